"""Reward model by Bradley-Terry -- Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, eq. 1.

    L = - 1/C(K,2) * E_{(x, y_w, y_l)} [ log sigmoid( r(x, y_w) - r(x, y_l) ) ]                        (eq. 1)

All C(K,2) pairs of a prompt's K responses stand in one batch element and share their K forward passes: taken as
independent rows, each response would be seen K - 1 times an epoch, and the model overfits. Each pair of a ranking
weighs 1/(number of its pairs), so that every prompt counts once.

    with margin     - log sigmoid( r_w - r_l - m )                    Touvron et al. 2023 (Llama 2), arXiv:2307.09288
    soft labels     - p log sigmoid(d) - (1 - p) log sigmoid(-d)      p = probability that y_w is preferred
    centring        + c * (r_w + r_l)^2                               Eisenstein et al. 2023, arXiv:2312.09244

Roles: reward (trained). Data: comparisons, or rankings as all their pairs.
Left out: Davidson and Rao-Kupper models of ties (a tie is a soft label of 1/2, or dropped from a ranking).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.errors import ConfigError
from palate.functional.preference import bradley_terry_loss
from palate.models.forward import response_scores
from palate.types import Comparisons, Mean, Models


def centring_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w + r_l)^2, one per pair, [P]: the only term that says where zero is."""
    return (chosen + rejected).square()


def reward_accuracy(lead: Tensor) -> Tensor:
    """1 where the chosen response scores higher, 1/2 on equal scores, else 0; [P]."""
    return (lead > 0).float() + 0.5 * (lead == 0).float()


@dataclass(frozen=True)
class RewardModel:
    """Settings.

    Attributes:
        label_smoothing: assumed share of flipped labels, in [0, 0.5).
        centring: weight of (r_w + r_l)^2, >= 0; 0.01 keeps scores near zero without hurting accuracy.
        use_margin: subtract the records' margins, where they have one.
    """

    label_smoothing: float = 0.0
    centring: float = 0.0
    use_margin: bool = True

    needs = ("reward",)
    trains = ("reward",)
    reads = "comparisons"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"reward: label_smoothing = {self.label_smoothing!r}, expected a number in [0, 0.5).")
        if self.centring < 0:
            raise ConfigError(f"reward: centring = {self.centring!r}, expected 0 or more.")

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Nothing: every term of the loss has a gradient."""
        return batch

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs; K responses of a prompt share one forward each."""
        scores = response_scores(models.reward, batch.tokens)  # type: ignore[arg-type]  # [N]
        chosen, rejected = scores[batch.chosen], scores[batch.rejected]  # [P]
        loss = bradley_terry_loss(
            chosen,
            rejected,
            margin=batch.margin if self.use_margin and batch.margin is not None else 0.0,
            probability=1.0 if batch.probability is None else batch.probability,
            label_smoothing=self.label_smoothing,
        )
        total = loss + self.centring * centring_penalty(chosen, rejected) if self.centring else loss
        lead = (chosen - rejected).detach()
        # Right is to agree with the likelier side, which below 1/2 is the "rejected" one.
        agrees = lead if batch.probability is None else torch.where(batch.probability < 0.5, -lead, lead)
        return {
            "loss": Mean.of(total, batch.weight),
            "loss/preference": Mean.of(loss.detach(), batch.weight),
            "reward/accuracy": Mean.of(reward_accuracy(agrees), batch.weight),
            "reward/margin": Mean.of(lead, batch.weight),
            "reward/chosen": Mean.of(chosen.detach(), batch.weight),
            "reward/rejected": Mean.of(rejected.detach(), batch.weight),
        }


METHOD = RewardModel
