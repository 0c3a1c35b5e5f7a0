"""Length-normalised DPO -- Lambert et al. 2024 (Tulu 3), arXiv:2411.15124; the length as in SimPO, arXiv:2405.14734.

    L = -E log sigmoid( beta/|y_w| log pi(y_w|x)/pi_ref(y_w|x) - beta/|y_l| log pi(y_l|x)/pi_ref(y_l|x) )

DPO on mean log-ratios: a long response earns no more for being long. The fixed point on Bradley-Terry data is
pi_ref exp( |y| (r / beta + k) ).

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: margins (refused).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from palate.methods.dpo import (
    check_positive,
    dpo_loss,
    log_ratios,
    pair_metrics,
    pair_weight,
    refuse_facts,
    response_lengths,
    with_reference,
)
from palate.types import Comparisons, Mean, Models


@dataclass(frozen=True)
class LNDPO:
    """Settings.

    Attributes:
        beta: reward units per nat *a token*, > 0; 5, and 2 to 10.
    """

    beta: float = 5.0

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin",)

    def __post_init__(self) -> None:
        check_positive("ln_dpo", beta=self.beta)

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("ln_dpo", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)
        mean = log_ratio / response_lengths(batch.tokens)  # [N], nats a token
        probability = 1.0 if batch.probability is None else batch.probability
        loss = dpo_loss(mean[batch.chosen], mean[batch.rejected], self.beta, probability=probability)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.beta * mean, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights."""
        return {"loss": math.log(2), "reward/margin": 0.0}


METHOD = LNDPO
