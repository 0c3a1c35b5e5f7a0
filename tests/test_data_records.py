"""Reading and writing records: every source, every fault with its place, nothing overwritten."""

import gzip
import io
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.data.records import (
    Comparison,
    Demonstration,
    Judgement,
    Prompt,
    Ranking,
    read_records,
    write_records,
)
from palate.errors import ConfigError, DataError

PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "What"}


def lines(path, *objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))
    return path


def fails(path, kind, **options):
    with pytest.raises(DataError) as error:
        read_records(path, kind, **options)
    return str(error.value).replace(f"{path.parent}/", "")


# -- sources ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    objects = [PAIR, {**PAIR, "prompt": "Bye\nnow", "margin": 0.5}]
    lines(tmp_path / "a.jsonl", *objects)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(objects, indent=1))
    (tmp_path / "lines.json").write_text((tmp_path / "a.jsonl").read_text())
    (tmp_path / "split.json").write_text(json.dumps({"train": objects, "version": 1}))
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected,margin\nHi,Hello,What,\n"Bye\nnow",Hello,What,0.5\n')
    pq.write_table(pa.Table.from_pylist([{"margin": None} | o for o in objects]), tmp_path / "a.parquet")
    expected = [("Hi", None), ("Bye\nnow", 0.5)]
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "lines.json", "split.json", "a.csv", "a.parquet"):
        found = read_records(tmp_path / name, "comparisons")
        assert [(r.prompt, r.margin) for r in found] == expected, name
        assert found[0].source.startswith(str(tmp_path / name) + ":"), name


def test_sources_are_lines_counted_from_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(PAIR) + "\n\n" + json.dumps(PAIR) + "\n")
    assert [r.source for r in read_records(path, "comparisons")] == [f"{path}:2", f"{path}:4"]
    listed = tmp_path / "a.json"
    listed.write_text('[\n {"prompt": "a"},\n\n {"prompt":\n "b"}\n]')
    assert [r.source for r in read_records(listed, "prompts")] == [f"{listed}:2", f"{listed}:4"]
    table = tmp_path / "a.csv"
    table.write_text('prompt\n"two\nlines"\nnext\n')
    assert [r.source for r in read_records(table, "prompts")] == [f"{table}:2", f"{table}:4"]


def test_a_folder_gives_the_files_of_its_split(tmp_path):
    lines(tmp_path / "train-00000.jsonl", {"prompt": "a"})
    lines(tmp_path / "train-00001.jsonl", {"prompt": "b"})
    lines(tmp_path / "test.jsonl", {"prompt": "c"})
    assert [r.prompt for r in read_records(tmp_path, "prompts")] == ["a", "b"]
    assert [r.prompt for r in read_records(tmp_path, "prompts", split="test")] == ["c"]
    with pytest.raises(DataError, match='no file of the split "dev". Found: test, train'):
        read_records(tmp_path, "prompts", split="dev")


def test_a_folder_whose_names_tell_no_split_gives_all_files(tmp_path):
    lines(tmp_path / "one.jsonl", {"prompt": "a"})
    lines(tmp_path / "two.jsonl", {"prompt": "b"})
    assert [r.prompt for r in read_records(tmp_path, "prompts")] == ["a", "b"]


def test_a_saved_dataset_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([PAIR]), "test": Dataset.from_list([PAIR, PAIR])}).save_to_disk(
        tmp_path / "d"
    )
    assert len(read_records(tmp_path / "d", "comparisons")) == 1
    assert len(read_records(tmp_path / "d", "comparisons", split="test")) == 2


def test_a_hub_name_goes_through_datasets(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [PAIR])
    found = read_records("owner/name:main", "comparisons", split="test")
    assert asked == [(("owner/name", "main"), {"split": "test"})]
    assert found[0].source == "owner/name:main[test]:1"


def test_a_hub_name_that_cannot_be_had_says_why(monkeypatch):
    import datasets

    def refuse(*a, **k):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="owner/name: no such file, and as a hub data set .* ConnectionError: offline"):
        read_records("owner/name", "comparisons")


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "a"}\n{"prompt": "b"}\n'))
    assert [(r.prompt, r.source) for r in read_records("-", "prompts")] == [("a", "stdin:1"), ("b", "stdin:2")]


def test_limit_and_rename(tmp_path):
    path = lines(tmp_path / "a.jsonl", *[{"prompt": str(i), "reference": "r"} for i in range(5)])
    found = read_records(path, "demonstrations", limit=2, rename={"reference": "response"})
    assert [(r.prompt, r.response) for r in found] == [("0", "r"), ("1", "r")]
    assert 'a.jsonl:1: no "answer" field to rename' in fails(path, "demonstrations", rename={"answer": "response"})
    with pytest.raises(ConfigError, match="limit is 0"):
        read_records(path, "prompts", limit=0)


def test_a_prompt_keeps_the_other_fields(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "2+2?", "answer": "4", "level": 1, "empty": None})
    assert read_records(path, "prompts")[0].fields == {"answer": "4", "level": 1}


# -- faults ----------------------------------------------------------------------------------------------------------


def test_a_missing_field_names_found_fields_and_the_command(tmp_path):
    """The sentence of STYLE.md, word for word."""
    objects = [{"prompt": "a"}] * 40 + [{"instruction": "b", "output": "c"}]
    assert fails(lines(tmp_path / "prompts.jsonl", *objects), "prompts") == (
        "prompts.jsonl:41: no \"prompt\" field. Found: 'instruction', 'output'. "
        "Convert with: palate convert --from alpaca"
    )


def test_a_missing_field_of_no_known_shape_shows_the_expected_one(tmp_path):
    found = fails(lines(tmp_path / "a.jsonl", {"query": "a"}), "comparisons")
    assert found.startswith('a.jsonl:1: no "prompt" field. Found: \'query\'. Expected, for comparisons: {"prompt"')
    found = fails(lines(tmp_path / "b.jsonl", {"prompt": "a", "response": "b"}), "comparisons")
    assert found.startswith("b.jsonl:1: no \"chosen\" field. Found: 'prompt', 'response'.")


def test_null_is_a_missing_field(tmp_path):
    assert 'no "chosen" field' in fails(lines(tmp_path / "a.jsonl", {**PAIR, "chosen": None}), "comparisons")


def test_a_missing_file_says_so_and_suggests(tmp_path):
    lines(tmp_path / "comparisons.jsonl", PAIR)
    found = fails(tmp_path / "comparison.jsonl", "comparisons")
    assert "comparison.jsonl: no such file or folder." in found and 'Did you mean "' in found


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert f"{name}: the file is empty" in fails(tmp_path / name, "prompts")


def test_a_folder_without_data(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no data in this folder"):
        read_records(tmp_path, "prompts")


def test_malformed_json_shows_line_and_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b" "answer": 1}\n')
    found = fails(path, "prompts")
    assert found.startswith("a.jsonl:2: not valid JSON at column 16") and '"b" "answer": 1' in found


def test_a_malformed_json_list_shows_its_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"prompt": "a"},\n{"prompt": "b"}\n{"prompt": "c"}]')
    assert fails(path, "prompts").startswith("a.json:4: not valid JSON")
    path.write_text('[{"prompt": "a"}')
    assert "not valid JSON" in fails(path, "prompts")


def test_a_json_list_named_jsonl_gets_a_hint(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('[\n{"prompt": "a"}]')
    assert "name it .json" in fails(path, "prompts")


def test_a_line_that_is_no_object(tmp_path):
    assert "a.jsonl:1: a number: 3. Expected a JSON object" in fails(lines(tmp_path / "a.jsonl", 3), "prompts")


def test_a_broken_archive_and_text_that_is_not_utf8(tmp_path):
    whole = gzip.compress(json.dumps(PAIR).encode() * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "the compressed file is broken" in fails(tmp_path / "a.jsonl.gz", "comparisons")
    (tmp_path / "b.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    said = fails(tmp_path / "b.jsonl", "prompts")
    assert "not UTF-8 text (byte 0xe9)" in said and "iconv -f latin1 -t utf-8" in said
    (tmp_path / "c.jsonl").write_bytes('{"prompt": "你好，请问面包怎么做？"}'.encode("gbk"))
    assert "iconv -f gb18030 -t utf-8" in fails(tmp_path / "c.jsonl", "prompts")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode())
    assert len(read_records(tmp_path / "a.jsonl", "comparisons")) == 1


def test_a_table_with_a_broken_row(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b,c\na,b,c,d\n")
    assert "a.csv:3: 4 cells in a table of 3 columns" in fails(tmp_path / "a.csv", "comparisons")


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        ({"chosen": 3}, "comparisons", '"chosen" is a number: 3. Expected a string.'),
        ({"prompt": 3}, "comparisons", '"prompt" is a number: 3. Expected a string or a list of messages.'),
        ({"prompt": []}, "comparisons", '"prompt" is a list: []'),
        ({"prompt": [{"role": "robot", "content": "a"}]}, "comparisons", "unknown role 'robot'"),
        ({"prompt": [{"content": "a"}]}, "comparisons", 'Expected {"role": "user", "content": "..."}'),
        ({"prompt": [{"role": "user"}]}, "comparisons", '["content"] is null. Expected a string.'),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "comparisons", "ends with an assistant turn"),
        ({"margin": float("nan")}, "comparisons", '"margin" is nan. Expected a finite number.'),
        ({"margin": "1"}, "comparisons", '"margin" is a string: "1". Expected a number.'),
        ({"probability": 1.2}, "comparisons", '"probability" is 1.2. Expected a number from 0 to 1.'),
        ({"annotator": 3}, "comparisons", '"annotator" is a number: 3.'),
        ({"chosen": "\ud83d"}, "comparisons", "holds half a character (\\ud83d at 0)"),
        ({"responses": ["a", "b"], "ranks": [1]}, "rankings", '"ranks" has 1 entries for 2 "responses"'),
        (
            {"responses": ["a", "b"], "ranks": [0, 1]},
            "rankings",
            '"ranks"[0] is 0; expected a whole number >= 1',
        ),
        ({"responses": ["a"], "ranks": [1]}, "rankings", "expected at least two"),
        ({"responses": "ab", "ranks": [1, 2]}, "rankings", '"responses" is a string: "ab". Expected a list.'),
        (
            {"response": "a", "desirable": "yes"},
            "judgements",
            '"desirable" is a string: "yes". Expected true or false.',
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_place(tmp_path, change, kind, expected):
    found = fails(lines(tmp_path / "a.jsonl", PAIR | change), kind)
    assert found.startswith("a.jsonl:1: ") and expected.lower() in found.lower()


def test_unknown_kind_and_format_are_settings_errors(tmp_path):
    path = lines(tmp_path / "a.jsonl", PAIR)
    with pytest.raises(ConfigError, match='unknown kind of records "comparison". Did you mean "comparisons"'):
        read_records(path, "comparison")
    with pytest.raises(ConfigError, match='unknown format "sharegtp". Did you mean "sharegpt"'):
        read_records(path, "comparisons", format="sharegtp")


# -- writing ---------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}), max_size=3
)
prompts = texts | turns.map(lambda t: (*t, {"role": "user", "content": "x"}))
names = st.none() | texts
records = {
    "prompts": st.builds(Prompt, prompts, st.dictionaries(st.sampled_from(["answer", "n"]), texts | st.integers())),
    "demonstrations": st.builds(Demonstration, prompts, texts, st.booleans()),
    "comparisons": st.builds(
        Comparison,
        prompts,
        texts,
        texts,
        st.none() | st.floats(allow_nan=False, allow_infinity=False, width=32),
        st.none() | st.floats(0, 1),
        names,
    ),
    "rankings": st.lists(st.tuples(texts, st.integers(1, 9)), min_size=2, max_size=4).flatmap(
        lambda r: st.builds(Ranking, prompts, st.just(tuple(x for x, _ in r)), st.just(tuple(k for _, k in r)), names)
    ),
    "judgements": st.builds(Judgement, prompts, texts, st.booleans(), names),
}


@pytest.mark.parametrize("kind", records)
def test_what_is_written_is_read_back(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)

    @given(st.lists(records[kind], min_size=1, max_size=3))
    def round_trip(some):
        for name in ("a.jsonl", "a.jsonl.gz"):
            write_records(folder / name, some, overwrite=True)
            found = read_records(folder / name, kind, format="palate")
            assert [type(r)(**{**vars(r), "source": ""}) for r in found] == some

    round_trip()


def test_writing_refuses_to_overwrite_and_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "a.jsonl"
    write_records(path, [Prompt("a")])
    with pytest.raises(DataError, match="exists and is not overwritten"):
        write_records(path, [Prompt("b")])
    assert [r.prompt for r in read_records(path, "prompts")] == ["a"]

    def broken():
        yield Prompt("c")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_records(path, broken(), overwrite=True)
    with pytest.raises(DataError, match="record 1 cannot be written as JSON"):
        write_records(tmp_path / "b.jsonl", [Prompt("a", {"x": object()})])
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert [r.prompt for r in read_records(path, "prompts")] == ["a"]


def test_reading_jsonl_imports_nothing_heavy(tmp_path):
    path = lines(tmp_path / "a.jsonl", PAIR)
    code = (
        "import sys; from palate.data.records import read_records; import palate.data.chat; "
        f"read_records({str(path)!r}, 'comparisons'); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
