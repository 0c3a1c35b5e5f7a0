"""Importance weights: learning about one policy from what another has drawn.

    E_mu[ w f ] = E_pi[ f ],        w(y) = pi(y|x) / mu(y|x),   mu(y|x) > 0 wherever pi(y|x) > 0

Truncated at ``most`` (Ionides 2008, Truncated importance sampling; V-trace's rho-bar, Espeholt et al. 2018, IMPALA,
arXiv:1802.01561) the variance is bounded, and what pi likes more than ``most`` times as well as mu did counts for less than it should.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.functional.policy_gradient import probability_ratio

LEVELS = ("sequence", "token")


class Weights(NamedTuple):
    """What each token of N responses counts for."""

    used: Tensor  # [N, T], at most ``most``, zero outside the response
    raw: Tensor  # [N, 1] or [N, T]: before they were cut, one a response or one a token
    counts: Tensor  # bool, the shape of ``raw``: which of them there are


def importance_weights(logprobs: Tensor, drawn_logprobs: Tensor, mask: Tensor, *, level: str, most: float) -> Weights:
    """w of every response, or of every token on its own.

    Args:
        logprobs: of the policy that learns, pi, [N, T], nats.
        drawn_logprobs: of the policy that drew, mu, [N, T], nats; masked slots of both may hold anything.
        mask: bool [N, T], the response.
        level: "sequence", the product of a response's token ratios at each of its tokens: exact, until it is cut. "token",
            each token's own ratio, as in decoupled PPO (AReaL, arXiv:2505.24298): less variance, but what came before
            a token, and what comes after it, stay as mu drew them.
        most: above which a weight is cut, >= 1; often 2.

    >>> one = torch.tensor([[0.0, 0.5, 0.25]]).log()
    >>> two = torch.tensor([[0.0, 0.25, 0.5]]).log()
    >>> mask = torch.tensor([[False, True, True]])
    >>> importance_weights(one, two, mask, level="token", most=2.0).used
    tensor([[0.0000, 2.0000, 0.5000]])
    >>> importance_weights(one, two, mask, level="sequence", most=2.0).used
    tensor([[0., 1., 1.]])
    """
    mine, theirs = torch.where(mask, logprobs, 0), torch.where(mask, drawn_logprobs, 0)
    counts = mask
    if level == "sequence":
        mine, theirs, counts = mine.sum(-1, keepdim=True), theirs.sum(-1, keepdim=True), mask.any(-1, keepdim=True)
    raw = probability_ratio(mine, theirs)
    return Weights(torch.where(mask, raw.clamp(max=most), 0), raw, counts)


def effective_share(weights: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2), a scalar in [1/n, 1]: how many equally weighted samples n samples are worth, as a share.

    Args:
        weights: [n], >= 0; n >= 1. All zero gives 0.

    Source: Kong 1992; the usual effective sample size, divided by n.

    >>> effective_share(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    tensor(0.5000)
    """
    weights = weights.double()
    return (weights.sum().square() / (len(weights) * weights.square().sum()).clamp(min=1e-300)).float()


def gradient_times(values: Tensor, weights: Tensor) -> Tensor:
    """The values to the last bit; what flows back through each is multiplied by its weight. Same shape, or broadcast.

    So every loss of the values is a weighted one: grad sum_i w_i l(v_i), whatever l is.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> gradient_times(x, torch.tensor([3.0, 0.5])).square().sum().backward()
    >>> x.grad
    tensor([6., 2.])
    """
    return _GradientTimes.apply(values, weights)  # type: ignore[no-any-return, no-untyped-call]


class _GradientTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return gradient * weights.to(gradient.dtype), None
