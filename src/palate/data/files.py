"""Files, folders, hub names and standard input as a stream of (source, JSON object); what a record means is not known here.

``source`` is "file:line" for JSONL, JSON and CSV, "file:row" for Parquet and hub data, both counted from 1.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

from palate.data.kinds import describe, shorten
from palate.errors import DataError

Row = tuple[str, dict[str, Any]]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")
_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")
# Cells of a table are text; these names hold a list, a number or a truth value, written as JSON.
_JSON_CELLS = (
    *("messages", "conversations", "responses", "ranks", "margin", "probability", "desirable", "label"),
    *("rating", "ratings"),
)


def rows(where: str | Path, *, split: str = "train") -> Iterator[Row]:
    """The JSON objects of a file, a folder, a hub data set, or standard input ("-"), in order.

    Args:
        where: .jsonl, .json, .parquet, .csv or .tsv (text also with .gz), a folder of such files, "owner/name" or
            "owner/name:configuration" on the hub, or "-" for JSONL on standard input.
        split: which split of a folder or hub data set; a single file has none.
    Raises:
        DataError: nothing there, nothing in it, or something that is not an object.
    """
    if str(where) == "-":
        return _not_empty(_jsonl(_standard_input(), "stdin"), "standard input")
    path = Path(where).expanduser()
    if path.is_dir():
        return _not_empty(_folder(path, split), str(where))
    if path.exists():
        return _not_empty(_file(path, str(where), split), str(where))
    if not _looks_like_file(str(where)):
        return _not_empty(_hub(str(where), split), str(where))
    raise DataError(f"{where}: no such file or folder.{_near(path)}")


def _looks_like_file(where: str) -> bool:
    return not _HUB_NAME.match(where) or where.startswith(".") or _suffix(Path(where)) in SUFFIXES


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _near(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" The folder {folder} does not exist either."
    near = get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1)
    return f' Did you mean "{folder / near[0]}"?' if near else ""


def _not_empty(found: Iterator[Row], where: str) -> Iterator[Row]:
    first = next(found, None)
    if first is None:
        raise DataError(f"{where}: the file is empty. Expected one JSON object for each record.")
    yield first
    yield from found


def _file(path: Path, name: str, split: str) -> Iterator[Row]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        return _parquet(path, name)
    if suffix in (".csv", ".tsv"):
        return _table(path, name, "\t" if suffix == ".tsv" else ",")
    if suffix == ".json":
        return _json(path, name, split)
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl_file(path, name)
    raise DataError(f"{name}: unknown kind of file. Expected one of {', '.join(SUFFIXES)} (text also with .gz).")


def _likely_encoding(path: Path) -> str:
    """What a text that is not UTF-8 may be: GB18030, of Chinese systems, where all of it can be read so; else Latin-1.

    Western text cannot: an accented letter before a space or a mark is no character of GB18030.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as raw:
        text = raw.read(1_000_000)
    try:
        codecs.getincrementaldecoder("gb18030")().decode(text)  # the last character may be cut
    except UnicodeDecodeError:
        return "latin1"
    return "gb18030"


@contextmanager
def _opened(path: Path, name: str) -> Iterator[TextIO]:
    """The text of a file, its faults told with its name."""
    try:
        # utf-8-sig also takes a byte order mark, which spreadsheets write; newline="" leaves line ends to the reader.
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as raw:
            import io

            yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")  # type: ignore[arg-type]
    except UnicodeDecodeError as error:
        raise _not_text(name, error, _likely_encoding(path)) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{name}: the compressed file is broken: {error}. Fetch it again.") from None
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}.") from None


def _standard_input() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise _not_text("stdin", error) from None


def _not_text(name: str, error: UnicodeDecodeError, was: str | None = None) -> DataError:
    bad = error.object[error.start : error.start + 1].hex()
    how = f"iconv -f {was} -t utf-8 {name} > utf8-{Path(name).name}" if was else "iconv -f latin1 -t utf-8"
    return DataError(f"{name}: not UTF-8 text (byte 0x{bad}). Convert it, e.g. {how}")


def _jsonl_file(path: Path, name: str) -> Iterator[Row]:
    with _opened(path, name) as file:
        yield from _jsonl(file, name)


def _jsonl(lines: Iterable[str], name: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            with _decoding(f"{name}:{number}"):
                # with its line break a cut-off line would end in column 1 of the next
                value = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            hint = " Is it one JSON list? Then name it .json." if number == 1 and line.lstrip()[0] == "[" else ""
            raise DataError(
                f"{name}:{number}: not valid JSON at column {error.colno}: {error.msg}. "
                f"The line reads: {_around(line, error.pos)}. Expected one JSON object a line.{hint}"
            ) from None
        if number == 1 and isinstance(value, list):
            raise DataError(
                f"{name}:1: a list. Expected one JSON object a line. Is the file one JSON list? Then name it .json."
            )
        yield f"{name}:{number}", _object(value, f"{name}:{number}")


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """What valid JSON may hold and Python does not take, told with its place."""
    try:
        yield
    except RecursionError:
        raise DataError(f"{where}: lists and objects within one another without end. Expected a record.") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise DataError(f"{where}: a number that cannot be read: {error}.") from None


def _around(text: str, position: int, width: int = 60) -> str:
    """The part of a text around a fault."""
    start = max(0, position - width // 2)
    part = text[start : position + width // 2].strip()
    return ("..." if start else "") + part + ("..." if position + width // 2 < len(text.rstrip()) else "")


def _object(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{source}: {describe(value) if value is not None else 'null'}. Expected a JSON object.")
    return value


def _json(path: Path, name: str, split: str) -> Iterator[Row]:
    """A list of objects, an object with a list under the split's name or "data", or JSONL under the wrong name.

    The text is read whole; its objects are decoded one by one, so that each knows its line.
    """
    with _opened(path, name) as file:
        text = file.read()
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        try:
            with _decoding(name):
                value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _bad_json(name, text, error) from None
        if _skip(text, end) < len(text):
            yield from _jsonl(text.splitlines(keepends=True) if "\r" in text else text.split("\n"), name)
            return
        held = next((key for key in (split, "data") if isinstance(value, dict) and _is_rows(value.get(key))), None)
        if held is None:
            yield f"{name}:1", _object(value, f"{name}:1")
        else:
            for number, item in enumerate(value[held], 1):
                yield f"{name}:{held}[{number}]", _object(item, f"{name}:{held}[{number}]")
        return
    line, counted = 1, 0
    position = _skip(text, position + 1)
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            with _decoding(f"{name}:{line}"):
                value, position = decoder.raw_decode(text, position)
            position = _skip(text, position)
            if position >= len(text) or text[position] not in ",]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except json.JSONDecodeError as error:
            raise _bad_json(name, text, error) from None
        yield f"{name}:{line}", _object(value, f"{name}:{line}")
        position = _skip(text, position + 1) if text[position] == "," else position
    if position >= len(text):
        raise _bad_json(name, text, json.JSONDecodeError("The list is not closed", text, len(text)))
    if (after := _skip(text, position + 1)) < len(text):
        raise _bad_json(name, text, json.JSONDecodeError("Something stands after the list's end", text, after))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


_SPACE = re.compile(r"\s*")


def _skip(text: str, position: int) -> int:
    """The position of the next character that is no white space."""
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _bad_json(name: str, text: str, error: json.JSONDecodeError) -> DataError:
    place = f"{name}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}"
    return DataError(f"{place}. The text reads: {_around(text, error.pos)}.")


def _table(path: Path, name: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB a cell, is less than a long conversation
    with _opened(path, name) as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        while reader.fieldnames == []:  # blank lines before the header
            reader.fieldnames = None
        names = list(reader.fieldnames or ())
        if twice := next((key for key in names if names.count(key) > 1), None):
            raise DataError(f'{name}:{reader.line_num}: two columns are named "{twice}". Rename or remove one.')
        line = reader.line_num + 1
        for record in reader:
            if None in record or None in record.values():
                wanted = len(reader.fieldnames or ())
                found = sum(v is not None for k, v in record.items() if k) + len(record.get(None) or ())  # type: ignore[call-overload]
                raise DataError(f"{name}:{line}: {found} cells in a table of {wanted} columns. Are quotes missing?")
            # An empty cell is a missing value, except where the empty text is one.
            yield f"{name}:{line}", {key: _cell(key, text) for key, text in record.items() if text or key == "input"}
            line = reader.line_num + 1


def _cell(name: str, text: str) -> Any:
    if name in _JSON_CELLS or (name == "prompt" and text.startswith("[{")):
        try:
            return json.loads(text.lower() if text in ("True", "False", "TRUE", "FALSE") else text)
        except (ValueError, RecursionError):
            pass
    return text


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{name}: not a Parquet file: {shorten(str(error))}") from None
    number, batches = 0, file.iter_batches(batch_size=1000)
    while True:
        try:
            records = next(batches).to_pylist()
        except StopIteration:
            return
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise DataError(f"{name}: broken after row {number}: {shorten(str(error))} Fetch it again.") from None
        for record in records:
            number += 1
            yield f"{name}:{number}", record


def _folder(folder: Path, split: str) -> Iterator[Row]:
    """The files of one split, by their names; all files when no name tells a split."""
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        yield from _saved_dataset(folder, split)
        return
    inside = (p for p in sorted(folder.rglob("*")) if not any(s.startswith(".") for s in p.relative_to(folder).parts))
    files = [p for p in inside if p.is_file() and _suffix(p) in SUFFIXES]
    if not files:
        raise DataError(
            f"{folder}: no data in this folder. Expected files named {', '.join('*' + s for s in SUFFIXES)}."
        )
    named = {p: _split_of(p.relative_to(folder)) for p in files}
    if any(named.values()):
        files = [p for p in files if named[p] == split]
        if not files:
            has = ", ".join(sorted({s for s in named.values() if s}))
            raise DataError(f'{folder}: no file of the split "{split}". Found: {has}.')
    for path in files:
        yield from _file(path, str(path), split)


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((split for split in SPLITS if split in words), None)


def _saved_dataset(folder: Path, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(folder))
    if isinstance(found, DatasetDict):
        if split not in found:
            raise DataError(f'{folder}: no split "{split}". Found: {", ".join(found)}.')
        found = found[split]
    for number, record in enumerate(found, 1):
        yield f"{folder}:{number}", dict(record)


def _hub(name: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    path, _, configuration = name.partition(":")
    try:
        found = load_dataset(path, configuration or None, split=split)
    # The library raises a dozen unrelated classes for "not there", "not reachable" and "no such split".
    except Exception as error:
        reason = shorten(" ".join(str(error).split()), 300)
        raise DataError(
            f'{name}: no such file, and as a hub data set (split "{split}") it cannot be had: '
            f"{type(error).__name__}: {reason}"
        ) from error
    for number, record in enumerate(found, 1):
        yield f"{name}[{split}]:{number}", dict(record)
