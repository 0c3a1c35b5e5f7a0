"""From rewards to advantages: how much better an action was than what was expected there."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation -- Schulman et al. 2015, arXiv:1506.02438, eq. 16.

        delta_t = r_t + gamma V_{t+1} - V_t,      A_t = delta_t + gamma lam A_{t+1},      V after the last token = 0

    Tokens outside the mask (prompt, padding, an environment's turn) are stepped over: neither reward nor discount.

    Args:
        rewards: [N, T], reward units, paid for the token of their column.
        values: [N, T], the value of the state in which that token was chosen.
        mask: bool [N, T]; other slots may hold NaN.
        gamma: discount per token, in [0, 1]; 1 for language.
        lam: 0 = one step (bias), 1 = the whole return (variance); in [0, 1].

    Returns:
        advantages and returns (advantage + value, not whitened), [N, T], zero outside the mask.
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages = torch.zeros_like(values)
    next_value, next_advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        advantages[:, t] = torch.where(here, advantage, 0)
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
    return advantages, advantages + values


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Reward-to-go G_t = r_t + gamma G_{t+1} over the mask's tokens, [N, T]; zero outside the mask."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def leave_one_out(scores: Tensor, group: Tensor) -> Tensor:
    """R_i minus the mean of the *other* scores of its group (RLOO) -- Ahmadian et al. 2024, arXiv:2402.14740.

    Args:
        scores: [N], reward units.
        group: int64 [N]. A group of one has nothing to compare with: its advantage is 0. Equal scores give exactly 0.
    """
    total, count, index = _group_sums(scores, group)
    others = (count - 1).clamp(min=1)[index]
    equal = _group_range(scores, index, len(count)) == 0
    return torch.where(equal[index], 0, scores - (total[index] - scores) / others)


def group_relative(scores: Tensor, group: Tensor, *, scale: bool = True, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """(R_i - mean of its group) / (std of its group + eps) -- DeepSeekMath 2024, arXiv:2402.03300, section 4.1.2.

    Args:
        scores: [N], reward units.
        group: int64 [N].
        scale: False leaves the division out (Dr. GRPO, arXiv:2503.20783).
        ddof: 1 divides the variance by n - 1. eps: 1e-4 in TRL, 1e-6 in verl. Equal scores give exactly 0.
    """
    total, count, index = _group_sums(scores, group)
    deviation = scores - (total / count)[index]
    equal = _group_range(scores, index, len(count)) == 0
    deviation = torch.where(equal[index], 0, deviation)
    if not scale:
        return deviation
    return deviation / (_group_std(deviation, count, index, ddof)[index] + eps)


def group_stds(scores: Tensor, group: Tensor, *, ddof: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """How far the scores of each group are apart.

    Args:
        scores: [N], reward units. group: int64 [N].
        ddof: 1 divides the variance by n - 1.

    Returns:
        standard deviation, [G], exactly 0 for equal scores; whether all scores are equal, bool [G]; rows, int64 [G]; in
        order of group number.
    """
    total, count, index = _group_sums(scores, group)
    equal = _group_range(scores, index, len(count)) == 0
    std = _group_std(scores - (total / count)[index], count, index, ddof)
    return torch.where(equal, 0, std), equal, count.long()


def all_equal(scores: Tensor, group: Tensor) -> Tensor:
    """Rows whose group's scores are all the same, bool [N]: such a group says nothing of what is better."""
    _, count, index = _group_sums(scores, group)
    return (_group_range(scores, index, len(count)) == 0)[index]


def _group_std(deviation: Tensor, count: Tensor, index: Tensor, ddof: int) -> Tensor:
    squares = torch.zeros_like(count).index_add_(0, index, deviation.square())
    return (squares / (count - ddof).clamp(min=1)).sqrt()


def _group_sums(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and size of each group, [G], and each row's group index, [N]."""
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), dtype=scores.dtype, device=scores.device).index_add_(0, index, scores)
    return total, count.to(scores.dtype), index


def _group_range(scores: Tensor, index: Tensor, size: int) -> Tensor:
    """Largest minus smallest score of each group, [G]: exactly 0 when all are equal, which a computed mean is not."""
    extreme = scores.new_zeros(size)
    high = extreme.scatter_reduce(0, index, scores, "amax", include_self=False)
    return high - extreme.scatter_reduce(0, index, scores, "amin", include_self=False)
