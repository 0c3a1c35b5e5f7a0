"""What every coefficient takes and returns: a table of answers with holes, and a number that may be undefined."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from palate.errors import FeedbackError
from palate.evaluation.statistics import wilson

Floats = NDArray[np.float64]
Ratings = Sequence[Sequence[Any]]


class RatingTable(NamedTuple):
    """Answers in rows of items and columns of raters; None = no answer."""

    ratings: list[list[Any]]
    items: list[Hashable]
    raters: list[Hashable]


@dataclass(frozen=True)
class Agreement:
    """A coefficient of agreement.

    Attributes:
        name: e.g. "Cohen's kappa".
        value: 1 = all agree, 0 = as by chance, below 0 = less than by chance; None = undefined, see ``why``.
        low, high: percentile bootstrap interval over items, or None where there is none. Where all items agree, every
            resample does too and would claim certainty; then ``low`` is Wilson's lower bound for the share of items
            that agree, as if an item that does not disagreed as by chance.
        observed, expected: observed and expected agreement (kappa) or disagreement (alpha); NaN where not defined.
        items: items that count, i.e. with two or more answers of the raters in question.
        ratings: answers of these items.
        missing: share of the table's cells without an answer, in [0, 1], items that do not count included.
        resamples_undefined: bootstrap resamples in which the value is undefined; they are left out of the interval.
        why: why ``value`` is None, for the reader.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    observed: float
    expected: float
    items: int
    ratings: int
    missing: float
    resamples_undefined: int = 0
    why: str = ""

    def __str__(self) -> str:
        counts = f"{self.items} items, {self.ratings} ratings, {100 * self.missing:.1f} % missing"
        if self.value is None:
            return f"{self.name} undefined ({self.why}; {counts})"
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if self.low is not None else " (no interval)"
        return f"{self.name} {self.value:.3f}{interval} ({counts})"


def rating_table(answers: Iterable[tuple[Hashable, Hashable, Any]]) -> RatingTable:
    """(item, rater, value) triples as a table, in order of first appearance.

    Raises:
        FeedbackError: a rater answers the same item twice. Repeats measure a rater's constancy, not agreement.

    >>> rating_table([("i1", "anna", 1), ("i1", "bo", 2), ("i2", "bo", 1)]).ratings
    [[1, 2], [None, 1]]
    """
    items: dict[Hashable, int] = {}
    raters: dict[Hashable, int] = {}
    cells: dict[tuple[int, int], Any] = {}
    for item, rater, value in answers:
        cell = (items.setdefault(item, len(items)), raters.setdefault(rater, len(raters)))
        if cell in cells:
            raise FeedbackError(
                f"{rater!r} answered {item!r} twice: {cells[cell]!r} and {value!r}. Keep one answer per rater and item."
            )
        cells[cell] = value
    ratings = [[cells.get((i, j)) for j in range(len(raters))] for i in range(len(items))]
    return RatingTable(ratings, list(items), list(raters))


def is_missing(value: Any) -> bool:
    """None, or a float NaN."""
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def present(ratings: Ratings) -> tuple[list[list[Any]], float]:
    """The answers of each row without the holes, and the share of holes."""
    widths = {len(row) for row in ratings}
    if len(widths) != 1 or not next(iter(widths)):
        raise FeedbackError(f"rows of {sorted(widths)} answers: expected as many in each item's row, None = no answer")
    rows = [[v for v in row if not is_missing(v)] for row in ratings]
    cells = len(ratings) * next(iter(widths))
    return rows, 1 - sum(map(len, rows)) / cells


def item_weights(items: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each item is in a bootstrap resample, in parts [<= part, items] below 32 MB; same seed, same parts."""
    rng = np.random.default_rng(seed)
    part = max(1, 4_000_000 // items)
    for start in range(0, resamples, part):
        size = min(part, resamples - start)
        yield rng.multinomial(items, np.full(items, 1 / items), size=size).astype(np.float64)


def with_interval(
    name: str,
    statistic: Callable[[Floats], tuple[Floats, Floats, Floats]],
    *,
    items: int,
    ratings: int,
    missing: float,
    why: str,
    confidence: float,
    resamples: int,
    seed: int,
) -> Agreement:
    """Value and bootstrap interval of a statistic of item weights.

    Args:
        statistic: weights [R, items] -> (values, observed, expected), each [R]; NaN = undefined.
        why: what to say where it is undefined.
    """
    if not (0 < confidence < 1 and resamples >= 0):
        raise FeedbackError(f"confidence {confidence}, resamples {resamples}: expected (0, 1) and 0 or more")
    if not items:
        nothing = "no item has two answers"
        return Agreement(name, None, None, None, np.nan, np.nan, 0, 0, missing, 0, nothing)
    values, observed, expected = (float(x[0]) for x in statistic(np.ones((1, items))))
    counts = (items, ratings, missing)
    if np.isnan(values):
        return Agreement(name, None, None, None, observed, expected, *counts, 0, why)
    drawn = np.concatenate([np.empty(0), *(statistic(w)[0] for w in item_weights(items, resamples, seed))])
    defined = drawn[~np.isnan(drawn)]
    low, high = _bounds(values, defined, items, confidence)
    return Agreement(name, values, low, high, observed, expected, *counts, len(drawn) - len(defined))


def _bounds(value: float, drawn: Floats, items: int, confidence: float) -> tuple[float | None, float | None]:
    if not len(drawn):
        return None, None
    if np.ptp(drawn) > 1e-12:
        low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
        return float(low), float(high)
    if value > 1 - 1e-12:
        return wilson(items, items, confidence=confidence).low, 1.0
    return None, None  # one item: nothing to resample
