"""f-DPO: DPO for other divergences -- Wang et al. 2023, arXiv:2309.16240.

    L = -E log sigmoid( beta f'(u_w) - beta f'(u_l) ),     u = pi(y|x)/pi_ref(y|x),   h = log u

The objective is E r - beta D_f(pi, pi_ref) with D_f = E_(pi_ref) f(u); its optimum has r = beta f'(u) + a term of x alone,
which cancels in a pair. Up to constants:

    reverse_kl   f'(u) = log u               = h                              this is DPO
    js           f'(u) = log 2u/(1 + u)      = log 2 + log sigmoid(h)
    forward_kl   f'(u) = -1/u, here + 1      = 1 - exp(-h)
    alpha        f'(u) = (1 - u^-alpha)/alpha = (1 - exp(-alpha h))/alpha      0 < alpha < 1; 0: reverse, 1: forward KL

``alpha`` is the paper's. Elsewhere (TRL since 2026) f'(u) = (u^(a - 1) - 1)/(a - 1): that a is 1 - alpha.

All but reverse_kl stop paying for more probability once u is large (f' is bounded above). Losing probability costs log u
with js as with reverse_kl, and 1/u or u^-alpha, which is more, with forward_kl and alpha. Fixed point on Bradley-Terry data with reward r: pi_ref(y|x) u(y), where
beta f'(u) = r + c(x) and c makes the probabilities add up to 1.

Where -h or -alpha h is above 30 the exponential goes on as its tangent: e^30 is beyond any step that an optimizer could
make, and loss and gradient stay numbers that point the right way.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: margins (refused).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.errors import ConfigError
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

Divergence = Literal["reverse_kl", "js", "forward_kl", "alpha"]
LARGEST = 30.0  # exponent from which on exp is its tangent


def divergence_slope(log_ratio: Tensor, divergence: Divergence, alpha: float | None = None) -> Tensor:
    """f'(u) of u = exp(log_ratio), elementwise.

    Args:
        log_ratio: log pi(y|x)/pi_ref(y|x) in nats, any shape.
        divergence: "reverse_kl", "js", "forward_kl" or "alpha".
        alpha: in (0, 1), for "alpha".
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    if divergence == "forward_kl":
        return -exp_minus_one(-log_ratio)
    assert divergence == "alpha" and alpha is not None
    return -exp_minus_one(-alpha * log_ratio) / alpha


def exp_minus_one(x: Tensor) -> Tensor:
    """exp(x) - 1, and above ``LARGEST`` its tangent there."""
    # By relu: the slope of e^30 (x - held) below 30 is e^30 - e^30, which leaves rounding of e^30 in the gradient.
    return torch.expm1(x.clamp(max=LARGEST)) + math.exp(LARGEST) * F.relu(x - LARGEST)


def fdpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    divergence: Divergence,
    alpha: float | None = None,
    probability: Tensor | float = 1.0,
) -> Tensor:
    """One loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        beta: how dearly leaving the reference is paid for; > 0.
        divergence, alpha: as in ``divergence_slope``.
        probability: how surely chosen is preferred, in [0, 1]; [P] or one number.
    """
    lead = divergence_slope(chosen, divergence, alpha) - divergence_slope(rejected, divergence, alpha)
    return expected_loss(lambda d: -F.logsigmoid(beta * d), lead, probability)


@dataclass(frozen=True)
class FDPO:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.01 to 0.5.
        divergence: reverse_kl (DPO), js, forward_kl or alpha; js lies between the two KL.
        alpha: between 0 (reverse KL) and 1 (forward KL), with divergence alpha only; 0.3 to 0.7.
    """

    beta: float = 0.1
    divergence: Divergence = "js"
    alpha: float | None = None

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin",)

    def __post_init__(self) -> None:
        check_positive("fdpo", beta=self.beta)
        if self.divergence not in get_args(Divergence):
            known = ", ".join(get_args(Divergence))
            raise ConfigError(f"fdpo: divergence = {self.divergence!r}, expected one of {known}.")
        if self.divergence == "alpha" and not (self.alpha is not None and 0 < self.alpha < 1):
            raise ConfigError(f"fdpo: alpha = {self.alpha!r}, expected a number between 0 and 1 for divergence alpha.")
        if self.divergence != "alpha" and self.alpha is not None:
            raise ConfigError(
                f"fdpo: alpha = {self.alpha!r} with divergence {self.divergence}, expected alpha only with divergence alpha. "
                "Leave alpha away, or set method.divergence=alpha."
            )

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("fdpo", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs; a row's reward is beta f'(u)."""
        logprobs, log_ratio = log_ratios(models, batch)
        chosen, rejected = log_ratio[batch.chosen], log_ratio[batch.rejected]
        probability = 1.0 if batch.probability is None else batch.probability
        loss = fdpo_loss(chosen, rejected, self.beta, self.divergence, self.alpha, probability)
        rewards = self.beta * divergence_slope(log_ratio.detach(), self.divergence, self.alpha)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(rewards, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights every log-ratio is 0 and the loss that of a coin."""
        return {"loss": math.log(2), "reward/margin": 0.0}


METHOD = FDPO
