"""Token-level DPO, the first loss (TDPO1) -- Zeng et al. 2024, arXiv:2404.11999.

    L = -E log sigmoid( beta * [ d - ( SeqKL(x, y_l) - SeqKL(x, y_w) ) ] )                             (eq. 15, TDPO1)
    d = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)
    SeqKL(x, y) = sum_t KL( pi_ref(.|x, y_<t) || pi(.|x, y_<t) ),     over the whole vocabulary

What Bradley-Terry becomes when the KL is charged token by token. Both sides have their gradient, so that the loss also falls
when the policy leaves the reference on the chosen side; ``tdpo`` stops that gradient, and the paper prefers it.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: soft labels and margins (refused).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from palate.methods.dpo import check_positive, pair_metrics, pair_weight, refuse_facts, with_reference
from palate.methods.tdpo import kl_metrics, log_ratios_and_kl
from palate.types import Comparisons, Mean, Models


def tdpo1_loss(chosen: Tensor, rejected: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, beta: float) -> Tensor:
    """Eq. 15, one loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        chosen_kl, rejected_kl: SeqKL in nats, >= 0, [P].
        beta: how dearly leaving the reference is paid for; > 0. The paper uses 0.1.
    """
    return -F.logsigmoid(beta * (chosen - rejected - (rejected_kl - chosen_kl)))


@dataclass(frozen=True)
class TDPO1:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.01 to 0.5.
    """

    beta: float = 0.1

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows and more"
    refuses = ("margin", "probability")

    def __post_init__(self) -> None:
        check_positive("tdpo1", beta=self.beta)

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("tdpo1", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs; a row's reward is beta (log-ratio + SeqKL), whose difference the loss has."""
        logprobs, log_ratio, kl = log_ratios_and_kl(models, batch)
        w, r = batch.chosen, batch.rejected
        loss = tdpo1_loss(log_ratio[w], log_ratio[r], kl[w], kl[r], self.beta)
        metrics = pair_metrics(self.beta * (log_ratio + kl), logprobs, batch) | kl_metrics(kl, batch)
        return {"loss": Mean.of(loss, pair_weight(batch))} | metrics

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights."""
        return {"loss": math.log(2), "reward/margin": 0.0, "kl/chosen": 0.0, "kl/rejected": 0.0}


METHOD = TDPO1
