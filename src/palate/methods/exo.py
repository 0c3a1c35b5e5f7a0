"""Exact Optimization on pairs -- Ji et al. 2024, arXiv:2402.00856.

    L = E [ q log( q / p ) + (1 - q) log( (1 - q) / (1 - p) ) ]
    q = sigmoid( beta d ),     d = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)
    p = 1 - e   (soft labels: (1 - e) P(y_w is preferred) + e (1 - P))

The reverse KL between the policy's preference and the label's, where DPO has the forward KL. Needs e > 0: a sure label
would be infinitely far from any policy.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: the loss on K responses; margins (refused).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.errors import ConfigError
from palate.methods.dpo import check_positive, log_ratios, pair_metrics, pair_weight, refuse_facts, with_reference
from palate.types import Comparisons, Mean, Models


def exo_loss(
    chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float, probability: Tensor | float = 1.0
) -> Tensor:
    """KL(policy's preference, label's), one loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        beta: how dearly leaving the reference is paid for; > 0.
        label_smoothing: e in (0, 0.5).
        probability: how surely chosen is preferred, in [0, 1]; [P] or one number.
    """
    lead = beta * (chosen - rejected)
    p = torch.as_tensor(probability, dtype=lead.dtype, device=lead.device)
    p = (1 - label_smoothing) * p + label_smoothing * (1 - p)
    q = torch.sigmoid(lead)
    return q * (F.logsigmoid(lead) - p.log()) + torch.sigmoid(-lead) * (F.logsigmoid(-lead) - (1 - p).log())


@dataclass(frozen=True)
class EXO:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.01 to 0.5.
        label_smoothing: assumed share of flipped labels, in (0, 0.5); 0.001.
    """

    beta: float = 0.1
    label_smoothing: float = 0.001

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin",)

    def __post_init__(self) -> None:
        check_positive("exo", beta=self.beta)
        if not 0 < self.label_smoothing < 0.5:
            raise ConfigError(f"exo: label_smoothing = {self.label_smoothing!r}, expected a number between 0 and 0.5.")

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("exo", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)
        chosen, rejected = log_ratio[batch.chosen], log_ratio[batch.rejected]
        probability = 1.0 if batch.probability is None else batch.probability
        loss = exo_loss(chosen, rejected, self.beta, self.label_smoothing, probability)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.beta * log_ratio, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights; the loss then depends on the labels."""
        return {"reward/margin": 0.0}


METHOD = EXO
