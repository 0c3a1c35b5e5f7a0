"""Krippendorff's alpha: agreement of any number of raters, with missing answers, under any distance.

    o_ck  = sum_u (number of ordered pairs of answers c, k in item u by different raters) / (m_u - 1)
    n_c   = sum_k o_ck,   n = sum_c n_c
    alpha = 1 - D_o / D_e = 1 - (n - 1) sum_ck o_ck d_ck / sum_ck n_c n_k d_ck

with m_u >= 2 the answers of item u; items with fewer cannot be paired and are left out, with a count. d is, for numbers
c <= k,

    nominal  [c != k]        interval  (c - k)^2        ordinal  (n_c/2 + sum_{c < g < k} n_g + n_k/2)^2

or a distance of ``distances``. Alpha is undefined where D_e = 0, that is where all answers are the same.

D_e compares answers of different items. For rankings it is what positions in the list alone would give, so show
responses in random order or number them so; for spans, where in a text people like to mark.

Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"; Krippendorff 2019, Content Analysis, ch. 12.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palate.errors import FeedbackError
from palate.feedback.agreement.distances import kendall_distance, masi_distance, span_distance
from palate.feedback.agreement.table import Agreement, Floats, Ratings, present, with_interval

Distance = Callable[[Any, Any], float]
STRUCTURED: dict[str, Distance] = {"ranking": kendall_distance, "set": masi_distance, "span": span_distance}
DISTANCES = ("nominal", "ordinal", "interval", *STRUCTURED)
ONE_VALUE = "every answer is the same, so no disagreement is expected"


def krippendorff_alpha(
    ratings: Ratings,
    distance: str | Distance = "nominal",
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Alpha with a bootstrap interval over items.

    Args:
        ratings: [items][raters], None or NaN = no answer. Answers are anything hashable for "nominal"; numbers for
            "ordinal" and "interval"; ranks of the same K responses for "ranking"; collections of labels for "set"; of
            (start, end) for "span" (an empty one is an answer: nothing marked).
        distance: one of these names, or a function of two answers that is 0 for equal ones and symmetric.
        confidence, resamples, seed: of the bootstrap.

    Time and memory grow with the square of the number of *different* answers: thousands are fine, 100,000 are not.

    >>> # mid-ranks 1.5, 3.5, 5: D_o = 2 * 2^2 / 6, D_e = 2 * (3 * 2^2 + 6 * 3.5^2 + 2 * 1.5^2) / 30
    >>> round(krippendorff_alpha([[1, 1], [1, 2], [3, 3], [2, None]], "ordinal").value, 3)
    0.778
    """
    if isinstance(distance, str) and distance not in DISTANCES:
        raise FeedbackError(f"the distance {distance!r} is unknown. Expected {', '.join(DISTANCES)}, or a function.")
    rows, missing = present(ratings)
    rows = [[_key(v, distance) for v in row] for row in rows if len(row) >= 2]
    values = _values(rows, distance)
    counts = np.zeros((len(rows), len(values)))
    place = {v: i for i, v in enumerate(values)}
    for i, row in enumerate(rows):
        np.add.at(counts[i], [place[v] for v in row], 1.0)
    statistic = _ordinal(counts) if distance == "ordinal" else _fixed(counts, _matrix(values, distance))
    name = distance if isinstance(distance, str) else getattr(distance, "__name__", "own distance")
    return with_interval(
        f"Krippendorff's alpha ({name})",
        statistic,
        items=len(rows),
        ratings=sum(map(len, rows)),
        missing=missing,
        why=ONE_VALUE,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def _fixed(counts: Floats, d: Floats) -> Callable[[Floats], tuple[Floats, Floats, Floats]]:
    """Alpha where distances do not depend on the sample: sums of per-item disagreements."""
    m = counts.sum(axis=1)
    # d_cc = 0, so pairs of an answer with itself add nothing
    within = np.einsum("uc,uc->u", counts @ d, counts) / np.maximum(m - 1, 1)

    def statistic(w: Floats) -> tuple[Floats, Floats, Floats]:
        n_c = w @ counts
        return _alpha(w @ within, np.einsum("rc,rc->r", n_c @ d, n_c), n_c.sum(axis=1), d.max(initial=0.0))

    return statistic


def _ordinal(counts: Floats) -> Callable[[Floats], tuple[Floats, Floats, Floats]]:
    """The ordinal distance is the interval distance of mid-ranks, n_1 + ... + n_{c-1} + n_c / 2, in each resample."""
    m = counts.sum(axis=1)

    def statistic(w: Floats) -> tuple[Floats, Floats, Floats]:
        n_c = w @ counts
        n = n_c.sum(axis=1)
        rank = n_c.cumsum(axis=1) - n_c / 2
        rank = rank - (n / 2)[:, None]  # their mean: smaller numbers, same differences
        # sum over pairs (x_i - x_j)^2 = 2 (m sum x^2 - (sum x)^2)
        square, total = rank**2 @ counts.T, rank @ counts.T
        within = 2 * (m * square - total**2) / np.maximum(m - 1, 1)
        across = 2 * (n * (n_c * rank**2).sum(axis=1) - (n_c * rank).sum(axis=1) ** 2)
        return _alpha((w * within).sum(axis=1), across, n)

    return statistic


def _alpha(within: Floats, across: Floats, n: Floats, unit: float = 1.0) -> tuple[Floats, Floats, Floats]:
    """From sums over items and over all answers; ``unit`` is the largest distance, which for numbers has any size."""
    observed, expected = within / n, across / (n * (n - 1))
    # relative to the number of answers: sums of squares of mid-ranks round
    defined = across > 1e-9 * unit
    return np.where(defined, 1 - observed / np.where(defined, expected, 1.0), np.nan), observed, expected


def _key(value: Any, distance: str | Distance) -> Hashable:
    """An answer in a form that equals another's exactly when they say the same."""
    try:
        if distance in ("ordinal", "interval"):
            return float(value)
        if distance == "ranking":
            return tuple(value)
        if distance == "set":
            return frozenset(value)
        if distance == "span":
            return tuple(sorted((int(s), int(e)) for s, e in value))
        hash(value)
    except (TypeError, ValueError):
        name = distance if isinstance(distance, str) else "this"
        raise FeedbackError(f"the answer {value!r} does not fit the {name} distance") from None
    return value  # type: ignore[no-any-return]


def _values(rows: Sequence[Sequence[Any]], distance: str | Distance) -> list[Any]:
    values = dict.fromkeys(v for row in rows for v in row)
    return sorted(values) if distance in ("ordinal", "interval") else list(values)


def _matrix(values: Sequence[Any], distance: str | Distance) -> NDArray[np.float64]:
    n = len(values)
    if distance == "nominal":
        return 1.0 - np.eye(n)
    if distance == "interval":
        x = np.array(values, dtype=np.float64)
        return np.subtract.outer(x, x) ** 2
    function = STRUCTURED[distance] if isinstance(distance, str) else distance
    matrix = np.zeros((n, n))
    for i in range(n):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = function(values[i], values[j])
    return matrix
