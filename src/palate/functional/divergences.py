"""How far one policy is from another, in nats.

With y_t drawn from pi and d_t = log pi(y_t) - log pi_ref(y_t), three estimators of KL(pi || pi_ref) -- Schulman,
"Approximating KL divergence", 2020:

    k1 = d                  unbiased, signed                 k3 = exp(-d) - 1 + d     unbiased, never negative
    k2 = d^2 / 2            biased, low variance

Their values agree on average; their *gradients* do not. As a term of a loss, k1 has no expected gradient at all, and k3
per token has that of the forward KL at each state (Tang and Munos 2025, arXiv:2506.09477; arXiv:2512.21852). Palate
therefore charges k1 in the reward.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log pi - log ref, elementwise; nats. Sum over a response for the sequence's estimate."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio, elementwise; nats."""
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d, elementwise; nats, >= 0. By ``expm1``, so that tiny d keep their digits."""
    d = logprobs - reference_logprobs
    return torch.expm1(-d) + d


def exact_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(reference_logits)) over the last axis; nats, >= 0. [..., V] -> [...]"""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logp, logq = logits.to(wide).log_softmax(-1), reference_logits.to(wide).log_softmax(-1)
    p = logp.exp()
    return (p * torch.where(p > 0, logp - logq, 0)).sum(-1)  # 0 log 0 = 0, also in the gradient
