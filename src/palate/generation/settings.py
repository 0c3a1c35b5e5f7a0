"""How responses are drawn; no tensor library is imported here, so settings files may read it."""

from __future__ import annotations

from dataclasses import dataclass

from palate.errors import ConfigError


@dataclass(frozen=True)
class SamplingSettings:
    """How a response is drawn, token by token.

    Attributes:
        max_new_tokens: tokens of a response at most, stop token included; >= 1.
        min_new_tokens: tokens of a response before a stop token may be drawn; 0 to ``max_new_tokens``.
        temperature: logits are divided by it; 1 samples the model as it is, 0 takes the most probable token.
        top_p: draw from the most probable tokens that together hold this probability; in (0, 1], 1 = all.
        top_k: draw from this many most probable tokens; 0 = all.

    ``top_p``, ``top_k`` and ``min_new_tokens`` make the drawn distribution another one than the policy's: a KL that is
    estimated from such samples is biased, and may be negative. RL leaves them at their defaults.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        _expect(self.max_new_tokens >= 1, f"max_new_tokens = {self.max_new_tokens}: expected 1 or more")
        _expect(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens = {self.min_new_tokens}: expected 0 to max_new_tokens ({self.max_new_tokens})",
        )
        _expect(
            0 <= self.temperature < float("inf"),
            f"temperature = {self.temperature}: expected 0 (most probable token) or a positive number",
        )
        _expect(0 < self.top_p <= 1, f"top_p = {self.top_p}: expected more than 0 and at most 1 (1 = all tokens)")
        _expect(self.top_k >= 0, f"top_k = {self.top_k}: expected 0 (all tokens) or a positive number")

    @property
    def filters(self) -> list[str]:
        """The settings, as they are written, that make the drawn distribution another one than the policy's."""
        on = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_new_tokens": self.min_new_tokens > 0}
        return [f"sampling.{name}={getattr(self, name)}" for name, is_on in on.items() if is_on]


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(f"sampling: {message}.")
