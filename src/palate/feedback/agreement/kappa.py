"""Kappa: agreement of raters on categories, beyond what their habits alone would give.

    Cohen:   kappa = 1 - sum_ij w_ij p_ij / sum_ij w_ij p_i. p_.j                                          (1968, eq. 2)
             w_ij = [i != j] (1960: (p_o - p_e) / (1 - p_e)),  |i - j| (linear)  or  (i - j)^2 (quadratic)
    Fleiss:  P_i = (sum_j n_ij^2 - n) / (n (n - 1)),  P_e = sum_j p_j^2,  kappa = (mean P_i - P_e) / (1 - P_e)

Where the raters use one and the same category only, p_e = 1 and kappa is 0/0: undefined, not 0 and not 1.

Sources: Cohen 1960 (Educational and Psychological Measurement 20); Cohen 1968 (Psychological Bulletin 70); Fleiss 1971
(Psychological Bulletin 76).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np

from palate.errors import FeedbackError
from palate.feedback.agreement.table import Agreement, Floats, Ratings, is_missing, present, with_interval

Weights = Literal["none", "linear", "quadratic"]
POWERS = {"none": 0, "linear": 1, "quadratic": 2}
ONE_CATEGORY = "every answer is the same category, so chance alone agrees always"


def cohen_kappa(
    first: Sequence[Any],
    second: Sequence[Any],
    *,
    weights: Weights = "none",
    categories: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Cohen's kappa of two raters, items with one or no answer left out and counted.

    Args:
        first, second: [N] answers, None or NaN = none.
        weights: "none" for categories without order; "linear" or "quadratic" for ordered ones.
        categories: all possible answers in their order; needed for ordered ones, because a step that nobody used
            still is a step. None: those that occur.
        confidence, resamples, seed: of the bootstrap over items.

    >>> cohen_kappa("aabb", "aabb").value
    1.0
    """
    if len(first) != len(second):
        raise FeedbackError(f"{len(first)} answers of one rater, {len(second)} of the other: expected as many")
    if weights not in POWERS:
        raise FeedbackError(f"weights are {weights!r}. Expected {', '.join(map(repr, POWERS))}.")
    if categories is None and weights != "none":
        raise FeedbackError(f'"{weights}" weights need "categories": all possible answers in their order')
    both = [(a, b) for a, b in zip(first, second, strict=True) if not is_missing(a) and not is_missing(b)]
    given = sum(not is_missing(v) for v in (*first, *second))
    place = _places([v for pair in both for v in pair], categories)
    size = len(place)
    cell = np.array([place[a] * size + place[b] for a, b in both], dtype=np.int64)
    indicator = np.zeros((len(both), size * size))
    indicator[np.arange(len(both)), cell] = 1.0
    cost = _costs(size, weights)

    def statistic(w: Floats) -> tuple[Floats, Floats, Floats]:
        joint = (w @ indicator).reshape(-1, size, size) / w.sum(axis=1)[:, None, None]
        observed = (cost * joint).sum(axis=(1, 2))
        expected = np.einsum("ij,ri,rj->r", cost, joint.sum(axis=2), joint.sum(axis=1))
        return _beyond_chance(observed, expected), 1 - observed, 1 - expected

    return with_interval(
        "Cohen's kappa" + (f" ({weights})" if weights != "none" else ""),
        statistic,
        items=len(both),
        ratings=2 * len(both),
        missing=1 - given / (2 * len(first)) if len(first) else 0.0,
        why=ONE_CATEGORY,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def fleiss_kappa(ratings: Ratings, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Agreement:
    """Fleiss' kappa: n answers for each item, by whomever.

    Args:
        ratings: [items][raters], None or NaN = no answer; every item with an answer must have the same number n >= 2.

    Raises:
        FeedbackError: items with different numbers of answers; ``krippendorff_alpha`` takes those.
    """
    rows, missing = present(ratings)
    rows = [row for row in rows if row]
    sizes = {len(row) for row in rows}
    if len(sizes) > 1:
        raise FeedbackError(
            f"items with {min(sizes)} to {max(sizes)} answers. Fleiss' kappa is defined for the same number of answers "
            "for every item; krippendorff_alpha is not limited to that."
        )
    if sizes == {1}:
        rows = []
    n = max(sizes, default=0)
    counts = _counts(rows, _places([v for row in rows for v in row], None))
    within = ((counts**2).sum(axis=1) - n) / max(n * (n - 1), 1)

    def statistic(w: Floats) -> tuple[Floats, Floats, Floats]:
        total = w.sum(axis=1)
        observed = w @ within / total
        shares = (w @ counts) / (n * total)[:, None]
        expected = (shares**2).sum(axis=1)
        return _beyond_chance(1 - observed, 1 - expected), observed, expected

    return with_interval(
        "Fleiss' kappa",
        statistic,
        items=len(rows),
        ratings=n * len(rows),
        missing=missing,
        why=ONE_CATEGORY,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )


def pairwise_kappa(
    ratings: Ratings, raters: Sequence[Hashable], **settings: Any
) -> dict[tuple[Hashable, Hashable], Agreement]:
    """``cohen_kappa`` of every two raters, over the items that both answered; settings as there."""
    columns = list(zip(*ratings, strict=True))
    if len(columns) != len(raters):
        raise FeedbackError(f"{len(columns)} columns of answers for {len(raters)} raters")
    pairs = combinations(range(len(raters)), 2)
    return {(raters[i], raters[j]): cohen_kappa(columns[i], columns[j], **settings) for i, j in pairs}


def _places(values: Sequence[Any], categories: Sequence[Hashable] | None) -> dict[Any, int]:
    """Each category's number; in the given order, or as they appear."""
    place = {c: i for i, c in enumerate(dict.fromkeys(values if categories is None else categories))}
    unknown = {v for v in values if v not in place}
    if unknown:
        raise FeedbackError(f"answers {sorted(map(repr, unknown))} are not among the categories {list(place)}")
    return place


def _counts(rows: Sequence[Sequence[Any]], place: dict[Any, int]) -> Floats:
    counts = np.zeros((len(rows), len(place)))
    for i, row in enumerate(rows):
        for value in row:
            counts[i, place[value]] += 1
    return counts


def _costs(size: int, weights: Weights) -> Floats:
    """w_ij scaled to [0, 1]; the scale cancels in kappa, and makes ``observed`` a share."""
    steps = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(np.float64)
    return (steps > 0).astype(np.float64) if weights == "none" else (steps / max(size - 1, 1)) ** POWERS[weights]


def _beyond_chance(observed: Floats, expected: Floats) -> Floats:
    """1 - observed / expected disagreement; NaN where none is expected."""
    defined = expected > 1e-12
    return np.where(defined, 1 - observed / np.where(defined, expected, 1.0), np.nan)
