"""Pieces of policy-gradient losses: what a token is paid, how far it has moved, and the clipped surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 40.0  # nats; above it a ratio and its gradient would leave float32: held there, with no gradient


def token_rewards(logprobs: Tensor, reference_logprobs: Tensor, scores: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """R_t, [N, T]: the KL charge at each response token, and the score at the last of them.

    Args:
        logprobs, reference_logprobs: [N, T], nats; masked slots may hold anything.
        scores: [N], reward units.
        mask: bool [N, T], the response.
        kl_coef: reward units per nat, >= 0.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2.
    """
    rewards = torch.where(mask, -kl_coef * (logprobs - reference_logprobs), 0)
    is_last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(is_last, rewards + scores[:, None], rewards)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """rho = pi / pi_old, elementwise, at most exp(40): far beyond any clip, and finite in every float type."""
    return (logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO).exp()


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """max( -A rho, -A clip(rho, 1 - low, 1 + high) ), elementwise (PPO, arXiv:1707.06347, eq. 7; there low = high).

    Args:
        ratio: rho, of tokens or of whole responses; any shape.
        advantages: the same shape.
        low, high: > 0; 0.2 both in PPO.
    """
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def is_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Where ``clipped_surrogate`` gives no gradient; bool, the shape of ``ratio``."""
    return torch.where(advantages > 0, ratio > 1 + high, ratio < 1 - low) & (advantages != 0)
