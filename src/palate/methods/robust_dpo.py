"""Robust DPO -- Ray Chowdhury, Kini and Natarajan 2024, arXiv:2403.00409.

    L = [ (1 - e) l(d) - e l(-d) ] / (1 - 2e),     l(d) = -log sigmoid(beta d)

    d = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)

With labels that were flipped with probability e, the expectation of L is DPO's loss on the clean labels: the fixed point
stays pi_ref exp(r / beta) / Z, where plain DPO and label smoothing end nearer to the reference. A single pair's loss has
no lower bound; the average over enough pairs has.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: margins (refused); estimating e, which the paper takes as known.
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


def robust_dpo_loss(
    chosen: Tensor, rejected: Tensor, beta: float, flip_rate: float, probability: Tensor | float = 1.0
) -> Tensor:
    """DPO's loss without the bias that flipped labels bring, one per pair, [P]; may be negative.

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        beta: how dearly leaving the reference is paid for; > 0.
        flip_rate: share of flipped labels e, in [0, 0.5).
        probability: share of annotators for chosen, each flipped at that rate, in [0, 1]; [P] or one number.
    """
    p = (probability - flip_rate) / (1 - 2 * flip_rate)  # of the clean label; outside [0, 1] for a single hard label
    return expected_loss(lambda d: -F.logsigmoid(beta * d), chosen - rejected, p)


@dataclass(frozen=True)
class RobustDPO:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.01 to 0.5.
        flip_rate: known share of flipped labels, in [0, 0.5); 0 is DPO.
    """

    beta: float = 0.1
    flip_rate: float = 0.1

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin",)

    def __post_init__(self) -> None:
        check_positive("robust_dpo", beta=self.beta)
        if not 0 <= self.flip_rate < 0.5:
            raise ConfigError(f"robust_dpo: flip_rate = {self.flip_rate!r}, expected a number in [0, 0.5).")

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("robust_dpo", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)
        probability = 1.0 if batch.probability is None else batch.probability
        chosen, rejected = log_ratio[batch.chosen], log_ratio[batch.rejected]
        loss = robust_dpo_loss(chosen, rejected, self.beta, self.flip_rate, probability)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.beta * log_ratio, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights."""
        return {"loss": math.log(2), "reward/margin": 0.0}


METHOD = RobustDPO
