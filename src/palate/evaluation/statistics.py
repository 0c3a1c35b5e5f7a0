"""Estimates with intervals, where the unit of evidence is the prompt.

Several responses (or pairs) of one prompt are not independent: they share its difficulty. So everything here that is
not a plain count of independent trials resamples whole prompts (a *cluster bootstrap*; Cameron, Gelbach and Miller
2008, section II; Davison and Hinkley 1997, section 3.8).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate with a two-sided confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:z.3f} [{self.low:z.3f}, {self.high:z.3f}]"

    def percent(self) -> str:
        """For shares: ``71.3 % [66.0, 76.1]``."""
        return f"{100 * self.estimate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(successes: float, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927; Agresti and Coull 1998).

    Args:
        successes: how many of ``n`` independent trials succeeded, in [0, n]; a tie may count one half.
        n: trials, > 0.
        confidence: in (0, 1).

    Raises:
        ValueError: nothing was tried, or successes outside [0, n].

    >>> wilson(8, 10).percent()
    '80.0 % [49.0, 94.3]'
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials: expected 0 <= successes <= n and n > 0")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    share: bool = False,
) -> Interval:
    """The weighted mean of ``values`` with a percentile interval that resamples whole clusters.

    A resample draws as many clusters as there are, with replacement, and takes sum(weight * value) / sum(weight) over
    all members of the drawn ones. Same seed, same interval.

    Args:
        values: [n].
        clusters: [n], equal = belongs together (the prompt, usually); None: every value on its own.
        weights: [n] > 0 or None (= 1 each).
        confidence: in (0, 1).
        resamples: 1000 or more for a 95 % interval.
        share: values are successes in [0, 1]. When every cluster says the same (all right, all wrong, one cluster),
            all resamples are equal and the percentiles would claim certainty; then the interval is Wilson's, with a
            cluster as one trial.

    Raises:
        ValueError: no values, a value that is not finite, a weight that is not above 0, or lengths that differ.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if x.ndim != 1 or not len(x) or w.shape != x.shape or (clusters is not None and len(clusters) != len(x)):
        raise ValueError(f"values {x.shape}, weights {w.shape}: expected one number, weight and cluster per row, n > 0")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).sum())} of {len(x)} values are NaN or infinite")
    if not (w > 0).all() or not np.isfinite(w).all():
        raise ValueError(f"{int((~((w > 0) & np.isfinite(w))).sum())} of {len(w)} weights are not above 0")
    number = _numbers(clusters) if clusters is not None else np.arange(len(x))
    sums = [np.bincount(number, weights=w * x), np.bincount(number, weights=w)]
    totals = np.stack(sums, axis=1).astype(np.float64)  # [clusters, 2]
    estimate = float(totals[:, 0].sum() / totals[:, 1].sum())
    if share and np.ptp(totals[:, 0] / totals[:, 1]) <= 1e-12:
        return wilson(min(max(estimate, 0.0), 1.0) * len(totals), len(totals), confidence=confidence)
    drawn = _resampled(totals, resamples, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(estimate, float(low), float(high))


def win_rate(
    ours: ArrayLike,
    theirs: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    tie: float = 0.0,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Paired win rate (wins + ties/2) / n on the same prompts, with a cluster bootstrap interval (a share's).

    Args:
        ours, theirs: [n] scores of two responses to the same prompt, row by row.
        clusters: [n] the prompt of each row; None: every row is another prompt.
        tie: scores at most this far apart are a tie.

    >>> win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0]).estimate
    0.625
    """
    difference = _difference(ours, theirs)
    outcome = np.where(np.abs(difference) <= tie, 0.5, (difference > 0).astype(np.float64))
    return cluster_bootstrap(outcome, clusters, confidence=confidence, resamples=resamples, seed=seed, share=True)


def paired_difference(
    ours: ArrayLike,
    theirs: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of ours - theirs on the same prompts, with a cluster bootstrap interval. Arguments as in ``win_rate``."""
    return cluster_bootstrap(_difference(ours, theirs), clusters, confidence=confidence, resamples=resamples, seed=seed)


def _difference(ours: ArrayLike, theirs: ArrayLike) -> Floats:
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} scores of ours, {b.shape} of theirs: a paired comparison needs one of each a row")
    finite = np.isfinite(a) & np.isfinite(b)  # NaN is above nothing, and would be a loss
    if not finite.all():
        raise ValueError(f"{int((~finite).sum())} of {finite.size} pairs of scores are NaN or infinite")
    return a - b


def _numbers(clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    """0, 1, 2, ... in order of first appearance."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(c, len(seen)) for c in clusters], dtype=np.int64)


def _resampled(totals: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Ratio of the two summed columns in each resample, [resamples]; in parts, so that memory stays below 64 MB."""
    n = len(totals)
    part = max(1, 4_000_000 // n)
    sums = [
        totals[rng.integers(n, size=(min(part, resamples - start), n))].sum(axis=1)
        for start in range(0, resamples, part)
    ]
    both = np.concatenate(sums)
    return np.asarray(both[:, 0] / both[:, 1], dtype=np.float64)
