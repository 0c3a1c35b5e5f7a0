"""What samples the prompts of a run: responses, or conversations where an environment answers."""

from __future__ import annotations

from typing import Any

from torch import nn

from palate.config import RunConfig
from palate.data.chat import Chat
from palate.environment import find_environment
from palate.generation.flat_weights import serves
from palate.resolve import may_keep_logprobs
from palate.training.environments import Conversations
from palate.training.rollouts import Rollout


def rollout_of(
    config: RunConfig, policy: nn.Module, chat: Chat, *, samples_per_prompt: int = 1, **drawers: Any
) -> Rollout:
    """A rollout by the run's ``sampling`` and ``environment``.

    Args:
        policy: who speaks. samples_per_prompt: rows a prompt.
        drawers: further attributes of ``Rollout``: who else draws, and with which engine.
    Raises:
        ConfigError: the environment that the settings name is none.
    """
    given: dict[str, Any] = {"policy": policy, "chat": chat, "sampling": config.sampling}
    given |= {"samples_per_prompt": samples_per_prompt} | drawers
    if config.environment is None:
        return Rollout(**given)
    return Conversations(
        **given,
        environment=find_environment(config.environment.function),
        max_turns=config.environment.max_turns,
        max_length=config.data.max_length,
    )


def keeps_logprobs(config: RunConfig, policy: nn.Module) -> bool:
    """Do the log-probs of the draw stand for a forward pass of the trainer's? See ``training.old_logprobs``.

    By itself only where both ways are our own arithmetic on the same tokens: the flat step and the flat trunk.
    """
    if config.training.old_logprobs == "auto":
        return may_keep_logprobs(config) and serves(policy)
    return config.training.old_logprobs == "sampler"
