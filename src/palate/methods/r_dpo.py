"""Length-regularised DPO -- Park et al. 2024, arXiv:2403.19159.

    L = -E log sigmoid( beta d + alpha (|y_w| - |y_l|) )
    d = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)

DPO's loss for the objective E[ r - alpha |y| ] - beta KL: part of a long response's victory is put down to its length.
The fixed point on Bradley-Terry data is pi_ref exp( (r - alpha |y|) / beta ) / Z: every token costs alpha.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: margins (refused).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from palate.errors import ConfigError
from palate.methods.dpo import (
    check_positive,
    expected_loss,
    log_ratios,
    pair_metrics,
    pair_weight,
    refuse_facts,
    with_reference,
)
from palate.types import Comparisons, Mean, Models


def r_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    extra_length: Tensor,
    beta: float,
    alpha: float,
    probability: Tensor | float = 1.0,
) -> Tensor:
    """One loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        extra_length: |y_w| - |y_l|, tokens, [P].
        beta: how dearly leaving the reference is paid for; > 0.
        alpha: price of a token, reward units; >= 0.
        probability: how surely chosen is preferred, in [0, 1]; [P] or one number.
    """
    lead = beta * (chosen - rejected) + alpha * extra_length
    return expected_loss(lambda lead: -F.logsigmoid(lead), lead, probability)


@dataclass(frozen=True)
class RDPO:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.01 to 0.5.
        alpha: price of a token, reward units, >= 0; 0.005 to 0.05 for responses of hundreds of tokens, up to 1 for short ones.
    """

    beta: float = 0.1
    alpha: float = 0.01

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin",)

    def __post_init__(self) -> None:
        check_positive("r_dpo", beta=self.beta)
        if not 0 <= self.alpha < math.inf:
            raise ConfigError(f"r_dpo: alpha = {self.alpha!r}, expected 0 or more.")

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("r_dpo", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)
        length = batch.tokens.response_mask.sum(-1)
        extra = length[batch.chosen] - length[batch.rejected]
        probability = 1.0 if batch.probability is None else batch.probability
        chosen, rejected = log_ratio[batch.chosen], log_ratio[batch.rejected]
        loss = r_dpo_loss(chosen, rejected, extra, self.beta, self.alpha, probability)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.beta * log_ratio, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights; the loss then depends on the lengths."""
        return {"reward/margin": 0.0}


METHOD = RDPO
