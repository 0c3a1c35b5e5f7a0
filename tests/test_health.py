"""Alarms: each rule on metrics made by hand, and the whole way from a run sabotaged on purpose to its page."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import palate
from palate.health import preferences
from palate.health.alarm import History, average, text
from palate.health.watch import RULES, alarmed
from palate.methods.dpo import pair_metrics
from palate.models.load import save_model
from palate.stage import run as stage_run
from palate.types import Comparisons, Mean, Tokens
from tiny import tiny, tokenizer_of

LETTERS = "abcdefghijklmnop"
SETTINGS = {"method.name": "dpo", "method.beta": 0.1, "method.anchor": 0.0, "training.learning_rate": 1e-5}


def history(train: Any = (), held_out: Any = (), total: int = 100, **settings: Any) -> History:
    made = History(total, SETTINGS | settings)
    for n, line in enumerate(train):
        made.add({"step": n + 1, "split": "train", **line})
    for step, line in held_out:
        made.add({"step": step, "split": "validation", **line})
    return made


def logprobs(chosen: float, rejected: float, length: float = 20.0) -> dict[str, float]:
    return {"logprob/chosen": chosen, "logprob/rejected": rejected, "length/chosen": length}


# -- likelihood displacement -----------------------------------------------------------------------------------------


def displaced(before: tuple[float, float], now: tuple[float, float], length: float = 20.0) -> Any:
    lines = [(0, logprobs(*before, length)), (50, logprobs(*now, length))]
    return preferences.likelihood_displacement(history(held_out=lines))


def test_a_preferred_response_may_lose_some_probability_and_not_more() -> None:
    """Of 20 tokens 0.3 nats each are 6 nats: from -30 down to -36 is no alarm, below it is one."""
    assert displaced((-30, -31), (-35.9, -60)) is None
    alarm = displaced((-30, -31), (-36.2, -60))
    assert alarm.name == "likelihood_displacement" and alarm.step == 50
    assert alarm.numbers["fall_per_token"] == pytest.approx(0.31)
    assert "-30.0 to -36.2" in alarm.evidence and "-31.0 to -60.0" in alarm.evidence
    assert "method.anchor=0.2" in alarm.remedies and "method.beta=0.2" in alarm.remedies


@pytest.mark.parametrize(
    ("why", "before", "now", "length"),
    [
        ("the preferred gain", (-30, -31), (-20, -60), 20),
        ("the others gain: a wrong preference, not a displaced one", (-30, -31), (-40, -20), 20),
        ("both fall alike: no margin grows", (-30, -31), (-40, -41), 20),
        ("one token that loses 0.9 nats", (-1, -1), (-1.9, -9), 1),
    ],
)
def test_what_is_no_displacement(why: str, before: Any, now: Any, length: float) -> None:
    assert displaced(before, now, length) is None


def test_where_nothing_is_held_out_the_last_batches_are_compared_with_the_first() -> None:
    """Batches differ by chance: with a spread of 40 nats between them a fall of 8 is not sure, with one of 1 it is."""

    def run(spread: float) -> Any:
        noise = random.Random(0)
        lines = [
            logprobs(-30 - (8 if n >= 20 else 0) + noise.gauss(0, spread), -31 - (30 if n >= 20 else 0))
            for n in range(40)
        ]
        return history(lines)

    assert preferences.likelihood_displacement(run(40.0)) is None
    assert "the last batches against the first" in preferences.likelihood_displacement(run(1.0)).evidence


def test_a_tiny_beta_is_named_before_the_learning_rate() -> None:
    lines = [(0, logprobs(-30, -31)), (50, logprobs(-60, -90))]
    for beta, first in ((0.01, "beta"), (0.1, "learning rate")):
        alarm = preferences.likelihood_displacement(history(held_out=lines, **{"method.beta": beta}))
        assert alarm is not None and alarm.causes[0].startswith(first)


# -- length drift ----------------------------------------------------------------------------------------------------


def lengths(longer: float, preferred: float, slope: float = 0.02, spread: float = 0.02) -> dict[str, float]:
    longer += random.Random(repr((longer, spread))).gauss(0, spread)
    return {"reward/longer": longer, "length/longer_preferred": preferred, "reward/length_slope": slope}


def drift(longer: float, preferred: float, batches: int = 30, **more: float) -> Any:
    noise = random.Random(1)
    return preferences.length_drift(
        history([lengths(longer + noise.gauss(0, 0.02), preferred, **more) for _ in range(batches)])
    )


@pytest.mark.parametrize(
    ("longer", "preferred", "what"),
    [
        (0.90, 0.65, "longer"),
        (0.20, 0.50, "shorter"),
        (0.70, 0.65, None),  # as the labels go
        (0.50, 0.75, None),  # length is not learnt (yet): no drift
        (0.60, 0.40, None),  # nor is a reward that hardly goes by length
    ],
)
def test_a_reward_that_goes_by_length_more_than_the_labels_do(
    longer: float, preferred: float, what: str | None
) -> None:
    alarm = drift(longer, preferred)
    assert (alarm is not None) == (what is not None)
    if alarm is not None:
        assert f"the {what} response has the higher reward" in alarm.evidence
        assert any("ln_dpo" in remedy for remedy in alarm.remedies)
        assert any("r_dpo with method.alpha=0.02" in remedy for remedy in alarm.remedies) == (what == "longer")


def test_length_is_judged_after_a_quarter_of_the_run_and_by_batches_that_agree() -> None:
    assert drift(0.9, 0.65, batches=24) is None and drift(0.9, 0.65, batches=25) is not None
    noise = random.Random(2)
    wild = [lengths(min(1.0, max(0.0, noise.gauss(0.85, 0.5))), 0.6, spread=0.0) for _ in range(30)]
    assert preferences.length_drift(history(wild)) is None


def rows(*response_lengths: int) -> Tokens:
    width = 1 + max(response_lengths)
    place, length = torch.arange(width), torch.tensor(response_lengths)[:, None]
    real = place < 1 + length
    return Tokens(real.long(), real, real & (place >= 1), torch.arange(len(response_lengths)) // 2)


def test_length_metrics_by_hand() -> None:
    """Pairs (lengths, rewards): 3 > 1 tokens, 2.0 > 1.0; 2 < 4, 0.5 < 1.5 (preferred by 0.8); 2 = 2, left out of shares.

    slope = (1.0 * 2 + -1.0 * -2 + 9 * 0) / (4 + 4 + 0) = 0.5 reward units a token. The longer has the higher reward in both
    of two; it is preferred with probability 1 and 0.2, of weight 1 and 3: (1 + 0.6) / 4 = 0.4.
    """
    batch = Comparisons(
        rows(3, 1, 2, 4, 2, 2),
        torch.tensor([0, 2, 4]),
        torch.tensor([1, 3, 5]),
        weight=torch.tensor([1.0, 3.0, 1.0]),
        probability=torch.tensor([1.0, 0.8, 1.0]),
    )
    rewards = torch.tensor([2.0, 1.0, 0.5, 1.5, 9.0, 0.0])
    without = pair_metrics(rewards, rewards, batch)
    assert without["length/chosen"].item() == pytest.approx((3 + 3 * 2 + 2) / 5)
    assert without["length/rejected"].item() == pytest.approx((1 + 3 * 4 + 2) / 5)
    assert "reward/longer" not in without  # a score without a reference begins anywhere
    from dataclasses import replace

    found = pair_metrics(rewards, rewards, replace(batch, reference_logprobs=torch.zeros(6)))
    assert found["reward/length_slope"].item() == pytest.approx((2 + 3 * 2) / (4 + 3 * 4))
    assert found["reward/longer"].item() == 1.0
    assert found["length/longer_preferred"].item() == pytest.approx(0.4)
    assert all(isinstance(value, Mean) for value in found.values())


# -- nothing learnt, the wrong thing learnt --------------------------------------------------------------------------


def judged(accuracy: float, margin: float, batches: int, spread: float = 0.05, seed: int = 0) -> list[dict[str, float]]:
    noise = random.Random(seed)
    return [
        {"reward/accuracy": accuracy + noise.gauss(0, spread), "reward/margin": margin + noise.gauss(0, spread)}
        for _ in range(batches)
    ]


def test_accuracy_at_chance() -> None:
    rule = preferences.accuracy_at_chance
    alarm = rule(history(judged(0.5, 0.0, 40)))
    assert alarm is not None and any("training.learning_rate=3e-05" in remedy for remedy in alarm.remedies)
    assert rule(history(judged(0.5, 0.0, 33))) is None  # a third of 100 batches is not done
    assert rule(history(judged(0.6, 0.0, 40))) is None
    assert rule(history(judged(0.5, 0.3, 40))) is None  # of eight answers the best is found half the time: not chance
    assert rule(history(judged(0.5, 0.0, 40, spread=0.4))) is None  # too few pairs to say


def test_margin_negative() -> None:
    rule = preferences.margin_negative
    good, bad = judged(0.6, 0.2, 30), judged(0.3, -0.5, 30)
    assert rule(history(good + bad)).name == "margin_negative"
    assert rule(history(bad + good)) is None
    assert (
        rule(history(judged(0.3, -0.9, 30) + judged(0.3, -0.5, 30))) is None
    )  # it began lower: a method without a reference
    assert rule(history(good + judged(0.3, -0.05, 30, spread=0.5))) is None  # noise


def test_a_rule_says_nothing_of_metrics_that_are_not_there() -> None:
    for lines in ([], [{"loss": 1.0}] * 60, [logprobs(float("nan"), 0.0) | {"reward/accuracy": 0.5}] * 60):
        made = history(lines, held_out=[(0, {"loss": 1.0}), (60, {"loss": 1.0})])
        assert [rule(made) for rule in RULES] == [None] * len(RULES)


def test_an_average_knows_its_error() -> None:
    """Of 1, 2, 3, 4: mean 2.5, variance 5/3, error of the mean sqrt(5/3/4)."""
    found = average([{"a": n, "b": 1.0} for n in (1, 2, 3, 4)], "a", "b")
    assert found.mean == 1.5 and found.error == pytest.approx((5 / 12) ** 0.5)
    assert average([{"a": 1}], "a").error == float("inf")


# -- by the real loop ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model; 60 clear pairs; 40 pairs that are there both ways round."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, folder / "base")

    def words() -> str:
        return " ".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 6)))

    clear = [{"prompt": words() + " ", "chosen": "a " + words(), "rejected": "b " + words()} for _ in range(60)]
    (folder / "clear.jsonl").write_text("".join(json.dumps(line) + "\n" for line in clear))
    some = [(words() + " ", words() + " a", words() + " b") for _ in range(40)]
    both = [{"prompt": p, "chosen": a, "rejected": b} for p, x, y in some for a, b in ((x, y), (y, x))]
    (folder / "both.jsonl").write_text("".join(json.dumps(line) + "\n" for line in both))
    return folder


def start(
    world: Path, out: Path, data: str = "clear", beta: float = 0.1, rate: float = 0.001, save: int = 4, **more: Any
) -> Path:
    training = {"batch_size": 8, "max_steps": 30, "learning_rate": rate, "save_every": save}
    return palate.train(
        "dpo",
        model=world / "base",
        data=world / f"{data}.jsonl",
        out=out,
        training=training,
        overrides={"method.beta": beta},
        **more,
    )


def alarms(run: Path) -> list[dict[str, Any]]:
    file = run / "alarms.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


SABOTAGE = {"beta": 0.01, "rate": 0.1}


def test_a_sabotaged_run_is_told_once_and_a_healthy_one_is_silent(world: Path, tmp_path: Path, capsys: Any) -> None:
    """Both at the same seed on the same pairs: the one with 100 times the learning rate and a tenth of the beta."""
    healthy = start(world, tmp_path / "healthy")
    assert alarms(healthy) == [] and "ALARM" not in capsys.readouterr().err
    assert "Alarms" not in (healthy / "report.html").read_text() and "Alarms" not in (healthy / "card.md").read_text()
    last = [json.loads(line) for line in (healthy / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["reward/accuracy"] > 0.6  # it is silent because it goes well, not because nothing happens

    run = start(world, tmp_path / "sabotaged", **SABOTAGE)
    found = {alarm["name"]: alarm for alarm in alarms(run)}
    said = capsys.readouterr().err
    assert "likelihood_displacement" in found and len(found) == len(alarms(run))
    alarm = found["likelihood_displacement"]
    assert said.count("ALARM likelihood_displacement") == 1 and alarm["step"] <= 15
    assert alarm["causes"][0].startswith("beta very small (method.beta = 0.01)")
    assert {"method.beta=0.1", "training.learning_rate=0.033", "method.anchor=0.2"} <= set(alarm["remedies"])
    for name in ("report.html", "card.md"):
        assert all(remedy in (run / name).read_text() for remedy in alarm["remedies"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    begun, now = (next(x for x in lines if x["split"] == "validation" and x["step"] == n) for n in (0, alarm["step"]))
    assert alarm["numbers"]["chosen_before"] == begun["logprob/chosen"] > now["logprob/chosen"]


def test_the_remedies_remedy(world: Path, tmp_path: Path) -> None:
    """The sabotaged run with what its alarm says of beta and the learning rate, again where the alarm comes again."""
    settings = dict(SABOTAGE)
    for attempt in range(5):
        run = start(world, tmp_path / str(attempt), quiet=True, **settings)
        found = [alarm for alarm in alarms(run) if alarm["name"] == "likelihood_displacement"]
        if not found:
            break
        advice = dict(remedy.split("=") for remedy in found[0]["remedies"])
        settings = {"beta": float(advice["method.beta"]), "rate": float(advice["training.learning_rate"])}
    assert 1 <= attempt <= 3 and alarms(run) == []


def test_labels_that_contradict_one_another_are_told(world: Path, tmp_path: Path) -> None:
    run = start(world, tmp_path / "both", data="both", quiet=True)
    assert [alarm["name"] for alarm in alarms(run)] == ["accuracy_at_chance"]


def test_labels_that_turn_round_on_the_way_are_told(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the 16th batch on the first ones' pairs come back the other way round."""
    from dataclasses import replace

    real = stage_run.loop_run

    def turning(stage: Any) -> Any:
        run = real(stage)
        collate, count = run.collate, []

        def collated(items: Any) -> Any:
            count.append(1)
            batch = collate(items)
            return batch if len(count) < 16 else replace(batch, chosen=batch.rejected, rejected=batch.chosen)

        return replace(run, collate=collated, validation=())

    monkeypatch.setattr(stage_run, "loop_run", turning)
    run = start(world, tmp_path / "turned", rate=0.003, quiet=True)
    assert "margin_negative" in [alarm["name"] for alarm in alarms(run)]


def test_a_resumed_run_raises_the_same_alarms(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Stopped in the step after the alarm (between checkpoints, so that it is forgotten and seen again), and at the end."""
    whole = start(world, tmp_path / "whole", **SABOTAGE)
    wanted = (whole / "alarms.jsonl").read_bytes()
    (first, *_) = alarms(whole)
    real = stage_run.train
    for stop in (first["step"] + 1, 29):

        def stopping(run: Any, stop: int = stop) -> Any:
            for metrics in real(run):
                yield metrics
                if metrics["step"] == stop and metrics["split"] == "train":
                    raise KeyboardInterrupt

        out, save = tmp_path / f"cut-{stop}", first["step"] - 1  # the last checkpoint does not know of the alarm
        monkeypatch.setattr(stage_run, "train", stopping)
        with pytest.raises(KeyboardInterrupt):
            start(world, out, save=save, **SABOTAGE)
        monkeypatch.undo()
        assert alarms(out)
        start(world, out, save=save, **SABOTAGE)
        assert (out / "alarms.jsonl").read_bytes() == wanted


def test_a_rule_of_ones_own_fits_in(tmp_path: Path) -> None:
    from palate.health.alarm import Alarm
    from palate.training import log

    def loss_above_two(history: History) -> Alarm | None:
        loss = history.train[-1]["loss"] if history.train else 0.0
        return Alarm("loss_above_two", history.step, f"loss {loss}", {}, ["x"], ["y=1"]) if loss > 2 else None

    def stream() -> Any:
        for step, loss in enumerate((1.0, 3.0, 4.0), 1):
            log.append(tmp_path, "metrics.jsonl", {"step": step, "split": "train", "loss": loss})
            yield {"step": step, "split": "train", "loss": loss, "time/update": 0.1}

    said: list[str] = []
    passed = list(alarmed(stream(), tmp_path, History(3), said.append, [loss_above_two]))
    assert [line["step"] for line in passed] == [1, 2, 3]
    assert said == ["ALARM loss_above_two (step 2): loss 3.0\n  likely causes: x\n  what to try: y=1"]
    assert text(log.read(tmp_path, "alarms.jsonl")[0]) == said[0].removeprefix("ALARM ")


def test_every_rule_has_its_alarms_name_and_a_place_in_the_documents() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "health.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert f"\n### `{rule.__name__}`\n" in page
