"""Self-Play Preference Optimization on given pairs -- Wu et al. 2024, arXiv:2405.00675.

    L = E [ ( h_w - (p - 1/2) / beta )^2 + ( h_l + (p - 1/2) / beta )^2 ],     h = log pi(y|x)/pi_ref(y|x)

p is the probability that y_w is preferred; with p = 1, SPPO-hard, the targets are +-1/(2 beta). Each response has its own
target, so that the chosen one must rise. The 1/2 is log Z of the paper's update, put at eta/2 as there; eta is 1/beta.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: the self-play (new samples and labels every round; make them with `palate sample` and train again); margins (refused).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palate.methods.dpo import check_positive, log_ratios, pair_metrics, pair_weight, refuse_facts, with_reference
from palate.types import Comparisons, Mean, Models


def sppo_loss(chosen: Tensor, rejected: Tensor, beta: float, probability: Tensor | float = 1.0) -> Tensor:
    """One loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        beta: one over the paper's eta; > 0.
        probability: how surely chosen is preferred, in [0, 1]; [P] or one number.
    """
    target = (probability - 0.5) / beta
    return (chosen - target).square() + (rejected + target).square()


@dataclass(frozen=True)
class SPPO:
    """Settings.

    Attributes:
        beta: one over the paper's eta, > 0; a sure pair's responses end 1/(2 beta) nats above and below the reference.
    """

    beta: float = 0.1

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin",)

    def __post_init__(self) -> None:
        check_positive("sppo", beta=self.beta)

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("sppo", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)
        probability = 1.0 if batch.probability is None else batch.probability
        loss = sppo_loss(log_ratio[batch.chosen], log_ratio[batch.rejected], self.beta, probability)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.beta * log_ratio, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights; the loss then depends on the labels."""
        return {"reward/margin": 0.0}


METHOD = SPPO
