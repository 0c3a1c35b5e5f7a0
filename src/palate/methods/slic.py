"""SLiC, the hinge on log-ratios -- Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425; as in Liu et al. 2023 (RSO),
arXiv:2309.06657, "hinge-norm".

    L = E max( 0, 1 - beta d ),     d = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)

SLiC-HF has log pi in place of the log-ratio; RSO divides by the reference. The majority of a pair's labels decides: the
fixed point is a lead of exactly 1/beta for it, however clear the majority.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: SLiC-HF's cross-entropy to the fine-tuned model's targets; RSO's rejection sampling; margins (refused).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

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


def slic_loss(chosen: Tensor, rejected: Tensor, beta: float, probability: Tensor | float = 1.0) -> Tensor:
    """The hinge, one loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        beta: one over the lead, in nats, at which a pair stops pulling; > 0.
        probability: how surely chosen is preferred, in [0, 1]; [P] or one number.
    """
    return expected_loss(lambda d: F.relu(1 - beta * d), chosen - rejected, probability)


@dataclass(frozen=True)
class SLiC:
    """Settings.

    Attributes:
        beta: one over the lead, in nats, at which a pair stops pulling, > 0; 0.05 to 0.5.
    """

    beta: float = 0.1

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin",)

    def __post_init__(self) -> None:
        check_positive("slic", beta=self.beta)

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("slic", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)
        probability = 1.0 if batch.probability is None else batch.probability
        loss = slic_loss(log_ratio[batch.chosen], log_ratio[batch.rejected], self.beta, probability)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.beta * log_ratio, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights."""
        return {"loss": 1.0, "reward/margin": 0.0}


METHOD = SLiC
