"""``normalise: reference``: the mean and spread of a reward on samples of the reference, measured once, before training.

The numbers take the place of the word in the run's config.yaml, so that a run that is resumed has the very same ones, and
so has another run that is given them. A z-score on reference samples is what makes rewards of different units addable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from palate.config import RunConfig
from palate.data.chat import Chat
from palate.errors import ConfigError
from palate.models.forward import score_responses
from palate.models.rewards import check_records, is_unmeasured, unmeasured, with_scales
from palate.run_folder import read_settings
from palate.stage.records import Sides
from palate.stage.rollout import rollout_of
from palate.types import Models

PROMPTS = 256  # prompts whose samples are scored, one sample each: a mean to within a sixteenth of the spread
ROWS = 64  # a batch of scoring

Say = Callable[[str], None]


def adopted(config: RunConfig) -> RunConfig:
    """The settings with the numbers that this very run was begun with, where its folder has them."""
    settings = config.out / "config.yaml"
    if not is_unmeasured(config.reward) or not settings.exists():
        return config
    there = read_settings(settings).get("reward")
    if _but_for_scales(config.reward, there):
        return config.fill("reward", there, "normalised on samples of the reference when the run began")
    return config  # another run's folder, which is refused where settings are compared


def _but_for_scales(asked: Any, there: Any) -> bool:
    """Is ``there`` what was asked, with numbers where it said "reference"?"""
    if isinstance(asked, Mapping) and isinstance(there, Mapping):
        return asked.keys() == there.keys() and all(
            (key == "normalise" and asked[key] == "reference" and isinstance(there[key], Mapping))
            or _but_for_scales(asked[key], there[key])
            for key in asked
        )
    if isinstance(asked, list) and isinstance(there, list):
        return len(asked) == len(there) and all(map(_but_for_scales, asked, there))
    return bool(asked == there)


def with_reward_ready(config: RunConfig, models: Models, items: Sides, chat: Chat, say: Say) -> RunConfig:
    """Look at what the reward reads of every record, then measure what is still to be measured; returns the settings
    with the numbers.

    Args:
        models: their reward's scales are settled in place.
        items: prompts; the first ``PROMPTS`` of those to train on are sampled.
    Raises:
        DataError: a record lacks a field that the reward reads. ConfigError: there is no reference to sample.
        ModelError: a reward says the same of every sample.
    """
    if config.reward is None or models.reward is None:
        return config
    check_records(models.reward, [item.record for side in items for item in side])
    open_scales = list(unmeasured(models.reward))
    if not open_scales:
        return config
    # Before training the policy is the reference, unless another is named.
    model: Any = models.policy if config.reference in (None, config.model) else models.reference
    if model is None or config.method.settings.reads != "prompts":
        raise ConfigError(
            f"reward: normalise: reference samples the reference, and {config.method.name} has none. Give the numbers, "
            "normalise: {mean: ..., std: ...}."
        )
    chosen = items.train[:PROMPTS]
    say(f"reward: measuring on {len(chosen)} samples of the reference")
    with torch.no_grad():
        tokens = rollout_of(config, model, chat)(chosen, config.training.seed, 0x5C)
        for rows in torch.arange(len(tokens), device=tokens.ids.device).split(ROWS):
            score_responses(models.reward, tokens.select(rows))
    for name, scale in open_scales:
        scale.settle(name)
        say(f"reward {name}: mean {scale.mean:.4g}, standard deviation {scale.std:.4g} there")
    numbers = ((scale.mean, scale.std) for _, scale in open_scales)
    reason = f"normalised on {len(chosen)} samples of the reference"
    return config.fill("reward", with_scales(config.reward, numbers), reason)
