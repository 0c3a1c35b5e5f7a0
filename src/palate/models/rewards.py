"""Rewards of every kind, their weighted sum, and the way to them from what stands in the settings.

Each is a scalar model on the policy's ids, or a ``types.Reward``: rows of tokens in, one score a row out. The latter read
text, decoded from the rows; the rows' ids stay the policy's own and are never encoded again for training.

runs/reward/model                                    a scalar model, or a hub name
my_rewards:shortness    rewards.py:shortness         a Python function
{classifier: lvwerra/distilbert-imdb, label: positive}
{function: my_rewards:shortness, weight: 0.1}        also with model: or classifier:
[one, another]    {helpful: one, brief: another}     a sum; the names are those of the metrics
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from palate.errors import ConfigError
from palate.models.forward import score_responses
from palate.models.load import load_scalar, load_tokenizer, same_vocabulary
from palate.models.quiet import did_you_mean
from palate.models.reward_classifier import ClassifierReward
from palate.models.reward_function import FunctionReward
from palate.models.reward_text import TextRewardModel
from palate.types import Reward, Scored, Tokens

if TYPE_CHECKING:
    from palate.data.chat import Chat

__all__ = ["ClassifierReward", "FunctionReward", "TextRewardModel", "WeightedReward", "find_function", "load_reward"]

KINDS = {
    "function": ("weight", "name"),
    "classifier": ("weight", "name", "label", "output", "reads", "dtype"),
    "model": ("weight", "name", "dtype"),
}
FUNCTION = re.compile(r"^(?P<module>[A-Za-z_][\w.]*|.*\.py):(?P<name>[A-Za-z_]\w*)$")

Spec = str | Path | Callable[..., Any] | Mapping[str, Any] | Sequence[Any]


class WeightedReward:
    """A weighted sum of named rewards, whose unweighted scores are kept as parts.

    Args:
        rewards: name -> (reward or scalar model, weight). A weight may be negative (a cost), never NaN; one of 0 is
            measured without being optimised.
    """

    def __init__(self, rewards: Mapping[str, tuple[nn.Module | Reward, float]]) -> None:
        if not rewards:
            raise ConfigError("reward: a weighted sum of no rewards. Name at least one.")
        for name, (_, weight) in rewards.items():
            if not abs(weight) < float("inf"):
                raise ConfigError(f'reward "{name}" has weight {weight}; a finite number was expected.')
        self.rewards = dict(rewards)

    def __call__(self, tokens: Tokens) -> Scored:
        """The sum [N], and every reward's own scores; those of a sum within the sum as "name/part"."""
        total = torch.zeros(len(tokens), device=tokens.ids.device)
        parts: dict[str, Tensor] = {}
        for name, (reward, weight) in self.rewards.items():
            with torch.no_grad():
                scored = score_responses(reward, tokens)
            total += weight * scored.scores.to(total)
            parts[name] = scored.scores
            parts |= {f"{name}/{part}": scores for part, scores in scored.parts.items()}
        return Scored(total, parts)


def load_reward(
    spec: Spec, chat: Chat, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> nn.Module | Reward:
    """The reward that ``spec`` describes, frozen.

    Args:
        spec: a string: folder or hub name of a scalar model, which reads the policy's ids when its vocabulary and
            chat template (if it brings one) are the policy's, and text otherwise; or "module:function" / "file.py:function". A mapping with one
            of the keys "function", "classifier", "model", and "weight", "name", and for a classifier "label", "output",
            "reads". A list of these, or a mapping from names to these: their weighted sum. A Python function itself.
        chat: the policy's.
        dtype, device: of models that are loaded.
    Raises:
        ConfigError: a key or function that does not exist.
        ModelError: a folder that cannot be a reward.
    """
    if isinstance(spec, Mapping) and not KINDS.keys() & spec.keys():
        _check_names(spec)
        named = {str(name): _one(part, chat, dtype, device) for name, part in spec.items()}
        return WeightedReward({name: (reward, weight) for name, (_, reward, weight) in named.items()})
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        parts: dict[str, tuple[nn.Module | Reward, float]] = {}
        for part in spec:
            name, reward, weight = _one(part, chat, dtype, device)
            parts[_unused(name, parts)] = (reward, weight)
        return WeightedReward(parts)
    name, reward, weight = _one(spec, chat, dtype, device)
    return reward if weight == 1.0 else WeightedReward({name: (reward, weight)})


def _one(
    spec: Any, chat: Chat, dtype: str | torch.dtype, device: str | torch.device
) -> tuple[str, nn.Module | Reward, float]:
    """(name, reward, weight) of a spec that is no list and no mapping of names, or of such a sum within a sum."""
    if callable(spec):
        reward = FunctionReward(spec, chat)
        return reward.name, reward, 1.0
    if isinstance(spec, str | Path):
        text = str(spec)
        spec = {"function": text} if FUNCTION.match(text) and not Path(text).exists() else {"model": text}
    if not isinstance(spec, Mapping) or not KINDS.keys() & spec.keys():
        return "sum", load_reward(spec, chat, dtype=dtype, device=device), 1.0
    kind = _kind(spec)
    options = {key: value for key, value in spec.items() if key not in (kind, "weight", "name")}
    where, dtype = spec[kind], options.pop("dtype", dtype)
    made: Any
    if kind == "function":
        made = FunctionReward(where if callable(where) else find_function(str(where)), chat, spec.get("name"))
        name = made.name
    elif kind == "classifier":
        made = ClassifierReward(str(where), chat=chat, dtype=dtype, device=device, name=spec.get("name"), **options)
        name = made.name
    else:
        name = str(spec.get("name") or _folder_name(str(where)))
        made = _model(str(where), chat, dtype, device, name)
    return name, made, _weight(spec, name)


def _model(where: str, chat: Chat, dtype: Any, device: Any, name: str) -> nn.Module | Reward:
    """A scalar model on the policy's ids if those mean the same to it, else one that reads text.

    A folder without a template of its own was trained under whatever the settings said, as the policy is now.
    """
    own, policy = load_tokenizer(where), chat.tokenizer
    templates = (None, policy.chat_template, chat.template, chat.conversation_template)
    if same_vocabulary(own, policy) and own.chat_template in templates:
        return load_scalar(where, dtype=dtype, device=device, trainable=False, tokenizer=own, new_head=False)
    return TextRewardModel(where, chat, dtype=dtype, device=device, name=name)


def find_function(path: str) -> Callable[..., Any]:
    """The function that "module:function" or "file.py:function" names; the current folder is searched too.

    Raises:
        ConfigError: no such module or function.
    """
    match = FUNCTION.match(path)
    if match is None:
        raise ConfigError(f'reward: "{path}" names no function. Write "module:function" or "file.py:function".')
    where, name = match["module"], match["name"]
    module = _module_of_file(where) if where.endswith(".py") else _module(where)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(
            f'reward: {where} has no function "{name}".{did_you_mean(name, own)} Found: {", ".join(own)}.'
        )
    return function  # type: ignore[no-any-return]


def _module(name: str) -> ModuleType:
    try:
        with _current_folder_importable():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is missing inside the user's module is their error, and keeps its traceback.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ConfigError(
            f'reward: no module "{name}" can be imported from {os.getcwd()} or the Python path. A file can be named by its '
            'path: "folder/file.py:function".'
        ) from None


def _module_of_file(path: str) -> ModuleType:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f'reward: there is no file "{path}" (looked from {os.getcwd()}).')
    # Dataclasses look their module up by name while it is read; the whole path as the name hides no other module.
    name = f"palate.file:{file.resolve()}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """As ``python -m`` has it; an installed command does not."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _kind(spec: Mapping[str, Any]) -> str:
    kinds = sorted(KINDS.keys() & spec.keys())
    if len(kinds) > 1:
        raise ConfigError(f"reward: {' and '.join(kinds)} together in one reward. Write a list of two for their sum.")
    known = (kinds[0], *KINDS[kinds[0]])
    for key in spec:
        if key not in known:
            raise ConfigError(
                f'reward: unknown key "{key}" beside "{kinds[0]}".{did_you_mean(str(key), known)} Known: {", ".join(known)}.'
            )
    return kinds[0]


def _check_names(spec: Mapping[str, Any]) -> None:
    """A mapping without a known kind is one of names to rewards, unless a key is a slip of the pen."""
    for key, part in spec.items():
        if not isinstance(part, str | Path | Mapping | Sequence) and not callable(part):
            raise ConfigError(
                f'reward: "{key}" is {part!r}; a reward was expected. One reward is written with one of the keys '
                f"{', '.join(KINDS)}, a sum as a mapping from names to rewards."
            )


def _weight(spec: Mapping[str, Any], name: str) -> float:
    weight = spec.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f'reward "{name}" has weight {weight!r}; a number was expected.')
    return float(weight)


def _folder_name(where: str) -> str:
    """runs/helpful/model -> helpful."""
    path = Path(where)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    number = 2
    while name in taken:
        name, number = f"{name.rsplit('_', 1)[0] if number > 2 else name}_{number}", number + 1
    return name
