"""From what stands in the settings to the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from palate.errors import ConfigError
from palate.models.adapters import adapter_config
from palate.models.load import load_scalar, load_tokenizer, same_vocabulary
from palate.models.rewards.check import CheckReward
from palate.models.rewards.classifier import ClassifierReward
from palate.models.rewards.endpoint import EndpointReward
from palate.models.rewards.ensemble import EnsembleReward
from palate.models.rewards.find import find_function
from palate.models.rewards.function import FunctionReward
from palate.models.rewards.length import LengthReward
from palate.models.rewards.parts import Scale, WeightedReward, unmeasured
from palate.models.rewards.preference import PreferenceFunction, is_preference
from palate.models.rewards.spec import KINDS, One, Spec, kind_of, long_form, parts_of, read_one
from palate.models.rewards.text import TextRewardModel
from palate.types import Reward

if TYPE_CHECKING:
    from palate.data.chat import Chat


class Place(NamedTuple):
    """How and where models are held."""

    dtype: str | torch.dtype
    device: str | torch.device
    trunk: nn.Module | None  # whose weights those that are adapters use


class _Part:
    """A reward on its way into a sum: what it is, what it is called, what it counts."""

    def __init__(self, name: str, reward: nn.Module | Reward, weight: float = 1.0, scale: Scale | None = None) -> None:
        self.name, self.reward, self.weight, self.scale = name, reward, weight, scale

    @property
    def plain(self) -> bool:
        return self.weight == 1.0 and self.scale is None


def load_reward(
    spec: Spec,
    chat: Chat,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    measuring: bool = False,
    trunk: nn.Module | None = None,
) -> nn.Module | Reward:
    """The reward that ``spec`` describes, frozen.

    Args:
        spec: a string: folder or hub name of a scalar model, which reads the policy's ids when its vocabulary and
            chat template (if it brings one) are the policy's, and text otherwise; "module:function" or
            "file.py:function"; an http(s) address. A mapping with one of the keys of ``spec.KINDS`` and its options. A
            list of these, or a mapping from names to these: their weighted sum. A Python function itself.
        chat: the policy's.
        dtype, device: of models that are loaded.
        measuring: ``normalise: reference`` is allowed; its scales are then in ``unmeasured(reward)``.
        trunk: an adapted model on whose frozen weights scalar models that are adapters stand; others keep their own.
    Raises:
        ConfigError: a key or function that does not exist.
        ModelError: a folder that cannot be a reward.
    """
    spec = long_form(spec)
    kind = kind_of(spec)
    place = Place(dtype, device, trunk)
    if kind is None and not callable(spec):
        reward: nn.Module | Reward = _sum(_parts(parts_of(spec), chat, place, measuring))
    else:
        part = _one(spec, chat, place, measuring)
        reward = part.reward if part.plain else _sum([part])
    return reward


def _sum(parts: Sequence[_Part]) -> WeightedReward:
    return WeightedReward(
        {part.name: (part.reward, part.weight) for part in parts},
        {part.name: part.scale for part in parts if part.scale is not None},
    )


def _parts(specs: Mapping[Any, Any], chat: Chat, place: Place, measuring: bool) -> list[_Part]:
    """Every part, each with a name of its own: its key where it has one."""
    parts: list[_Part] = []
    for key, spec in specs.items():
        part = _one(spec, chat, place, measuring)
        part.name = _unused(part.name, {p.name for p in parts}) if isinstance(key, int) else str(key)
        parts.append(part)
    return parts


def _one(spec: Any, chat: Chat, place: Place, measuring: bool) -> _Part:
    """A single reward, or a sum within a sum."""
    if callable(spec):
        reward = _function(spec, chat, None)
        return _Part(reward.name, reward)
    spec = long_form(spec)
    kind = kind_of(spec)
    if kind is None:
        return _Part("sum", load_reward(spec, chat, measuring=measuring, **place._asdict()))
    one = read_one(spec, kind)
    name, made = _made(one, chat, place._replace(dtype=one.options.pop("dtype", place.dtype)), measuring)
    return _Part(name, made, one.weight, _scale(one, name, made, measuring))


def _made(one: One, chat: Chat, place: Place, measuring: bool) -> tuple[str, Any]:
    """(name, reward) of a single one."""
    where, name, options = one.what, one.name, one.options
    if one.kind == "ensemble":
        return name or "ensemble", _ensemble(one, chat, place, measuring)
    if one.kind == "length":
        return name or "length", LengthReward(**options)
    if one.kind == "check":
        return name or str(where), CheckReward(str(where), chat, name=name or str(where), **options)
    if one.kind == "url":
        return name or "endpoint", EndpointReward(str(where), chat, name=name or "endpoint", **options)
    if one.kind == "function":
        function = _function(where if callable(where) else find_function(str(where)), chat, name)
        return function.name, function
    if one.kind == "classifier":
        made = ClassifierReward(str(where), chat=chat, dtype=place.dtype, device=place.device, name=name, **options)
        return made.name, made
    assert one.kind == "model", one.kind
    name = name or _folder_name(str(where))
    return name, _model(str(where), chat, place, name)


def _function(function: Any, chat: Chat, name: str | None) -> FunctionReward | PreferenceFunction:
    """One that has a parameter ``others`` compares; any other scores."""
    return (PreferenceFunction if is_preference(function) else FunctionReward)(function, chat, name)


def _ensemble(one: One, chat: Chat, place: Place, measuring: bool) -> EnsembleReward:
    parts = _parts(parts_of(one.what), chat, place, measuring)
    for part in parts:
        if part.weight != 1.0:
            raise ConfigError(
                f'reward: "{part.name}" has weight {part.weight:g} within an ensemble, whose members count alike. Put the '
                "weight beside the ensemble."
            )
    scales = {part.name: part.scale for part in parts if part.scale is not None}
    return EnsembleReward({part.name: part.reward for part in parts}, scales=scales, **one.options)


def _scale(one: One, name: str, made: Any, measuring: bool) -> Scale | None:
    if isinstance(one.scale, tuple):
        return Scale(*one.scale)
    if one.scale is None:
        return None
    if not measuring:
        raise ConfigError(
            f'reward "{name}": normalise: reference is measured when a run begins, and there is none here. Give the '
            "numbers, normalise: {mean: ..., std: ...}; a run's config.yaml has them."
        )
    if any(unmeasured(made)):
        raise ConfigError(
            f'reward "{name}" is to be normalised on the reference, and so is something in it. Say it of one of them.'
        )
    return Scale(seen=[])


def _model(where: str, chat: Chat, place: Place, name: str) -> nn.Module | Reward:
    """A scalar model on the policy's ids if those mean the same to it, else one that reads text.

    A folder without a template of its own was trained under whatever the settings said, as the policy is now.
    """
    own, policy = load_tokenizer(where), chat.tokenizer
    templates = (None, policy.chat_template, chat.template, chat.conversation_template)
    if same_vocabulary(own, policy) and own.chat_template in templates:
        trunk = place.trunk if adapter_config(where) else None
        model: Any = load_scalar(
            where,
            dtype=place.dtype,
            device=place.device,
            trainable=False,
            tokenizer=own,
            new_head=False,
            trunk=trunk,
        )
        model.chat = chat  # so that an error can show the sample in words
        return model  # type: ignore[no-any-return]
    return TextRewardModel(where, chat, dtype=place.dtype, device=place.device, name=name)


def _folder_name(where: str) -> str:
    """runs/helpful/model -> helpful."""
    path = Path(where)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _unused(name: str, taken: set[str]) -> str:
    """The name, or name_2, name_3, ..."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


__all__ = ["KINDS", "load_reward"]
