"""The reference's log-probs, computed once and kept by content: what is the same as without, what is shared, what is not."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import palate
from batches import batch_for, models_for
from palate.config import load_settings
from palate.data.chat import Chat
from palate.data.collate import collate, encode_records
from palate.data.records import Comparison
from palate.errors import RunError
from palate.lookup import find_method, method_names
from palate.models.forward import response_logprobs
from palate.models.load import load_policy, save_model
from palate.models.roles import AdapterOff, frozen_copy
from palate.stage import reference_cache
from palate.stage import run as stage_run
from palate.stage.reference_store import read_store, reference_key, row_key, write_store
from palate.stage.user_cache import cache_folder
from palate.types import Models
from tiny import LORA, tiny, tokenizer_of, trained

LETTERS = "abcdefghijklmnop"
CPU = torch.device("cpu")
TRAINING = {"batch_size": 4, "max_steps": 4, "save_every": 2, "eval_every": 2, "learning_rate": 0.01}


def text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(LETTERS) for _ in range(rng.randint(low, high)))


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model; 20 pairs (two of one prompt); the same responses as judgements."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, folder / "base")
    prompts = [text(rng, 2, 6) + " " for _ in range(19)]
    pairs = [{"prompt": p, "chosen": text(rng, 1, 9), "rejected": text(rng, 1, 9)} for p in [*prompts, prompts[0]]]
    write(folder / "pairs.jsonl", pairs)
    sides = ("chosen", "rejected")
    judged = [{"prompt": x["prompt"], "response": x[s], "desirable": s == "chosen"} for x in pairs for s in sides]
    write(folder / "judged.jsonl", judged)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PALATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def start(world: Path, out: Path, method: str = "dpo", **settings: Any) -> Path:
    data = world / ("judged.jsonl" if method == "kto" else "pairs.jsonl")
    given = {"model": world / "base", "data": data, "training": TRAINING} | settings
    return palate.train(method, out=out, **given)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def results(run: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "samples.jsonl", "model/model.safetensors", "reference.safetensors")
    return {name: (run / name).read_bytes() for name in names}


def near(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, str) else pytest.approx(v, rel=1e-5, abs=1e-6) for k, v in line.items()}


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "reference log-probs" in line or "anew" in line]


# -- the same as without ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "lora"), [("dpo", False), ("dpo", True), ("ipo", False), ("kto", False), ("kto", True)]
)
def test_a_run_with_the_cache_is_the_run_without(
    method: str, lora: bool, world: Path, tmp_path: Path, cache: Path
) -> None:
    """The reference's batches are made otherwise, so float32 sums of some ten numbers may differ in their last bit."""
    settings = {"lora": {"rank": 2} if lora else None, "quiet": True}
    without = lines(start(world, tmp_path / "without", method, reference_cache="off", **settings))
    assert not cache.exists() and not (tmp_path / "without" / "reference.safetensors").exists()
    found = lines(start(world, tmp_path / "with", method, **settings))
    again = lines(start(world, tmp_path / "again", method, **settings))
    assert len(list(cache.iterdir())) == 1 and found == again
    assert len(found) == len(without) == 4 + 3
    for one, other in zip(found, without, strict=True):
        assert one == near(other)
    assert found[-1]["loss"] != pytest.approx(found[0]["loss"], abs=1e-3)  # something was learnt


@pytest.mark.parametrize(("method", "kept"), [("dpo", False), ("kto", True)])
def test_the_reference_is_let_go_where_nothing_else_is_asked_of_it(
    method: str, kept: bool, world: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen, real = [], stage_run.train
    monkeypatch.setattr(stage_run, "train", lambda run: seen.append(run.models.reference is not None) or real(run))
    start(world, tmp_path / "auto", method)
    assert ("until its log-probs are known" in capsys.readouterr().err) is not kept
    start(world, tmp_path / "off", method, reference_cache="off")
    assert "until its log-probs are known" not in capsys.readouterr().err
    assert seen == [kept, True]


def asking(what: str) -> list[str]:
    return [n for n in method_names() if getattr(find_method(n).METHOD, "asks_reference", None) == what]


@pytest.mark.parametrize("name", asking("rows"))
def test_a_method_that_asks_for_rows_needs_no_reference_once_they_are_known(name: str) -> None:
    method = find_method(name).METHOD()
    models, batch = models_for(method), batch_for(method)
    with torch.no_grad():
        wanted = method.prepare(models, batch)
        filled = replace(batch, reference_logprobs=response_logprobs(models.reference, batch.tokens))
        found = method.prepare(Models(policy=models.policy), filled)
    assert found.reference_logprobs.equal(wanted.reference_logprobs)


def test_the_known_methods_say_what_they_ask() -> None:
    rows = {
        "dpo",
        "ipo",
        "ipo_mean",
        "slic",
        "exo",
        "sppo",
        "nca",
        "r_dpo",
        "robust_dpo",
        "apo_zero",
        "apo_down",
        "ln_dpo",
    }
    assert rows <= set(asking("rows")) and "kto" in asking("rows and more")


# -- what is shared, and what is not ---------------------------------------------------------------------------------


def test_later_runs_compute_only_what_is_new(world: Path, tmp_path: Path, cache: Path, capsys: Any) -> None:
    """20 pairs, 40 responses; with two more pairs 4 more, of which one is there already. kto judges the same 40."""
    start(world, tmp_path / "first")
    assert "0 of 40 responses known, 40 to compute" in said(capsys)[0]
    start(world, tmp_path / "second", "ipo", training=TRAINING | {"learning_rate": 0.001})
    start(world, tmp_path / "third", "kto")
    start(world, tmp_path / "fourth", lora=True)
    assert [line.partition(": ")[2] for line in said(capsys)] == ["40 of 40 responses known, 0 to compute."] * 3
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    more = [{**pairs[3], "chosen": "a a a a"}, {"prompt": "p p p p ", "chosen": "b", "rejected": "c"}]
    start(world, tmp_path / "fifth", data=write(tmp_path / "more.jsonl", pairs + more))
    assert "40 of 43 responses known, 3 to compute" in said(capsys)[0]
    assert len(list(cache.iterdir())) == 1


def test_what_another_template_or_length_makes_of_a_record_is_another_row(
    world: Path, tmp_path: Path, cache: Path, capsys: Any
) -> None:
    start(world, tmp_path / "first")
    start(world, tmp_path / "shorter", data={"train": str(world / "pairs.jsonl"), "max_length": 6})
    start(world, tmp_path / "longer", data={"train": str(world / "pairs.jsonl"), "max_length": 200})
    first, shorter, longer = (line for line in said(capsys) if "known" in line)
    assert "0 of 40" in first and "40 of 40 responses known, 0 to compute" in longer
    known, _, rest = shorter.partition(": ")[2].partition(" of ")
    assert 0 < int(known) < int(rest.split()[0])  # short records are cut by neither


def test_a_key_tells_rows_apart_by_ids_and_by_mask(world: Path) -> None:
    chat = Chat(tokenizer_of())
    (item,), _ = encode_records([Comparison("a b", "c d", "d c")], "comparisons", chat, max_length=20)
    one, other = item.rows
    fewer = replace(one, response_mask=one.response_mask & (one.response_mask.cumsum() > 1))
    assert len({row_key(one), row_key(other), row_key(fewer)}) == 3
    assert row_key(one) == row_key(replace(one, source="elsewhere:3", finished=False))


def test_a_key_is_the_weights_wherever_they_stand(world: Path, tmp_path: Path) -> None:
    base = load_policy(world / "base")
    shutil.copytree(world / "base", tmp_path / "moved")
    key = reference_key(base, CPU)
    assert reference_key(load_policy(tmp_path / "moved"), CPU) == reference_key(frozen_copy(base), CPU) == key
    adapted = load_policy(world / "base", lora=LORA)
    assert reference_key(AdapterOff(adapted), CPU) == key  # and it stays so while the adapter is trained
    assert reference_key(AdapterOff(trained(adapted)), CPU) == key
    others = {
        "one weight": load_policy(world / "base"),
        "adapter on": adapted,
        "bfloat16": load_policy(world / "base", dtype="bfloat16"),
        "rope": load_policy(world / "base"),
    }
    mixed = load_policy(world / "base", dtype="mixed")  # on a CPU the same numbers as bfloat16, by the same products
    assert reference_key(mixed, CPU) == reference_key(others["bfloat16"], CPU)
    others["one weight"].lm_head.weight.data[3, 2] += 1e-3
    others["rope"].config.rope_parameters["rope_theta"] = 123.0
    keys = {name: reference_key(model, CPU).all for name, model in others.items()}
    assert len({key.all, reference_key(base, torch.device("cuda")).all, *keys.values()}) == 2 + len(others)


# -- what goes wrong -------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """One bit of the last log-prob: the file is still well-formed."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, empty])
def test_a_damaged_file_is_said_and_computed_anew(
    damage: Any, world: Path, tmp_path: Path, cache: Path, capsys: Any
) -> None:
    wanted = results(start(world, tmp_path / "first"))
    (file,) = cache.iterdir()
    sound = file.read_bytes()
    damage(file)
    capsys.readouterr()
    assert results(start(world, tmp_path / "second")) == wanted
    text = said(capsys)
    assert file.name in text[0] and "computed anew" in text[0] and "40 to compute" in text[1]
    assert file.read_bytes() == sound


def test_log_probs_that_the_reference_does_not_say_are_computed_anew(
    world: Path, tmp_path: Path, cache: Path, capsys: Any
) -> None:
    """A whole file with the right key and checksum, of another forward pass, say."""
    wanted = results(start(world, tmp_path / "first"))
    (file,) = cache.iterdir()
    key = reference_key(load_policy(world / "base"), CPU)
    write_store(file, key, {row: value - 0.1 for row, value in read_store(file, key).items()})
    capsys.readouterr()
    assert results(start(world, tmp_path / "second")) == wanted
    assert "computed anew" in said(capsys)[0]
    assert read_store(file, key) == read_store(tmp_path / "first" / "reference.safetensors", key)


def test_a_cache_that_cannot_be_written_is_said_and_done_without(
    world: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PALATE_CACHE", str(tmp_path / "file"))
    run = start(world, tmp_path / "run")
    assert "later runs compute the reference's log-probs again" in capsys.readouterr().err
    assert (run / "card.md").exists() and (run / "reference.safetensors").exists()


# -- resuming --------------------------------------------------------------------------------------------------------


def interrupted(world: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage_run.train

    def stopping(run: Any) -> Any:
        for metrics in real(run):
            yield metrics
            if metrics["step"] == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage_run, "train", stopping)
        with pytest.raises(KeyboardInterrupt):
            start(world, out, quiet=True)


def test_a_resumed_run_has_the_same_bits_even_without_the_cache(
    world: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run finds half its rows computed by a run on other data, in other batches; the resumed one finds no cache."""
    pairs = (world / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_text("".join(pairs[::2]))
    start(world, tmp_path / "half", data=tmp_path / "half.jsonl", quiet=True)
    wanted = results(start(world, tmp_path / "whole", quiet=True))
    interrupted(world, tmp_path / "cut", monkeypatch)
    shutil.rmtree(cache)
    asked = []
    monkeypatch.setattr(reference_cache, "_computed", lambda *args: asked.append(args) or iter(()))
    assert results(start(world, tmp_path / "cut", quiet=True)) == wanted
    assert asked and len(list(cache.iterdir())) == 1  # the run's own copy fills the cache again


def test_a_kill_while_computing_leaves_what_was_done(
    world: Path, tmp_path: Path, cache: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Chunks of at most 60 tokens, written after each; killed at the third."""
    wanted = results(start(world, tmp_path / "whole", reference_cache=str(tmp_path / "other")))
    monkeypatch.setattr(reference_cache, "CHUNK_TOKENS", 60)
    monkeypatch.setattr(reference_cache, "SECONDS_BETWEEN_WRITES", 0.0)
    real, calls = reference_cache._scored, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache, "_scored", killed)
        with pytest.raises(KeyboardInterrupt):
            start(world, tmp_path / "cut")
    capsys.readouterr()
    run = start(world, tmp_path / "cut")
    found = said(capsys)[0].partition(": ")[2]
    assert 2 <= int(found.split()[0]) < 40
    assert lines(run) == [near(json.loads(line)) for line in wanted["metrics.jsonl"].splitlines()]


def test_another_reference_under_an_unfinished_run_is_refused(
    world: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world, tmp_path / "world")
    interrupted(tmp_path / "world", tmp_path / "cut", monkeypatch)
    save_model(tiny(seed=5), tokenizer_of(), tmp_path / "world" / "base", overwrite=True)
    with pytest.raises(RunError, match="the reference has other weights than when this run was started"):
        start(tmp_path / "world", tmp_path / "cut", quiet=True)


# -- where -----------------------------------------------------------------------------------------------------------


def test_the_cache_is_where_people_expect_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PALATE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("auto", "reference") == tmp_path / ".cache" / "palate" / "reference"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder("auto", "reference") == Path("/x/palate/reference")
    monkeypatch.setenv("PALATE_CACHE", "/p")
    assert cache_folder("auto", "reference") == Path("/p/reference")
    assert cache_folder("~/mine", "reference") == tmp_path / "mine" and cache_folder("off", "reference") is None


def test_off_is_a_word_in_yaml_too(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("method: dpo\nmodel: m\nout: o\ndata: d.jsonl\nreference_cache: off\n")
    assert load_settings(file=tmp_path / "x.yaml").reference_cache == "off"


def test_a_batch_is_filled_only_where_every_row_is_known() -> None:
    chat = Chat(tokenizer_of())
    records = [Comparison("a b", "c d", "d c"), Comparison("b a", "c", "d")]
    (first, second), _ = encode_records(records, "comparisons", chat, max_length=20)
    known = replace(first, rows=tuple(replace(row, reference_logprob=-1.5 - n) for n, row in enumerate(first.rows)))
    assert collate([known], "comparisons").reference_logprobs.tolist() == [-1.5, -2.5]
    assert collate([known, second], "comparisons").reference_logprobs is None
