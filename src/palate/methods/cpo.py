"""Contrastive Preference Optimization -- Xu et al. 2024, arXiv:2401.08417.

    L = -E log sigmoid( beta [ log pi(y_w|x) - log pi(y_l|x) ] )  +  nll_coef * E ( -log pi(y_w|x) / |y_w| )

DPO with a uniform reference, so that none need be held, and the likelihood of the chosen response as its tether. Without
the second term the fixed point on Bradley-Terry data is exp(r / beta) / Z.

Roles: policy (trained). Data: comparisons. No sampling.
Left out: soft labels and margins (refused). The paper prints the second term as a sum over tokens; released code takes a
mean over the batch's tokens; here it is a mean over the response's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from palate.errors import ConfigError
from palate.methods.dpo import check_positive, pair_metrics, pair_weight, refuse_facts, response_lengths
from palate.models.forward import response_logprobs
from palate.types import Comparisons, Mean, Models


def cpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """The preference term, one per pair, [P].

    Args:
        chosen, rejected: log pi(y|x) in nats, summed over response tokens, [P].
        beta: > 0; the paper uses 0.1.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


@dataclass(frozen=True)
class CPO:
    """Settings.

    Attributes:
        beta: how soon a pair's lead is enough, > 0; 0.05 to 0.5.
        nll_coef: weight of the chosen response's negative log-likelihood a token, >= 0; 1.
    """

    beta: float = 0.1
    nll_coef: float = 1.0

    needs = ("policy",)
    trains = ("policy",)
    reads = "comparisons"
    refuses = ("margin", "probability")

    def __post_init__(self) -> None:
        check_positive("cpo", beta=self.beta)
        if not 0 <= self.nll_coef < math.inf:
            raise ConfigError(f"cpo: nll_coef = {self.nll_coef!r}, expected 0 or more.")

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Nothing but a look at the data: every term of the loss has a gradient."""
        refuse_facts("cpo", batch, self.refuses)
        return batch

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        assert models.policy is not None
        logprobs = response_logprobs(models.policy, batch.tokens)  # [N]
        preference = cpo_loss(logprobs[batch.chosen], logprobs[batch.rejected], self.beta)
        nll = -(logprobs / response_lengths(batch.tokens))[batch.chosen]
        weight = pair_weight(batch)
        return {
            "loss": Mean.of(preference + self.nll_coef * nll, weight),
            "loss/preference": Mean.of(preference.detach(), weight),
            "loss/chosen_nll": Mean.of(nll.detach(), weight),
        } | pair_metrics(self.beta * logprobs, logprobs, batch)


METHOD = CPO
