"""Reading and writing records: what ``kinds`` defines, from files of any known shape, with errors that name the place."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from palate.data.formats.convert import ConvertReport, iterate_records, skipped_text, write_lines
from palate.data.formats.palate import to_json
from palate.data.kinds import (
    KINDS,
    Comparison,
    Conversation,
    Demonstration,
    Judgement,
    Message,
    Prompt,
    PromptText,
    Ranking,
    Record,
    SegmentedComparison,
    prompt_key,
)
from palate.errors import ConfigError, DataError

__all__ = [
    "KINDS",
    "Comparison",
    "Conversation",
    "Demonstration",
    "Judgement",
    "Message",
    "Prompt",
    "PromptText",
    "Ranking",
    "Record",
    "SegmentedComparison",
    "prompt_key",
    "read_records",
    "write_records",
]


def read_records(
    where: str | Path,
    kind: str,
    *,
    format: str = "auto",
    split: str = "train",
    limit: int | None = None,
    rename: Mapping[str, str] | None = None,
) -> list[Record]:
    """Read records of a kind.

    Args:
        where: a .jsonl, .json, .parquet, .csv or .tsv file (text also with .gz), a folder of such files, "owner/name" or
            "owner/name:configuration" on the hub, or "-" for JSONL on standard input.
        kind: "prompts", "demonstrations", "comparisons", "corrections", "rankings" or "judgements". A file of rankings may
            be read as comparisons and as prompts; "comparisons" then holds ``Ranking`` records. Comparisons may be read as
            corrections, and corrections as comparisons (``segments``).
        format: a name of ``formats.FORMATS``, or "auto": the shape of the first record, which the others must share.
        split: which split of a folder or hub data set; single files have none.
        limit: at most so many records, from the beginning; >= 1, or None for all.
        rename: fields to read under another name, {name in the file: name expected}, e.g. {"reference": "response"}.
    Returns:
        The records in their order, each with its source ("file:line", or "file:row" for tables without lines).
    Raises:
        DataError: the file is missing, empty or malformed, a field is missing or of the wrong type, or no record can be
            used; the message begins with the place.
        ConfigError: an unknown kind or format, or a limit below 1.

    Records with a known flaw of a public data set (HH-RLHF, UltraFeedback: see their files) are skipped with a warning
    that counts and names them. All other faults stop the reading.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}. Expected a whole number >= 1, or none for all records.")
    report = ConvertReport()
    stream = iterate_records(where, kind, format=format, split=split, rename=rename, report=report)
    records = list(itertools.islice(stream, limit))
    if not records:
        raise DataError(f"{where}: no record could be used; {skipped_text(report.skipped)}.")
    if report.skipped:
        warnings.warn(f"{where}: {skipped_text(report.skipped)} of {report.read:,} read.", stacklevel=2)
    return records


def write_records(where: str | Path, records: Iterable[Record], *, overwrite: bool = False) -> None:
    """Write records as palate's own JSONL, which ``read_records`` reads back as the same records.

    Args:
        where: .jsonl, .jsonl.gz, or "-" for standard output. The file appears only when it is complete.
        overwrite: replace a file that exists.
    Raises:
        DataError: the file exists, or a prompt's fields are no JSON.
    """
    write_lines(where, (to_json(record) for record in records), overwrite=overwrite)
