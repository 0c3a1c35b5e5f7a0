"""Which of two responses is preferred, and how surely: by a reward's scores, or by a reward that compares.

A reward *scores*, or has ``compare(tokens, first, second)`` and looks at both responses (a preference model). Only the
latter can say that A beats B, B beats C and C beats A.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from palate.errors import ModelError
from palate.models.forward import score_responses
from palate.types import Reward, Scored, Tokens


@runtime_checkable
class Preference(Protocol):
    """A reward that compares."""

    def compare(self, tokens: Tokens, first: Tensor, second: Tensor) -> Tensor:
        """P(the first row is preferred to the second), [P] in [0, 1].

        Args:
            tokens: rows [N, T]. first, second: row numbers, int64 [P]; both rows of a pair answer the same prompt.
        """


class Compared(NamedTuple):
    """What a reward says of pairs of rows."""

    probability: Tensor  # [P], that the first is preferred
    scored: Scored  # of the rows, [N]


def compares(reward: Any) -> bool:
    """Has the reward no scores, only comparisons?"""
    return not isinstance(reward, nn.Module) and isinstance(reward, Preference)


def bradley_terry(scores: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """P(first preferred) = sigmoid(r_first - r_second), [P]: what a score means to a reward trained on comparisons."""
    return torch.sigmoid(scores[first] - scores[second])


def compare_responses(
    reward: nn.Module | Reward | Preference, tokens: Tokens, first: Tensor, second: Tensor
) -> Compared:
    """How surely the first row of every pair is preferred.

    Args:
        tokens: rows [N, T]. first, second: row numbers, int64 [P].

    Returns:
        probabilities, and scores of all rows: the reward's own, or of one that compares the mean probability with which
        the row wins (1/2 of a row in no pair).

    Raises:
        ModelError: not one number in [0, 1] for each pair, or not one finite score for each row.
    """
    if not compares(reward):
        scored = score_responses(reward, tokens)  # type: ignore[arg-type]
        return Compared(bradley_terry(scored.scores, first, second), scored)
    probability = reward.compare(tokens, first, second)  # type: ignore[union-attr, operator]
    name = getattr(reward, "name", type(reward).__name__)
    if tuple(probability.shape) != tuple(first.shape) or not bool(((probability >= 0) & (probability <= 1)).all()):
        raise ModelError(
            f'reward "{name}" compared {len(first)} pairs and gave {list(probability.shape)} numbers from '
            f"{float(probability.min()) if probability.numel() else 0:.4g} to "
            f"{float(probability.max()) if probability.numel() else 0:.4g}; one probability in [0, 1] for each was expected."
        )
    rows = torch.cat([first, second])
    return Compared(probability, Scored(mean_of_rows(torch.cat([probability, 1 - probability]), rows, len(tokens)), {}))


def mean_of_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Mean of the values that belong to each of ``count`` rows, [count]; 1/2 where there is none.

    Args:
        values: [P]. rows: int64 [P], the row of each.
    """
    total = values.new_zeros(count).index_add_(0, rows, values)
    number = values.new_zeros(count).index_add_(0, rows, torch.ones_like(values))
    return torch.where(number > 0, total / number.clamp(min=1), 0.5)
