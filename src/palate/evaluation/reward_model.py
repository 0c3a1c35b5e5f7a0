"""How good a reward model is: accuracy, likelihood, calibration, and whether it only measures length.

Everything here reads numbers: the scores of the two responses of each labelled pair. A held-out accuracy means little
without its two neighbours: what "the longer one wins" reaches on the same pairs, and the accuracy on those pairs where
the shorter one was chosen.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from palate.evaluation.statistics import Interval, cluster_bootstrap

Floats = NDArray[np.float64]


class Bin(NamedTuple):
    """Pairs whose confidence fell into one bin of a reliability diagram."""

    low: float
    high: float
    pairs: int
    confidence: float  # mean confidence, in [0.5, 1]
    accuracy: float  # how often the surer side was right, ties one half


class SwapReport(NamedTuple):
    """What changes when the two responses change places."""

    consistent: float  # share of pairs with the same winner in both orders (a tie in both orders is consistent)
    first_wins: float  # share of judgements, over both orders, won by the response shown first; 0.5 = no side bias
    deviation: float  # mean |p(a over b) + p(b over a) - 1|, 0 = the order does not matter


class LengthReport(NamedTuple):
    """Is it only length? An accuracy is None when no pair qualifies."""

    longer_wins: Interval  # accuracy of "the longer one is better" on the same pairs, equal lengths one half
    accuracy_longer_chosen: Interval | None
    accuracy_shorter_chosen: Interval | None
    correlation: float  # of score and length over all responses
    correlation_within: float  # of their differences within pairs, so that prompts do not matter


@dataclass(frozen=True)
class RewardModelReport:
    """See ``evaluate_reward_model``. ``length`` is None when no lengths were given."""

    pairs: int
    accuracy: Interval
    nll: float
    ece: float
    margin: float
    bins: tuple[Bin, ...]
    length: LengthReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; every interval as its estimate, low and high."""
        return {name: _plain(value) for name, value in self.__dict__.items()}


def evaluate_reward_model(
    chosen: ArrayLike,
    rejected: ArrayLike,
    *,
    prompts: Sequence[Hashable] | None = None,
    chosen_length: ArrayLike | None = None,
    rejected_length: ArrayLike | None = None,
    bins: int = 10,
    seed: int = 0,
) -> RewardModelReport:
    """Judge a reward model on labelled pairs.

    Args:
        chosen, rejected: [P] raw scores, whose difference is a Bradley-Terry log-odds (undo any normalisation).
        prompts: [P] the prompt of each pair, for intervals that resample prompts; None: all pairs independent.
        chosen_length, rejected_length: [P] lengths in tokens or words, both or none.
        bins: bins of the reliability diagram, over confidence in [0.5, 1].

    Raises:
        ValueError: no pairs, unequal lengths, or scores that are not finite.
    """
    good, bad = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    if good.shape != bad.shape or good.ndim != 1 or not len(good):
        raise ValueError(f"chosen {good.shape}, rejected {bad.shape}: expected one score of each per pair, P > 0")
    if not np.isfinite([good, bad]).all():
        raise ValueError(
            f"{int((~np.isfinite(good - bad)).sum())} of {len(good)} pairs have a score that is NaN or infinite"
        )
    right = pair_accuracy(good, bad)
    clusters: list[Hashable] = list(range(len(good)) if prompts is None else prompts)
    if (chosen_length is None) != (rejected_length is None):
        raise ValueError("lengths of one side only: give chosen_length and rejected_length, or neither")
    lengths = None
    if chosen_length is not None and rejected_length is not None:
        lengths = np.asarray(chosen_length, dtype=np.float64), np.asarray(rejected_length, dtype=np.float64)
    diagram = reliability(good - bad, bins=bins)
    return RewardModelReport(
        pairs=len(good),
        accuracy=cluster_bootstrap(right, clusters, seed=seed, share=True),
        nll=negative_log_likelihood(good - bad),
        ece=expected_calibration_error(diagram),
        bins=diagram,
        margin=float((good - bad).mean()),
        length=None if lengths is None else _length_report(good, bad, *lengths, clusters, seed),
    )


def pair_accuracy(chosen: ArrayLike, rejected: ArrayLike) -> Floats:
    """1 where the chosen one scores higher, 1/2 where both score the same, else 0; [P]."""
    difference = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    return np.asarray((np.sign(difference) + 1) / 2, dtype=np.float64)


def negative_log_likelihood(difference: ArrayLike) -> float:
    """Mean of -log sigmoid(chosen - rejected), nats a pair; log 2 = 0.693 knows nothing."""
    return float(np.logaddexp(0.0, -np.asarray(difference, dtype=np.float64)).mean())


def reliability(difference: ArrayLike, *, bins: int = 10) -> tuple[Bin, ...]:
    """Reliability diagram of pair predictions; bins without pairs are left out.

    Which response is "first" is arbitrary, so the forecast is read from its surer side: confidence = sigmoid(|d|) in
    [0.5, 1], right when d > 0, half right when d = 0.

    Args:
        difference: [P] score of the chosen minus score of the rejected, log-odds.
        bins: equal bins over [0.5, 1].
    """
    d = np.asarray(difference, dtype=np.float64)
    confidence, right = 1 / (1 + np.exp(-np.abs(d))), (np.sign(d) + 1) / 2
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    width = 0.5 / bins
    return tuple(
        Bin(
            0.5 + i * width,
            0.5 + (i + 1) * width,
            int((place == i).sum()),
            float(confidence[place == i].mean()),
            float(right[place == i].mean()),
        )
        for i in range(bins)
        if (place == i).any()
    )


def expected_calibration_error(diagram: Sequence[Bin]) -> float:
    """Mean |accuracy - confidence| over bins, weighted by their pairs (Naeini et al. 2015), in [0, 1]."""
    return sum(b.pairs * abs(b.accuracy - b.confidence) for b in diagram) / sum(b.pairs for b in diagram)


def length_correlation(scores: ArrayLike, lengths: ArrayLike) -> float:
    """Pearson correlation of score and length over responses, in [-1, 1]; 0 when either is constant."""
    s, n = np.asarray(scores, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    return _cosine(s - s.mean(), n - n.mean())


def swap_test(first_over_second: ArrayLike, second_over_first: ArrayLike) -> SwapReport:
    """Does a pairwise judge keep its mind when the two responses change places?

    Args:
        first_over_second: [P] probability that a is better, shown as (a, b).
        second_over_first: [P] probability that b is better, shown as (b, a): so always of the response shown first.

    A scalar reward model passes by construction *if* a row's score does not depend on its place in the batch, which
    is what this then checks.
    """
    ab, ba = np.asarray(first_over_second, dtype=np.float64), np.asarray(second_over_first, dtype=np.float64)
    if ab.shape != ba.shape or not len(ab):
        raise ValueError(f"{ab.shape} judgements in one order, {ba.shape} in the other: expected as many, P > 0")
    vote_ab, vote_ba = np.sign(ab - 0.5), np.sign(ba - 0.5)
    return SwapReport(
        consistent=float((vote_ab == -vote_ba).mean()),
        first_wins=float((np.concatenate([vote_ab, vote_ba]) + 1).mean() / 2),
        deviation=float(np.abs(ab + ba - 1).mean()),
    )


def _length_report(
    good: Floats, bad: Floats, good_length: Floats, bad_length: Floats, clusters: list[Hashable], seed: int
) -> LengthReport:
    if good_length.shape != good.shape or bad_length.shape != bad.shape:
        raise ValueError(
            f"lengths {good_length.shape}, {bad_length.shape} of {len(good)} pairs: expected one per response"
        )
    right = pair_accuracy(good, bad)

    def accuracy(where: NDArray[np.bool_]) -> Interval | None:
        if not where.any():
            return None
        kept = [cluster for cluster, chosen in zip(clusters, where, strict=True) if chosen]
        return cluster_bootstrap(right[where], kept, seed=seed, share=True)

    return LengthReport(
        longer_wins=cluster_bootstrap(pair_accuracy(good_length, bad_length), clusters, seed=seed, share=True),
        accuracy_longer_chosen=accuracy(good_length > bad_length),
        accuracy_shorter_chosen=accuracy(good_length < bad_length),
        correlation=length_correlation(np.concatenate([good, bad]), np.concatenate([good_length, bad_length])),
        # each pair stands in both orders, so both means are zero
        correlation_within=_cosine(good - bad, good_length - bad_length),
    )


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _cosine(a: Floats, b: Floats) -> float:
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm else 0.0
