"""A file of one kind rewritten as another kind that it can be read as: rankings and comparisons as judgements."""

from __future__ import annotations

from pathlib import Path

from palate.data import files
from palate.data.formats.convert import ConvertReport, check_target, convert_file, iterate_records, write_lines
from palate.data.formats.detect import check_kind, convert_record
from palate.data.formats.palate import to_json
from palate.data.kinds import Comparison, Ranking, Record, SegmentedComparison
from palate.data.ranking import comparison_to_judgements, comparison_to_ranking, ranking_to_judgements
from palate.errors import ConfigError, DataError


def convert_between(
    source: str | Path,
    target: str | Path,
    from_format: str = "auto",
    kind: str = "comparisons",
    *,
    top: int = 1,
    bottom: int = 1,
) -> ConvertReport:
    """``formats.convert.convert_file``, which also makes judgements or rankings of what is read as comparisons.

    Args:
        top, bottom: of a ranking, how many become desirable and undesirable (``ranking.ranking_to_judgements``).
    Raises:
        DataError: the target exists, or nothing can be made of the records.
        ConfigError: ``top`` or ``bottom`` without rankings to make judgements of.
    """
    check_kind(kind)
    derived = (
        str(source) != "-" and kind in ("judgements", "rankings") and _only_as_comparisons(source, from_format, kind)
    )
    if not derived:
        if (top, bottom) != (1, 1):
            raise ConfigError(
                "--top and --bottom are for rankings that become judgements (--kind judgements, from a file)."
            )
        return convert_file(source, target, from_format, kind)
    check_target(target)
    report = ConvertReport(kind=kind)
    made: list[Record] = []
    for record in iterate_records(source, "comparisons", format=from_format, report=report):
        found: list[Record] = []
        if kind == "rankings":
            found = [record if isinstance(record, Ranking) else comparison_to_ranking(_pair(record))]
        elif isinstance(record, Ranking):
            found += ranking_to_judgements(record, top=top, bottom=bottom)
        else:
            found += comparison_to_judgements(_pair(record))
        if not found:
            report.skipped.setdefault("all responses are tied", []).append(record.source)
        made += found
    if not made:
        raise DataError(f"{source}: no {kind} can be made of it; in every ranking all responses are tied.")
    report.written = write_lines(target, (to_json(record) for record in made))
    return report


def _pair(record: Record) -> Comparison:
    assert isinstance(record, Comparison) and not isinstance(record, SegmentedComparison)
    return record


def _only_as_comparisons(source: str | Path, from_format: str, kind: str) -> bool:
    """Whether the first object cannot be read as the kind itself, but as a comparison or ranking."""
    where, row = next(iter(files.rows(source)))
    for wanted, otherwise in ((kind, False), ("comparisons", True)):
        try:
            if convert_record(row, wanted, where, format=from_format):
                return otherwise
        except DataError:
            continue
    return False
