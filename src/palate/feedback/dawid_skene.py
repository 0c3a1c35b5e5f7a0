"""Dawid and Skene 1979: categories from several unreliable people, and each one's confusion matrix.

    p_j      share of items whose true class is j
    pi^k_jl  probability that annotator k says l of an item of class j
    n^k_il   how often k said l of item i

    E   T_ij  proportional to  p_j prod_k prod_l (pi^k_jl)^(n^k_il)                                          (eq. 2.5)
    M   p_j = mean_i T_ij,   pi^k_jl = sum_i T_ij n^k_il / sum_l sum_i T_ij n^k_il                    (eqs. 2.3, 2.4)

in log space. With ``smoothing`` c > 0 the M step adds c to every count, of p and of each row of pi: the mode under
Dirichlet(1 + c) priors. What never falls then is the log posterior; with c = 0 it is the log likelihood. EM starts from
the shares of votes, as in the paper, and so ends at the optimum in which class j means what people call j.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palate.errors import FeedbackError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DawidSkene:
    """What EM found.

    Attributes:
        items, annotators, classes: what the axes below stand for.
        probabilities: [I, C] of each item's true class.
        prevalence: [C].
        confusion: [A, C, C], row = true class, column = what the annotator says; rows sum to 1.
        objective: [steps] log posterior (up to a constant) before each M step, in nats; never falls.
        converged: the last gain was below the tolerance.
    """

    items: tuple[Hashable, ...]
    annotators: tuple[Hashable, ...]
    classes: tuple[Hashable, ...]
    probabilities: Floats
    prevalence: Floats
    confusion: Floats
    objective: Floats
    converged: bool

    def labels(self) -> list[Hashable]:
        """The likeliest class of each item; of equally likely ones the first."""
        return [self.classes[j] for j in self.probabilities.argmax(axis=1)]


def dawid_skene(
    answers: Iterable[tuple[Hashable, Hashable, Hashable]],
    *,
    classes: Sequence[Hashable] | None = None,
    smoothing: float = 0.1,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
) -> DawidSkene:
    """Fit by EM.

    Args:
        answers: (item, annotator, class) triples; an annotator may answer an item repeatedly.
        classes: all of them; None: those that occur, in order of first appearance.
        smoothing: imagined answers added to every cell, >= 0. 0.1 hardly moves annotators with tens of answers, and keeps
            those with few from being certain; 0 is the paper.
        tolerance: stop when a step gains less, in nats per answer.
        max_steps: of EM.

    Raises:
        FeedbackError: no answers, a class that is not in ``classes``, or settings out of range.
    """
    triples = list(answers)
    if not triples or not (smoothing >= 0 and tolerance > 0 and max_steps > 0):
        raise FeedbackError(
            f"{len(triples)} answers, smoothing {smoothing}, tolerance {tolerance}, max_steps {max_steps}: "
            "expected at least one answer, smoothing >= 0, and tolerance and max_steps above 0"
        )
    items, i = _numbered([t[0] for t in triples])
    annotators, k = _numbered([t[1] for t in triples])
    known = list(dict.fromkeys(t[2] for t in triples) if classes is None else classes)
    unknown = {t[2] for t in triples} - set(known)
    if unknown:
        raise FeedbackError(f"answers {sorted(map(repr, unknown))} are not among the classes {known}")
    label = np.array([known.index(t[2]) for t in triples])
    truth = np.zeros((len(items), len(known)))
    np.add.at(truth, (i, label), 1.0)
    truth /= truth.sum(axis=1, keepdims=True)
    history: list[float] = []
    converged = False
    while not converged and len(history) < max_steps:
        prevalence, confusion = _maximise(truth, i, k, label, len(annotators), smoothing)
        truth, objective = _expect(prevalence, confusion, i, k, label, len(items), smoothing)
        converged = bool(history) and objective - history[-1] < tolerance * len(triples)
        history.append(objective)
    return DawidSkene(
        tuple(items), tuple(annotators), tuple(known), truth, prevalence, confusion, np.array(history), converged
    )


def _maximise(
    truth: Floats,
    i: NDArray[np.int64],
    k: NDArray[np.int64],
    label: NDArray[np.int64],
    annotators: int,
    smoothing: float,
) -> tuple[Floats, Floats]:
    prevalence = truth.sum(axis=0) + smoothing
    counts = np.full((annotators, truth.shape[1], truth.shape[1]), float(smoothing))  # of an int it would hold ints
    np.add.at(counts.transpose(0, 2, 1), (k, label), truth[i])
    rows = counts.sum(axis=2, keepdims=True)
    # a class that an annotator never met: nothing is known of that row
    confusion = np.where(rows > 0, counts / np.where(rows > 0, rows, 1.0), 1 / truth.shape[1])
    return prevalence / prevalence.sum(), confusion


def _expect(
    prevalence: Floats,
    confusion: Floats,
    i: NDArray[np.int64],
    k: NDArray[np.int64],
    label: NDArray[np.int64],
    items: int,
    smoothing: float,
) -> tuple[Floats, float]:
    with np.errstate(divide="ignore"):
        log_p, log_pi = np.log(prevalence), np.log(confusion)
    joint = np.tile(log_p, (items, 1))
    np.add.at(joint, i, log_pi[k, :, label])
    top = joint.max(axis=1, keepdims=True)
    evidence = top[:, 0] + np.log(np.exp(joint - top).sum(axis=1))
    prior = smoothing * (log_p.sum() + log_pi.sum()) if smoothing else 0.0
    return np.exp(joint - evidence[:, None]), float(evidence.sum() + prior)


def _numbered(keys: Sequence[Hashable]) -> tuple[list[Hashable], NDArray[np.int64]]:
    seen: dict[Hashable, int] = {}
    numbers = np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)
    return list(seen), numbers
