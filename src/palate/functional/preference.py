"""How a preference depends on scores. Scores are in reward units; a loss is in nats, one per pair or group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float = 0.0,
    probability: Tensor | float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log P(chosen over rejected), one loss per pair, [P].

        d = r_chosen - r_rejected - margin
        L = -p log sigmoid(d) - (1 - p) log sigmoid(-d),     p = (1 - e) probability + e (1 - probability)

    Args:
        chosen, rejected: scores, [P].
        margin: by how much the chosen one should lead, reward units, >= 0; [P] or one number.
        probability: how surely chosen is preferred, in [0, 1]; [P] or one number. At 1/2 the pair is a tie.
        label_smoothing: assumed share of flipped labels e, in [0, 0.5).

    Source: InstructGPT (arXiv:2203.02155) eq. 1; margin: Llama 2 (arXiv:2307.09288) eq. 2.

    >>> bradley_terry_loss(torch.tensor([2.0]), torch.tensor([2.0]))
    tensor([0.6931])
    """
    lead = chosen - rejected - margin
    p = (1 - label_smoothing) * probability + label_smoothing * (1 - probability)
    return -p * F.logsigmoid(lead) - (1 - p) * F.logsigmoid(-lead)


def infonce_loss(positive: Tensor, negatives: Tensor, mask: Tensor | None = None) -> Tensor:
    """-log of the positive's share of exp(score) among itself and its negatives, [G].

    Args:
        positive: [G].
        negatives: [G, M]; masked slots may hold anything.
        mask: bool [G, M] or None = all count. No negatives: loss 0. One negative: Bradley-Terry.

    Source: pick the best of K -- Ziegler et al. 2019 (arXiv:1909.08593) eq. 1; InfoNCE -- arXiv:1807.03748 eq. 4.
    """
    if mask is not None:
        negatives = negatives.masked_fill(~mask, -torch.inf)
    everyone = torch.cat([positive[:, None], negatives], -1)
    return everyone.logsumexp(-1) - positive


def plackett_luce_loss(scores: Tensor, rank: Tensor, mask: Tensor) -> Tensor:
    """-log probability of a ranking drawn by taking the best of what is left, again and again, [G].

        L = -sum_i [ r_i - log( exp r_i + sum_{j ranked below i} exp r_j ) ]

    Without ties this is Plackett-Luce: each item is chosen from itself and all below it. Tied items are left out of
    each other's sums, so that their order carries nothing; all tied: 0.

    Args:
        scores: [G, K].
        rank: int [G, K], 1 = best, equal = tie.
        mask: bool [G, K]; other slots may hold anything.

    Source: DPO (arXiv:2305.18290) appendix A.3, eq. 18. K = 2 is Bradley-Terry.
    """
    scores = torch.where(mask, scores, 0)
    below = (rank[:, None, :] > rank[:, :, None]) & mask[:, None, :]
    candidates = below | torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    share = scores[:, None, :].expand_as(below).masked_fill(~candidates, -torch.inf).logsumexp(-1)
    return torch.where(mask, share - scores, 0).sum(-1)


def pad_groups(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Per-row values as one row per group: [N] -> [G, K] and a bool mask [G, K], groups in ascending order."""
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    order = torch.argsort(index, stable=True)
    column = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count).repeat_interleave(count)
    padded = values.new_zeros(len(count), int(count.max()))
    mask = torch.zeros(padded.shape, dtype=torch.bool, device=group.device)
    where = (index[order], column)
    return padded.index_put(where, values[order]), mask.index_put(where, torch.ones_like(column, dtype=torch.bool))
