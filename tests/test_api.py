"""palate in three lines of Python: what a stage leaves, what it refuses, and that its numbers are the same everywhere."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import palate
from palate.config import load_config
from palate.errors import ConfigError, DataError, ModelError, RunError
from palate.models.load import save_model
from palate.stage.roles import where_from
from tiny import tiny, tokenizer_of

LETTERS = "abcdefghijklmnop"
QUICK = {"batch_size": 8, "max_steps": 3, "save_every": 1, "eval_every": 1}


def texts(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(LETTERS) for _ in range(words))


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, demonstrations, comparisons, rankings; and an SFT and a reward run on them."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, folder / "base")
    prompts = [texts(rng, 3) + " " for _ in range(40)]
    write(folder / "demos.jsonl", [{"prompt": p, "response": texts(rng, 4)} for p in prompts])
    pairs = [{"prompt": p, "chosen": "a " + texts(rng, 3), "rejected": "b " + texts(rng, 3)} for p in prompts]
    write(folder / "pairs.jsonl", pairs)
    four = [{"prompt": p, "responses": [texts(rng, 3) for _ in range(4)], "ranks": [1, 2, 3, 3]} for p in prompts]
    write(folder / "rankings.jsonl", four)
    sft = palate.train(
        "sft", model=folder / "base", data=folder / "demos.jsonl", out=folder / "sft", training=QUICK, quiet=True
    )
    palate.train(
        "reward",
        model=sft / "model",
        data={"train": str(folder / "pairs.jsonl"), "validation_fraction": 0.25},
        out=folder / "reward",
        training=QUICK | {"max_steps": 20, "learning_rate": 0.003},
        quiet=True,
    )
    return folder


def train_ppo(world: Path, out: Path, validation: str | None = None, **settings: Any) -> Path:
    return palate.train(
        "ppo",
        model=world / "sft" / "model",
        reward=str(world / "reward" / "model"),
        data={"train": str(world / "pairs.jsonl"), "validation": validation},
        out=out,
        sampling={"max_new_tokens": 6},
        training=QUICK,
        quiet=True,
        **settings,
    )


def files(folder: Path) -> dict[str, bytes]:
    """What a run computed: everything but the report's and card's words about itself."""
    names = ["metrics.jsonl", "samples.jsonl", "model/model.safetensors", "model/config.json"]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def test_a_run_folder_is_complete(world: Path) -> None:
    for run in ("sft", "reward"):
        there = {path.name for path in (world / run).iterdir()}
        assert {"config.yaml", "metrics.jsonl", "checkpoints", "model", "report.html", "card.md"} <= there
    card = (world / "reward" / "card.md").read_text()
    assert "pairs.jsonl" in card and "torch" in card and "mean 0 and standard deviation 1" in card
    before, after = [[e for e in lines(world / "sft" / "samples.jsonl") if e["when"] == w] for w in ("before", "after")]
    assert [e["prompt"] for e in before] == [e["prompt"] for e in after] and before[0]["step"] == 0 < after[0]["step"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_model_folder_loads_in_plain_transformers(world: Path) -> None:
    AutoTokenizer.from_pretrained(world / "sft" / "model")
    assert AutoModelForCausalLM.from_pretrained(world / "sft" / "model").config.vocab_size == 20
    assert AutoModelForSequenceClassification.from_pretrained(world / "reward" / "model").config.num_labels == 1


def test_resolved_settings_say_where_the_learning_rate_is_from(world: Path) -> None:
    text = (world / "sft" / "config.yaml").read_text()
    assert "# training.learning_rate: default: supervised fine-tuning" in text
    assert yaml.safe_load(text)["training"]["learning_rate"] == 0.001
    assert "# training.learning_rate" not in (world / "reward" / "config.yaml").read_text()  # it was given


def test_config_yaml_runs_again_and_gives_the_same_model(world: Path, tmp_path: Path) -> None:
    again = palate.train(config=world / "sft" / "config.yaml", out=tmp_path / "again", quiet=True)
    assert files(again) == files(world / "sft")


def test_the_reward_is_normalised_on_the_training_responses(world: Path) -> None:
    """20 steps separate "a ..." from "b ..."; the scores of all training responses then have mean 0 and sd 1."""
    from palate.data.ranking import split_by_prompt
    from palate.data.records import read_records

    train, held_out = split_by_prompt(read_records(world / "pairs.jsonl", "comparisons"), 0.25, 0)
    assert held_out
    prompts = [r.prompt for r in train for _ in range(2)]
    scores = palate.score(world / "reward" / "model", prompts, [t for r in train for t in (r.chosen, r.rejected)])
    assert torch.tensor(scores).mean().item() == pytest.approx(0, abs=1e-5)
    assert torch.tensor(scores).std(correction=0).item() == pytest.approx(1, abs=1e-4)
    report = json.loads((world / "reward" / "evaluation.json").read_text())
    assert report["pairs"] == len(held_out) and report["accuracy"]["estimate"] > 0.8


def test_score_gives_the_number_that_training_saw(world: Path, tmp_path: Path) -> None:
    """Also for responses that were cut off: those are scored without an end of text.

    A sampled special token leaves no trace in a text, so only responses whose six tokens are six words are compared.
    """
    pairs = str(world / "pairs.jsonl")
    run = train_ppo(world, tmp_path / "ppo", validation=pairs)
    whole = [e for e in lines(run / "samples.jsonl") if "when" in e and len(e["response"].split()) == 6]
    assert whole and not any(e["finished"] for e in whole)
    asked = [e["prompt"] for e in whole], [e["response"] for e in whole]
    seen = pytest.approx([e["score"] for e in whole], abs=1e-5)
    assert palate.score(world / "reward" / "model", *asked, finished=[False] * len(whole)) == seen
    assert palate.score(world / "reward" / "model", *asked) != seen


@pytest.mark.parametrize("method", ["sft", "reward", "ppo"])
def test_an_interrupted_run_resumes_to_the_same_bits(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from palate.stage import run as stage_run

    def start(out: Path) -> Path:
        if method == "ppo":
            return train_ppo(world, out)
        data = world / ("demos.jsonl" if method == "sft" else "pairs.jsonl")
        return palate.train(method, model=world / "sft" / "model", data=data, out=out, training=QUICK, quiet=True)

    whole = files(start(tmp_path / "whole"))
    real = stage_run.train

    def interrupted(run: Any) -> Any:
        for metrics in real(run):
            yield metrics
            if metrics["step"] == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(stage_run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "cut")
    monkeypatch.undo()
    assert files(start(tmp_path / "cut")) == whole
    steps = [[line["step"] for line in lines(tmp_path / "cut" / f"{name}.jsonl")] for name in ("metrics", "times")]
    assert steps[0] == steps[1]  # each batch's time stands once, too

    # and once more from the very end: everything was trained, nothing was saved yet
    (tmp_path / "cut" / "card.md").unlink()
    assert files(start(tmp_path / "cut")) == whole


def test_a_finished_run_is_left_alone(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (world / "sft").rglob("*")}
    palate.train("sft", model=world / "base", data=world / "demos.jsonl", out=world / "sft", training=QUICK)
    assert {path: path.stat().st_mtime_ns for path in (world / "sft").rglob("*")} == before
    assert "finished" in capsys.readouterr().err


def test_the_folder_of_another_run_is_refused_with_what_differs(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        palate.train(
            "sft", model=world / "base", data=world / "demos.jsonl", out=world / "sft", training=QUICK | {"epochs": 7}
        )
    assert "training.epochs: 1.0 there, 7.0 here" in str(error.value) and "--out" in str(error.value)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not the folder of a run"):
        palate.train("sft", model=world / "base", data=world / "demos.jsonl", out=tmp_path, quiet=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_refused_run_leaves_no_folder(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        palate.train("reward", model=world / "base", data=world / "demos.jsonl", out=tmp_path / "x", quiet=True)
    with pytest.raises(ModelError):
        palate.train("reward", model=tmp_path / "none", data=world / "pairs.jsonl", out=tmp_path / "x", quiet=True)
    assert not (tmp_path / "x").exists()


def test_the_wrong_kind_of_data_names_what_it_is_and_who_reads_it(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        palate.train("reward", model=world / "base", data=world / "demos.jsonl", out=tmp_path / "x", quiet=True)
    message = str(error.value)
    assert "demos.jsonl:1" in message and "looks like demonstrations" in message and "sft" in message


def test_what_a_method_needs_is_asked_for(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ppo needs a reward"):
        palate.train("ppo", model=world / "base", data=world / "pairs.jsonl", out=tmp_path / "x")
    with pytest.raises(ConfigError, match="no data given: sft reads demonstrations"):
        palate.train("sft", model=world / "base", out=tmp_path / "x")
    with pytest.raises(ConfigError, match="set sampling.temperature only"):
        train_ppo(world, tmp_path / "x", overrides={"method.temperature": 0.5, "sampling.temperature": 0.7})


def test_one_temperature_holds_on_both_sides(world: Path, tmp_path: Path) -> None:
    run = train_ppo(world, tmp_path / "warm", overrides={"sampling.temperature": 0.7})
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["method"]["temperature"] == settings["sampling"]["temperature"] == 0.7


@pytest.mark.parametrize("method", ["reward", "reward_infonce", "reward_listwise"])
def test_rankings_train_every_reward_method(method: str, world: Path, tmp_path: Path) -> None:
    run = palate.train(
        method, model=world / "base", data=world / "rankings.jsonl", out=tmp_path / method, training=QUICK, quiet=True
    )
    assert (run / "model" / "config.json").exists() and (run / "evaluation.json").exists()


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "simpo"])
@pytest.mark.parametrize("lora", [False, True])
def test_preferences_train_a_policy_directly(method: str, lora: bool, world: Path, tmp_path: Path) -> None:
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    judged = [{"prompt": x["prompt"], "response": x[side], "desirable": side == "chosen"} for x in pairs for side in x]
    judged = [x for x in judged if x["response"] != x["prompt"]]
    data = write(tmp_path / "judged.jsonl", judged) if method == "kto" else world / "pairs.jsonl"
    settings = {"training": QUICK | {"learning_rate": 0.003}, "lora": lora, "quiet": True}
    run = palate.train(method, model=world / "base", data=data, out=tmp_path / method, **settings)
    assert (run / "model" / ("adapter_config.json" if lora else "config.json")).exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["split"] == "train")
    known = {"dpo": math.log(2), "kto": 0.5}  # policy and reference are the same weights
    assert method not in known or first["loss"] == pytest.approx(known[method], abs=1e-5)
    assert any(line["split"] == "validation" and "reward/accuracy" in line for line in lines)


def test_a_margin_is_refused_by_file_and_line_before_any_work(world: Path, tmp_path: Path) -> None:
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    pairs[30]["margin"] = 1.5
    data = write(tmp_path / "margins.jsonl", pairs)
    with pytest.raises(DataError, match=r'margins.jsonl:31: .*"margin", and dpo has no place for it.*: reward\.'):
        palate.train("dpo", model=world / "base", data=data, out=tmp_path / "x", quiet=True)
    assert not (tmp_path / "x").exists()
    palate.train("reward", model=world / "base", data=data, out=tmp_path / "y", training=QUICK, quiet=True)


def test_lora_leaves_an_adapter_and_costs_no_reference(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = palate.train(
        "ppo",
        model=world / "sft" / "model",
        reward=str(world / "reward" / "model"),
        data=str(world / "pairs.jsonl"),
        out=tmp_path / "lora",
        lora={"rank": 2},
        sampling={"max_new_tokens": 4},
        training=QUICK,
    )
    assert (run / "model" / "adapter_config.json").exists()
    said = capsys.readouterr().err
    assert "policy, adapter off" in said and "frozen" in said and "KiB" in said


def test_a_python_function_is_a_reward(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_taste.py").write_text("def brief(prompts, responses):\n    return [-len(r) for r in responses]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = palate.train(
        "ppo",
        model=world / "sft" / "model",
        reward="my_taste:brief",
        data=world / "pairs.jsonl",
        out=tmp_path / "brief",
        sampling={"max_new_tokens": 4},
        training=QUICK,
        quiet=True,
    )
    seen = [e for e in lines(run / "samples.jsonl") if "when" in e]
    assert [e["score"] for e in seen] == [-len(e["response"]) for e in seen]
    assert palate.score("my_taste:brief", ["a "], ["b c"], tokenizer=world / "base") == [-len(" b c")]
    with pytest.raises(ConfigError, match="tokenizer"):
        palate.score("my_taste:brief", ["a "], ["b c"])


def test_a_reward_is_normalised_on_samples_of_a_named_reference(world: Path, tmp_path: Path) -> None:
    run = palate.train(
        "reward",
        model=world / "base",
        reference=world / "sft" / "model",
        data=world / "pairs.jsonl",
        out=tmp_path / "r",
        sampling={"max_new_tokens": 4},
        training=QUICK,
        quiet=True,
    )
    assert "samples of" in (run / "card.md").read_text()


def test_same_seed_same_samples(world: Path) -> None:
    ask = {"samples_per_prompt": 2, "max_new_tokens": 5, "seed": 3}
    first = palate.sample(world / "sft" / "model", ["a b ", "c "], **ask)
    assert first == palate.sample(world / "sft" / "model", ["a b ", "c "], **ask)
    assert [entry["prompt"] for entry in first] == ["a b ", "a b ", "c ", "c "]
    assert first != palate.sample(world / "sft" / "model", ["a b ", "c "], **(ask | {"seed": 4}))
    with pytest.raises(ConfigError, match="list of prompts"):
        palate.sample(world / "sft" / "model", "a b ")


def test_score_refuses_what_cannot_be_scored(world: Path) -> None:
    with pytest.raises(ConfigError, match="2 prompts for 1 responses"):
        palate.score(world / "reward" / "model", ["a", "b"], ["c"])
    with pytest.raises(DataError, match="pair 1.*empty"):
        palate.score(world / "reward" / "model", ["a ", "b "], ["c", ""])


def test_a_new_model_from_settings(world: Path, tmp_path: Path) -> None:
    shape = {"architecture": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    run = palate.train(
        "sft", model=shape, tokenizer=world / "base", data=world / "demos.jsonl", out=tmp_path / "new", training=QUICK,
        quiet=True,
    )  # fmt: skip
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["max_length"] == 32
    assert where_from(load_config(file=run / "config.yaml")) == "new llama policy (hidden 16, 1 layer)"
    with pytest.raises(ConfigError, match="--tokenizer"):
        palate.train("sft", model=shape, data=world / "demos.jsonl", out=tmp_path / "newer", quiet=True)


def test_unknown_trackers_are_refused_before_anything_is_loaded(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='Did you mean "tensorboard"'):
        palate.train("sft", model="nowhere", data="nothing", out=tmp_path / "x", trackers="tensorbord")


def test_tensorboard_gets_the_metrics(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = palate.train(
        "sft", model=world / "base", data=world / "demos.jsonl", out=tmp_path / "t", training=QUICK,
        trackers=["tensorboard"], quiet=True,
    )  # fmt: skip
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    written = {e["step"]: e["loss"] for e in lines(run / "metrics.jsonl") if e["split"] == "train"}
    assert {e.step: pytest.approx(e.value) for e in events.Scalars("train/loss")} == written


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such"):
        _ = palate.no_such
    assert set(palate.__all__) <= set(dir(palate)) and palate.__version__


def test_explain_prints_the_paper_and_the_settings() -> None:
    text = str(palate.explain("ppo"))
    assert (
        "arXiv:1707.06347" in text
        and "kl_coef" in text
        and "needs policy, reference, reward, value".lower() in text.lower()
    )


def test_the_bill_counts_weights_gradients_and_moments(world: Path) -> None:
    """float32: 4 bytes a weight; a trained one has a gradient and AdamW's two moments, 12 bytes more."""
    from palate.stage.roles import bill
    from palate.types import Models

    policy, value = tiny(), tiny(seed=1)
    value.requires_grad_(False)
    first, second = bill(Models(policy=policy, value=value), ("policy",))
    weights = sum(p.numel() for p in policy.parameters())
    assert (first.parameters, first.trained, first.weights, first.training) == (
        weights,
        weights,
        4 * weights,
        12 * weights,
    )
    assert (second.role, second.trained, second.training) == ("value", 0, 0)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_passes_every_metric_on_and_shows_the_telling_ones(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from palate.stage.progress import watched

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "160")
    stream = [
        {"step": 1, "split": "train", "loss": 0.5, "score": 1.25, "kl/reference": 2.5, "length/response": 9.0},
        {"step": 2, "split": "validation", "reward/accuracy": 0.75},
        {"step": 2, "split": "train", "loss": 0.25, "tokens/second": 100.0},
    ]
    assert list(watched(stream, 2, "ppo", quiet=False)) == stream
    said = capsys.readouterr().err
    assert "ppo" in said and "reward/accuracy 0.75" in said and "loss 0.25" in said
    assert list(watched(stream, 2, "ppo", quiet=True)) == stream
    assert capsys.readouterr().err == ""


def test_a_model_trained_on_conversations_carries_its_template(world: Path, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    data = write(tmp_path / "talk.jsonl", [{"prompt": turns, "response": f"{letter} e"} for letter in LETTERS])
    run = palate.train("sft", model=world / "base", data=data, out=tmp_path / "run", training=QUICK, quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template and "a b" in tokenizer.apply_chat_template(turns, tokenize=False)
    assert AutoTokenizer.from_pretrained(world / "sft" / "model").chat_template is None
