"""Simple Preference Optimization -- Meng, Xia and Chen 2024, arXiv:2405.14734.

    L = -E log sigmoid( beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma )              (eq. 6)

The reward is the mean log-probability of a token, which is what a decoder ranks by; no reference. gamma is the lead that
is asked for, in reward units. The released code is given the ratio gamma/beta instead (``gamma_beta_ratio``).
With gamma = 0 the fixed point on Bradley-Terry data is pi = exp( |y| (r / beta + k) ).

Roles: policy (trained). Data: comparisons. No sampling.
Left out: margins of single pairs (refused).
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
    pair_metrics,
    pair_weight,
    refuse_facts,
    response_lengths,
)
from palate.models.forward import response_logprobs
from palate.types import Comparisons, Mean, Models


def simpo_loss(
    chosen: Tensor, rejected: Tensor, beta: float, gamma: float, probability: Tensor | float = 1.0
) -> Tensor:
    """Eq. 6, one loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x) / |y|, nats a token, [P].
        beta: reward units per nat a token; > 0. The paper uses 2 to 2.5, and 10 for strong instruct models.
        gamma: the lead asked for, reward units, >= 0. The paper's gamma/beta is 0.25 to 0.55.
        probability: how surely chosen is preferred, in [0, 1]; [P] or one number.
    """
    return expected_loss(lambda d: -F.logsigmoid(beta * d - gamma), chosen - rejected, probability)


@dataclass(frozen=True)
class SimPO:
    """Settings.

    Attributes:
        beta: reward units per nat a token, > 0; 2 to 10.
        gamma: the lead asked for, reward units, >= 0; 0.25 to 0.55 times beta.
    """

    beta: float = 2.0
    gamma: float = 1.0

    needs = ("policy",)
    trains = ("policy",)
    reads = "comparisons"
    refuses = ("margin",)

    def __post_init__(self) -> None:
        check_positive("simpo", beta=self.beta)
        if not 0 <= self.gamma < math.inf:
            raise ConfigError(f"simpo: gamma = {self.gamma!r}, expected 0 or more.")

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Nothing but a look at the data: every term of the loss has a gradient."""
        refuse_facts("simpo", batch, self.refuses)
        return batch

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        assert models.policy is not None
        logprobs = response_logprobs(models.policy, batch.tokens)  # [N]
        mean = logprobs / response_lengths(batch.tokens)  # [N], nats a token
        probability = 1.0 if batch.probability is None else batch.probability
        loss = simpo_loss(mean[batch.chosen], mean[batch.rejected], self.beta, self.gamma, probability)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.beta * mean, logprobs, batch)


METHOD = SimPO
