"""Alarms on real runs of tiny models: healthy ones are silent, and those that are sabotaged are told what went wrong."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import palate
from palate.config import load_config
from palate.evaluation.diversity import distinct
from palate.health import reward_model
from palate.health.alarm import History
from palate.models.load import save_model
from palate.resolve import require_all
from palate.settings_tree import flatten
from palate.training.diversity import distinct_pairs
from palate.types import Tokens
from tiny import tiny, tokenizer_of

LETTERS = "abcdefghijklmnop"
REWARDS = '''
def share_of_a(prompts, responses):
    """How much of the response is the letter a."""
    return [r.split().count("a") / max(1, len(r.split())) for r in responses]

def longer_is_better(prompts, responses):
    return [len(r.split()) / 4 for r in responses]

def many_a(prompts, responses):
    return [r.split().count("a") / 2 for r in responses]

def some_a(prompts, responses):
    """What was meant: two letters a, and no more."""
    return [-abs(r.split().count("a") - 2) for r in responses]
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, 64 prompts, rewards; 24 pairs with random labels, and 120 that a rule has labelled."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, folder / "base")
    (folder / "rewards.py").write_text(REWARDS)

    def words() -> str:
        return " ".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 6)))

    def lines(name: str, records: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    lines("prompts.jsonl", [{"prompt": words() + " "} for _ in range(64)])
    lines("few.jsonl", [{"prompt": words() + " ", "chosen": words(), "rejected": words()} for _ in range(24)])
    lines("held_out.jsonl", [{"prompt": words() + " ", "chosen": words(), "rejected": words()} for _ in range(60)])
    clear = [{"prompt": words() + " ", "chosen": "a " + words(), "rejected": "b " + words()} for _ in range(180)]
    lines("clear.jsonl", clear[:120])
    lines("clear_held_out.jsonl", clear[120:])
    return folder


def sampling(
    world: Path,
    out: Path,
    method: str,
    reward: Any,
    rate: float,
    tokens: int = 24,
    model: Path | None = None,
    **overrides: Any,
) -> Path:
    training = {"batch_size": 16, "max_steps": 30, "learning_rate": rate, "save_every": 0, "eval_every": 0}
    given = {"samples_per_prompt": 4} if method != "ppo" else {}
    return palate.train(
        method,
        model=model or world / "base",
        value=(model or world / "base") if method == "ppo" else None,
        reward=reward,
        data={"train": world / "prompts.jsonl", "validation_fraction": 0.1},
        sampling={"max_new_tokens": tokens},
        training=training,
        out=out,
        overrides={key.replace("__", "."): value for key, value in overrides.items()},
        quiet=True,
        **given,
    )


def alarms(run: Path) -> dict[str, dict[str, Any]]:
    file = run / "alarms.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert len({alarm["name"] for alarm in found}) == len(found)
    return {alarm["name"]: alarm for alarm in found}


def measured(run: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


@pytest.fixture(scope="module")
def taught(world: Path) -> Path:
    """A model that answers with five random letters and ends there, as one that has been fine-tuned does."""
    rng = random.Random(1)
    with open(world / "fives.jsonl", "w") as file:
        for _ in range(320):
            prompt, response = (" ".join(rng.choices(LETTERS, k=n)) for n in (3, 5))
            file.write(json.dumps({"prompt": prompt + " ", "response": response}) + "\n")
    training = {"batch_size": 16, "epochs": 6, "learning_rate": 0.01, "eval_every": 0, "save_every": 0}
    data = {"train": world / "fives.jsonl"}
    run = palate.train("sft", model=world / "base", data=data, training=training, out=world / "sft", quiet=True)
    return run / "model"


@pytest.mark.parametrize(("method", "price"), [("ppo", 0.1), ("rloo", 0.1), ("grpo", 0.2)])
def test_a_healthy_run_that_learns_is_silent(
    world: Path, taught: Path, tmp_path: Path, method: str, price: float
) -> None:
    """Of sixteen letters one is paid for, at a price of distance that lets it come a few times as often. ``grpo`` makes every
    score as large as the others, and so needs a higher price."""
    reward = f"{world}/rewards.py:share_of_a"
    run = sampling(world, tmp_path / "run", method, reward, 0.003, tokens=12, model=taught, method__kl_coef=price)
    lines = measured(run)
    begun, ended = (sum(line["score"] for line in part) / len(part) for part in (lines[:3], lines[-10:]))
    assert ended > 1.3 * begun  # silent, but not for doing nothing
    assert alarms(run) == {}
    assert all(0 < line["diversity/distinct_2"] <= 1 for line in lines + measured(run, "validation"))


def test_a_policy_that_nothing_holds_back_explodes_and_collapses(world: Path, tmp_path: Path) -> None:
    """PPO without a price of distance and at thirty times the learning rate, paid for one letter; gold wants two of it."""
    reward = {
        "judge": {"function": f"{world}/rewards.py:many_a"},
        "gold": {"function": f"{world}/rewards.py:some_a", "weight": 0},
    }
    run = sampling(world, tmp_path / "run", "ppo", reward, 0.1, method__kl_coef=0.0)
    found = alarms(run)
    assert {"kl_explosion", "mode_collapse", "over_optimisation"} <= set(found)
    assert found["kl_explosion"]["causes"][0].startswith("nothing holds the policy back (method.kl_coef = 0)")
    assert found["over_optimisation"]["evidence"].startswith("score/gold")
    for name in ("report.html", "card.md"):
        shown = (run / name).read_text()
        assert all(f"{alarm['name']} (step {alarm['step']})" in shown for alarm in found.values())
        assert all(remedy in shown for alarm in found.values() for remedy in alarm["remedies"] if "<" not in remedy)


def test_a_reward_for_length_makes_responses_that_never_end(world: Path, tmp_path: Path) -> None:
    reward = f"{world}/rewards.py:longer_is_better"
    found = alarms(sampling(world, tmp_path / "run", "rloo", reward, 0.03, tokens=40, method__kl_coef=0.0))
    assert "length_hacking" in found and found["length_hacking"]["numbers"]["times"] > 1.5
    assert found["length_hacking"]["numbers"]["slope"] == pytest.approx(0.25, rel=0.2)  # what a word is paid
    assert "responses_cut" in found


def reward_model_on(world: Path, out: Path, train: str, held_out: str, steps: int, **more: Any) -> Path:
    training = {"batch_size": 8, "max_steps": steps, "learning_rate": 0.01, "eval_every": 0.1, "save_every": 0} | more
    data = {"train": world / train, "validation": world / held_out}
    return palate.train("reward", model=world / "base", data=data, training=training, out=out, quiet=True)


def test_a_reward_model_that_knows_24_random_labels_by_heart(world: Path, tmp_path: Path) -> None:
    run = reward_model_on(world, tmp_path / "run", "few.jsonl", "held_out.jsonl", 60)
    alarm = alarms(run)["reward_overfitting"]
    held = measured(run, "validation")
    assert min(line["loss"] for line in held) == pytest.approx(alarm["numbers"]["best"])
    assert "on 60 held-out prompts rose from" in alarm["evidence"]
    assert any(remedy.startswith("training.patience=2") for remedy in alarm["remedies"])


def test_where_the_best_checkpoint_is_kept_overfitting_is_dealt_with(world: Path, tmp_path: Path) -> None:
    run = reward_model_on(world, tmp_path / "run", "few.jsonl", "held_out.jsonl", 60, patience=3)
    assert "reward_overfitting" not in alarms(run)


def test_a_reward_model_that_learns_a_rule_is_silent(world: Path, tmp_path: Path) -> None:
    run = reward_model_on(world, tmp_path / "run", "clear.jsonl", "clear_held_out.jsonl", 60)
    assert measured(run, "validation")[-1]["reward/accuracy"] > 0.9 and alarms(run) == {}


# -- overfitting, by hand --------------------------------------------------------------------------------------------


def judged(
    held: list[float], train: tuple[float, float], prompts: int, policy: bool = False, **settings: Any
) -> History:
    """Evaluations every ten batches; the training loss falls in a line."""
    made = History(10 * (len(held) - 1), {"training.epochs": 4, "training.learning_rate": 1e-3} | settings)
    made.prompts_held_out = prompts
    batches = 10 * (len(held) - 1)
    more = {"logprob/chosen": -20.0} if policy else {}
    for n in range(batches + 1):
        if n:
            loss = train[0] + (train[1] - train[0]) * n / batches
            made.add({"step": n, "split": "train", "loss": loss, "reward/accuracy": 0.9, **more})
        if n % 10 == 0:
            made.add({"step": n, "split": "validation", "loss": held[n // 10], "reward/accuracy": 0.6, **more})
    return made


FALLING = (0.7, 0.3)


def test_overfitting_is_a_rise_beyond_three_standard_errors_of_the_held_out_loss() -> None:
    """At a loss of 0.75 on 400 prompts 3 standard errors are 0.1125: from 0.63 up to 0.74 is none, to 0.75 is one."""
    rule = reward_model.reward_overfitting
    assert rule(judged([0.7, 0.63, 0.74], FALLING, 400)) is None
    alarm = rule(judged([0.7, 0.63, 0.75], FALLING, 400))
    assert alarm is not None and alarm.step == 20 and alarm.numbers["best_step"] == 10
    assert "from 0.630 (step 10) to 0.750" in alarm.evidence and alarm.remedies[0] == "training.epochs=2"
    assert rule(judged([0.7, 0.63, 0.75], FALLING, 100)) is None  # fewer prompts say less
    assert rule(judged([0.7, 0.63, 0.67], FALLING, 10**6)) is None  # sure, and by nothing


@pytest.mark.parametrize("method", ["reward", "reward_listwise", "reward_infonce"])
@pytest.mark.parametrize("length", ["training.epochs=4", "training.max_steps=20"])
def test_the_remedies_of_overfitting_are_settings_of_the_method(method: str, length: str) -> None:
    given = ["model=base", "data.train=pairs.jsonl", "out=run", length]
    settings = flatten(load_config(method, overrides=given).to_dict())
    alarm = reward_model.reward_overfitting(judged([0.7, 0.63, 0.75], FALLING, 400, **settings))
    assert alarm is not None
    told = [text for remedy in alarm.remedies for text in re.findall(r"[a-z_.]+=[^\s,;]+", remedy)]
    assert len(told) >= 3
    for text in told:
        require_all(load_config(method, overrides=[*given, text]))


def test_what_is_no_overfitting() -> None:
    rule, held = reward_model.reward_overfitting, [0.7, 0.6, 1.5]
    assert rule(judged(held, FALLING, 400)) is not None
    assert rule(judged(held, (0.5, 0.9), 400)) is None  # the training loss rises too: it diverges
    assert rule(judged(held, FALLING, 400, policy=True)) is None  # dpo grows more confident, and may be right
    assert rule(judged(held, FALLING, 0)) is None  # on how many it was measured is not known
    assert rule(judged([1.5], FALLING, 400)) is None
    assert rule(judged([0.7, float("nan"), 1.5], FALLING, 400)) is not None
    assert rule(judged(held, FALLING, 400, **{"training.best_metric": "loss"})) is None
    best_before_training = rule(judged([0.6, 0.9, 1.5], FALLING, 400))
    assert best_before_training is not None and best_before_training.numbers["best_step"] == 0


# -- how varied a batch is -------------------------------------------------------------------------------------------


def test_distinct_pairs_of_tokens_are_counted_over_the_responses_of_the_policy() -> None:
    """Prompt 1 token; responses a b a b and a b of ids 5, 6: pairs ab ba ab, ab: 2 different of 4."""
    ids = torch.tensor([[9, 5, 6, 5, 6], [9, 5, 6, 0, 0]])
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    response = mask.clone()
    response[:, 0] = False
    batch = Tokens(ids, mask, response, torch.arange(2))
    found = distinct_pairs(batch)
    assert (found.total.item(), found.count.item()) == (2.0, 4.0)
    assert found.item() == distinct([[5, 6, 5, 6], [5, 6]], 2)
    theirs = Tokens(ids, mask, response, torch.zeros(2, dtype=torch.long), {"drawn_by": ["reference", "policy"]})
    assert tuple(value.item() for value in distinct_pairs(theirs)) == (1.0, 1.0)
    none = distinct_pairs(batch.select(torch.tensor([], dtype=torch.long)))
    assert none.item() == 0.0
