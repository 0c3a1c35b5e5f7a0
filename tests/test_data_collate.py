"""Records to items to batches: what is kept, cut, dropped and merged, with every count."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palate.data.chat import Chat
from palate.data.collate import Item, Row, collate, encode_records, prompt_ids
from palate.data.records import Comparison, Demonstration, Judgement, Prompt, Ranking, read_records
from palate.errors import ConfigError, DataError
from palate.types import groups, microbatches


@pytest.fixture
def chat(tiny_tokenizer):
    return Chat(tiny_tokenizer)


@pytest.fixture
def plain(tiny_tokenizer):
    """Text without a template, so that lengths are those of the texts: one token a letter of "xyz"."""
    return Chat(tiny_tokenizer, template="none")


def encode(records, kind, chat, **options):
    return encode_records(records, kind, chat, **{"max_length": 200} | options)


def texts(chat, item):
    return [chat.text(row.ids[row.response_mask].tolist()) for row in item.rows]


# -- batches ---------------------------------------------------------------------------------------------------------

rows = st.integers(2, 9).flatmap(
    lambda n: st.tuples(st.lists(st.integers(0, 99), min_size=n, max_size=n), st.integers(1, n - 1))
)


@given(st.lists(st.lists(rows, min_size=1, max_size=3), min_size=1, max_size=5))
def test_padding_is_outside_every_mask_and_rows_come_back(several):
    items = [
        Item(tuple(Row(np.array(ids, np.int32), np.arange(len(ids)) >= start) for ids, start in some), record=i)
        for i, some in enumerate(several)
    ]
    tokens = collate(items, "demonstrations")
    flat = [row for item in items for row in item.rows]
    assert tokens.ids.shape == (len(flat), max(len(row.ids) for row in flat)) == tokens.response_mask.shape
    assert tokens.ids.dtype == tokens.group.dtype == torch.int64
    assert tokens.attention_mask.dtype == tokens.response_mask.dtype == torch.bool
    assert not (tokens.response_mask & ~tokens.attention_mask).any() and not tokens.response_mask[:, 0].any()
    assert (tokens.ids[~tokens.attention_mask] == 0).all()
    for i, row in enumerate(flat):
        length = int(tokens.attention_mask[i].sum())
        assert tokens.ids[i, :length].tolist() == row.ids.tolist() and tokens.attention_mask[i, :length].all()
        assert tokens.response_mask[i, :length].tolist() == row.response_mask.tolist()
    assert [len(g) for g in groups(tokens)] == [len(item.rows) for item in items]
    assert tokens.extras["records"] == [i for i, item in enumerate(items) for _ in item.rows]
    assert int(tokens.attention_mask.sum()) == sum(item.length for item in items)


def test_a_token_with_the_padding_id_is_a_real_token(chat):
    """Padding is written as 0; id 0 inside a text stays what it is."""
    items, _ = encode([Demonstration("Hi", "a<|pad|>b"), Demonstration("Hi", "long " * 9)], "demonstrations", chat)
    tokens = collate(items, "demonstrations")
    assert chat.tokenizer.pad_token_id == 0
    at = (tokens.ids[0] == 0) & tokens.attention_mask[0]
    assert at.sum() == 1 and tokens.response_mask[0][at].all()


def test_comparisons_of_one_prompt_are_one_item_with_each_response_once(chat):
    records = [
        Comparison("Hi", "a", "b", margin=2.0),
        Comparison("Bye", "a", "b"),
        Comparison(({"role": "user", "content": "Hi"},), "a", "c", probability=0.75),
        Comparison("Hi", "c", "b"),
    ]
    items, report = encode(records, "comparisons", chat)
    assert [texts(chat, item) for item in items] == [["a", "b", "c"], ["a", "b"]]
    batch = collate(items, "comparisons")
    assert batch.chosen.tolist() == [0, 0, 2, 3] and batch.rejected.tolist() == [1, 2, 1, 4]
    assert batch.weight.tolist() == [1.0] * 4
    assert batch.probability.tolist() == [1.0, 0.75, 1.0, 1.0] and batch.margin.tolist() == [2.0, 0.0, 0.0, 0.0]
    assert batch.tokens.group.tolist() == [0, 0, 0, 1, 1]
    assert (report.read, report.kept, report.items, report.rows, report.pairs) == (4, 4, 2, 5, 4)


def test_an_item_of_merged_comparisons_holds_sixteen_rows_at_most(chat):
    records = [Comparison("Hi", f"good {i}", f"bad {i}") for i in range(20)]
    items, _ = encode(records, "comparisons", chat)
    assert [len(item.rows) for item in items] == [16, 16, 8] and sum(len(item.pairs) for item in items) == 20


def test_margins_and_probabilities_are_none_where_nobody_gave_them(chat):
    batch = collate(encode([Comparison("Hi", "a", "b")], "comparisons", chat)[0], "comparisons")
    assert batch.margin is None and batch.probability is None


@given(st.lists(st.integers(1, 4), min_size=2, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_ranking_gives_every_untied_pair_and_a_weight_of_one_in_all(chat, ranks):
    responses = tuple(f"answer {i}" for i in range(len(ranks)))
    record = Ranking("Hi", responses, tuple(ranks))
    expected = {(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b}
    if not expected:
        with pytest.raises(DataError, match="1 all responses tied"):
            encode([record], "comparisons", chat)
        return
    batch = collate(encode([record], "comparisons", chat)[0], "comparisons")
    said = texts(chat, encode([record], "comparisons", chat)[0][0])
    pairs = {(said[c], said[r]) for c, r in zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)}
    assert pairs == {(responses[i], responses[j]) for i, j in expected} and len(batch.chosen) == len(expected)
    assert batch.weight.tolist() == pytest.approx([1 / len(expected)] * len(expected))


def test_rankings_and_judgements_and_prompts(chat):
    items, _ = encode([Ranking("Hi", ("a", "b", "c"), (2, 1, 2)), Ranking("Ho", ("d", "e"), (1, 2))], "rankings", chat)
    batch = collate(items, "rankings")
    assert batch.rank.tolist() == [2, 1, 2, 1, 2] and batch.tokens.group.tolist() == [0, 0, 0, 1, 1]
    items, _ = encode([Judgement("Hi", "a", True), Judgement("Hi", "b", False)], "judgements", chat)
    assert collate(items, "judgements").desirable.tolist() == [True, False]
    items, _ = encode([Prompt("Hi", {"answer": "4"}), Comparison("Ho", "a", "b")], "prompts", chat)
    assert prompt_ids(items) == chat.encode_prompts(["Hi", "Ho"]) and items[0].record.fields == {"answer": "4"}
    assert not collate(items, "prompts").response_mask.any()


def test_microbatches_cut_items_apart_only(chat):
    records = [Ranking(f"Prompt {i}", ("a", "b", "c"), (1, 2, 3)) for i in range(6)]
    batch = collate(encode(records, "comparisons", chat)[0], "comparisons")
    parts = list(microbatches(batch, 60))
    assert len(parts) > 1 and sum(len(part.chosen) for part in parts) == len(batch.chosen) == 18


# -- cutting ---------------------------------------------------------------------------------------------------------


def test_the_prompts_beginning_is_cut_and_the_response_kept_whole(plain):
    items, report = encode([Comparison("x" * 30 + "yz", "zx", "z")], "comparisons", plain, max_length=12)
    decoded = [plain.tokenizer.decode(row.ids) for row in items[0].rows]
    assert decoded == ["x" * 7 + "yzzx<|im_end|>", "x" * 7 + "yzz<|im_end|>"], "both rows keep the same prompt"
    assert (report.truncated_prompt, report.truncated_response) == (1, 0)
    assert all(row.finished for row in items[0].rows)


def test_a_long_response_leaves_the_prompt_a_quarter_and_loses_its_end(plain):
    items, report = encode([Demonstration("x" * 30, "z" * 30)], "demonstrations", plain, max_length=16)
    row = items[0].rows[0]
    assert plain.tokenizer.decode(row.ids) == "xxxx" + "z" * 12 and not row.finished
    assert row.response_mask.tolist() == [False] * 4 + [True] * 12
    assert (report.truncated_prompt, report.truncated_response) == (1, 1)
    assert not collate(items, "demonstrations").extras["finished"].any()
    assert "1 response cut at the end (without stop token)" in str(report)


def test_max_prompt_length_cuts_prompts_that_would_fit(plain):
    items, report = encode([Demonstration("xyz" * 5, "z")], "demonstrations", plain, max_prompt_length=4)
    assert plain.tokenizer.decode(items[0].rows[0].ids) == "zxyzz<|im_end|>" and report.truncated_prompt == 1


def test_a_conversation_loses_its_oldest_turns_whole_and_keeps_its_system_message(chat):
    talk = (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "first " * 6},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "third"},
    )
    room = len(chat.encode_prompt((talk[0], *talk[3:])))
    items, report = encode([Demonstration(talk, "ok", True)], "demonstrations", chat, max_length=room + 4)
    row = items[0].rows[0]
    assert row.ids.tolist() == chat.encode((talk[0], *talk[3:]), "ok")[0] and report.truncated_prompt == 1
    assert chat.tokenizer.decode(row.ids[row.response_mask]) == "two<|im_end|>ok<|im_end|>"


def test_one_long_turn_keeps_the_templates_head_and_its_end(chat):
    items, _ = encode([Prompt("start " * 20 + "end")], "prompts", chat, max_length=24)
    text = chat.tokenizer.decode(items[0].rows[0].ids)
    assert len(items[0].rows[0].ids) == 24 and text.startswith("<|im_start|>") and "start start" not in text[:20]
    assert text.endswith("end<|im_end|>\n<|im_start|>assistant\n")


def test_cutting_to_the_right_never_touches_the_prompt_and_may_leave_nothing(plain):
    records = [Demonstration("x" * 9, "zzz"), Demonstration("x" * 30, "z"), Demonstration("y", "z", source="a:3")]
    items, report = encode(records, "demonstrations", plain, max_length=10, truncate="right")
    assert [plain.tokenizer.decode(i.rows[0].ids) for i in items] == ["x" * 9 + "z", "yz<|im_end|>"]
    assert {k: len(v) for k, v in report.dropped.items()} == {"response cut to nothing": 1}
    assert report.truncated_prompt == 0 and report.truncated_response == 1


def test_dropping_what_is_too_long(plain):
    records = [Comparison("x", "y" * 20, "z"), Comparison("x", "y", "z"), Comparison("z" * 20, "y", "z")]
    items, report = encode(records, "comparisons", plain, max_length=10, truncate="drop")
    assert len(items) == 1 and texts(plain, items[0]) == ["z", "y"] and items[0].pairs[0][:2] == (1, 0)
    assert {k: len(v) for k, v in report.dropped.items()} == {"too long": 2}


def test_responses_that_become_equal_when_cut_are_an_identical_pair(plain):
    records = [Comparison("x", "z" * 30 + "a", "z" * 30 + "b", source="a:1"), Comparison("x", "y", "z")]
    items, report = encode(records, "comparisons", plain, max_length=10)
    assert report.dropped == {"identical pair once cut": ["a:1"]} and len(items[0].pairs) == 1


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
    st.integers(4, 40),
    st.sampled_from(["left_prompt", "right", "drop"]),
    st.booleans(),
)
def test_every_row_fits_has_something_to_train_on_and_every_record_is_counted(
    chat, plain, sizes, length, how, template
):
    used = chat if template else plain
    records = [Comparison("x" * p, "y" * a, "z" * b) for p, a, b in sizes]
    try:
        items, report = encode_records(records, "comparisons", used, max_length=length, truncate=how)
    except DataError as error:
        assert "no record is left" in str(error)
        return
    for item in items:
        for row in item.rows:
            assert len(row.ids) == len(row.response_mask) <= length
            assert row.response_mask.any() and not row.response_mask[0]
        assert all(0 <= n < len(item.rows) for pair in item.pairs for n in pair[:2])
        assert {n for pair in item.pairs for n in pair[:2]} == set(range(len(item.rows)))
    assert report.read == len(records) == report.kept + report.dropped_count
    assert sum(len(item.pairs) for item in items) == report.kept == report.pairs


# -- dropping --------------------------------------------------------------------------------------------------------


def test_empty_responses_and_identical_pairs_are_dropped_with_their_places(chat):
    records = [
        Comparison("Hi", "", "b", source="f:1"),
        Comparison("Hi", "a", " \n", source="f:2"),
        Comparison("Hi", "a", "a", source="f:3"),
        Comparison("Hi", "a", "b", source="f:4"),
    ]
    items, report = encode(records, "comparisons", chat)
    assert report.dropped == {"empty response": ["f:1", "f:2"], "identical pair": ["f:3"]} and report.kept == 1
    assert "3 dropped: 2 empty response (f:1, f:2), 1 identical pair (f:3)" in str(report)
    assert len(items) == 1 and len(str(report).splitlines()) == 2


def test_a_ranking_loses_its_empty_response_and_is_kept(chat):
    items, report = encode([Ranking("Hi", ("a", "", "b"), (3, 1, 2), source="f:1")], "comparisons", chat)
    assert texts(chat, items[0]) == ["a", "b"] and items[0].pairs[0][:2] == (1, 0)
    assert report.thinned == {"empty response": ["f:1"]} and items[0].pairs[0].weight == 1.0
    items, _ = encode([Ranking("Hi", ("a", "", "b"), (3, 1, 2))], "rankings", chat)
    assert items[0].ranks == (3, 2) and texts(chat, items[0]) == ["a", "b"]


def test_the_account_names_what_was_given(chat):
    ranking, pair = Ranking("Hi", ("a", "b"), (1, 2)), Comparison("Ho", "a", "b")
    assert str(encode([ranking], "comparisons", chat)[1]).startswith("1 ranking read")
    assert str(encode([pair], "comparisons", chat)[1]).startswith("1 comparison read")
    assert str(encode([ranking, pair], "comparisons", chat)[1]).startswith("2 comparisons and rankings read")


def test_equal_texts_in_a_ranking_are_no_pair(chat):
    items, report = encode([Ranking("Hi", ("a", "a", "b"), (1, 2, 3), source="f:1")], "comparisons", chat)
    assert len(items[0].pairs) == 2 and items[0].pairs[0].weight == 0.5
    assert report.thinned == {"identical pair": ["f:1"]}


def test_when_nothing_is_left_it_is_an_error_with_the_counts(chat):
    with pytest.raises(
        DataError, match=r"no record is left to train on. 1 comparison read, 0 kept(.|\n)*identical pair"
    ):
        encode([Comparison("Hi", "a", "a")], "comparisons", chat)


def test_one_class_of_judgements_is_a_warning_in_the_report(chat):
    _, report = encode([Judgement("Hi", "a", True), Judgement("Ho", "b", True)], "judgements", chat)
    assert report.warnings and str(report).splitlines()[-1].startswith("Warning: all 2 judgements are desirable")
    assert not encode([Judgement("Hi", "a", True), Judgement("Ho", "b", False)], "judgements", chat)[1].warnings


def test_records_of_another_kind_are_an_error(chat):
    with pytest.raises(DataError, match="f:1: a Judgement; comparisons are made of Comparison and Ranking records"):
        encode([Judgement("Hi", "a", True, source="f:1")], "comparisons", chat)


def test_lengths_that_leave_no_room_are_a_settings_error(chat):
    with pytest.raises(ConfigError, match="max_prompt_length is 20 and max_length 20"):
        encode([Demonstration("a", "b")], "demonstrations", chat, max_length=20, max_prompt_length=20)
    with pytest.raises(ConfigError, match="max_length is 1"):
        encode([Demonstration("a", "b")], "demonstrations", chat, max_length=1)
    with pytest.raises(ConfigError, match='truncate is "left"'):
        encode([Demonstration("a", "b")], "demonstrations", chat, truncate="left")


def test_a_conversation_that_the_template_refuses_is_named(tiny_tokenizer):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    chat = Chat(tiny_tokenizer, template=strict + tiny_tokenizer.chat_template)
    bad = ({"role": "system", "content": "x"}, {"role": "user", "content": "y"})
    with pytest.raises(DataError, match="^f:2: the chat template refuses"):
        encode([Demonstration("a", "b", source="f:1"), Demonstration(bad, "b", source="f:2")], "demonstrations", chat)
    with pytest.raises(DataError, match="^f:2: the chat template refuses"):
        encode([Prompt("a", source="f:1"), Prompt(bad, source="f:2")], "prompts", chat)


def test_a_stop_token_quoted_in_a_response_is_counted(chat):
    _, report = encode([Demonstration("Hi", "a<|im_end|>b"), Demonstration("Hi", "a")], "demonstrations", chat)
    assert report.stop_in_text == 1 and "1 response with a stop token inside their text" in str(report)


def test_the_reports_numbers_are_json(chat):
    import json

    _, report = encode([Comparison("Hi", "a", "b"), Comparison("Hi", "a", "a")], "comparisons", chat)
    counts = json.loads(json.dumps(report.counts()))
    assert counts["read"] == 2 and counts["dropped"] == {"identical pair": 1}


# -- real data -------------------------------------------------------------------------------------------------------


def test_real_comparisons_fit_and_are_all_counted(shared_data):
    from transformers import AutoTokenizer

    chat = Chat(AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "minimind-6400"))
    records = read_records(shared_data / "preferences" / "hh_rlhf.jsonl.gz", "comparisons", limit=1000)
    records += read_records(shared_data / "preferences" / "oasst_zh_ranked.jsonl.gz", "comparisons", limit=200)
    items, report = encode_records(records, "comparisons", chat, max_length=256)
    assert report.read == 1200 == report.kept + report.dropped_count and report.truncated_prompt > 100
    for item in items:
        assert all(len(row.ids) <= 256 and row.response_mask.any() for row in item.rows)
        firsts = {tuple(row.ids[~row.response_mask].tolist()) for row in item.rows}
        assert len(firsts) == 1, "all responses of a prompt follow the same ids"
        assert all(row.ids[-1] == chat.stop_token_ids[0] for row in item.rows if row.finished)
