"""Several models of one thing, and one number from them that a policy finds harder to exploit.

With r_1 ... r_k the members' scores of a response (Coste et al. 2023, arXiv:2310.02743, section 3.3):

    mean                  1/k sum_i r_i
    min                   min_i r_i                                                     (WCO, worst-case optimisation)
    mean_minus_variance   mean - lambda * 1/k sum_i (r_i - mean)^2                      (UWO, uncertainty-weighted)

Members should be on one scale, as reward models are that palate normalised; else give each ``normalise``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from palate.errors import ConfigError
from palate.models.quiet import did_you_mean
from palate.models.rewards.parts import Scale, scores_of
from palate.types import Reward, Scored, Tokens

TAKE = ("mean", "min", "mean_minus_variance")


@dataclass
class EnsembleReward:
    """One score from several rewards of the same thing; the members' own scores and their spread are parts.

    Args:
        rewards: name -> reward or scalar model, at least two.
        take: "mean", "min" or "mean_minus_variance".
        weight_of_variance: lambda, >= 0, for "mean_minus_variance"; the paper takes 0.1 for PPO, 0.5 for best-of-n.
        scales: name -> the scale on which a member's score is put first.
    """

    rewards: Mapping[str, nn.Module | Reward]
    take: str = "mean"
    weight_of_variance: float = 0.1
    scales: Mapping[str, Scale] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.rewards) < 2:
            raise ConfigError(f"reward: an ensemble of {len(self.rewards)}. Name at least two rewards.")
        if self.take not in TAKE:
            raise ConfigError(
                f'reward: take "{self.take}" is not known.{did_you_mean(str(self.take), TAKE)} Choose: {", ".join(TAKE)}.'
            )
        weight = self.weight_of_variance
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ConfigError(f"reward: weight_of_variance is {weight!r}; expected a number of at least 0.")

    def __call__(self, tokens: Tokens) -> Scored:
        """Scores [N]; parts: every member's own, and "ensemble_std", their standard deviation (divided by k)."""
        parts: dict[str, Tensor] = {}
        columns = []
        for name, reward in self.rewards.items():
            scores = scores_of(name, reward, tokens, parts).float().to(tokens.ids.device)
            columns.append(self.scales[name](scores) if name in self.scales else scores)
        scores = torch.stack(columns)  # [k, N]
        parts["ensemble_std"] = scores.std(0, correction=0)
        if self.take == "min":
            return Scored(scores.min(0).values, parts)
        mean = scores.mean(0)
        if self.take == "mean":
            return Scored(mean, parts)
        return Scored(mean - self.weight_of_variance * scores.var(0, correction=0), parts)
