"""Token-level DPO, the second loss (TDPO2) -- Zeng et al. 2024, arXiv:2404.11999.

    L = -E log sigmoid( beta * [ d - alpha * ( SeqKL(x, y_l) - sg SeqKL(x, y_w) ) ] )                  (eq. 18, TDPO2)
    d = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)
    SeqKL(x, y) = sum_t KL( pi_ref(.|x, y_<t) || pi(.|x, y_<t) ),     over the whole vocabulary

DPO lets the policy run away from the reference on rejected responses faster than on chosen ones; here the difference of
the two is charged. sg: no gradient, so that the chosen side's KL is not pushed up to win. ``tdpo1`` has alpha = 1 and the
gradient on both sides: another loss, another file. alpha = 0 is DPO.

SeqKL is the *forward* KL, the expectation at every token under the reference, and not an estimate from the one token that
stands there. It needs the reference's whole distribution at every step, so the reference runs beside the policy in every
microbatch.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: soft labels and margins (refused).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from palate.errors import ConfigError
from palate.methods.dpo import check_positive, pair_metrics, pair_weight, refuse_facts, with_reference
from palate.models.forward import token_logprobs_and_kl
from palate.types import Comparisons, Mean, Models


def tdpo_loss(
    chosen: Tensor, rejected: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, beta: float, alpha: float
) -> Tensor:
    """Eq. 18, one loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        chosen_kl, rejected_kl: SeqKL in nats, >= 0, [P]; the chosen one gets no gradient.
        beta: how dearly leaving the reference is paid for; > 0. The paper uses 0.1.
        alpha: how much of the difference of the two SeqKL is charged; >= 0. The paper uses 0.5.
    """
    return -F.logsigmoid(beta * (chosen - rejected - alpha * (rejected_kl - chosen_kl.detach())))


def log_ratios_and_kl(models: Models, batch: Comparisons) -> tuple[Tensor, Tensor, Tensor]:
    """(log pi(y|x), log pi(y|x)/pi_ref(y|x), SeqKL(x, y)) of every row; [N] each, nats."""
    assert models.policy is not None and models.reference is not None and batch.reference_logprobs is not None
    logprobs, kl = token_logprobs_and_kl(models.policy, models.reference, batch.tokens)
    return logprobs.sum(-1), logprobs.sum(-1) - batch.reference_logprobs, kl.sum(-1)


def kl_metrics(kl: Tensor, batch: Comparisons) -> dict[str, Mean]:
    """SeqKL of either side, nats a response."""
    kl, weight = kl.detach(), pair_weight(batch)
    return {"kl/chosen": Mean.of(kl[batch.chosen], weight), "kl/rejected": Mean.of(kl[batch.rejected], weight)}


@dataclass(frozen=True)
class TDPO:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.01 to 0.5.
        alpha: how much of the difference between the sides' KL is charged, >= 0; 0 (DPO) to 1.
    """

    beta: float = 0.1
    alpha: float = 0.5

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows and more"
    refuses = ("margin", "probability")

    def __post_init__(self) -> None:
        check_positive("tdpo", beta=self.beta)
        if not 0 <= self.alpha < math.inf:
            raise ConfigError(f"tdpo: alpha = {self.alpha!r}, expected 0 or more.")

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("tdpo", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs; a row's reward is beta (log-ratio + alpha SeqKL), whose difference the loss has."""
        logprobs, log_ratio, kl = log_ratios_and_kl(models, batch)
        w, r = batch.chosen, batch.rejected
        loss = tdpo_loss(log_ratio[w], log_ratio[r], kl[w], kl[r], self.beta, self.alpha)
        rewards = self.beta * (log_ratio + self.alpha * kl)
        metrics = pair_metrics(rewards, logprobs, batch) | kl_metrics(kl, batch)
        return {"loss": Mean.of(loss, pair_weight(batch))} | metrics

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights."""
        return {"loss": math.log(2), "reward/margin": 0.0, "kl/chosen": 0.0, "kl/rejected": 0.0}


METHOD = TDPO
