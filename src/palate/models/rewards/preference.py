"""A Python function that compares two responses: a taste that need not be an order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from palate.errors import ConfigError
from palate.models.rewards.function import FunctionReward
from palate.models.samples import read_samples
from palate.types import Scored, Tokens

if TYPE_CHECKING:
    from palate.data.chat import Chat


def is_preference(function: Callable[..., Any]) -> bool:
    """Does the function have a parameter ``others``?"""
    try:
        return "others" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


class PreferenceFunction:
    """A Python function as preference (``models.preferences.Preference``).

    Args:
        function: ``f(prompts, responses, others, **fields) -> probabilities``: for each pair how surely the response is
            preferred to the other, from 0 to 1. Parameters otherwise as in ``FunctionReward``.
        chat: the policy's, to decode with.
        name: in metrics and errors; the function's own by default.
    """

    def __init__(self, function: Callable[..., Any], chat: Chat, name: str | None = None) -> None:
        self.function, self.chat = FunctionReward(function, chat, name), chat
        self.name = self.function.name

    def compare(self, tokens: Tokens, first: Tensor, second: Tensor) -> Tensor:
        """P(the first row is preferred to the second), [P]; see ``models.preferences``.

        Raises:
            ModelError: as ``FunctionReward``.
        """
        samples = read_samples(tokens, self.chat)
        pairs = [
            replace(samples[i], fields={**samples[i].fields, "others": samples[j].response})
            for i, j in zip(first.tolist(), second.tolist(), strict=True)
        ]
        if not pairs:
            return torch.zeros(0, device=tokens.ids.device)
        return self.function.of_samples(pairs).to(tokens.ids.device)

    def __call__(self, tokens: Tokens) -> Scored:
        """Raises: ConfigError, for there are no scores."""
        raise ConfigError(
            f'reward "{self.name}" compares two responses (it has a parameter "others") and gives no scores. Use it alone '
            "and with a method that compares: nash_md, xpo or online_dpo."
        )
