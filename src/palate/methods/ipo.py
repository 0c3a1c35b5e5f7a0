"""Identity Preference Optimization -- Azar et al. 2023, arXiv:2310.12036.

    L = E ( h(y_w, y_l) - 1 / (2 tau) )^2                                                          (eq. 17)
    h = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)

As printed: log-ratios are sums over tokens (``ipo_mean`` has their means). DPO pushes a pair that is always labelled the
same way apart without end; here the lead has a target. The fixed point is pi_ref exp(P(y beats mu) / tau) / Z, where mu
is what the responses were drawn from: the mean preference, not a reward.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: margins (refused).
"""

from __future__ import annotations

from dataclasses import dataclass

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


def ipo_loss(chosen: Tensor, rejected: Tensor, tau: float, probability: Tensor | float = 1.0) -> Tensor:
    """Eq. 17, one loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        tau: how dearly leaving the reference is paid for; > 0. The lead of a sure pair becomes 1/(2 tau) nats.
        probability: how surely chosen is preferred, in [0, 1]; [P] or one number.
    """
    return expected_loss(lambda d: (d - 1 / (2 * tau)).square(), chosen - rejected, probability)


@dataclass(frozen=True)
class IPO:
    """Settings.

    Attributes:
        tau: how dearly leaving the reference is paid for, > 0; 0.1: a sure pair ends 5 nats apart.
    """

    tau: float = 0.1

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin",)

    def __post_init__(self) -> None:
        check_positive("ipo", tau=self.tau)

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("ipo", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)
        probability = 1.0 if batch.probability is None else batch.probability
        loss = ipo_loss(log_ratio[batch.chosen], log_ratio[batch.rejected], self.tau, probability)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.tau * log_ratio, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights."""
        return {"loss": 1 / (2 * self.tau) ** 2, "reward/margin": 0.0}


METHOD = IPO
