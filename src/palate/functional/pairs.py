"""Pairs of sampled responses to the same prompt, by their row numbers: which are compared, who is preferred, what each weighs."""

from __future__ import annotations

import torch
from torch import Tensor


def pairs_within(group: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of rows of a group once: row numbers (first, second), int64 [P] each.

    Args:
        group: int64 [N].
    """
    row = torch.arange(len(group), device=group.device)
    first, second = ((group[:, None] == group) & (row[:, None] < row)).nonzero(as_tuple=True)
    return first, second


def pairs_between(group: Tensor, ones: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Each of ``ones`` with each of ``others`` of its group: row numbers, int64 [P] each.

    Args:
        group: int64 [N]. ones, others: row numbers, int64 [A] and [B].
    """
    first, second = (group[ones][:, None] == group[others]).nonzero(as_tuple=True)
    return ones[first], others[second]


def extremes(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The best and the worst row of every group whose scores are not all equal: row numbers, int64 [at most G] each.

    Of equal ones the first is taken.
    """
    best, worst = [], []
    for number in torch.unique(group):
        rows = (group == number).nonzero()[:, 0]
        high, low = int(scores[rows].argmax()), int(scores[rows].argmin())
        if scores[rows[high]] != scores[rows[low]]:
            best.append(rows[high])
            worst.append(rows[low])
    empty = group.new_zeros(0)
    return (torch.stack(best), torch.stack(worst)) if best else (empty, empty)


def group_shares(group: Tensor) -> Tensor:
    """1 / (number of members of its group), float [P]: all members of a group together weigh 1.

    Args:
        group: int64 [P], of each pair.
    """
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    share: Tensor = 1.0 / count[index]
    return share


def labelled(first: Tensor, second: Tensor, probability: Tensor, labels: str) -> tuple[Tensor, Tensor, Tensor]:
    """(chosen, rejected, how surely): the likelier side stands first.

    Args:
        first, second: row numbers, int64 [P].
        probability: that the first is preferred, [P], in [0, 1].
        labels: "soft" keeps the probability; "hard" makes it 1, and leaves 1/2 as it is.
    """
    leads = probability >= 0.5
    sure = torch.where(leads, probability, 1 - probability)
    if labels == "hard":
        sure = torch.where(sure > 0.5, 1.0, sure)
    return torch.where(leads, first, second), torch.where(leads, second, first), sure
