"""Public shapes: each is detected, and says what its documentation says it says."""

import json
import warnings

import pytest

from palate.data.formats import convert_file, convert_record, detect_format
from palate.data.records import Comparison, Demonstration, Judgement, Prompt, Ranking, read_records
from palate.errors import DataError

U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
B, S = {"role": "assistant", "content": "What"}, {"role": "system", "content": "Be kind."}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What"}
UF = {
    "instruction": "Hi",
    "completions": [
        {"response": "x", "overall_score": 2.0},
        {"response": "y", "overall_score": "7.5"},
        {"response": "z", "overall_score": 2},
    ],
}

CASES = [
    # shape, object, kind, expected
    ("trl", {"prompt": "Hi", "completion": "Hello"}, "demonstrations", Demonstration("Hi", "Hello")),
    ("trl", {"prompt": [U], "completion": [A]}, "demonstrations", Demonstration((U,), "Hello")),
    ("trl", {"prompt": [U], "completion": [A, U, B]}, "demonstrations", Demonstration((U, A, U), "What")),
    ("trl", {"prompt": "Hi", "completion": "Hello", "label": True}, "judgements", Judgement("Hi", "Hello", True)),
    ("trl", {"prompt": [U], "completion": [A], "label": False}, "judgements", Judgement((U,), "Hello", False)),
    ("trl", {"prompt": [U], "chosen": [A], "rejected": [B]}, "comparisons", Comparison((U,), "Hello", "What")),
    ("trl", {"chosen": [S, U, A], "rejected": [S, U, B]}, "comparisons", Comparison((S, U), "Hello", "What")),
    ("trl", {"prompt": "Hi", "chosen": [U, A], "rejected": [U, B]}, "comparisons", Comparison((U,), "Hello", "What")),
    ("trl", {"chosen": [U, A], "rejected": [U, B], "x": 1}, "prompts", Prompt((U,), {"x": 1})),
    ("trl", {"text": "Once."}, "demonstrations", Demonstration("", "Once.")),
    (
        "palate",
        {"prompt": "Hi", "chosen": "Hello", "rejected": "What"},
        "comparisons",
        Comparison("Hi", "Hello", "What"),
    ),
    ("palate", {"prompt": [U], "chosen": "a", "rejected": "b"}, "comparisons", Comparison((U,), "a", "b")),
    (
        "palate",
        {"prompt": "Hi", "responses": ["a", "b"], "ranks": [2, 1]},
        "comparisons",
        Ranking("Hi", ("a", "b"), (2, 1)),
    ),
    ("openai", {"messages": [S, U, A]}, "demonstrations", Demonstration((S, U), "Hello", True)),
    ("openai", {"messages": [U, A, U]}, "demonstrations", Demonstration((U,), "Hello", True)),
    ("openai", {"messages": [U, A, U, A]}, "prompts", Prompt((U, A, U))),
    (
        "openai",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, A]},
        "demonstrations",
        Demonstration((U,), "Hello", True),
    ),
    (
        "openai",
        {"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [B]},
        "comparisons",
        Comparison((U,), "Hello", "What"),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."},
        "demonstrations",
        Demonstration((S, U), "Hello", True),
    ),
    ("sharegpt", {"conversations": [U, A]}, "demonstrations", Demonstration((U,), "Hello", True)),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "What"},
        },
        "comparisons",
        Comparison((U,), "Hello", "What"),
    ),
    ("sharegpt", {"conversations": [U, A], "kto_tag": True}, "judgements", Judgement((U,), "Hello", True)),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, "demonstrations", Demonstration("Hi", "Hello")),
    (
        "alpaca",
        {"instruction": "Add", "input": "1 2", "output": "3"},
        "demonstrations",
        Demonstration("Add\n\n1 2", "3"),
    ),
    (
        "alpaca",
        {"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"]], "system": "Be kind."},
        "demonstrations",
        Demonstration((S, U, A, U), "Hello"),
    ),
    ("alpaca", {"instruction": "Hi", "chosen": "a", "rejected": "b"}, "comparisons", Comparison("Hi", "a", "b")),
    ("alpaca", {"instruction": "Hi", "output": ["a", "b"]}, "comparisons", Comparison("Hi", "a", "b")),
    ("alpaca", {"instruction": "Hi", "output": ["a", "b", "c"]}, "rankings", Ranking("Hi", ("a", "b", "c"), (1, 2, 3))),
    ("hh_rlhf", HH, "comparisons", Comparison((U,), "Hello", "What")),
    ("hh_rlhf", HH, "prompts", Prompt((U,))),
    ("hh_rlhf", HH, "demonstrations", Demonstration((U,), "Hello")),
    ("ultrafeedback", UF, "rankings", Ranking("Hi", ("x", "y", "z"), (2, 1, 2))),
    ("ultrafeedback", UF, "comparisons", Ranking("Hi", ("x", "y", "z"), (2, 1, 2))),
    ("ultrafeedback", UF, "demonstrations", Demonstration("Hi", "y")),
    (
        "history",
        {"history": [["Hi", "Hello"]], "prompt": "Hi", "ranked_responses": ["a", "b"]},
        "rankings",
        Ranking((U, A, U), ("a", "b"), (1, 2)),
    ),
    ("history", {"history": [], "prompt": "Hi", "response": "Hello"}, "demonstrations", Demonstration("Hi", "Hello")),
    (
        "numbered",
        {"prompt": "Hi", "response_1": "a", "response_2": "b", "preferred": 2},
        "comparisons",
        Comparison("Hi", "b", "a"),
    ),
    (
        "numbered",
        {"prompt": "Hi", "response_a": "a", "response_b": "b", "winner": "tie"},
        "comparisons",
        Ranking("Hi", ("a", "b"), (1, 1)),
    ),
    ("question", {"question": "2+2?", "answer": "4"}, "prompts", Prompt("2+2?", {"answer": "4"})),
    (
        "question",
        {"question": "2+2?", "solution": "It is 4", "answer": "4"},
        "demonstrations",
        Demonstration("2+2?", "It is 4"),
    ),
]


@pytest.mark.parametrize(("shape", "record", "kind", "expected"), CASES)
def test_a_shape_is_detected_and_read(shape, record, kind, expected):
    assert detect_format(record) == shape
    assert convert_record(record, kind, "") == [expected]
    assert convert_record(record, kind, "", format=shape) == [expected]


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        ({"chosen": "the cat sat", "rejected": "the cat ran"}, "comparisons", 'no "prompt" field'),
        ({"chosen": [U, A], "rejected": [S, U, B]}, "comparisons", "differ before their last turn"),
        ({"messages": [S, U]}, "demonstrations", "no assistant turn after a user turn. Found the roles: system, user"),
        ({"messages": [U, A]}, "comparisons", "hold demonstrations, not comparisons"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, A]}, "prompts", "Only text can be read"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "prompts", "no user turn"),
        ({"instruction": "Hi", "output": "a"}, "comparisons", "hold demonstrations, not comparisons"),
        ({"history": [["a"]], "prompt": "Hi", "response": "a"}, "demonstrations", "Expected [user, assistant]"),
        (
            {"prompt": "Hi", "response_1": "a", "response_2": "b", "preferred": 3},
            "comparisons",
            '"preferred" is a number: 3',
        ),
    ],
)
def test_what_a_shape_cannot_say_is_an_error_with_its_place(record, kind, expected):
    with pytest.raises(DataError, match="f.jsonl:7: ") as error:
        convert_record(record, kind, "f.jsonl:7")
    assert expected in str(error.value)


def test_hh_transcripts_keep_every_turn_and_quote_nothing():
    text = "\n\nHuman: a\n\nsecond paragraph\n\nAssistant: b\n\nHuman: c\n\nAssistant: The Human: said"
    found = convert_record({"chosen": text, "rejected": text[:-4] + "sang"}, "comparisons", "")[0]
    assert [m["content"] for m in found.prompt] == ["a\n\nsecond paragraph", "b", "c"]
    assert (found.chosen, found.rejected) == ("The Human: said", "The Human: sang")


def test_known_flaws_of_a_public_data_set_are_skipped_with_a_count(tmp_path):
    path = tmp_path / "hh.jsonl"
    other = {"chosen": HH["chosen"], "rejected": "\n\nHuman: Ho\n\nAssistant: What"}
    path.write_text("".join(json.dumps(o) + "\n" for o in (HH, other, HH, other)))
    with pytest.warns(
        UserWarning, match=r"skipped 2: 2: the transcripts differ .*hh.jsonl:2, .*hh.jsonl:4.* of 4 read"
    ):
        assert len(read_records(path, "comparisons")) == 2
    path.write_text(json.dumps(other))
    with pytest.raises(DataError, match="no record could be used; skipped 1"):
        read_records(path, "comparisons")


def test_convert_file_streams_counts_and_never_overwrites(tmp_path):
    source, target = tmp_path / "a.jsonl", tmp_path / "out" / "b.jsonl.gz"
    source.write_text("".join(json.dumps({"instruction": str(i), "output": "x"}) + "\n" for i in range(5)))
    report = convert_file(source, target, "alpaca", "demonstrations")
    assert (report.read, report.written) == (5, 5) and str(report) == "5 read (alpaca), 5 demonstrations, none skipped"
    assert [r.prompt for r in read_records(target, "demonstrations", format="palate")] == list("01234")
    before = target.read_bytes()
    with pytest.raises(DataError, match="exists and is not overwritten"):
        convert_file(source, target, "alpaca", "demonstrations")
    assert target.read_bytes() == before


def test_rankings_among_comparisons_are_counted_as_what_they_are(tmp_path):
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]},
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = str(convert_file(tmp_path / "r.jsonl", tmp_path / "c.jsonl", "auto", "comparisons"))
    assert "2 comparisons (2 of them rankings, which stand for all their pairs), none skipped" in said
    assert "of them" not in str(convert_file(tmp_path / "r.jsonl", tmp_path / "k.jsonl", "auto", "rankings"))


def test_convert_file_takes_records_one_by_one(tmp_path, monkeypatch):
    """A fault in the third record is met after the first two went out, so nothing is held back."""
    import io
    import sys

    source = tmp_path / "a.jsonl"
    source.write_text('{"instruction": "1", "output": "x"}\n{"instruction": "2", "output": "x"}\n{"instruction": 3}\n')
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(DataError, match="a.jsonl:3"):
        convert_file(source, "-", "alpaca", "demonstrations")
    assert [json.loads(line)["prompt"] for line in out.getvalue().splitlines()] == ["1", "2"]


def test_a_failed_conversion_leaves_no_file(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"instruction": "1", "output": "x"}\n{"instruction": 3}\n')
    with pytest.raises(DataError):
        convert_file(source, tmp_path / "b.jsonl", "auto", "demonstrations")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("preferences/hh_rlhf", "comparisons", 6057),
        ("preferences/politeness_ai", "comparisons", 832),
        ("preferences/oasst_zh_ranked", "rankings", 547),
        ("preferences/oasst_zh_ranked", "comparisons", 547),
        ("preferences/llmbar", "comparisons", 351),
        ("sft/oasst_zh", "demonstrations", 554),
        ("sft/self_instruct_seed", "demonstrations", 175),
        ("verifiable/gsm8k", "prompts", 7473),
        ("lm/tinystories", "demonstrations", 1955),
    ],
)
def test_real_files_are_read_whole(shared_data, name, kind, count):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_records(shared_data / f"{name}.jsonl.gz", kind)) == count


def test_real_rankings_have_their_history(shared_data):
    found = read_records(shared_data / "preferences" / "oasst_zh_ranked.jsonl.gz", "rankings")
    assert any(not isinstance(r.prompt, str) for r in found) and all(r.ranks[0] == 1 for r in found)
    assert max(len(r.responses) for r in found) == 10
