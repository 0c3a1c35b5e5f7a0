"""The split is by prompt, never by pair, and stable."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.data.ranking import ranking_to_comparisons, split_by_prompt
from palate.data.records import Comparison, Prompt, Ranking, prompt_key, read_records
from palate.errors import ConfigError


@given(st.lists(st.integers(0, 12), min_size=1), st.floats(0, 0.99), st.integers(0, 5))
def test_no_prompt_is_on_both_sides_and_nothing_is_lost(numbers, fraction, seed):
    records = [Comparison(f"prompt {n}", f"a{i}", "b") for i, n in enumerate(numbers)]
    train, held = split_by_prompt(records, fraction, seed)
    assert not {r.prompt for r in train} & {r.prompt for r in held}
    assert sorted(train + held, key=lambda r: int(r.chosen[1:])) == records
    assert [r for r in records if r in train] == train
    if fraction > 0 and len(set(numbers)) > 1:
        assert train and held


def test_a_prompt_stays_on_its_side_whatever_else_is_there():
    records = [Prompt(f"prompt {i}") for i in range(400)]
    _, held = split_by_prompt(records, 0.25, 3)
    _, again = split_by_prompt(records[100:300], 0.25, 3)
    assert {r.prompt for r in again} == {r.prompt for r in held} & {r.prompt for r in records[100:300]}
    assert 70 <= len(held) <= 130, "four standard deviations around 100"
    assert {r.prompt for r in split_by_prompt(records, 0.25, 4)[1]} != {r.prompt for r in held}


def test_the_hash_is_the_same_on_every_machine():
    """The rule written out: validation when the first 64 bits of sha256("seed:prompt"), as a share of 2**64, are below."""
    import hashlib

    for text in ("a", "b", "c"):
        share = int(hashlib.sha256(f"0:{text}".encode()).hexdigest()[:16], 16) / 16**16
        records = [Prompt(text), *[Prompt(f"other {i}") for i in range(50)]]
        assert (records[0] in split_by_prompt(records, 0.5)[1]) == (share < 0.5)


def test_text_and_a_conversation_of_one_message_are_one_prompt():
    talk = ({"role": "user", "content": "Hi"},)
    assert prompt_key("Hi") == prompt_key(talk)
    for seed in range(8):
        train, held = split_by_prompt([Prompt("Hi"), Prompt(talk), Prompt("Ho")], 0.5, seed)
        assert {len(train), len(held)} == {1, 2}


def test_fractions_out_of_range_are_a_settings_error():
    for fraction in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"Expected a number in \[0, 1\)"):
            split_by_prompt([Prompt("a")], fraction, 0)
    assert split_by_prompt([Prompt("a"), Prompt("b")], 0.0, 0)[1] == []


def test_pairs_of_a_ranking_leave_ties_out():
    ranking = Ranking("Hi", ("a", "b", "c", "d"), (2, 1, 2, 3), annotator="x", source="f:1")
    pairs = ranking_to_comparisons(ranking)
    assert {(p.chosen, p.rejected) for p in pairs} == {("b", "a"), ("b", "c"), ("b", "d"), ("a", "d"), ("c", "d")}
    assert all((p.prompt, p.annotator, p.source) == ("Hi", "x", "f:1") for p in pairs)
    assert ranking_to_comparisons(Ranking("Hi", ("a", "b"), (1, 1))) == []


def test_real_conversations_do_not_leak(shared_data):
    records = read_records(shared_data / "preferences" / "hh_rlhf.jsonl.gz", "comparisons")
    train, held = split_by_prompt(records, 0.1, 0)
    assert len(train) + len(held) == len(records) and 0.08 < len(held) / len(records) < 0.12
    assert not {prompt_key(r.prompt) for r in train} & {prompt_key(r.prompt) for r in held}
    train, held = split_by_prompt(records, 0.1, 0, by="opening")
    assert not {r.prompt[0]["content"] for r in train} & {r.prompt[0]["content"] for r in held}
