"""What to label next: where a label would teach most, always mixed with pairs drawn at random.

Values, one for each candidate pair, larger = ask sooner:

* ``ensemble_disagreement``: reward models that were trained differently disagree about it. "variance" of the margins
  r(first) - r(second), or "vote_entropy" of their signs (Seung, Opper and Sompolinsky 1992; Christiano et al. 2017,
  arXiv:1706.03741, section 2.2.4, use the variance).
* ``expected_information``: what one more vote tells about the score difference d ~ N(mean, sd^2),

      I(vote; d) = H( E_d sigmoid(d) ) - E_d H( sigmoid(d) )                  (Houlsby et al. 2011, arXiv:1112.5745, eq. 2)

  which is zero both where d is known and, unlike the entropy of the vote, where people simply differ.

``choose`` makes an order of them. Uncertainty alone asks for oddities, and what it leaves out is never measured; so a
share is a plain random sample of *all* candidates, set aside first, and can be evaluated on like any random sample.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from palate.errors import FeedbackError
from palate.feedback.annotator_model import expected_sigmoid

Floats = NDArray[np.float64]


class Selection(NamedTuple):
    """Numbers of candidates in the order in which to ask, and which of them are the random sample, both [count]."""

    order: NDArray[np.int64]
    random: NDArray[np.bool_]


def ensemble_disagreement(margins: ArrayLike, measure: Literal["variance", "vote_entropy"] = "variance") -> Floats:
    """Disagreement of M reward models on N pairs, [N].

    Args:
        margins: [M, N] r(first) - r(second), M >= 2. For "variance" the models' scales must be comparable.
        measure: "variance" (reward units squared) or "vote_entropy" (nats; a margin of 0 is half a vote for each side).
    """
    x = np.asarray(margins, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
        raise FeedbackError(f"margins {x.shape}: expected finite numbers [models, pairs] of two models or more")
    if measure == "variance":
        return np.asarray(x.var(axis=0, ddof=1))
    if measure == "vote_entropy":
        return _entropy(((np.sign(x) + 1) / 2).mean(axis=0))
    raise FeedbackError(f'measure {measure!r}: expected "variance" or "vote_entropy"')


def expected_information(mean: ArrayLike, sd: ArrayLike) -> Floats:
    """Mutual information of one more typical vote and the score difference, [N] nats, in [0, log 2].

    Args:
        mean, sd: [N] of the difference, in the typical annotator's logits (``PairEstimate.margin``, ``margin_sd``).
    """
    m, s = (torch.as_tensor(np.atleast_1d(np.asarray(x, dtype=np.float64))) for x in (mean, sd))
    if m.shape != s.shape or m.ndim != 1 or not bool((s >= 0).all()) or not bool(torch.isfinite(m + s).all()):
        raise FeedbackError(f"mean {tuple(m.shape)}, sd {tuple(s.shape)}: expected as many finite numbers, sd >= 0")
    x, w = np.polynomial.hermite_e.hermegauss(31)
    p = 1 / (1 + np.exp(-(m.numpy() + s.numpy() * x[:, None])))
    within = (_entropy(p) * (w / w.sum())[:, None]).sum(axis=0)
    return np.maximum(_entropy(expected_sigmoid(m, s).numpy()) - within, 0.0)


def choose(
    value: ArrayLike,
    prompts: Sequence[Hashable],
    *,
    count: int | None = None,
    random_share: float = 0.2,
    eligible: ArrayLike | None = None,
    seed: int = 0,
) -> Selection:
    """The next ``count`` candidates to label, in order.

    Two streams are interleaved so that every beginning of the order holds the random share, rounded down. One is a random
    sample of the eligible candidates. The other takes the rest by value, in rounds: first the best pair of each prompt,
    best first, then each prompt's second best, and so on; so K pairs of one prompt, which tell much the same, never come
    in a row while other prompts wait. Equal values are taken in random order.

    Args:
        value: [N] finite.
        prompts: [N] each candidate's prompt.
        count: how many; None: all that are eligible.
        random_share: in [0, 1]; 0.2 by default. 0 is allowed and leaves nothing to evaluate on.
        eligible: [N] bool, e.g. not yet voted on by this annotator; None: all.
        seed: of the sample.
    """
    x = np.asarray(value, dtype=np.float64)
    mask = np.ones(len(x), dtype=bool) if eligible is None else np.asarray(eligible, dtype=bool)
    if x.ndim != 1 or len(prompts) != len(x) or mask.shape != x.shape or not np.isfinite(x).all():
        raise FeedbackError(
            f"values {x.shape}, {len(prompts)} prompts, eligible {mask.shape}: expected one of each, values finite"
        )
    candidates = np.flatnonzero(mask)
    count = len(candidates) if count is None else count
    if not (0 <= random_share <= 1 and 0 <= count):
        raise FeedbackError(f"count {count}, random_share {random_share}: expected 0 or more, and a share in [0, 1]")
    count = min(count, len(candidates))
    shuffled = np.random.default_rng(seed).permutation(candidates)
    # a hair above, so that 0.2 * 5 is one
    quota = np.floor(np.arange(count + 1) * random_share + 1e-9).astype(np.int64)
    sample, rest = shuffled[: quota[-1]], shuffled[quota[-1] :]
    best = _in_rounds(rest, x, prompts)
    random = np.diff(quota) > 0
    order = np.empty(count, dtype=np.int64)
    order[random] = sample
    order[~random] = best[: count - quota[-1]]
    return Selection(order, random)


def _in_rounds(candidates: NDArray[np.int64], value: Floats, prompts: Sequence[Hashable]) -> NDArray[np.int64]:
    ranked = candidates[np.argsort(-value[candidates], kind="stable")]
    taken: dict[Hashable, int] = {}
    rounds = []
    for i in ranked:
        rounds.append(taken.get(prompts[i], 0))
        taken[prompts[i]] = rounds[-1] + 1
    return ranked[np.argsort(np.array(rounds, dtype=np.int64), kind="stable")]


def _entropy(p: Floats) -> Floats:
    """Of a coin, in nats."""
    inside = np.clip(p, 1e-300, 1.0), np.clip(1 - p, 1e-300, 1.0)
    return np.asarray(-(p * np.log(inside[0]) + (1 - p) * np.log(inside[1])))
