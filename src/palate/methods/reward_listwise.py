"""Reward model by Plackett-Luce, the whole ranking at once -- Rafailov et al. 2023 (DPO), arXiv:2305.18290, eq. 18.

    P(y_1 > y_2 > ... > y_K | x) = prod_{k=1}^{K} exp r(x, y_k) / sum_{j=k}^{K} exp r(x, y_j)          (eq. 18)
    L = - log P

The best is chosen from all, the second from what is left, and so on; with K = 2 it is Bradley-Terry. It is not the
average of Bradley-Terry over the pairs. Tied responses are left out of each other's sums.

Roles: reward (trained). Data: rankings; a comparison is a ranking of two.
"""

from __future__ import annotations

from dataclasses import dataclass

from palate.functional.preference import pad_groups, plackett_luce_loss
from palate.methods.reward import reward_accuracy
from palate.models.forward import response_scores
from palate.types import Mean, Models, Rankings


@dataclass(frozen=True)
class RewardListwise:
    """Settings: none. The likelihood of a ranking has no knob."""

    needs = ("reward",)
    trains = ("reward",)
    reads = "rankings"

    def prepare(self, models: Models, batch: Rankings) -> Rankings:
        """Nothing: every term of the loss has a gradient."""
        return batch

    def loss(self, models: Models, batch: Rankings) -> dict[str, Mean]:
        """Mean over prompts; ``reward/accuracy`` over their pairs, each prompt counting once."""
        scores = response_scores(models.reward, batch.tokens)  # type: ignore[arg-type]  # [N]
        padded, mask = pad_groups(scores, batch.tokens.group)  # [G, K]
        rank, _ = pad_groups(batch.rank, batch.tokens.group)
        better = (rank[:, :, None] < rank[:, None, :]) & mask[:, :, None] & mask[:, None, :]  # [G, K, K]
        pairs = better.sum((-1, -2))
        correct = reward_accuracy((padded[:, :, None] - padded[:, None, :]).detach()) * better
        return {
            "loss": Mean.of(plackett_luce_loss(padded, rank, mask), pairs > 0),
            "reward/accuracy": Mean.of(correct.sum((-1, -2)) / pairs.clamp(min=1), pairs > 0),
        }


METHOD = RewardListwise
