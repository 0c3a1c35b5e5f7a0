"""How far two answers to the same item are apart: 0 = the same, 1 = as far as can be.

What Krippendorff writes delta^2; each of these is used in its place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Any

from palate.errors import FeedbackError


def kendall_distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Normalised Kendall distance of two rankings of the same K things, ties allowed, in [0, 1].

        d = 1/C(K,2) sum_{i<j} |sign(a_i - a_j) - sign(b_i - b_j)| / 2

    A pair in opposite order costs 1, a pair that is tied in one ranking only costs 1/2, so a tie is half way between
    both orders (Kemeny and Snell 1962; Fagin et al. 2006, with p = 1/2, for which it is a metric).

    Args:
        first, second: [K] ranks, lower = better; only their order counts.

    >>> kendall_distance((1, 2, 3), (3, 2, 1)), kendall_distance((1, 2), (1, 1))
    (1.0, 0.5)
    """
    if len(first) != len(second) or len(first) < 2:
        raise FeedbackError(
            f"rankings of {len(first)} and {len(second)} things: expected as many, two or more. "
            "Compute the agreement of each K on its own."
        )
    pairs = list(combinations(range(len(first)), 2))
    return sum(abs(_sign(first[i], first[j]) - _sign(second[i], second[j])) for i, j in pairs) / (2 * len(pairs))


def masi_distance(first: Collection[Any], second: Collection[Any]) -> float:
    """Distance of two sets of labels, in [0, 1]: 1 - J M (Passonneau 2006).

    J is their Jaccard index; M = 1 for equal sets, 2/3 where one holds the other, 1/3 where each has something of its
    own beside something shared, 0 where nothing is shared. Two empty sets are equal.

    >>> masi_distance({"a", "b"}, {"a"})  # 1 - 1/2 * 2/3
    0.6666666666666667
    """
    a, b = set(first), set(second)
    if a == b:
        return 0.0
    monotone = 2 / 3 if a <= b or b <= a else 1 / 3
    return 1 - len(a & b) / len(a | b) * monotone


def span_distance(first: Collection[tuple[int, int]], second: Collection[tuple[int, int]]) -> float:
    """1 - intersection over union of the marked characters, in [0, 1]; two empty marks are equal.

    Args:
        first, second: spans (start, end), characters, end excluded, 0 <= start < end; they may overlap. What counts is
            which characters are marked, not how they are cut into spans.

    >>> span_distance([(0, 4)], [(2, 4), (4, 6)])  # 2 shared of 6
    0.6666666666666667
    """
    a, b = _merged(first), _merged(second)
    shared = sum(max(0, min(e, g) - max(s, f)) for s, e in a for f, g in b)
    union = sum(e - s for s, e in (*a, *b)) - shared
    return 1 - shared / union if union else 0.0


def _merged(spans: Collection[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same characters as spans that do not touch."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if not 0 <= start < end:
            raise FeedbackError(f"the span ({start}, {end}): expected 0 <= start < end")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _sign(a: float, b: float) -> int:
    return (a > b) - (a < b)
