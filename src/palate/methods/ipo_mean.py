"""IPO on mean log-ratios -- Azar et al. 2023, arXiv:2310.12036, eq. 17, with every log-ratio divided by its length.

    L = E ( h(y_w)/|y_w| - h(y_l)/|y_l| - 1 / (2 tau) )^2,     h(y) = log pi(y|x)/pi_ref(y|x)

The paper prints sums (``ipo``); TRL and others use the mean over tokens, which its authors told them they had done. It is
another policy: pi_ref exp(|y| (g + k)), where ``ipo`` has pi_ref exp(g) / Z.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: margins (refused).
"""

from __future__ import annotations

from dataclasses import dataclass

from palate.methods.dpo import (
    check_positive,
    log_ratios,
    pair_metrics,
    pair_weight,
    refuse_facts,
    response_lengths,
    with_reference,
)
from palate.methods.ipo import ipo_loss
from palate.types import Comparisons, Mean, Models


@dataclass(frozen=True)
class IPOMean:
    """Settings.

    Attributes:
        tau: how dearly leaving the reference is paid for, > 0; a sure pair ends 1/(2 tau) nats *a token* apart: 0.1 to 1.
    """

    tau: float = 0.1

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin",)

    def __post_init__(self) -> None:
        check_positive("ipo_mean", tau=self.tau)

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("ipo_mean", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)
        mean = log_ratio / response_lengths(batch.tokens)  # [N], nats a token
        probability = 1.0 if batch.probability is None else batch.probability
        loss = ipo_loss(mean[batch.chosen], mean[batch.rejected], self.tau, probability)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.tau * mean, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights."""
        return {"loss": 1 / (2 * self.tau) ** 2, "reward/margin": 0.0}


METHOD = IPOMean
