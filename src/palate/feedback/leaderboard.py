"""A table of models from votes on their battles: Bradley-Terry with ties, with intervals, and ranks only where they hold.

    z = s_l - s_r + b                                  s of each model, b for the side on the left, in logits
    P(left, right, tie) = softmax(z/2, -z/2, t)        Davidson (1970); "both bad" counts as a tie

The mode under s, b, t ~ N(0, 3^2), which only matters while there is little data (a model that never lost); scores have
mean zero. The likelihood knows the votes by their counts alone, so the table does not depend on their order, as running
Elo ratings do.

Intervals of a difference s_i - s_j: a bootstrap over conversations (the turns of one are not independent), widened to the
normal approximation from the curvature at the mode wherever that is wider: a bootstrap of ten wins in ten battles would
claim certainty. Two models are *separated* when the interval of their difference is clear of zero at a level that
holds for all pairs at once (Bonferroni). A model's rank runs from 1 + the number of models that are surely better to the
number of all less those that are surely worse; who is separated from nobody has no rank of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from palate.errors import FeedbackError
from palate.feedback.conversations import Conversation
from palate.feedback.tables import canonical_json

Floats = NDArray[np.float64]
PRIOR_SD = 3.0  # logits
POINTS = 400 / np.log(10)  # Elo's points of a logit
Outcome = Literal["left", "right", "tie"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Cell = tuple[str, str, Outcome]  # left, right


@dataclass(frozen=True)
class Battle:
    """One vote: which of two models, as they stood on the screen, was better.

    Attributes:
        left, right: names.
        outcome: "left", "right" or "tie" (both bad too).
        cluster: what it belongs to: a conversation, or an annotator.
    """

    left: str
    right: str
    outcome: Outcome
    cluster: str


@dataclass(frozen=True)
class Standing:
    """A model in the table.

    Attributes:
        score, low, high: in Elo's points (400 = 10 : 1), 1000 = the mean of the models; the interval is of the distance to that mean.
        wins, ties, losses: counts of votes.
        best, worst: the ranks that are possible; equal = its rank.
    """

    name: str
    score: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    best: int
    worst: int


@dataclass(frozen=True)
class Leaderboard:
    """The table, the highest score first.

    Attributes:
        separated: pairs (better, worse) whose order the votes settle.
        left_share: share of wins of the left side between equal models; 1/2 = no bias.
        tie_share: share of ties between equal models.
        votes, clusters: how much it is from.
        confidence: of each interval; the separations hold at this level for all pairs at once.
    """

    standings: tuple[Standing, ...]
    separated: tuple[tuple[str, str], ...]
    left_share: float
    tie_share: float
    votes: int
    clusters: int
    confidence: float

    @property
    def ranked(self) -> bool:
        """Every model has a rank of its own."""
        return all(each.best == each.worst for each in self.standings)


def battles_of(conversations: Iterable[Conversation], *, by: Literal["conversation", "annotator"]) -> list[Battle]:
    """Every vote of the battles; models of one name and different content are told apart by their hash."""
    held = [each for each in conversations if each.mode == "battle"]
    hashes: dict[str, set[str]] = {}
    for each in held:
        for model in each.models:
            hashes.setdefault(model["name"], set()).add(str(model.get("hash")))

    def name(model: object) -> str:
        assert isinstance(model, dict)
        several = len(hashes[model["name"]]) > 1
        return f"{model['name']}@{str(model.get('hash'))[:8]}" if several else model["name"]

    found = []
    for each in held:
        left, right = (name(model) for model in each.models)
        cluster = each.id if by == "conversation" else each.annotator
        for turn in each.current:
            if turn.vote is not None:
                outcome: Outcome = turn.vote if turn.vote in ("left", "right") else "tie"  # type: ignore[assignment]
                found.append(Battle(left, right, outcome, cluster))
    return found


def leaderboard(
    battles: Sequence[Battle], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Leaderboard:
    """Fit the table; the same votes in any order give the same table.

    Args:
        confidence: in (0, 1).
        resamples: of the bootstrap.
    Raises:
        FeedbackError: no vote, or models that were never compared, not even by way of others.
    """
    if not battles:
        raise FeedbackError(
            "there is no vote on a battle yet. Start with: palate label arena STORE --model A --model B"
        )
    names = sorted({name for each in battles for name in (each.left, each.right)})
    _check_connected(names, battles)
    cells, counts = _counted(battles)
    numbered = [(names.index(left), names.index(right), outcome) for left, right, outcome in cells]
    fitted = _fitted(_design(numbered, len(names)), counts, resamples, seed)
    surely = _separated(fitted, len(names), confidence)
    standings = [_standing(i, names, battles, fitted, surely, confidence) for i in range(len(names))]
    bias, tie = fitted.mode[-2], fitted.mode[-1]
    return Leaderboard(
        tuple(sorted(standings, key=lambda each: (-each.score, each.name))),
        tuple(sorted((names[i], names[j]) for i, j in surely)),
        float(1 / (1 + np.exp(-bias))),
        float(np.exp(tie) / (2 + np.exp(tie))),
        len(battles),
        len(counts),
        confidence,
    )


def _standing(
    i: int,
    names: Sequence[str],
    battles: Sequence[Battle],
    fitted: _Fitted,
    surely: Sequence[tuple[int, int]],
    confidence: float,
) -> Standing:
    """Model ``i`` in the table."""
    contrast = np.zeros(len(fitted.mode))
    contrast[: len(names)] = -1 / len(names)
    contrast[i] += 1
    low, high = fitted.interval(contrast, confidence)
    score = fitted.mode[i] - fitted.mode[: len(names)].mean()
    points = [1000 + POINTS * float(x) for x in (score, low, high)]
    name = names[i]
    mine = [(each.left == name, each.outcome) for each in battles if name in (each.left, each.right)]
    wins = sum(outcome == ("left" if left else "right") for left, outcome in mine)
    ties = sum(outcome == "tie" for _, outcome in mine)
    best = 1 + sum(worse == i for _, worse in surely)
    worst = len(names) - sum(better == i for better, _ in surely)
    return Standing(name, points[0], points[1], points[2], wins, ties, len(mine) - wins - ties, best, worst)


def _counted(battles: Sequence[Battle]) -> tuple[list[Cell], Floats]:
    """What happened, and how often in each cluster, [clusters, cells]."""
    cells = sorted({(each.left, each.right, each.outcome) for each in battles})
    place = {cell: i for i, cell in enumerate(cells)}
    by_cluster: dict[str, Counter[int]] = {}
    for each in battles:
        by_cluster.setdefault(each.cluster, Counter())[place[each.left, each.right, each.outcome]] += 1
    # by what they hold, not by when they came or what they are called
    rows = sorted(by_cluster.values(), key=lambda row: canonical_json(sorted(row.items())))
    return cells, np.array([[row[cell] for cell in range(len(cells))] for row in rows], dtype=np.float64)


def _design(cells: Sequence[tuple[int, int, str]], models: int) -> Floats:
    """x [cells, 4, models + 2]: the linear terms of the three outcomes of a cell's pair, then of what happened there."""
    found = np.zeros((len(cells), 4, models + 2))
    for row, (left, right, outcome) in enumerate(cells):
        found[row, 0, left], found[row, 0, right], found[row, 0, -2] = 0.5, -0.5, 0.5
        found[row, 1] = -found[row, 0]
        found[row, 2, -1] = 1
        found[row, 3] = found[row, OUTCOMES.index(outcome)]
    return found


@dataclass(frozen=True)
class _Fitted:
    """theta = (s of each model, b, t): its mode, the inverse of the curvature there, and draws of a bootstrap."""

    mode: Floats
    covariance: Floats
    drawn: Floats

    def interval(self, contrast: Floats, confidence: float) -> tuple[float, float]:
        """Of contrast . theta: the bootstrap's, or the normal approximation's where that is wider."""
        at = float(contrast @ self.mode)
        half = NormalDist().inv_cdf(0.5 + confidence / 2) * float(np.sqrt(contrast @ self.covariance @ contrast))
        low, high = np.quantile(self.drawn @ contrast, [0.5 - confidence / 2, 0.5 + confidence / 2])
        return min(at - half, float(low)), max(at + half, float(high))


def _fitted(design: Floats, counts: Floats, resamples: int, seed: int) -> _Fitted:
    """Whole clusters are drawn anew in each of the resamples."""
    mode, covariance = _fit(design, counts.sum(0))
    rng, clusters = np.random.default_rng(seed), len(counts)
    again = (counts[rng.integers(clusters, size=clusters)].sum(0) for _ in range(resamples))
    return _Fitted(mode, covariance, np.stack([_fit(design, each, start=mode)[0] for each in again]))


def _separated(fitted: _Fitted, models: int, confidence: float) -> list[tuple[int, int]]:
    """(better, worse) of every pair whose difference is clear of zero, at a level that holds for all pairs at once."""
    pairs = list(combinations(range(models), 2))
    surely: list[tuple[int, int]] = []
    for i, j in pairs:
        contrast = np.zeros(len(fitted.mode))
        contrast[i], contrast[j] = 1, -1
        low, high = fitted.interval(contrast, 1 - (1 - confidence) / len(pairs))
        if low > 0 or high < 0:
            surely.append((i, j) if low > 0 else (j, i))
    return surely


def _fit(design: Floats, counts: Floats, start: Floats | None = None) -> tuple[Floats, Floats]:
    """The mode and the inverse of its curvature, by Newton's method; the log posterior is strictly concave."""
    outcomes, happened = design[:, :3], design[:, 3]
    theta = np.zeros(design.shape[2]) if start is None else start.copy()

    def value(at: Floats) -> float:
        linear = outcomes @ at
        top = linear.max(1)
        total = top + np.log(np.exp(linear - top[:, None]).sum(1))
        return float(counts @ (happened @ at - total) - (at @ at) / (2 * PRIOR_SD**2))

    now = value(theta)
    for _ in range(100):
        linear = outcomes @ theta
        p = np.exp(linear - linear.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        mean = np.einsum("co,cod->cd", p, outcomes)
        gradient = counts @ (happened - mean) - theta / PRIOR_SD**2
        curvature = np.einsum("c,co,cod,coe->de", counts, p, outcomes, outcomes, optimize=True)
        curvature -= np.einsum("c,cd,ce->de", counts, mean, mean)
        curvature[np.diag_indices_from(curvature)] += 1 / PRIOR_SD**2
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while (after := value(theta + size * step)) < now and size > 1e-6:
            size /= 2
        theta, now = theta + size * step, max(now, after)
        if np.abs(step).max() < 1e-9:
            break
    return theta, np.linalg.inv(curvature)


def _check_connected(names: Sequence[str], battles: Sequence[Battle]) -> None:
    reached, more = {names[0]}, True
    while more:
        more = False
        for each in battles:
            if (each.left in reached) != (each.right in reached):
                reached |= {each.left, each.right}
                more = True
    if len(reached) < len(names):
        apart = ", ".join(sorted(set(names) - reached))
        raise FeedbackError(
            f"{apart} never met {', '.join(sorted(reached))}, not even by way of others: they cannot be put into one "
            "table. Hold battles between them."
        )
