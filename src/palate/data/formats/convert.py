"""A stream of records from any source, and a file of any shape rewritten as palate's own JSONL."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from palate.data import files
from palate.data.formats.detect import check_kind, convert_record, detect_format, find_format
from palate.data.formats.palate import to_json
from palate.data.kinds import Ranking, Record, Unusable, at
from palate.errors import ConfigError, DataError, PalateError


@dataclass
class ConvertReport:
    """What a reading did: objects read, records made of them, and for each reason which objects were skipped.

    ``rankings`` counts those among comparisons.
    """

    read: int = 0
    written: int = 0
    format: str = "auto"
    kind: str = "records"
    skipped: dict[str, list[str]] = field(default_factory=dict)
    rankings: int = 0

    def __str__(self) -> str:
        said = f"{self.read:,} read ({self.format}), {self.written:,} {self.kind}"
        if self.rankings:
            said += f" ({self.rankings:,} of them rankings, which stand for all their pairs)"
        return f"{said}; {skipped_text(self.skipped)}" if self.skipped else f"{said}, none skipped"


def skipped_text(skipped: Mapping[str, list[str]]) -> str:
    """The counts of what was skipped, with the first places."""
    parts = [f"{len(where):,}: {why} ({_first(where)})" for why, where in skipped.items()]
    return f"skipped {sum(map(len, skipped.values())):,}: " + "; ".join(parts)


def _first(where: list[str], count: int = 3) -> str:
    return ", ".join(where[:count]) + (", ..." if len(where) > count else "")


def iterate_records(
    where: str | Path,
    kind: str,
    *,
    format: str = "auto",
    split: str = "train",
    rename: Mapping[str, str] | None = None,
    report: ConvertReport | None = None,
) -> Iterator[Record]:
    """The records of a kind, one after the other, as they are read.

    Args:
        where: what ``files.rows`` takes.
        kind: one of ``KINDS``.
        format: a name of ``FORMATS``, or "auto": the shape of the first object, which the others must share.
        split: which split of a folder or hub data set.
        rename: fields to read under another name, {name in the file: name expected}.
        report: where counts are written; without it a record of a public data set's known flaw is an error.
    Raises:
        DataError: with the place and what to do.
    """
    check_kind(kind)
    if format != "auto":
        find_format(format)
    for source, found in files.rows(where, split=split):
        record = _renamed(found, rename or {}, source)
        if format == "auto":
            format = detect_format(record) or "palate"
        if report is not None:
            report.read, report.format = report.read + 1, format
        try:
            yield from convert_record(record, kind, source, format=format)
        except Unusable as error:
            if report is None:
                raise
            why = str(error).removeprefix(f"{source}: ").rstrip(".")
            report.skipped.setdefault(why, []).append(source)


def _renamed(record: dict[str, Any], rename: Mapping[str, str], source: str) -> dict[str, Any]:
    """The record under its new names, without nulls: a table has every column in every row."""
    for name in rename:
        if name not in record:
            found = ", ".join(repr(key) for key in record)
            raise DataError(at(source, f'no "{name}" field to rename to "{rename[name]}". Found: {found}.'))
    kept = {key: value for key, value in record.items() if value is not None and key not in rename}
    return {**kept, **{new: record[old] for old, new in rename.items()}}


def convert_file(
    source: str | Path,
    target: str | Path,
    from_format: str = "auto",
    kind: str = "comparisons",
    *,
    split: str = "train",
    rename: Mapping[str, str] | None = None,
) -> ConvertReport:
    """Rewrite records of any shape as palate's own JSONL, one by one.

    Args:
        source: what ``read_records`` takes.
        target: .jsonl, .jsonl.gz, or "-" for standard output. Never overwritten.
        from_format: a name of ``FORMATS``, or "auto".
        kind: one of ``KINDS``; rankings in a file of comparisons stay rankings.
    Raises:
        DataError: the target exists, or a record cannot be read; then no target is left.
    """
    report = ConvertReport(kind=kind)
    records = iterate_records(source, kind, format=from_format, split=split, rename=rename, report=report)

    def lines() -> Iterator[Mapping[str, Any]]:
        for record in records:
            report.rankings += kind == "comparisons" and isinstance(record, Ranking)
            yield to_json(record)

    report.written = write_lines(target, lines())
    if not report.written:
        if str(target) != "-":
            Path(target).unlink(missing_ok=True)
        raise DataError(f"{source}: no record could be used; {skipped_text(report.skipped)}.")
    return report


def write_lines(where: str | Path, objects: Iterable[Mapping[str, Any]], *, overwrite: bool = False) -> int:
    """Write JSON objects, one a line, to a file that appears only when it is complete; returns their number."""
    count = 0
    with _target(where, overwrite) as file:
        for count, value in enumerate(objects, 1):
            try:
                file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise DataError(f"{where}: record {count} cannot be written as JSON: {error}.") from None
    return count


_NUMBERS = itertools.count()


def check_target(where: str | Path, *, overwrite: bool = False) -> None:
    """What is worth knowing before the work.

    Raises:
        DataError: the file is there and is not to be replaced.
        ConfigError: its name says that it is a table, and what is written is JSONL.
    """
    if Path(where).suffix.lower() in (".csv", ".tsv", ".parquet"):
        raise ConfigError(
            f"{where}: what is written is JSONL, which this name would hide. Name it {Path(where).stem}.jsonl."
        )
    if str(where) != "-" and not overwrite and Path(where).expanduser().exists():
        raise DataError(f"{where} exists and is not overwritten. Name another file, or remove it first.")


@contextmanager
def _target(where: str | Path, overwrite: bool) -> Iterator[TextIO]:
    if str(where) == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    path = Path(where).expanduser()
    check_target(where, overwrite=overwrite)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{next(_NUMBERS)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            gzip.open(partial, "wt", encoding="utf-8")
            if path.suffix == ".gz"
            else open(partial, "w", encoding="utf-8", newline="\n") as file
        ):
            yield file  # type: ignore[misc]
        if path.exists() and not overwrite:
            raise DataError(f"{where} appeared while it was being written, and is not overwritten.")
        os.replace(partial, path)
    except OSError as error:
        if isinstance(error, PalateError) or error.filename not in (None, str(path.parent), str(partial), str(path)):
            raise  # the records' own fault, read as they are written
        raise DataError(
            f"{where}: cannot be written: {error.strerror or error}. Nothing is left of it; name another file or free "
            "some space."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
