"""Files that were read wrongly, in part, or with a traceback; each test is named after what went wrong."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from palate.data.files import rows
from palate.data.ratings import convert_ratings, read_ratings
from palate.data.records import read_records, write_records
from palate.errors import DataError, PalateError
from palate.feedback.exchange import read_file
from palate.feedback.items import read_candidates
from palate.stage.records import _read

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And?"},
]


def file_of(folder, *objects, name="data.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(each) for each in objects))
    return path


# --- what was lost without a word -------------------------------------------------------------------------------


def test_a_second_list_in_a_file_is_not_left_out(tmp_path):
    (tmp_path / "two.json").write_text('[{"prompt": "a"}]\n[{"prompt": "b"}]\n')
    with pytest.raises(DataError, match="two.json:2: .*after the list's end"):
        list(rows(tmp_path / "two.json"))


def test_the_first_of_two_columns_of_one_name_is_not_left_out(tmp_path):
    (tmp_path / "data.csv").write_text("prompt,response,response\na,b,c\n")
    with pytest.raises(DataError, match='data.csv:1: two columns are named "response"'):
        list(rows(tmp_path / "data.csv"))


@pytest.mark.parametrize("name", ["input", "system"])
def test_an_input_that_is_no_text_is_refused_not_left_out(tmp_path, name):
    path = file_of(tmp_path, {"instruction": "Add them.", "output": "6", name: [1, 2, 3]})
    with pytest.raises(DataError, match=f'data.jsonl:1: "{name}" is a list'):
        read_records(path, "demonstrations")


def test_rankings_among_comparisons_are_items_too(tmp_path):
    comparison, ranking = (
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "b", "responses": ["x", "y"], "ranks": [2, 1]},
    )
    found = read_candidates(str(file_of(tmp_path, comparison, ranking)), kind="gold")
    assert [(each.prompt, each.gold) for each in found] == [("a", {"ranks": [1, 2]}), ("b", {"ranks": [2, 1]})]


def test_rankings_among_comparisons_that_are_read_as_rankings_are_kept(tmp_path):
    """A file that begins with comparisons; every ranking in it was left out."""
    path = file_of(tmp_path, *({"prompt": "a", "chosen": "x", "rejected": "y"},
                               {"prompt": "b", "responses": ["x", "y"], "ranks": [2, 1]}))  # fmt: skip
    data = SimpleNamespace(prompt_words=None, format="auto", split="train", rename={})
    found = _read(SimpleNamespace(data=data), str(path), "rankings", None, print)
    assert [(each.prompt, each.ranks) for each in found] == [("a", (1, 2)), ("b", (2, 1))]


def test_sources_that_do_not_fit_are_refused_for_they_say_who_may_not_judge(tmp_path):
    row = {"prompt": "a", "responses": ["x", "y"], "sources": [{"annotator": "p-1"}]}
    with pytest.raises(DataError, match='data.jsonl:1: 1 "sources" of 2 "responses"'):
        read_candidates(str(file_of(tmp_path, row)))


# --- what was taken for something else --------------------------------------------------------------------------


def test_a_completion_without_an_answer_does_not_take_one_from_the_prompt(tmp_path):
    """The assistant's earlier "Hello." became the response."""
    path = file_of(tmp_path, {"prompt": TURNS, "completion": [{"role": "user", "content": "Well?"}], "label": True})
    with pytest.raises(DataError, match="Expected one turn, the assistant's"):
        read_records(path, "judgements")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": [TURNS[0]], "rejected": [TURNS[1]]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "human", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"input": {"messages": [TURNS[0]]}, "preferred_output": TURNS[:2], "non_preferred_output": [TURNS[1]]},
    ],
)  # fmt: skip
def test_what_the_user_says_is_no_response(tmp_path, row):
    with pytest.raises(DataError, match="Expected one turn, the assistant's"):
        read_records(file_of(tmp_path, row), "comparisons")


def test_a_field_named_prompt_beside_a_conversation_never_replaces_it(tmp_path):
    """UltraChat has both; converted, the prompt was its first message again."""
    path = file_of(tmp_path, {"prompt": "Hi", "prompt_id": "1", "messages": TURNS})
    records = read_records(path, "prompts")
    write_records(tmp_path / "out.jsonl", records)
    (back,) = read_records(tmp_path / "out.jsonl", "prompts")
    assert (back.prompt, back.fields) == (tuple(TURNS), {"prompt_id": "1"}) == (records[0].prompt, records[0].fields)


def test_a_gold_comparison_is_answered_by_its_likelier_side(tmp_path):
    row = {"prompt": "a", "chosen": "x", "rejected": "y"}
    lines = (row | {"probability": sure} for sure in (0.9, 0.1, 0.5))
    found = read_candidates(str(file_of(tmp_path, *lines)), kind="gold")
    assert [each.gold["ranks"] for each in found] == [[1, 2], [2, 1], [1, 1]]


def test_the_number_of_a_question_is_that_of_the_response_not_its_place(tmp_path):
    """Fields in another order, and numbered from 0: "clear_1" was given to whatever stood first."""
    for first, second in (("response_2", "response_1"), ("response_0", "response_1")):
        fields = {"prompt": "q", first: "other", second: "one"}
        said = {"clear_1": [{"value": 4, "user_id": "u"}]}
        (found,) = read_file(file_of(tmp_path, {"fields": fields, "responses": said}), "argilla").judged
        assert (found.responses, found.values) == (("other", "one"), {"clear": [None, 4]})


def test_a_rating_that_went_through_a_table_is_a_rating(tmp_path):
    said = {"clear_1": [{"value": 4.0, "user_id": "u"}], "clear_2": [{"value": 3.5, "user_id": "u"}]}
    fields = {"prompt": "q", "response_1": "a", "response_2": "b"}
    taken = read_file(file_of(tmp_path, {"fields": fields, "responses": said}), "argilla")
    assert [each.values for each in taken.judged] == [{"clear": [4, None]}]
    assert sum(taken.left_out.values()) == 1 and [q["type"] for q in taken.questions] == ["rating"]


def test_a_label_that_names_no_response_costs_itself_not_the_file(tmp_path):
    fields = {"prompt": "q", "response_1": "a", "response_2": "b"}
    lines = [{"fields": fields, "responses": {"better": [{"value": v, "user_id": "u"}]}} for v in
             ("response_1", "unsure", "response_2")]  # fmt: skip
    taken = read_file(file_of(tmp_path, *lines), "argilla")
    assert [each.values["better"]["choice"] for each in taken.judged] == [0, 1]
    assert dict(taken.left_out) == {'answers to "better" that are no choice': 1}
    assert [(q["id"], q["type"]) for q in taken.questions] == [("better", "compare")]


def test_a_prompt_under_another_name_is_not_taken_for_an_empty_one(tmp_path):
    chosen = {
        "from_name": "better",
        "to_name": "response_1,response_2",
        "type": "pairwise",
        "value": {"selected": "left"},
    }
    task = {"data": {"dialog": "q", "response_1": "a", "response_2": "b"}, "annotations": [{"result": [chosen]}]}
    with pytest.raises(DataError, match='no prompt in the data. Found: \'dialog\'.* "prompt": "" says so'):
        read_file(file_of(tmp_path, task), "label_studio")
    task["data"]["prompt"] = ""
    (judged,) = read_file(file_of(tmp_path, task), "label_studio").judged
    assert (judged.prompt, judged.responses) == ("", ("a", "b"))


# --- what ended in a traceback ----------------------------------------------------------------------------------


def test_numbers_beyond_a_batch_are_refused_where_they_are_read(tmp_path):
    """10**400 is no float, 1e300 no float32 (the loss would be infinite), 10**30 no int64."""
    row = {"prompt": "a", "chosen": "x", "rejected": "y"}
    for margin in (10**400, 1e300):
        with pytest.raises(DataError, match='data.jsonl:1: "margin" is .*Expected a finite number'):
            read_records(file_of(tmp_path, row | {"margin": margin}), "comparisons")
    with pytest.raises(DataError, match=r'"ranks"\[0\]'):
        read_records(file_of(tmp_path, {"prompt": "a", "responses": ["x", "y"], "ranks": [10**30, 1]}), "rankings")
    with pytest.raises(DataError, match="Expected a finite number"):
        list(read_ratings(file_of(tmp_path, {"prompt": "a", "response": "x", "rating": 10**400})))


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 100_000])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "list.json"])
def test_json_that_python_cannot_hold_is_named(tmp_path, name, text):
    row = '{"prompt": ' + text
    (tmp_path / name).write_text(f"[{row}" if name == "list.json" else row)
    with pytest.raises(DataError, match=name):
        list(rows(tmp_path / name))


def test_a_parquet_file_that_breaks_off_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"prompt": [f"question {i}" for i in range(100)]}), path, compression="none")
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    with pytest.raises(DataError, match="data.parquet: broken after row 0"):
        list(rows(path))


def test_standard_input_that_is_no_text_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "\xff"}\n'), encoding="utf-8"))
    with pytest.raises(DataError, match="stdin: not UTF-8 text"):
        list(rows("-"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": {"a": 1}, "response": "x", "rating": 1},
        {"prompt": "a", "response": ["x"], "rating": 1},
        {"prompt": "a", "response": "x", "rating": 1, "annotator": ["anna"]},
    ],
)
def test_a_rating_of_something_odd_is_named(tmp_path, row):
    with pytest.raises(DataError, match=r"data.jsonl:1: "):
        convert_ratings(file_of(tmp_path, row), tmp_path / "out.jsonl", "rankings")


def test_ratings_in_a_table_are_numbers(tmp_path):
    (tmp_path / "data.csv").write_text("prompt,response,rating\nq,a,4\nq,b,2.5\n")
    assert [each.rating for each in read_ratings(tmp_path / "data.csv")] == [4, 2.5]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("comparisons", {"instruction": "Do", "completions": [["a"], ["b"]]}),
        ("comparisons", {"prompt": 0.5, "chosen": TURNS[:2], "rejected": TURNS[:2]}),
        ("judgements", {"prompt": {"a": 1}, "completion": [TURNS[1]], "label": True}),
    ],
)
def test_a_record_of_the_wrong_form_is_named(tmp_path, kind, row):
    with pytest.raises(DataError, match=r"data.jsonl:1: "):
        read_records(file_of(tmp_path, row), kind)


STUDIO = {"data": {"prompt": "q", "response_1": "a", "response_2": "b"}}
JUDGED = {"prompt": "q", "responses": ["a", "b"], "values": {"better": {"choice": 0}}}


@pytest.mark.parametrize(
    ("tool", "row"),
    [
        ("label_studio", STUDIO | {"annotations": [{"result": [{"type": "choices", "value": {"choices": []}}]}]}),
        ("label_studio", STUDIO | {"annotations": ["x"]}),
        ("argilla", {"fields": {"prompt": "q", "response": "a"}, "responses": {"r": [["x"]]}}),
        ("argilla", {"fields": {"prompt": "q", "response": ["a"]}, "responses": {"r": [{"value": 1}]}}),
        ("ultrafeedback", {"instruction": "q", "completions": "two"}),
        ("rlhf_v", {"text": "no JSON"}),
        ("jsonl", JUDGED | {"sources": 3}),
        ("jsonl", JUDGED | {"seconds": "soon"}),
        ("jsonl", JUDGED | {"time": 5}),
        ("jsonl", JUDGED | {"values": {"better": "\ud800"}}),
        ("jsonl", {"prompt": "q", "chosen": "a", "rejected": "b", "annotators": {"anna": 1}}),
    ],
)
def test_a_judgement_of_the_wrong_form_is_named(tmp_path, tool, row):
    with pytest.raises(PalateError, match=r"data.jsonl:1"):
        read_file(file_of(tmp_path, row), tool)
