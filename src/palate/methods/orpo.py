"""Odds Ratio Preference Optimization -- Hong, Lee and Thorne 2024, arXiv:2403.07691.

    L      = L_SFT + lam * L_OR                                                                    (eq. 6)
    L_SFT  = -a_w,      L_OR = -log sigmoid( log odds(y_w|x) - log odds(y_l|x) )                   (eq. 7)
    odds   = p / (1 - p),   p = exp(a),   a = log pi(y|x) / |y|

Fine-tuning and preference in one stage, without a reference. p is the geometric mean of the tokens' probabilities. The
fixed point has no closed form; it does not depend on where training starts.

Roles: policy (trained). Data: comparisons. No sampling.
Left out: soft labels and margins (refused); the loss on the prompt's tokens that the released code has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.methods.dpo import check_positive, pair_metrics, pair_weight, refuse_facts, response_lengths
from palate.models.forward import response_logprobs
from palate.types import Comparisons, Mean, Models

NEAREST = 2.0**-24  # nats: nearer to 0 a float32 log-probability does not tell how far p is from 1


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """log( p / (1 - p) ) of p = exp(a), a <= 0, elementwise; at most 24 log 2 = 16.6, without gradient there.

    log(1 - exp a) is log(-expm1 a) near 0 and log1p(-exp a) far from it (Maechler 2012): each is exact on its side.
    """
    a = mean_logprobs.clamp(max=-NEAREST)
    near = a > -math.log(2)
    log_rest = torch.where(near, (-torch.expm1(torch.where(near, a, -1.0))).log(), torch.log1p(-a.exp()))
    return a - log_rest


def orpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """L_OR of eq. 7, one loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x) / |y|, nats a token, <= 0, [P].
    """
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


@dataclass(frozen=True)
class ORPO:
    """Settings.

    Attributes:
        lam: weight of the odds ratio beside the likelihood of the chosen response, > 0; 0.1 to 1.
    """

    lam: float = 0.1

    needs = ("policy",)
    trains = ("policy",)
    reads = "comparisons"
    refuses = ("margin", "probability")

    def __post_init__(self) -> None:
        check_positive("orpo", lam=self.lam)

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Nothing but a look at the data: every term of the loss has a gradient."""
        refuse_facts("orpo", batch, self.refuses)
        return batch

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        assert models.policy is not None
        logprobs = response_logprobs(models.policy, batch.tokens)  # [N]
        mean = logprobs / response_lengths(batch.tokens)  # [N], nats a token
        preference = orpo_loss(mean[batch.chosen], mean[batch.rejected])
        nll, weight = -mean[batch.chosen], pair_weight(batch)
        return {
            "loss": Mean.of(nll + self.lam * preference, weight),
            "loss/preference": Mean.of(preference.detach(), weight),
            "loss/chosen_nll": Mean.of(nll.detach(), weight),
        } | pair_metrics(self.lam * mean, logprobs, batch)


METHOD = ORPO
