"""How many more labels buy how much accuracy.

    accuracy(n) = ceiling - a n^-b,    a >= 0,  0.05 <= b <= 2,  ceiling <= 1

(power law of learning curves: Cortes et al. 1994; Hestness et al. 2017, arXiv:1712.00409), fitted by least squares to
the held-out accuracy of models trained on n labels each. Intervals are a bootstrap of two kinds of noise at once: which
pairs were held out (whole prompts are resampled, the same for every n) and how the training runs fell out (residuals,
scaled for the fitted parameters, are resampled).

Three parameters of a handful of points: often they cannot be told apart, and then any extrapolation is invention. The
fit says so, and refuses. What helps: more sizes, more held-out pairs, or a ceiling that is known from elsewhere, such as
the agreement of people with one another (``human_agreement``, ``model_limit``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from palate.errors import FeedbackError
from palate.evaluation.statistics import Interval, cluster_bootstrap
from palate.feedback.votes import Vote

Floats = NDArray[np.float64]
EXPONENTS = np.geomspace(0.05, 2.0, 120)
SIZES = 4  # different numbers of labels, at least
SPAN = 8.0  # largest / smallest of them, at least
REACH = 10.0  # how far beyond the largest is answered
AT_THE_EDGE = 0.1  # share of resamples with a parameter at the end of its range, at most


@dataclass(frozen=True)
class LearningCurve:
    """A fitted curve.

    Attributes:
        sizes: [m] labels of each run; accuracies: [m].
        ceiling, exponent: with bootstrap intervals; a given ceiling has no width.
        rise: accuracy at the largest size less that at the smallest.
        why_not: reasons why the curve cannot be extrapolated; empty where it can.
        draws: [R, 3] ceiling, a, b of each resample, the fit itself first.
    """

    sizes: tuple[float, ...]
    accuracies: tuple[float, ...]
    ceiling: Interval
    exponent: Interval
    rise: Interval
    why_not: tuple[str, ...]
    draws: Floats
    confidence: float

    def accuracy_at(self, labels: float) -> Interval:
        """Expected accuracy with so many labels.

        Raises:
            FeedbackError: beyond the measured sizes where ``why_not`` forbids it, or more than 10 times beyond them.
        """
        self._check(labels)
        return self._interval(self._accuracy(labels))

    def gain(self, more: float, *, now: float | None = None) -> Interval:
        """Accuracy bought by ``more`` labels on top of ``now`` (None: the largest measured size). Raises as above."""
        now = max(self.sizes) if now is None else now
        self._check(now)
        self._check(now + more)
        return self._interval(self._accuracy(now + more) - self._accuracy(now))

    def labels_for(self, accuracy: float) -> Interval:
        """Labels needed for an accuracy; the upper bound is infinite where the ceiling may lie below it.

        Raises:
            FeedbackError: not to be had by this curve, more than 10 times the measured labels, or ``why_not``.
        """
        ceiling, a, b = self.draws.T
        room = ceiling - accuracy
        with np.errstate(divide="ignore", over="ignore"):
            needed = np.where(room > 0, (a / np.where(room > 0, room, 1.0)) ** (1 / b), math.inf)
        if not math.isfinite(needed[0]):
            raise FeedbackError(
                f"an accuracy of {accuracy:.3f} is not below the ceiling {self.ceiling}: no number reaches it"
            )
        self._check(float(needed[0]))
        return self._interval(needed)

    def _accuracy(self, labels: float) -> Floats:
        ceiling, a, b = self.draws.T
        return np.asarray(ceiling - a * labels**-b)

    def _interval(self, values: Floats) -> Interval:
        bounds = [0.5 - self.confidence / 2, 0.5 + self.confidence / 2]
        low, high = np.quantile(values, bounds, method="nearest")  # infinities cannot be interpolated
        return Interval(float(values[0]), float(low), float(high))

    def _check(self, labels: float) -> None:
        low, high = min(self.sizes), max(self.sizes)
        if not labels >= low:
            raise FeedbackError(f"{labels:g} labels: the curve was measured from {low:g} upwards")
        if labels > high and self.why_not:
            raise FeedbackError(f"{labels:g} labels is beyond the measured {high:g}, and: {'; '.join(self.why_not)}.")
        if labels > REACH * high:
            raise FeedbackError(
                f"{labels:g} labels is more than {REACH:g} times the measured {high:g}: measure nearer first"
            )


def learning_curve(
    sizes: Sequence[float],
    outcomes: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    ceiling: float | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> LearningCurve:
    """Fit the power law.

    Args:
        sizes: [m] labels that each model was trained on, > 0; several runs of one size are welcome.
        outcomes: [m, T] how each model did on the same T held-out pairs: 1 right, 0 wrong, 1/2 tie.
        clusters: [T] the prompt of each held-out pair; None: all different.
        ceiling: a known one, in (0.5, 1], e.g. ``model_limit(human_agreement(votes).estimate)``; None: fitted.
        confidence, resamples, seed: of the bootstrap.
    """
    n = np.asarray(sizes, dtype=np.float64)
    y = np.asarray(outcomes, dtype=np.float64)
    if (
        n.ndim != 1
        or y.ndim != 2
        or len(y) != len(n)
        or not y.size
        or not ((y >= 0) & (y <= 1)).all()
        or not (n > 0).all()
    ):
        raise FeedbackError(f"sizes {n.shape}, outcomes {y.shape}: expected [m] above 0 and [m, T] in [0, 1]")
    if ceiling is not None and not 0.5 < ceiling <= 1:
        raise FeedbackError(f"ceiling {ceiling}: expected a number in (0.5, 1], or None to have it fitted")
    if clusters is not None and len(clusters) != y.shape[1]:
        raise FeedbackError(f"{len(clusters)} clusters for {y.shape[1]} held-out pairs")
    accuracies = y.mean(axis=1)
    unit = float(np.exp(np.log(n).mean()))
    fit = _fit(n / unit, accuracies[None], ceiling)
    rng = np.random.default_rng(seed)
    resampled = _resample_pairs(y, clusters, resamples, rng)
    residuals = accuracies - _curve(n / unit, fit)[0]
    free = max(len(n) - (2 if ceiling is not None else 3), 1)
    residuals = (residuals - residuals.mean()) * math.sqrt(len(n) / free)
    resampled = np.clip(resampled + residuals[rng.integers(len(n), size=resampled.shape)], 0, 1)
    draws = np.concatenate([fit, _fit(n / unit, resampled, ceiling)])
    smallest, largest = n == n.min(), n == n.max()
    rises = resampled[:, largest].mean(axis=1) - resampled[:, smallest].mean(axis=1)
    bounds = [0.5 - confidence / 2, 0.5 + confidence / 2]
    rise = Interval(
        float(accuracies[largest].mean() - accuracies[smallest].mean()), *map(float, np.quantile(rises, bounds))
    )
    why_not = _why_not(n, draws[1:], rise, ceiling)
    draws[:, 1] *= unit ** draws[:, 2]
    intervals = [Interval(float(x[0]), *map(float, np.quantile(x[1:], bounds))) for x in (draws[:, 0], draws[:, 2])]
    return LearningCurve(
        tuple(n.tolist()), tuple(accuracies.tolist()), intervals[0], intervals[1], rise, why_not, draws, confidence
    )


def human_agreement(votes: Sequence[Vote], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """How often two people who both decide say the same of a pair; interval by resampling prompts.

    Ties are left out: a reward model does not say "tie" either. Every two people who judged a pair count once.

    Raises:
        FeedbackError: no pair was decided by two different people.
    """
    sides: dict[tuple[Hashable, frozenset[Hashable]], dict[str, Hashable]] = defaultdict(dict)
    for v in votes:
        if v.outcome != "tie":
            sides[v.prompt, frozenset((v.left, v.right))][v.annotator] = v.left if v.outcome == "left" else v.right
    same, prompts = [], []
    for (prompt, _), said in sides.items():
        for one, other in combinations(said.values(), 2):
            same.append(float(one == other))
            prompts.append(prompt)
    if not same:
        raise FeedbackError("no pair was decided by two people: have some pairs judged twice")
    return cluster_bootstrap(same, prompts, confidence=confidence, seed=seed, share=True)


def model_limit(agreement: float) -> float:
    """The accuracy against single human votes that no model can exceed, given that two humans agree so often.

    Where a share p of people prefers one side, two of them agree with probability A = p^2 + (1 - p)^2, and the best guess
    is right with probability max(p, 1 - p) = (1 + sqrt(2 A - 1)) / 2. That is concave in A, so by Jensen its value at the
    mean of A bounds the mean over pairs. A model may thus beat human agreement, but not this.

    >>> model_limit(0.68)
    0.8
    """
    if not 0.5 <= agreement <= 1:
        raise FeedbackError(f"an agreement of {agreement:.3f}: expected a number in [0.5, 1]")
    return round((1 + math.sqrt(2 * agreement - 1)) / 2, 12)


def _fit(n: Floats, y: Floats, ceiling: float | None) -> Floats:
    """Least squares for each row of y [R, m]: the best of the exponents' grid, ceiling and a in closed form, [R, 3]."""
    x = n[None, :] ** -EXPONENTS[:, None]  # [B, m]
    if ceiling is None:
        centred = x - x.mean(axis=1, keepdims=True)
        spread = (centred**2).sum(axis=1)
        a = -(y @ centred.T) / np.where(spread > 0, spread, np.inf)
        a = np.maximum(a, 0.0)
        c = y.mean(axis=1, keepdims=True) + a * x.mean(axis=1)
    else:
        c = np.full((len(y), len(x)), np.inf)
    top = 1.0 if ceiling is None else ceiling
    through = np.maximum((top - y) @ x.T, 0.0) / (x**2).sum(axis=1)  # a with the ceiling held there
    held = c > top
    c = np.where(held, top, c)
    a = through if ceiling is not None else np.where(held, through, a)
    error = ((c[:, :, None] - a[:, :, None] * x - y[:, None, :]) ** 2).sum(axis=2)
    best = error.argmin(axis=1)
    rows = np.arange(len(y))
    return np.stack([c[rows, best], a[rows, best], EXPONENTS[best]], axis=1)


def _curve(n: Floats, parameters: Floats) -> Floats:
    c, a, b = (parameters[:, i, None] for i in range(3))
    return np.asarray(c - a * n**-b)


def _resample_pairs(y: Floats, clusters: Sequence[Hashable] | None, resamples: int, rng: np.random.Generator) -> Floats:
    """Accuracies [R, m] of held-out sets of as many prompts, drawn with replacement."""
    seen: dict[Hashable, int] = {}
    number = np.array([seen.setdefault(c, len(seen)) for c in (range(y.shape[1]) if clusters is None else clusters)])
    size = number.max() + 1
    sums = np.stack([np.bincount(number, weights=row, minlength=size) for row in y])  # [m, clusters]
    counts = np.bincount(number, minlength=size).astype(np.float64)
    w = rng.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)
    return np.asarray((w @ sums.T) / (w @ counts)[:, None])


def _why_not(n: Floats, draws: Floats, rise: Interval, ceiling: float | None) -> tuple[str, ...]:
    reasons = []
    different = len(set(n.tolist()))
    if different < SIZES or n.max() < SPAN * n.min():
        reasons.append(
            f"{different} sizes from {n.min():g} to {n.max():g}; a curve needs {SIZES} that span a factor of {SPAN:g}"
        )
    if not rise.low > 0:
        reasons.append(f"accuracy did not surely rise over them ({rise})")
    edge = (draws[:, 2] <= EXPONENTS[0]) | (draws[:, 2] >= EXPONENTS[-1]) | (draws[:, 1] <= 0)
    if np.mean(edge) > AT_THE_EDGE:
        reasons.append(f"the exponent is at the end of its range in {100 * np.mean(edge):.0f} % of resamples")
    if ceiling is None and np.mean(draws[:, 0] >= 1) > AT_THE_EDGE:
        share = 100 * np.mean(draws[:, 0] >= 1)
        reasons.append(f"the ceiling is 1 in {share:.0f} % of resamples: give one, or measure more sizes")
    return tuple(reasons)
