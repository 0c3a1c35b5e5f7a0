"""Tokenised records kept by content: what comes out is what encoding gives, or encoding is done."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palate.config import load_settings
from palate.data.chat import Chat
from palate.data.collate import encode_records
from palate.data.records import read_records
from palate.errors import ConfigError, DataError
from palate.models.load import save_model
from palate.run_folder import differences
from palate.stage import token_cache
from palate.stage.records import Sides, encode_sides, read_sides
from palate.stage.token_cache import encode_or_recall, entry_key
from palate.stage.user_cache import keep_within
from tiny import tiny, tokenizer_of

LENGTHS = {"max_length": 24, "max_prompt_length": 14}
SHAPES: dict[str, Any] = {
    "prompts": lambda t: {"prompt": t(1, 30), "answer": t(1, 2)},
    "demonstrations": lambda t: {"prompt": t(1, 30), "response": t(0, 20)},
    "comparisons": lambda t: {"prompt": t(1, 3), "chosen": t(1, 20), "rejected": t(1, 20), "margin": len(t(1, 3))},
    "corrections": lambda t: {"prompt": t(1, 30), "chosen": "a b " + t(1, 5), "rejected": "a c " + t(1, 5)},
    "rankings": lambda t: {"prompt": t(1, 30), "responses": [t(1, 9), t(0, 9), t(1, 9)], "ranks": [1, 2, 2]},
    "judgements": lambda t: {"prompt": t(1, 30), "response": t(0, 20), "desirable": len(t(1, 2)) > 1},
}


@pytest.fixture(autouse=True)
def small_is_enough(monkeypatch):
    monkeypatch.setattr(token_cache, "LEAST", 1)


@pytest.fixture
def chat(tiny_tokenizer) -> Chat:
    return Chat(tiny_tokenizer)


def written(path: Path, kind: str, count: int = 40, seed: int = 0) -> Path:
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice("abcdef") for _ in range(rng.randint(low, high)))

    path.write_text("".join(json.dumps(SHAPES[kind](text)) + "\n" for _ in range(count)))
    return path


def same(items, others) -> None:
    """Every field of every item and row, by value, type and (records) identity."""
    assert len(items) == len(others)
    for item, other in zip(items, others, strict=True):
        assert item.record is other.record
        for name in ("pairs", "ranks", "desirable"):
            assert repr(getattr(item, name)) == repr(getattr(other, name)), "2 is not 2.0: a run's data is compared so"
        assert len(item.rows) == len(other.rows)
        for row, its in zip(item.rows, other.rows, strict=True):
            for each in fields(row):
                one, two = getattr(row, each.name), getattr(its, each.name)
                if isinstance(one, np.ndarray):
                    assert one.dtype == two.dtype and np.array_equal(one, two), each.name
                else:
                    assert one == two and type(one) is type(two), each.name


@pytest.mark.parametrize("truncate", ["left_prompt", "drop"])
@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_recalled_is_what_encoding_gives(kind, truncate, chat, tmp_path):
    records = read_records(written(tmp_path / "data.jsonl", kind), kind)
    # byte-level tokens: a letter and its space are two
    lengths = {"max_length": 40, "max_prompt_length": 30, "truncate": truncate}
    plain, report = encode_records(records, kind, chat, **lengths)
    first, its_report, said = encode_or_recall(records, kind, chat, tmp_path / "cache", **lengths)
    again, recalled, told = encode_or_recall(records, kind, chat, tmp_path / "cache", **lengths)
    assert said == "" and "taken from" in told
    same(plain, first)
    same(plain, again)
    assert report == its_report == recalled and str(report) == str(recalled)
    if truncate == "left_prompt" and kind != "comparisons":
        assert report.truncated_prompt > 0, "the data has something to cut"


def test_an_entry_is_of_these_records_this_tokenizer_this_template_and_these_lengths(chat, tiny_tokenizer, tmp_path):
    records = read_records(written(tmp_path / "a.jsonl", "demonstrations"), "demonstrations")
    key = entry_key(records, "demonstrations", chat, LENGTHS)
    assert key == entry_key(list(records), "demonstrations", Chat(tiny_tokenizer), dict(LENGTHS))
    others = [
        entry_key(records[:-1], "demonstrations", chat, LENGTHS),
        entry_key(records[::-1], "demonstrations", chat, LENGTHS),
        entry_key(records, "prompts", chat, LENGTHS),
        entry_key(records, "demonstrations", chat, LENGTHS | {"max_length": 25}),
        entry_key(records, "demonstrations", Chat(tiny_tokenizer, system="Be kind."), LENGTHS),
        entry_key(records, "demonstrations", Chat(tiny_tokenizer, template="none"), LENGTHS),
        entry_key(records, "demonstrations", Chat(tiny_tokenizer, template="default"), LENGTHS),
        entry_key(records, "demonstrations", Chat(tiny_tokenizer, stop_token_ids=5), LENGTHS),
        entry_key(records, "demonstrations", Chat(tokenizer_of(), template="default"), LENGTHS),
    ]
    written(tmp_path / "b.jsonl", "demonstrations")  # the same texts from elsewhere: errors name another place
    elsewhere = read_records(tmp_path / "b.jsonl", "demonstrations")
    others.append(entry_key(elsewhere, "demonstrations", chat, LENGTHS))
    tiny_tokenizer.add_tokens(["abc"])
    others.append(entry_key(records, "demonstrations", Chat(tiny_tokenizer), LENGTHS))
    assert len({key, *others}) == 1 + len(others)


def test_a_tokenizer_that_reads_quoted_special_tokens_as_text_has_entries_of_its_own(tmp_path):
    """``split_special_tokens`` is no part of what a fast tokenizer's backend writes down, and changes the ids."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a b", "response": "c </s> d"}) + "\n")
    records = read_records(tmp_path / "a.jsonl", "demonstrations")
    found = []
    for splits in (False, True):
        tokenizer = tokenizer_of()
        tokenizer.split_special_tokens = splits
        chat = Chat(tokenizer, template="none")
        plain, _ = encode_records(records, "demonstrations", chat, **LENGTHS)
        items, _, _ = encode_or_recall(records, "demonstrations", chat, tmp_path / "cache", **LENGTHS)
        same(plain, items)
        found.append(entry_key(records, "demonstrations", chat, LENGTHS))
    assert found[0] != found[1]


def test_what_is_no_function_of_the_records_is_not_kept(tiny_tokenizer, tmp_path):
    """A template with today's date writes something else tomorrow."""
    records = read_records(written(tmp_path / "a.jsonl", "demonstrations"), "demonstrations")
    dated = "{{ strftime_now('%d') }}" + tiny_tokenizer.chat_template
    encode_or_recall(records, "demonstrations", Chat(tiny_tokenizer, dated), tmp_path / "cache", **LENGTHS)
    assert not (tmp_path / "cache").exists()


def test_few_records_and_the_setting_off_keep_nothing(chat, tmp_path, monkeypatch):
    records = read_records(written(tmp_path / "a.jsonl", "demonstrations"), "demonstrations")
    assert encode_or_recall(records, "demonstrations", chat, None, **LENGTHS)[2] == ""
    monkeypatch.setattr(token_cache, "LEAST", len(records) + 1)
    encode_or_recall(records, "demonstrations", chat, tmp_path / "cache", **LENGTHS)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "another"])
def test_a_broken_entry_is_said_in_one_line_passed_over_and_replaced(damage, chat, tmp_path):
    records = read_records(written(tmp_path / "a.jsonl", "comparisons"), "comparisons")
    plain, _, _ = encode_or_recall(records, "comparisons", chat, tmp_path / "cache", **LENGTHS)
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "another":
        path.unlink()
        encode_or_recall(records[:-1], "comparisons", chat, tmp_path / "cache", **LENGTHS)
        next((tmp_path / "cache").iterdir()).rename(path)
    else:
        content[-9] ^= 1
        path.write_bytes({"cut": content[:-20], "flipped": content, "emptied": b""}[damage])
    items, _, said = encode_or_recall(records, "comparisons", chat, tmp_path / "cache", **LENGTHS)
    same(plain, items)
    assert str(path) in said and "anew" in said and "\n" not in said
    assert "taken from" in encode_or_recall(records, "comparisons", chat, tmp_path / "cache", **LENGTHS)[2]


def test_a_folder_that_cannot_be_written_is_said_and_does_without(chat, tmp_path):
    records = read_records(written(tmp_path / "a.jsonl", "demonstrations"), "demonstrations")
    (tmp_path / "file").write_text("in the way")
    items, _, said = encode_or_recall(records, "demonstrations", chat, tmp_path / "file" / "cache", **LENGTHS)
    assert items and "cannot be written" in said


def test_faulty_data_is_refused_every_time_and_never_kept(chat, tmp_path):
    """The template refuses one conversation: its line is named at each start."""
    refusing = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
        "{{ m.role + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    )
    lines = [{"prompt": "no" if i == 7 else "a b", "response": "c"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = read_records(tmp_path / "a.jsonl", "demonstrations")
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl:8"):
            encode_or_recall(
                records, "demonstrations", Chat(chat.tokenizer, refusing), tmp_path / "cache", max_length=99
            )
    assert not (tmp_path / "cache").exists()


def _encode_often(folder: Path, tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    token_cache.LEAST = 1
    chat = Chat(AutoTokenizer.from_pretrained(tokenizer))
    records = read_records(folder / "a.jsonl", "demonstrations")
    plain, _ = encode_records(records, "demonstrations", chat, **LENGTHS)
    for _ in range(15):
        items, _, said = encode_or_recall(records, "demonstrations", chat, folder / "cache", **LENGTHS)
        same(plain, items)
        assert "anew" not in said
        for path in (folder / "cache").glob("*.safetensors"):
            path.unlink(missing_ok=True)  # as another process does that makes room


def test_two_processes_at_once_never_see_half_an_entry(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    written(tmp_path / "a.jsonl", "demonstrations", 200)
    start = multiprocessing.get_context("spawn").Process
    both = [start(target=_encode_often, args=(tmp_path, tmp_path / "tokenizer")) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]


def test_what_was_used_longest_ago_goes_first_and_leftovers_of_a_kill_go_with_it(tmp_path):
    for number in range(4):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(b"x" * 10)
        os.utime(path, (1000 + number, 1000 + number))
    os.utime(tmp_path / "0.safetensors")  # used now
    old, new = tmp_path / ".a.safetensors.1.tmp", tmp_path / ".b.safetensors.2.tmp"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1000, 1000))
    keep_within(tmp_path, "*.safetensors", 25)
    assert {p.name for p in tmp_path.iterdir()} == {"0.safetensors", "3.safetensors", new.name}


def test_an_entry_larger_than_the_bound_is_not_kept(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "MOST_BYTES", 100)
    records = read_records(written(tmp_path / "a.jsonl", "demonstrations"), "demonstrations")
    encode_or_recall(records, "demonstrations", chat, tmp_path / "cache", **LENGTHS)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_run_says_the_same_of_its_records_with_and_without_and_the_source_aside(tmp_path):
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, tmp_path / "base")
    written(tmp_path / "a.jsonl", "demonstrations")
    given = {"model": str(tmp_path / "base"), "out": str(tmp_path / "run")}
    told: dict[str, list[str]] = {}
    for name, cache in (("off", False), ("first", str(tmp_path / "cache")), ("second", str(tmp_path / "cache"))):
        data = {"train": str(tmp_path / "a.jsonl"), "max_length": 20, "cache": cache}
        config = load_settings("sft", settings=given | {"data": data})
        said, aside = told.setdefault(name, []), told.setdefault(f"{name} aside", [])
        sides = encode_sides(config, Sides(*read_sides(config)), Chat(tokenizer), said.append, aside.append)
        assert sides.train and sides.validation
    assert told["off"] == told["first"] == told["second"]
    assert told["off aside"] == told["first aside"] == []
    assert len(told["second aside"]) == 2 and "taken from" in told["second aside"][0]


def test_the_setting_is_a_word_or_a_folder_and_may_change_when_a_run_is_resumed(tmp_path):
    def config(cache):
        return load_settings("sft", settings={"model": "m", "out": "o", "data": {"train": "t", "cache": cache}})

    assert [config(value).data.cache for value in (False, True, "off", "~/x")] == ["off", "auto", "off", "~/x"]
    assert not differences(config("off").to_dict(), config("auto").to_dict())
    with pytest.raises(ConfigError, match="data.cache"):
        config("")
