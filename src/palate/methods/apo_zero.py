"""Anchored Preference Optimization, zero -- D'Oosterlinck et al. 2024, arXiv:2408.06266.

    L = E [ 1 - sigmoid( beta h_w ) + sigmoid( beta h_l ) ],     h = log pi(y|x)/pi_ref(y|x)

Pushes the chosen response above the reference and the rejected one below it, each by itself: DPO only asks for the
difference, and may lower both.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: soft labels and margins (refused).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.methods.dpo import check_positive, log_ratios, pair_metrics, pair_weight, refuse_facts, with_reference
from palate.types import Comparisons, Mean, Models


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """One loss per pair, [P], between 0 and 2.

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        beta: how fast the loss saturates; > 0.
    """
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


@dataclass(frozen=True)
class APOZero:
    """Settings.

    Attributes:
        beta: how fast the loss saturates, > 0; 0.01 to 0.5.
    """

    beta: float = 0.1

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin", "probability")

    def __post_init__(self) -> None:
        check_positive("apo_zero", beta=self.beta)

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("apo_zero", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)
        loss = apo_zero_loss(log_ratio[batch.chosen], log_ratio[batch.rejected], self.beta)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.beta * log_ratio, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights."""
        return {"loss": 1.0, "reward/margin": 0.0}


METHOD = APOZero
