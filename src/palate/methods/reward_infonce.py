"""Reward model by picking the best of K -- Ziegler et al. 2019, arXiv:1909.08593, eq. 1.

    L = - log [ exp r(x, y_b) / sum_i exp r(x, y_i) ]                                                  (eq. 1)

This is InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, eq. 4) with the best response as the positive and all that
rank below it as negatives. With one negative it is Bradley-Terry; the order among the negatives is not used. Responses
tied for best take turns as the positive, none of them is a negative, and a prompt counts once.

Roles: reward (trained). Data: rankings; a comparison is a ranking of two.
"""

from __future__ import annotations

from dataclasses import dataclass

from palate.errors import ConfigError
from palate.functional.preference import infonce_loss, pad_groups
from palate.models.forward import response_scores
from palate.types import Mean, Models, Rankings


@dataclass(frozen=True)
class RewardInfoNCE:
    """Settings.

    Attributes:
        temperature: scores are divided by it before the softmax; > 0. The paper uses 1.
    """

    temperature: float = 1.0

    needs = ("reward",)
    trains = ("reward",)
    reads = "rankings"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"reward_infonce: temperature = {self.temperature!r}, expected a number above 0.")

    def prepare(self, models: Models, batch: Rankings) -> Rankings:
        """Nothing: every term of the loss has a gradient."""
        return batch

    def loss(self, models: Models, batch: Rankings) -> dict[str, Mean]:
        """Mean over prompts that have a best and a worse response."""
        scores = response_scores(models.reward, batch.tokens)  # type: ignore[arg-type]  # [N]
        padded, mask = pad_groups(scores, batch.tokens.group)  # [G, K]
        rank, _ = pad_groups(batch.rank, batch.tokens.group)
        top = rank.masked_fill(~mask, rank.max() + 1).amin(-1, keepdim=True)
        best, worse = mask & (rank == top), mask & (rank > top)
        group, column = best.nonzero(as_tuple=True)  # [B], one line per best response
        positive, negatives, below = padded[group, column], padded[group], worse[group]
        loss = infonce_loss(positive / self.temperature, negatives / self.temperature, below)
        weight = below.any(-1) / best.sum(-1)[group]
        rivals = negatives.masked_fill(~below, -float("inf")).detach()
        equal = (positive[:, None] == rivals).sum(-1)  # scores as high as the best one's share its place
        picked = (positive[:, None] >= rivals).all(-1) / (1 + equal)
        return {
            "loss": Mean.of(loss, weight),
            "reward/accuracy": Mean.of(picked, weight),
        }


METHOD = RewardInfoNCE
