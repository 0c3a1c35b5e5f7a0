"""A weighted sum of rewards, each on a scale of its own; and a look at what any reward is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from palate.errors import ConfigError, ModelError
from palate.models.forward import score_responses
from palate.types import Reward, Scored, Tokens


@dataclass
class Scale:
    """(score - mean) / std: two rewards can be added when they are on one scale.

    Attributes:
        mean, std: of reference responses, in the reward's own units; std > 0.
        seen: None, or the scores so far of a scale that is still to be measured; until then scores are as they are.
    """

    mean: float = 0.0
    std: float = 1.0
    seen: list[Tensor] | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append(scores.detach().double().cpu())
            return scores
        return (scores - self.mean) / self.std

    def settle(self, name: str) -> None:
        """Mean 0 and standard deviation 1 (divided by N) on the scores that were seen, from now on.

        Raises:
            ModelError: fewer than two were seen, or all are equal.
        """
        values = torch.cat(self.seen) if self.seen else torch.zeros(0, dtype=torch.float64)
        spread = float(values.std(correction=0)) if len(values) > 1 else 0.0
        if spread <= 1e-6 * float(values.abs().max() if len(values) else 0.0):
            found = f"all {len(values)} scores are {values[0]:.6g}" if len(values) > 1 else f"{len(values)} score(s)"
            raise ModelError(
                f'reward "{name}" cannot be normalised on samples of the reference: {found}. Give the numbers, '
                "normalise: {mean: ..., std: ...}, or leave normalise out."
            )
        self.mean, self.std, self.seen = float(values.mean()), spread, None


@dataclass
class WeightedReward:
    """A weighted sum of named rewards, whose unweighted scores are kept as parts, in their own units.

    Args:
        rewards: name -> (reward or scalar model, weight). A weight may be negative (a cost), never NaN; one of 0 is
            measured without being optimised.
        scales: name -> the scale on which a score is put before it is weighted; without one it stays as it is.
    """

    rewards: Mapping[str, tuple[nn.Module | Reward, float]]
    scales: Mapping[str, Scale] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("reward: a weighted sum of no rewards. Name at least one.")
        for name, (_, weight) in self.rewards.items():
            if not abs(weight) < float("inf"):
                raise ConfigError(f'reward "{name}" has weight {weight}; a finite number was expected.')

    def __call__(self, tokens: Tokens) -> Scored:
        """The sum [N], and every reward's own scores; those of a sum within the sum as "name/part"."""
        total = torch.zeros(len(tokens), device=tokens.ids.device)
        parts: dict[str, Tensor] = {}
        for name, (reward, weight) in self.rewards.items():
            scores = scores_of(name, reward, tokens, parts)
            total += weight * (self.scales[name](scores) if name in self.scales else scores).to(total)
        return Scored(total, parts)


@torch.no_grad()
def scores_of(name: str, reward: nn.Module | Reward, tokens: Tokens, parts: dict[str, Tensor]) -> Tensor:
    """A part's scores [N]; they and their own parts are noted in ``parts``."""
    scored = score_responses(reward, tokens, name)
    parts[name] = scored.scores
    parts |= {f"{name}/{part}": scores for part, scores in scored.parts.items()}
    return scored.scores


def members(reward: Any) -> dict[str, Any]:
    """What a sum or an ensemble is made of, by name; nothing of any other reward."""
    inside = getattr(reward, "rewards", None)
    if isinstance(reward, nn.Module) or not isinstance(inside, Mapping):
        return {}
    return {name: part[0] if isinstance(part, tuple) else part for name, part in inside.items()}


def unmeasured(reward: Any) -> Iterator[tuple[str, Scale]]:
    """(name, scale) of every scale that is still to be measured, what is inside first."""
    scales = getattr(reward, "scales", {})
    for name, part in members(reward).items():
        yield from unmeasured(part)
        if name in scales and scales[name].seen is not None:
            yield name, scales[name]


def check_records(reward: Any, records: Sequence[Any]) -> None:
    """Whether every record has the fields that a reward reads, before anything is made with the first.

    Raises:
        DataError: a field is missing or not what it should be, with ``file:line``.
    """
    check = getattr(reward, "check_records", None)
    if callable(check) and not isinstance(reward, nn.Module):
        check(records)
    for part in members(reward).values():
        check_records(part, records)
