"""DPO by Plackett-Luce, the whole ranking at once -- Rafailov et al. 2023, arXiv:2305.18290, appendix A.3.

    L = -E log prod_{k=1}^{K} exp( beta h_k ) / sum_{j=k}^{K} exp( beta h_j )                               (eq. 20)
    h_k = log pi(y_k|x)/pi_ref(y_k|x),     y_1 the best, y_K the worst

The best is chosen from all, the second from what is left, and so on; the implicit rewards are the scores. With K = 2 it is
DPO, and it is not the average of DPO over the pairs. On rankings that follow Plackett-Luce with reward r the fixed point is
pi_ref exp(r / beta) / Z. Tied responses are left out of each other's sums, so that their order carries nothing.

Roles: policy (trained), reference (frozen). Data: rankings; a comparison is a ranking of two. No sampling.
Left out: label smoothing, which has no one meaning for a ranking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.functional.preference import pad_groups, plackett_luce_loss
from palate.methods.dpo import check_positive, log_ratios, pair_metrics, with_reference
from palate.types import Comparisons, Mean, Models, Rankings


def pl_dpo_loss(log_ratio: Tensor, rank: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Eq. 20, one loss per prompt, [G].

    Args:
        log_ratio: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [G, K].
        rank: int [G, K], 1 = best, equal = tie.
        mask: bool [G, K]; other slots may hold anything.
        beta: how dearly leaving the reference is paid for; > 0.
    """
    return plackett_luce_loss(beta * log_ratio, rank, mask)


def all_pairs(batch: Rankings) -> Comparisons:
    """Every pair of a better and a worse response to a prompt; the pairs of a prompt weigh 1 together."""
    group, rank, answered = batch.tokens.group, batch.rank, batch.tokens.response_mask.any(-1)
    better = (group[:, None] == group) & (rank[:, None] < rank) & answered[:, None] & answered
    chosen, rejected = better.nonzero(as_tuple=True)
    _, index, count = torch.unique(group[chosen], return_inverse=True, return_counts=True)
    known = batch.reference_logprobs
    return Comparisons(batch.tokens, chosen, rejected, weight=1 / count[index], reference_logprobs=known)


@dataclass(frozen=True)
class PLDPO:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.01 to 0.5.
    """

    beta: float = 0.1

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "rankings"
    asks_reference = "rows"

    def __post_init__(self) -> None:
        check_positive("pl_dpo", beta=self.beta)

    def prepare(self, models: Models, batch: Rankings) -> Rankings:
        """Reference log-probs of every row, once."""
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Rankings) -> dict[str, Mean]:
        """Mean over prompts that rank anything; a response without a token is not in its ranking."""
        logprobs, log_ratio = log_ratios(models, batch)
        padded, mask = pad_groups(log_ratio, batch.tokens.group)  # [G, K]
        rank, _ = pad_groups(batch.rank, batch.tokens.group)
        answered, _ = pad_groups(batch.tokens.response_mask.any(-1), batch.tokens.group)
        mask = mask & answered
        loss = pl_dpo_loss(padded, rank, mask, self.beta)
        ranked = ((rank[:, :, None] < rank[:, None, :]) & mask[:, :, None] & mask[:, None, :]).any(-1).any(-1)
        return {"loss": Mean.of(loss, ranked)} | pair_metrics(self.beta * log_ratio, logprobs, all_pairs(batch))

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights; the loss then depends on the lists' lengths."""
        return {"reward/margin": 0.0}


METHOD = PLDPO
