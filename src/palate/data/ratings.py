"""Ratings as rankings and judgements.

    {"prompt", "response", "rating": number, "annotator"?: text}          one response a line; one prompt on several lines
    {"prompt", "responses": [text, ...], "ratings": [number, ...], "annotator"?: text}

A rating is any finite number, higher = better. No method reads ratings themselves: the steps of a scale are not equal, and
two people do not mean the same by a 4. Rankings keep the order within one prompt and one annotator; judgements keep
what is clearly good and clearly bad.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from palate.data import files
from palate.data.formats import fields
from palate.data.formats.convert import ConvertReport, check_target, write_lines
from palate.data.formats.palate import to_json
from palate.data.kinds import Judgement, PromptText, Ranking, Record, at, describe, is_finite, prompt_key
from palate.data.ranking import ratings_to_ranks
from palate.errors import ConfigError, DataError


class Rated(NamedTuple):
    """One rated response."""

    prompt: PromptText
    response: str
    rating: float
    annotator: str | None = None
    source: str = ""


def read_ratings(where: str | Path) -> Iterator[Rated]:
    """Rated responses, in order.

    Raises:
        DataError: a field is missing, a rating is no finite number, or there are not as many ratings as responses.
    """
    for source, row in files.rows(where):
        prompt = fields.prompt(fields.required(row, "prompt", source), source)
        if "responses" in row:
            responses, ratings = (fields.required(row, name, source) for name in ("responses", "ratings"))
            if not isinstance(responses, list) or not isinstance(ratings, list) or len(responses) != len(ratings):
                raise DataError(at(source, '"responses" and "ratings" are not two lists of equal length.'))
        else:
            responses, ratings = [fields.required(row, "response", source)], [fields.required(row, "rating", source)]
        for response, rating in zip(responses, ratings, strict=True):
            checked = Judgement(prompt, response, True, annotator=row.get("annotator"), source=source)
            yield Rated(checked.prompt, checked.response, _number(rating, source), checked.annotator, source)


def _number(value: Any, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
        raise DataError(at(source, f"a rating is {describe(value)}. Expected a finite number, higher = better."))
    return float(value)


def ratings_to_rankings(rated: Iterable[Rated]) -> tuple[list[Ranking], list[str]]:
    """One ranking of all that one annotator rated for one prompt, equal ratings tied.

    A response that was rated twice by one annotator counts once, with the mean.

    Returns:
        (rankings, in the order in which their prompts first appear; sources of responses that stand alone).

    >>> [ranking.ranks for ranking in ratings_to_rankings([Rated("Hi", "a", 2), Rated("Hi", "b", 5)])[0]]
    [(2, 1)]
    """
    groups: dict[tuple[str, str | None], dict[str, list[Rated]]] = {}
    for each in rated:
        group = groups.setdefault((prompt_key(each.prompt), each.annotator), {})
        group.setdefault(each.response, []).append(each)
    rankings, alone = [], []
    for group in groups.values():
        first = next(iter(group.values()))[0]
        if len(group) < 2:
            alone.append(first.source)
            continue
        means = [math.fsum(each.rating for each in same) / len(same) for same in group.values()]
        ranks = ratings_to_ranks(means)
        rankings.append(Ranking(first.prompt, tuple(group), ranks, annotator=first.annotator, source=first.source))
    return rankings, alone


def ratings_to_judgements(rated: Iterable[Rated], *, good: float, bad: float) -> tuple[list[Judgement], list[str]]:
    """Ratings of ``good`` or more as desirable, of ``bad`` or less as undesirable.

    Returns:
        (judgements, sources of those between, which are left out).
    Raises:
        ConfigError: ``bad`` is not below ``good``.

    >>> [j.desirable for j in ratings_to_judgements([Rated("Hi", r, r_) for r, r_ in (("a", 5), ("b", 3), ("c", 1))], good=4, bad=2)[0]]
    [True, False]
    """
    if not bad < good:
        raise ConfigError(f"--bad {bad:g} is not below --good {good:g}; a rating would be both.")
    found, between = [], []
    for each in rated:
        if bad < each.rating < good:
            between.append(each.source)
        else:
            more: dict[str, Any] = {"annotator": each.annotator, "source": each.source}
            found.append(Judgement(each.prompt, each.response, each.rating >= good, **more))
    return found, between


def convert_ratings(
    source: str | Path, target: str | Path, kind: str, *, good: float | None = None, bad: float | None = None
) -> ConvertReport:
    """Rewrite a file of ratings as palate's own rankings or judgements.

    Args:
        target: .jsonl, .jsonl.gz, or "-"; never overwritten.
        kind: "rankings" ("comparisons" are written as rankings too, which every reader of comparisons takes) or
            "judgements".
        good, bad: for judgements; nobody else knows what your scale means.
    Raises:
        ConfigError: another kind, or judgements without both thresholds. DataError: nothing is left.
    """
    if kind not in ("rankings", "comparisons", "judgements"):
        raise ConfigError(
            f"ratings cannot become {kind}. Give --kind rankings, or --kind judgements with --good and --bad."
        )
    if (good is None or bad is None) if kind == "judgements" else (good is not None or bad is not None):
        raise ConfigError("--good and --bad go together with --kind judgements: --good 4 --bad 2 on a scale of 1 to 5.")
    check_target(target)
    rated = list(read_ratings(source))
    report = ConvertReport(read=len(rated), format="ratings", kind="rankings" if kind == "comparisons" else kind)
    records: Sequence[Record]
    if kind == "judgements":
        assert good is not None and bad is not None
        records, left = ratings_to_judgements(rated, good=good, bad=bad)
        why = f"a rating between {bad:g} and {good:g}"
    else:
        records, left = ratings_to_rankings(rated)
        why = "the only response that its annotator rated for its prompt"
    if left:
        report.skipped[why] = left
    if not records:
        raise DataError(f"{source}: no record could be made; {len(left)}: {why}.")
    report.written = write_lines(target, (to_json(record) for record in records))
    return report
