"""Corrections: what was changed, found by a diff of words; the tokens that stand there; records that say so."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, processors

from palate.config import load_settings
from palate.data.chat import Chat
from palate.data.collate import collate, encode_records
from palate.data.formats import convert_record, detect_format
from palate.data.records import Comparison, SegmentedComparison, read_records, write_records
from palate.data.segments import (
    changed_spans,
    comparison_to_correction,
    correction_to_comparison,
    found_spans,
    moved_spans,
)
from palate.errors import DataError, ModelError
from palate.stage.records import read_sides
from palate.texts import check_tokens

# --- the diff -------------------------------------------------------------------------------------------------------

WORDS = [
    "a",
    "the",
    "red",
    "cat",
    "cats",
    "don't",
    "3.5",
    "1,000",
    "Müller",
    "猫",
    "が",
    "好き",
    "\U00020000",
    "e\u0301",
]
pieces = st.sampled_from([*WORDS, " ", "  ", "\n", "\n\n", ".", ",", "!", "-", "’", "。", "\u3000"])
texts = st.lists(pieces, max_size=12).map("".join) | st.text(max_size=12)


def without(text, spans):
    kept, end = [], 0
    for start, stop in spans:
        kept.append(text[end:start])
        end = stop
    return [*kept, text[end:]]


@given(texts, texts)
def test_what_is_not_changed_is_the_same_on_both_sides(chosen, rejected):
    """Part by part, so that every character that differs is in a span; spans are in order and apart, and there are as
    many on either side, never empty on both."""
    assume(chosen != rejected)
    here, there = changed_spans(chosen, rejected)
    assert here and len(here) == len(there)
    assert without(chosen, here) == without(rejected, there)
    for text, spans in ((chosen, here), (rejected, there)):
        edges = [edge for span in spans for edge in span]
        assert edges == sorted(edges) and edges[0] >= 0 and edges[-1] <= len(text)
    for one, two in zip(here, there, strict=True):
        assert chosen[slice(*one)] != rejected[slice(*two)]


@given(texts, texts)
def test_exchanging_the_sides_exchanges_the_spans(chosen, rejected):
    assume(chosen != rejected)
    assert changed_spans(chosen, rejected) == changed_spans(rejected, chosen)[::-1]


@given(st.lists(st.sampled_from(["red", "cat", "sat", "down"]), min_size=2, max_size=8), st.data())
def test_a_word_put_in_is_a_span_of_one_side_and_a_seam_of_the_other(words, data):
    place = data.draw(st.integers(0, len(words)))
    before, after = " ".join(words), " ".join([*words[:place], "zebra", *words[place:]])
    here, there = changed_spans(after, before)
    assert len(here) == 1 and after[slice(*here[0])].strip() == "zebra"
    assert there[0][0] == there[0][1]


@given(texts)
def test_equal_texts_are_refused(text):
    with pytest.raises(DataError, match="nothing was changed"):
        changed_spans(text, text)


SHOWN = [  # chosen, rejected, the changed parts of both
    ("The cat is red.", "The dog is red.", ["cat"], ["dog"]),
    ("It is 3.6 m, not 4.", "It is 3.5 m, not 4.", ["3.6"], ["3.5"]),
    ("I don't know", "I do know", ["don't"], ["do"]),
    ("A cat.", "A cat. It runs.", [""], [" It runs."]),
    ("Well, a cat.", "a cat.", ["Well, "], [""]),
    ("a  b", "a b", [" "], [""]),
    ("这是红色的猫。", "这是蓝色的狗。", ["红", "猫"], ["蓝", "狗"]),
    ("私は猫が好きです", "私は犬が好きです", ["猫"], ["犬"]),
    ("x", "", ["x"], [""]),
    ("Yes", "No", ["Yes"], ["No"]),
]


@pytest.mark.parametrize(("chosen", "rejected", "here", "there"), SHOWN)
def test_a_diff_is_of_whole_words_and_of_single_chinese_and_japanese_characters(chosen, rejected, here, there):
    spans = changed_spans(chosen, rejected)
    assert [chosen[a:b] for a, b in spans[0]] == here
    assert [rejected[a:b] for a, b in spans[1]] == there


# --- records --------------------------------------------------------------------------------------------------------


def test_spans_are_kept_in_order_and_as_one_where_they_overlap_or_touch():
    def kept(*spans):
        return SegmentedComparison("Hi", "0123456789", "x", chosen_spans=list(map(list, spans))).chosen_spans

    assert kept((6, 8), (0, 2)) == ((0, 2), (6, 8))
    assert kept((0, 4), (2, 3), (3, 6)) == ((0, 6),)
    assert kept((1, 3), (3, 5)) == ((1, 5),)
    assert kept((3, 3), (3, 5), (1, 3), (9, 9), (9, 9)) == ((1, 5), (9, 9))
    assert kept((1, 3), (3, 3)) == ((1, 3), (3, 3))  # the seam is about what follows
    assert kept((0, 4), (2, 2)) == ((0, 4),)
    assert kept() == ()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), max_size=6))
def test_kept_spans_mark_the_same_characters_and_are_kept_again(spans):
    record = SegmentedComparison("Hi", "012345678", "x", chosen_spans=spans)
    assert {i for a, b in record.chosen_spans for i in range(a, b)} == {i for a, b in spans for i in range(a, b)}
    assert replace(record).chosen_spans == record.chosen_spans


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([[0, 4]], r'"chosen_spans"\[0\] is \[0, 4\], and "chosen" has 3 characters. Expected 0 <= start <= end <= 3'),
        ([[0, 1], [2, 1]], r'"chosen_spans"\[1\] is \[2, 1\]'),
        ([[-1, 1]], r"is \[-1, 1\]"),
        ([[0, 1, 2]], r"Expected \[start, end\], two whole numbers"),
        ([0, 1], r'"chosen_spans"\[0\] is a number: 0. Expected \[start, end\]'),
        ([[0.0, 1]], r"Expected \[start, end\], two whole numbers"),
        ([[False, 1]], r"two whole numbers"),
        ("0-1", r'"chosen_spans" is a string: "0-1". Expected a list'),
    ],
)
def test_a_wrong_span_is_named_with_its_place(spans, said, tmp_path):
    file = tmp_path / "c.jsonl"
    good = {"prompt": "Hi", "chosen": "abc", "rejected": "abd"}
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "chosen_spans": spans}) + "\n")
    with pytest.raises(DataError, match=f"c.jsonl:2: .*{said}"):
        read_records(file, "corrections")


U = {"role": "user", "content": "Hi"}
RECORDS = [
    SegmentedComparison("Hi", "a red cat", "a cat", annotator="ann"),
    SegmentedComparison("Hi", "a cat", "a dog", ((2, 5),), ((2, 5),)),
    SegmentedComparison((U,), "a cat", "a dog", (), None),
]


def test_written_corrections_are_read_back_as_the_same(tmp_path):
    file = tmp_path / "c.jsonl"
    write_records(file, RECORDS)
    assert [replace(record, source="") for record in read_records(file, "corrections")] == RECORDS


def test_corrections_are_read_as_comparisons_and_comparisons_as_corrections(tmp_path):
    file = tmp_path / "c.jsonl"
    write_records(file, RECORDS)
    plain = read_records(file, "comparisons")
    assert plain == [correction_to_comparison(record) for record in read_records(file, "corrections")]
    assert isinstance(plain[0], Comparison) and plain[0].annotator == "ann"
    write_records(tmp_path / "plain.jsonl", plain)
    again = read_records(tmp_path / "plain.jsonl", "corrections")
    assert again[0].chosen_spans is None and found_spans(again[0]) == (((1, 5),), ((1, 1),))
    assert [replace(record, source="") for record in again] == [
        replace(comparison_to_correction(pair), source="") for pair in plain
    ]


@pytest.mark.parametrize("fact", [{"margin": 1.0}, {"probability": 0.9}])
def test_a_comparison_with_a_fact_that_corrections_have_no_place_for_is_refused(fact):
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b", **fact}
    with pytest.raises(
        DataError, match=f'f:1: a comparison with a "{next(iter(fact))}" cannot be read as a correction'
    ):
        convert_record(pair, "corrections", "f:1")


def test_the_side_without_spans_is_found_by_the_diff():
    record = SegmentedComparison("Hi", "a red cat", "a blue cat", None, ((0, 1),))
    assert found_spans(record) == (((2, 5),), ((0, 1),))
    with pytest.raises(DataError, match="f:1: the two texts are equal"):
        found_spans(SegmentedComparison("Hi", "a", "a", source="f:1"))


INNER = {"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
RLHF_V = {"ds_name": "RLHF-V", "image": {"bytes": "..."}, "text": json.dumps(INNER), "origin_split": "{}", "idx": 3}


@pytest.mark.parametrize("found", [RLHF_V, {**RLHF_V, "text": INNER}, {**INNER, "image": "x", "idx": 3}], ids=str)
def test_rlhf_v_is_read_as_every_kind_that_it_holds(found):
    assert detect_format(found) == "rlhf_v"
    assert convert_record(found, "corrections", "f:1") == [
        SegmentedComparison("What is it?", "A cat.", "A dog.", source="f:1")
    ]
    assert convert_record(found, "comparisons", "") == [Comparison("What is it?", "A cat.", "A dog.")]
    assert convert_record(found, "demonstrations", "")[0].response == "A cat."
    prompt = convert_record(found, "prompts", "")[0]
    assert prompt.prompt == "What is it?" and prompt.fields["idx"] == 3 and "image" not in prompt.fields
    with pytest.raises(DataError, match="RLHF-V records hold corrections, not judgements"):
        convert_record(found, "judgements", "f:1")


def test_a_text_that_is_no_rlhf_v_record_stays_what_it_was():
    for text in ("Once.", "{once}", '{"question": "Hi"}', "[1]"):
        assert detect_format({"text": text}) == "trl"
    assert detect_format({"question": "Hi", "answer": "Yes"}) == "question"
    with pytest.raises(DataError, match='f:1: "text" is a string: "Once.". Expected an object with "question"'):
        convert_record({"text": "Once."}, "corrections", "f:1", format="rlhf_v")


def test_corrections_come_from_the_comparisons_of_other_shapes_but_not_from_rankings():
    hh = {"chosen": "\n\nHuman: Hi\n\nAssistant: A cat", "rejected": "\n\nHuman: Hi\n\nAssistant: A dog"}
    assert convert_record(hh, "corrections", "") == [SegmentedComparison((U,), "A cat", "A dog")]
    scored = {
        "instruction": "Hi",
        "completions": [{"response": r, "overall_score": s} for r, s in (("a", 1), ("b", 2))],
    }
    with pytest.raises(DataError, match="f:1: a ranking says which response is better, not what was corrected"):
        convert_record(scored, "corrections", "f:1")


# --- tokens ---------------------------------------------------------------------------------------------------------


def encoded(chat, *records, max_length=200, **how):
    items, report = encode_records(records, "corrections", chat, max_length=max_length, **how)
    return collate(items, "corrections"), items, report


def changed_texts(chat, batch, row):
    """The changed tokens of a row, as the vocabulary names them."""
    marked = batch.tokens.extras["changed"][row]
    assert not (marked & ~batch.tokens.response_mask[row]).any()
    return chat.tokenizer.convert_ids_to_tokens(batch.tokens.ids[row][marked].tolist())


def test_tokens_of_both_sides_are_marked_and_the_seam_marks_the_token_after_it(tiny_tokenizer):
    chat = Chat(tiny_tokenizer)
    batch, items, report = encoded(chat, SegmentedComparison("Hi", "a q z", "a q jj z"))
    assert changed_texts(chat, batch, int(batch.chosen[0])) == ["Ġ"]  # before z: where jj was taken out
    assert changed_texts(chat, batch, int(batch.rejected[0])) == ["Ġ", "j", "j"]
    assert batch.tokens.extras["changed"].dtype == torch.bool
    assert report.kept == report.pairs == 1 and "2 responses, 1 pair" in str(report)
    assert items[0].rows[0].changed.sum() == 1


def test_the_end_of_text_is_changed_only_where_the_text_now_ends_earlier(tiny_tokenizer):
    chat = Chat(tiny_tokenizer)
    batch, *_ = encoded(chat, SegmentedComparison("Hi", "q z", "q z jj"), SegmentedComparison("Hi", "q z", "q x"))
    end = tiny_tokenizer.eos_token
    assert changed_texts(chat, batch, 0) == [end]
    assert changed_texts(chat, batch, 1) == ["Ġ", "j", "j"]
    assert changed_texts(chat, batch, 2) == ["z"] and changed_texts(chat, batch, 3) == ["x"]
    assert (batch.tokens.ids[batch.tokens.attention_mask] == tiny_tokenizer.eos_token_id).sum() >= 4


@st.composite
def texts_with_spans(draw):
    alphabet = st.characters(codec="utf-8", exclude_characters="\x00")
    text = draw(st.text(alphabet, min_size=1, max_size=12) | st.lists(pieces, min_size=1, max_size=8).map("".join))
    assume(text.strip())
    edges = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return text, tuple(zip(edges[::2], edges[1::2], strict=False))


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("template", [None, "none"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=texts_with_spans())
def test_a_changed_token_is_one_whose_bytes_overlap_those_of_a_span(tiny_tokenizer, template, trimmed, found):
    """Byte-level tokens are pieces of the text's UTF-8, so their places can be counted without the tokenizer's offsets;
    ``trimmed``: its offsets leave white space out, as GPT-2's do."""
    text, spans = found
    spans = SegmentedComparison("Hi", text, "", chosen_spans=spans).chosen_spans
    if trimmed:
        tiny_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    chat = Chat(tiny_tokenizer, template)
    row = chat.encode_many(["Hi"], [[text]], spans=[[spans]])[0]
    pieces = [len(piece) for piece in tiny_tokenizer.convert_ids_to_tokens(row.responses[0][:-1])]  # bytes each
    assert sum(pieces) == len(text.encode())
    wanted, at = [False] * (len(pieces) + 1), 0
    starts = [len(text[:a].encode()) for a, _ in spans]
    ends = [len(text[:b].encode()) for _, b in spans]
    for i, size in enumerate(pieces):
        for a, b in zip(starts, ends, strict=True):
            # A seam belongs to the token that holds the byte after it.
            wanted[i] |= (at < b and at + size > a) if a < b else at <= a < at + size
        at += size
    wanted[-1] = any(a == b == at for a, b in zip(starts, ends, strict=True))
    assert row.changed == [wanted]


def test_marks_survive_a_template_that_strips_and_a_prompt_that_has_written_the_beginning(tiny_tokenizer):
    assert isinstance(tiny_tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.PreTokenizer)
    assert moved_spans(((0, 3), (4, 5)), "  q z  ", "q z") == ((0, 1), (2, 3))
    assert moved_spans(((5, 7),), "  q z  ", "q z") == ((3, 3),)
    assert moved_spans(((0, 7), (8, 9)), "<think>q z", "q z\n") == ((0, 0), (1, 2))
    assert moved_spans(((0, 1),), "q", "qq: q.", "qq: ") == ((4, 5),)
    template = (
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    chat = Chat(tiny_tokenizer, template)
    batch, *_ = encoded(chat, SegmentedComparison("Hi", "  q z  ", "  q x  "))
    assert changed_texts(chat, batch, 0) == ["z"] and changed_texts(chat, batch, 1) == ["x"]


@pytest.mark.parametrize("max_length", [5, 9, 12, 40])
def test_marks_survive_truncation(tiny_tokenizer, max_length):
    """Prompts are cut at their beginning, responses at their end; the marks stay on their tokens."""
    chat = Chat(tiny_tokenizer, "none")
    batch, *_ = encoded(
        chat, SegmentedComparison("zzzzzz", "qqxqqqqq", "qqjqqq", ((2, 3),), ((2, 3),)), max_length=max_length
    )
    for row, sign in ((0, "x"), (1, "j")):
        assert changed_texts(chat, batch, row) == [sign]
    assert batch.tokens.attention_mask.sum(-1).max() <= max_length


def test_a_cut_that_leaves_no_difference_drops_the_pair_and_one_that_leaves_no_mark_keeps_it(tiny_tokenizer):
    chat = Chat(tiny_tokenizer, "none")
    same = SegmentedComparison("zz", "qqqqqx", "qqqqqj", source="f:1")
    with pytest.raises(DataError, match=r"identical pair once cut \(f:1\)"):
        encoded(chat, same, max_length=6, truncate="right")
    shorter = SegmentedComparison("zz", "qqqqqx", "qqq", ((5, 6),), ((3, 3),))
    batch, *_ = encoded(chat, shorter, max_length=7, truncate="right")
    assert changed_texts(chat, batch, 0) == [] and changed_texts(chat, batch, 1) == [tiny_tokenizer.eos_token]


def test_the_same_text_may_be_changed_in_different_places(tiny_tokenizer):
    """Two corrections of one prompt share a text; each keeps its own marks."""
    chat = Chat(tiny_tokenizer)
    batch, items, _ = encoded(chat, SegmentedComparison("Hi", "q z", "q x"), SegmentedComparison("Hi", "q z", "j z"))
    assert len(items) == 2 and batch.tokens.group.tolist() == [0, 0, 1, 1]
    assert changed_texts(chat, batch, 0) == ["z"] and changed_texts(chat, batch, 2) == ["q"]


def test_empty_and_equal_texts_are_dropped_with_their_reason(tiny_tokenizer):
    records = [
        SegmentedComparison("Hi", "q", "z"),
        SegmentedComparison("Hi", "", "z", source="f:2"),
        SegmentedComparison("Hi", "q", "q", source="f:3"),
    ]
    *_, report = encoded(Chat(tiny_tokenizer), *records)
    assert report.dropped == {"empty response": ["f:2"], "identical pair": ["f:3"]}


def test_marks_follow_their_rows_through_selection(tiny_tokenizer):
    batch, *_ = encoded(Chat(tiny_tokenizer), *RECORDS)
    part = batch.select(torch.tensor([3, 2]))
    width = part.tokens.ids.shape[1]
    assert torch.equal(part.tokens.extras["changed"], batch.tokens.extras["changed"][[3, 2], :width])


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_is_refused(tiny_tokenizer):
    chat = Chat(tiny_tokenizer)

    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(tiny_tokenizer, name)

        def __call__(self, *args, **options):
            return tiny_tokenizer(*args, **options)

    chat.tokenizer = chat._tokenizing.tokenizer = Slow()
    with pytest.raises(ModelError, match="does not say which characters its tokens stand for"):
        encoded(chat, RECORDS[0])


# --- from the command line --------------------------------------------------------------------------------------------


def test_check_shows_what_was_changed(tiny_tokenizer, tmp_path, capsys):
    from palate.console import print_check

    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    write_records(tmp_path / "c.jsonl", [SegmentedComparison("Hi", "q zz j", "q j")])
    found = check_tokens(str(tmp_path / "model"), str(tmp_path / "c.jsonl"), kind="corrections")
    print_check(found)
    said = capsys.readouterr().out
    assert "3 of them changed" in said and "<<changed>>" in said
    assert "[[q|<< |z|z>>| |j|<|im_end|>]]" in said
    assert "[[q|<< >>|j|<|im_end|>]]" in said
    assert sum(found.to_dict()["rows"][0]["changed"]) == 3
    write_records(tmp_path / "d.jsonl", [Comparison("Hi", "q", "z")])
    print_check(check_tokens(str(tmp_path / "model"), str(tmp_path / "d.jsonl"), kind="comparisons"))
    assert "changed" not in capsys.readouterr().out


def test_a_file_of_another_kind_is_named_with_the_methods_that_read_it(tmp_path):
    (tmp_path / "j.jsonl").write_text('{"prompt": "Hi", "response": "a", "desirable": true}\n')
    given = {"model": "m", "out": str(tmp_path / "out"), "data": {"train": str(tmp_path / "j.jsonl")}}
    with pytest.raises(DataError, match=r"ddpo reads corrections, and .*j.jsonl looks like judgements.*kto"):
        read_sides(load_settings("ddpo", settings=given))
