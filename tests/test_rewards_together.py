"""Several rewards at once: ensembles, sums on one scale, prices for length; and rewards written in files."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import palate
import palate.errors
from palate.cli import app
from palate.data.chat import Chat
from palate.errors import ConfigError, DataError, ModelError
from palate.models.forward import score_responses
from palate.models.load import load_scalar, save_model
from palate.models.rewards import (
    EnsembleReward,
    Scale,
    WeightedReward,
    first_folder,
    is_unmeasured,
    load_reward,
    unmeasured,
    with_scales,
)
from palate.settings_tree import spelled_out
from palate.stage.roles import bill
from palate.types import Models, Scored
from sampled_rows import rows_of
from tiny import rows, tiny, tokenizer_of

PAIRS = [("a b", "c d e"), ("a b", "f"), ("g h i", "j k l m n o p a b c"), ("p", "o n")]
WORDS = [3, 1, 10, 2]  # of the responses


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(tokenizer_of())


@pytest.fixture
def tastes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of reward functions, in the current folder."""
    (tmp_path / "tastes.py").write_text(
        "def words(prompts, responses):\n    return [len(r.split()) for r in responses]\n"
        "def less(prompts, responses):\n    return [10 - len(r.split()) for r in responses]\n"
        "def square(prompts, responses):\n    return [len(r.split()) ** 2 for r in responses]\n"
        "def same(prompts, responses):\n    return [0.25] * len(responses)\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- ensembles -----------------------------------------------------------------------------------------------------------

MEMBERS = ["tastes:words", "tastes:less", "tastes:square"]


def test_an_ensemble_takes_the_mean_the_worst_or_the_mean_less_variance(tastes, chat) -> None:
    """Coste et al.: WCO = min, UWO = mean - lambda * variance with 1/k, computed here by the standard library."""
    tokens = rows_of(chat, PAIRS)
    columns = [(n, 10 - n, n * n) for n in WORDS]
    for options, expected in [
        ({}, [statistics.fmean(c) for c in columns]),
        ({"take": "mean"}, [statistics.fmean(c) for c in columns]),
        ({"take": "min"}, [min(c) for c in columns]),
        ({"take": "mean_minus_variance"}, [statistics.fmean(c) - 0.1 * statistics.pvariance(c) for c in columns]),
        (
            {"take": "mean_minus_variance", "weight_of_variance": 2},
            [statistics.fmean(c) - 2 * statistics.pvariance(c) for c in columns],
        ),
    ]:
        scored = load_reward({"ensemble": MEMBERS, **options}, chat)(tokens)
        assert scored.scores.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-4), options
        assert list(scored.parts) == ["words", "less", "square", "ensemble_std"]
        assert scored.parts["ensemble_std"].tolist() == pytest.approx([statistics.pstdev(c) for c in columns], abs=1e-4)
        assert scored.parts["less"].tolist() == [10 - n for n in WORDS]


def test_members_may_have_names_and_an_ensemble_may_be_part_of_a_sum(tastes, chat) -> None:
    spec = {
        "rm": {"ensemble": {"one": "tastes:words", "two": "tastes:less"}, "take": "min", "weight": 2},
        "price": {"length": -1},
    }
    scored = load_reward(spec, chat)(rows_of(chat, PAIRS))
    assert list(scored.parts) == ["rm", "rm/one", "rm/two", "rm/ensemble_std", "price"]
    assert scored.scores.tolist() == [2 * min(n, 10 - n) - (n + 1) for n in WORDS]  # with the end of text


def test_members_of_different_scales_are_put_on_one(tastes, chat) -> None:
    spec = {
        "ensemble": [{"function": "tastes:words"}, {"function": "tastes:square", "normalise": {"mean": 10, "std": 5}}],
        "take": "min",
    }
    scored = load_reward(spec, chat)(rows_of(chat, PAIRS))
    assert scored.scores.tolist() == pytest.approx([min(n, (n * n - 10) / 5) for n in WORDS])
    assert scored.parts["square"].tolist() == [n * n for n in WORDS]  # in its own units


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"ensemble": ["tastes:words"]}, "an ensemble of 1. Name at least two"),
        ({"ensemble": MEMBERS, "take": "max"}, 'take "max" is not known.*mean, min, mean_minus_variance'),
        ({"ensemble": MEMBERS, "weight_of_variance": -1}, "weight_of_variance is -1"),
        ({"ensemble": [{"function": "tastes:words", "weight": 2}, "tastes:less"]}, "weight 2 within an ensemble"),
        ({"ensemble": MEMBERS, "tak": "min"}, 'unknown key "tak".*Did you mean "take"'),
        ({"length": -0.1, "over": -1}, "over is -1"),
        ({"length": -0.1, "weight": 2}, 'unknown key "weight" beside "length"'),
        ({"function": "tastes:words", "normalise": {"mean": 0}}, "normalise is {'mean': 0}"),
        ({"function": "tastes:words", "normalise": {"mean": 0, "std": 0}}, "std above 0"),
        ({"function": "tastes:words", "normalise": "always"}, "normalise is 'always'"),
        ({"function": "tastes:words", "normalise": "reference"}, "is measured when a run begins"),
    ],
)
def test_what_makes_no_sense_together_is_a_config_error(tastes, chat, spec, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(spec, chat)


def test_the_bill_counts_the_models_of_an_ensemble(chat) -> None:
    one, other = tiny(seed=1), tiny(seed=2)
    line = bill(Models(reward=WeightedReward({"rm": (EnsembleReward({"one": one, "other": other}), 1.0)})), ())[0]
    assert line.parameters == sum(p.numel() for model in (one, other) for p in model.parameters())


# -- length, scales ------------------------------------------------------------------------------------------------------


def test_length_is_charged_by_the_response_token(chat) -> None:
    tokens = rows_of(chat, PAIRS)
    scored = load_reward({"length": -0.5}, chat)(tokens)
    assert scored.scores.tolist() == [-0.5 * (n + 1) for n in WORDS]  # the end of text is a token too
    assert scored.parts["length"].tolist() == tokens.response_mask.sum(-1).tolist()
    assert load_reward({"length": -1, "over": 4}, chat)(tokens).scores.tolist() == [-max(0, n + 1 - 4) for n in WORDS]


def test_a_sum_named_length_is_still_a_sum(tastes, chat) -> None:
    assert load_reward({"length": "tastes:words"}, chat)(rows_of(chat, PAIRS)).parts["length"].tolist() == WORDS


def test_a_scale_shifts_the_sum_and_leaves_the_parts_in_their_units(tastes, chat) -> None:
    spec = {
        "long": {"function": "tastes:words", "weight": 3, "normalise": {"mean": 4, "std": 2}},
        "short": "tastes:less",
    }
    scored = load_reward(spec, chat)(rows_of(chat, PAIRS))
    assert scored.scores.tolist() == pytest.approx([3 * (n - 4) / 2 + 10 - n for n in WORDS])
    assert scored.parts["long"].tolist() == WORDS
    alone = load_reward({"function": "tastes:words", "normalise": {"mean": 4, "std": 2}}, chat)(rows_of(chat, PAIRS))
    assert alone.scores.tolist() == [(n - 4) / 2 for n in WORDS] and alone.parts["words"].tolist() == WORDS


def test_scales_are_measured_in_the_order_in_which_they_are_written(tastes, chat) -> None:
    def asked(name: str) -> dict[str, Any]:
        return {"function": f"tastes:{name}", "normalise": "reference"}

    spec = {
        "a": [asked("square"), "tastes:words"],
        "b": {"ensemble": [asked("words"), "tastes:words"]},
        "c": asked("less"),
    }
    assert is_unmeasured(spec) and not is_unmeasured({"a": "reference"})
    reward = load_reward(spec, chat, measuring=True)
    tokens = rows_of(chat, PAIRS)
    reward(tokens)
    found = list(unmeasured(reward))
    for name, scale in found:
        scale.settle(name)
    assert [name for name, _ in found] == ["square", "words", "c"]
    expected = [[n * n for n in WORDS], WORDS, [10 - n for n in WORDS]]
    numbers = [(statistics.fmean(e), statistics.pstdev(e)) for e in expected]
    assert [(scale.mean, scale.std) for _, scale in found] == [pytest.approx(pair) for pair in numbers]
    written = with_scales(spec, iter([(scale.mean, scale.std) for _, scale in found]))
    assert not is_unmeasured(written) and written["c"]["normalise"]["mean"] == pytest.approx(numbers[2][0])
    assert spec["c"]["normalise"] == "reference"  # the settings that were given are left alone
    again = load_reward(written, chat)(tokens)
    assert torch.equal(again.scores, reward(tokens).scores)


def test_a_reward_that_says_one_thing_cannot_be_normalised() -> None:
    for seen, found in [
        ([2.0, 2.0, 2.0], "all 3 scores are 2"),
        ([0.0, 0.0], "all 2 scores are 0"),
        ([1.0], "1 score"),
    ]:
        with pytest.raises(ModelError, match=f'"taste" cannot be normalised.*{found}'):
            Scale(seen=[torch.tensor(seen)]).settle("taste")


def test_normalised_twice_is_refused(tastes, chat) -> None:
    members = [{"function": "tastes:words", "normalise": "reference"}, "tastes:less"]
    with pytest.raises(ConfigError, match="so is something in it"):
        load_reward({"ensemble": members, "normalise": "reference"}, chat, measuring=True)


# -- what is no score, of every kind -------------------------------------------------------------------------------------


def test_a_scalar_model_that_gives_nan_stops_with_the_sample(tmp_path, chat) -> None:
    save_model(tiny(), tokenizer_of(), tmp_path / "base")
    save_model(load_scalar(tmp_path / "base", seed=3), tokenizer_of(), tmp_path / "runs" / "nice" / "model")
    reward: Any = load_reward(str(tmp_path / "runs" / "nice" / "model"), chat)
    assert isinstance(reward, torch.nn.Module)
    with torch.no_grad():
        reward.score.weight.fill_(float("nan"))
    tokens = rows_of(chat, PAIRS)
    with pytest.raises(
        ModelError, match=r"gave nan \(4 of 4(?s:.*)p.jsonl:1(?s:.*)prompt: 'a b'(?s:.*)response: ' ?c d e'"
    ):
        score_responses(reward, tokens)
    with pytest.raises(ModelError, match='reward "rm" gave nan'):
        WeightedReward({"rm": (reward, 1.0)})(tokens)
    with pytest.raises(ModelError, match='reward "b" gave nan'):
        score_responses(EnsembleReward({"a": lambda tokens: Scored(torch.ones(4), {}), "b": reward}), tokens)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.tensor([1.0, 2.0, float("inf"), 4.0]), r"gave inf \(1 of 4(?s:.*)p.jsonl:3"),
        (torch.tensor([1.0, 2.0]), r"scores of shape \[2\] for 4 responses(?s:.*)p.jsonl:1"),
        (torch.ones(4, 1), r"scores of shape \[4, 1\]"),
        (torch.tensor(1.0), r"scores of shape \[\]"),
    ],
)
def test_a_reward_object_of_ones_own_is_checked_too(chat, scores, message) -> None:
    with pytest.raises(ModelError, match=message) as error:
        score_responses(lambda tokens: Scored(scores, {}), rows_of(chat, PAIRS))
    assert "token ids" in str(error.value)  # it has no chat to read them with
    with pytest.raises(ModelError, match="Inf|shape"):
        score_responses(lambda tokens: Scored(scores, {}), rows(5, 4, 6, 3))  # nor records


# -- files and the command line ------------------------------------------------------------------------------------------


def test_a_text_stands_for_what_it_spells_out(tastes) -> None:
    assert spelled_out("{check: number, answer: gold}", "reward") == {"check": "number", "answer": "gold"}
    assert spelled_out("[a, b]", "reward") == ["a", "b"]
    for given in ("runs/reward/model", "tastes:words", {"a": "b"}, None):
        assert spelled_out(given, "reward") == given
    Path("one.yaml").write_text("right: {check: number}\nprice: {length: -1e-3}\n")
    assert spelled_out("one.yaml", "reward") == {"right": {"check": "number"}, "price": {"length": -0.001}}
    Path("run.yaml").write_text("method: ppo\nreward: [a, b]\n")
    assert spelled_out("run.yaml", "reward") == ["a", "b"]
    Path("twice.yaml").write_text("check: number\ncheck: json\n")
    for name, message in [
        ("none.yaml", "no such file"),
        ("twice.yaml", "twice.yaml:2: .check. is given a second time"),
    ]:
        with pytest.raises(ConfigError, match=message):
            spelled_out(name, "reward")
    Path("bare.yaml").write_text("hello\n")
    with pytest.raises(ConfigError, match="holds 'hello'"):
        spelled_out("bare.yaml", "reward")


def test_the_tokenizer_is_that_of_the_first_model_that_is_named() -> None:
    assert first_folder("runs/reward/model") == "runs/reward/model"
    assert first_folder([{"check": "number"}, {"ensemble": ["a:b", {"classifier": "c"}, "d"]}]) == "c"
    for none in ("a:b", "http://x/y", {"url": "http://x/y"}, {"check": "number"}, {"length": -1}, {"function": "a:b"}):
        assert first_folder(none) is None


def command(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception}"
    return result


def test_score_takes_every_form_from_the_command_line_and_from_a_file(tastes, tiny_tokenizer) -> None:
    tiny_tokenizer.save_pretrained("tokens")
    lines = [
        {"prompt": "48+24?", "response": "It is 72.", "answer": "72", "tests": "assert True"},
        {"prompt": "48+25?", "response": '{"n": 72}', "answer": "73", "tests": "assert True"},
    ]
    Path("said.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("rewards.yaml").write_text("right: {check: number, weight: 2}\nwords: tastes:words\n")
    for spec, expected in [
        ("{check: number}", [1, 0]),
        ("{check: regex, pattern: '^It'}", [1, 0]),
        ("{check: json, schema: [n]}", [0, 1]),
        ("{check: code}", [0, 1]),
        ("tastes:words", [3, 2]),
        ("{ensemble: ['tastes:words', 'tastes:less'], take: min}", [3, 2]),
        ("rewards.yaml", [5, 2]),
    ]:
        done = command("score", "--reward", spec, "--data", "said.jsonl", "--tokenizer", "tokens")
        assert [json.loads(line)["score"] for line in done.stdout.splitlines()] == expected, spec
    done = command(
        "score", "--reward", "{check: number, answer: gold}", "-d", "said.jsonl", "--tokenizer", "tokens", code=1
    )
    assert 'said.jsonl:1: reward "number" reads the field "gold"' in done.stderr
    done = command("score", "--reward", "{check: nmber}", "-d", "said.jsonl", "--tokenizer", "tokens", code=2)
    assert 'Did you mean "number"' in done.stderr


# -- a run ---------------------------------------------------------------------------------------------------------------


def start(out: Path, reward: Any, prompts: str = "prompts.jsonl", **training: Any) -> Path:
    quick = {"batch_size": 4, "max_steps": 2, "save_every": 1, "eval_every": 0} | training
    return palate.train(
        "ppo",
        model="base",
        data=prompts,
        reward=reward,
        out=out,
        sampling={"max_new_tokens": 5},
        training=quick,
        quiet=True,
    )


@pytest.fixture
def base(tastes) -> Path:
    save_model(tiny(), tokenizer_of(), "base")
    lines = [
        {"prompt": f"{a} {b} ", "answer": str(i)}
        for i, (a, b) in enumerate(zip("abcdefghijklmnop", "ponmlkjihgfedcba", strict=True))
    ]
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tastes


def test_a_run_measures_once_writes_the_numbers_down_and_resumes_with_them(base, monkeypatch) -> None:
    """The resumed run must not sample the reference again, nor see itself as another run."""
    from palate.stage import reward_scale
    from palate.stage import run as stage_run

    reward = {"long": {"function": "tastes:words", "normalise": "reference"}, "price": {"length": -0.01}}
    whole = start(base / "whole", reward)
    written = yaml.safe_load((whole / "config.yaml").read_text())["reward"]
    numbers = written["long"]["normalise"]
    assert set(numbers) == {"mean", "std"} and numbers["std"] > 0 and written["price"] == {"length": -0.01}
    assert re.search(
        r"^# reward: normalised on 1\d samples of the reference$", (whole / "config.yaml").read_text(), re.MULTILINE
    )
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in metrics if line["split"] == "train"]
    for line in trained:  # what is optimised is the z-score; what is logged of a part is its own unit
        z = (line["score/long"] - numbers["mean"]) / numbers["std"]
        assert line["score"] == pytest.approx(z - 0.01 * line["score/price"], abs=1e-5)

    real = stage_run.train

    def interrupted(run: Any) -> Any:
        for line in real(run):
            yield line
            raise KeyboardInterrupt

    monkeypatch.setattr(stage_run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(base / "cut", reward)
    monkeypatch.setattr(stage_run, "train", real)
    monkeypatch.setattr(reward_scale, "rollout_of", None)  # not to be called
    start(base / "cut", reward)
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (base / "cut" / name).read_bytes() == (whole / name).read_bytes()
    # and the numbers given as numbers are the same run
    start(base / "given", written)
    assert (base / "given" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_another_reward_in_the_same_folder_is_still_refused(base) -> None:
    start(base / "run", {"function": "tastes:words", "normalise": "reference"})
    with pytest.raises(palate.errors.RunError, match="reward.function: 'tastes:words' there, 'tastes:square' here"):
        start(base / "run", {"function": "tastes:square", "normalise": "reference"})


def test_a_reward_from_a_file_stands_in_full_in_the_runs_settings(base) -> None:
    Path("rewards.yaml").write_text("long: {function: tastes:words, normalise: reference}\nprice: {length: -1e-3}\n")
    run = start(base / "run", "rewards.yaml")
    written = yaml.safe_load((run / "config.yaml").read_text())["reward"]
    assert written["long"].keys() == {"function", "normalise"} and written["price"] == {"length": -0.001}
    before = (run / "card.md").stat().st_mtime_ns
    start(run, "rewards.yaml")  # the same run, finished
    assert (run / "card.md").stat().st_mtime_ns == before


def test_a_field_missing_from_the_last_record_stops_before_the_first_step(base) -> None:
    lines = Path("prompts.jsonl").read_text().splitlines()
    Path("holes.jsonl").write_text("\n".join([*lines[:-1], '{"prompt": "a p "}']) + "\n")
    with pytest.raises(DataError, match='holes.jsonl:16: reward "number" reads the field "answer"'):
        start(base / "run", {"check": "number"}, prompts="holes.jsonl")
    assert not (base / "run").exists()


def test_a_constant_reward_cannot_be_normalised_in_a_run(base) -> None:
    with pytest.raises(ModelError, match='"same" cannot be normalised.*are 0.25'):
        start(base / "run", {"function": "tastes:same", "normalise": "reference"})
