"""Anchored Preference Optimization, down -- D'Oosterlinck et al. 2024, arXiv:2408.06266.

    L = E [ sigmoid( beta h_w ) + 1 - sigmoid( beta (h_w - h_l) ) ],     h = log pi(y|x)/pi_ref(y|x)

Lowers both responses, the rejected one further: for policies that are better than what they learn from, whose own samples
should not be traded for the chosen ones.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: soft labels and margins (refused).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.methods.dpo import check_positive, log_ratios, pair_metrics, pair_weight, refuse_facts, with_reference
from palate.types import Comparisons, Mean, Models


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """One loss per pair, [P], between 0 and 2.

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        beta: how fast the loss saturates; > 0.
    """
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


@dataclass(frozen=True)
class APODown:
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
        check_positive("apo_down", beta=self.beta)

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("apo_down", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)
        loss = apo_down_loss(log_ratio[batch.chosen], log_ratio[batch.rejected], self.beta)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.beta * log_ratio, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights."""
        return {"loss": 1.0, "reward/margin": 0.0}


METHOD = APODown
