"""The best of n samples: who is kept, the law of the one that is, and how far that is from the law they were drawn from."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best_weights(scores: Tensor, group: Tensor, keep: int = 1) -> Tensor:
    """How much of each row is kept, [N] in [0, 1]; ``keep`` in every group.

    Rows that are equal at the border share what is left: two that are both the best of their group are kept by half.

    Args:
        scores: [N], reward units.
        group: int64 [N].
        keep: >= 1; how many of the best.
    """
    same = group[:, None] == group
    above = (same & (scores > scores[:, None])).sum(-1)  # rows of the group that score higher
    equal = (same & (scores == scores[:, None])).sum(-1)
    return ((keep - above) / equal).clamp(0, 1).to(scores.dtype)


def best_of_n_law(probabilities: Tensor, scores: Tensor, n: int) -> Tensor:
    """P(y is the best of n samples), over all outcomes y; ties are split at random.

        F(r)^n - F(r-)^n for all outcomes of score r together, shared as their probabilities are

    Args:
        probabilities: of the sampled distribution, [..., V], summing to 1.
        scores: [..., V], reward units.
        n: >= 1.

    Returns:
        [..., V], in float64.
    """
    p, scores = probabilities.double(), scores.double()
    lower = (p[..., None, :] * (scores[..., None, :] < scores[..., None])).sum(-1)  # F(r-)
    level = (p[..., None, :] * (scores[..., None, :] == scores[..., None])).sum(-1)
    return p / level.clamp(min=1e-300) * ((lower + level).pow(n) - lower.pow(n))


def best_of_n_kl(probabilities: Tensor, scores: Tensor, n: int) -> Tensor:
    """KL(best of n || sampled), exactly; nats, [...]. Arguments as ``best_of_n_law``."""
    law, p = best_of_n_law(probabilities, scores, n), probabilities.double()
    return torch.where(law > 0, law * (law / p).log(), 0).sum(-1)


def best_of_n_kl_bound(n: int, keep: int = 1) -> float:
    """What that KL is at most, nats; reached when no two outcomes have the same score and none has much probability.

        log n - (n - 1)/n                                  keep = 1 (Stiennon et al. 2020, arXiv:2009.01325, appendix G.3)
        integral over u from 0 to 1 of  f log f            f(u) = n/k sum_{j<k} C(n-1, j) u^(n-1-j) (1 - u)^j

    f is the density of the quantile of one of the k best of n, taken at random; for k = 1 it is n u^(n-1). A response is
    a function of its quantile, and no function increases a KL (Beirami et al. 2024, arXiv:2401.01879).

    Args:
        n: >= 1. keep: k, from 1 to n.

    >>> best_of_n_kl_bound(1)
    0.0
    """
    if keep == 1:
        return math.log(n) - (n - 1) / n
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    chances = [math.lgamma(n) - math.lgamma(j + 1) - math.lgamma(n - j) for j in range(keep)]  # log C(n-1, j)
    order_statistics = [(c + (n - 1 - j) * u.log() + j * (1 - u).log()).exp() for j, c in enumerate(chances)]
    density = n / keep * torch.stack(order_statistics).sum(0)
    return float(torch.where(density > 0, density * density.clamp(min=1e-300).log(), 0).mean())
