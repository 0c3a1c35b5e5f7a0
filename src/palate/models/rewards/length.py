"""A price for length, where the reward alone would have responses grow."""

from __future__ import annotations

from dataclasses import dataclass

from palate.errors import ConfigError
from palate.types import Scored, Tokens


@dataclass
class LengthReward:
    """The response's tokens, its end of text included, beyond the first ``over``; the price is the weight in the sum."""

    over: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.over, bool) or not isinstance(self.over, int) or self.over < 0:
            raise ConfigError(f"reward: over is {self.over!r}; expected a whole number of tokens, at least 0.")

    def __call__(self, tokens: Tokens) -> Scored:
        """Tokens [N]."""
        return Scored((tokens.response_mask.sum(-1) - self.over).clamp(min=0).float(), {})
