"""What stands in the settings as a reward, looked at without loading anything: its kind, its options, its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from palate.errors import ConfigError
from palate.models.quiet import did_you_mean
from palate.models.rewards.find import FUNCTION

Spec = Any  # str | Path | Callable[..., Any] | Mapping[str, Any] | Sequence[Any]

COMMON = ("weight", "name", "normalise")
KINDS: dict[str, tuple[str, ...]] = {
    "function": COMMON,
    "classifier": (*COMMON, "label", "output", "reads", "dtype"),
    "model": (*COMMON, "dtype"),
    "check": COMMON,  # and the options of the check that is named: CHECKS
    "url": (*COMMON, "timeout", "retries", "batch", "total", "token_from"),
    "ensemble": (*COMMON, "take", "weight_of_variance"),
    "length": ("name", "over"),
}
CHECKS: dict[str, tuple[str, ...]] = {
    "number": ("answer", "marked", "tolerance"),
    "regex": ("pattern", "match"),
    "json": ("schema", "fenced"),
    "code": ("tests", "give", "timeout", "memory"),
}


class One(NamedTuple):
    """A single reward's settings, checked for keys that do not exist."""

    kind: str
    what: Any  # the folder, function, address, check, members or price
    options: dict[str, Any]  # of the kind itself
    name: str | None
    weight: float
    scale: tuple[float, float] | str | None  # (mean, std), "reference" = still to be measured, None = as it is


def kind_of(spec: Any) -> str | None:
    """The kind of a single reward's settings; None of a sum, whatever it is written as.

    A key is a kind only with a value that fits it: {length: {url: ...}} is a sum of one, named "length".

    Raises:
        ConfigError: two kinds in one reward.
    """
    if not isinstance(spec, Mapping):
        return None
    kinds = [kind for kind in KINDS if kind in spec and _fits(kind, spec[kind])]
    if len(kinds) > 1:
        raise ConfigError(f"reward: {' and '.join(kinds)} together in one reward. Write a list of two for their sum.")
    return kinds[0] if kinds else None


def _fits(kind: str, value: Any) -> bool:
    if kind == "length":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "ensemble":
        return isinstance(value, Mapping | Sequence) and not isinstance(value, str)
    return not isinstance(value, Mapping | list | tuple)


def long_form(spec: Any) -> Any:
    """A text as the mapping that it is short for; everything else as it is."""
    if not isinstance(spec, str | Path):
        return spec
    text = str(spec)
    if text.startswith(("http://", "https://")):
        return {"url": text}
    return {"function": text} if FUNCTION.match(text) and not Path(text).exists() else {"model": text}


def read_one(spec: Mapping[str, Any], kind: str) -> One:
    """The settings of a single reward.

    Raises:
        ConfigError: an unknown key, a weight that is no number, a scale that is none.
    """
    what = spec[kind]
    known = (kind, *KINDS[kind])
    if kind == "check":
        _check_known("check", str(what), tuple(CHECKS))
        known = (*known, *CHECKS[str(what)])
    beside = f"check: {what}" if kind == "check" else kind
    for key in spec:
        if key not in known:
            raise ConfigError(
                f'reward: unknown key "{key}" beside "{beside}".{did_you_mean(str(key), known)} Known: '
                f"{', '.join(known)}."
            )
    own = {key: value for key, value in spec.items() if key != kind and (key not in COMMON)}
    name = None if spec.get("name") is None else str(spec["name"])
    weight = _number(what if kind == "length" else spec.get("weight", 1.0), f'reward "{name or what}" has weight')
    return One(kind, what, own, name, weight, _scale(spec.get("normalise"), name or str(what)))


def _check_known(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(
            f'reward: {key} "{value}" is not known.{did_you_mean(value, known)} Choose: {", ".join(known)}.'
        )


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{what} {value!r}; a number was expected.")
    return float(value)


def _scale(value: Any, name: str) -> tuple[float, float] | str | None:
    if value is None or value == "reference":
        return value
    if isinstance(value, Mapping) and set(value) == {"mean", "std"}:
        mean, std = (_number(value[key], f'reward "{name}": normalise.{key} is') for key in ("mean", "std"))
        if math.isfinite(mean) and 0 < std < math.inf:
            return mean, std
    raise ConfigError(
        f'reward "{name}": normalise is {value!r}. Write {{mean: 0.3, std: 1.2}} (std above 0), or "reference" to have both '
        "measured on samples of the reference before training."
    )


def parts_of(spec: Any) -> dict[Any, Any]:
    """What a sum or an ensemble is made of, by its key or number, in order.

    Raises:
        ConfigError: a mapping that is neither a reward nor a sum of named ones.
    """
    if isinstance(spec, Mapping):
        _check_names(spec)
        return dict(spec)
    return dict(enumerate(spec))


def _check_names(spec: Mapping[str, Any]) -> None:
    """A mapping without a known kind is one of names to rewards, unless a key is a slip of the pen."""
    options = {key for keys in (*KINDS.values(), *CHECKS.values()) for key in keys}
    for key, part in spec.items():
        if key not in KINDS and did_you_mean(str(key), KINDS) and options & (spec.keys() - {key}):
            raise ConfigError(
                f'reward: "{key}" is no kind of reward.{did_you_mean(str(key), KINDS)} Known: {", ".join(KINDS)}.'
            )
        if not isinstance(part, str | Path | Mapping | Sequence) and not callable(part):
            raise ConfigError(
                f'reward: "{key}" is {part!r}; a reward was expected. One reward is written with one of the keys '
                f"{', '.join(KINDS)}, a sum as a mapping from names to rewards."
            )


def _nested(spec: Any) -> tuple[str | None, dict[Any, Any]]:
    """(kind, what is inside) of any spec; nothing is inside a single reward other than an ensemble."""
    kind = kind_of(spec)
    if kind == "ensemble":
        return kind, parts_of(spec["ensemble"])
    if kind is None and isinstance(spec, Mapping | Sequence) and not isinstance(spec, str):
        return kind, parts_of(spec)
    return kind, {}


def is_unmeasured(spec: Any) -> bool:
    """Does something in it say ``normalise: reference``?"""
    kind, inside = _nested(spec)
    own = kind is not None and spec.get("normalise") == "reference"
    return own or any(is_unmeasured(part) for part in inside.values())


def with_scales(spec: Any, scales: Iterator[tuple[float, float]]) -> Any:
    """The same settings with ``normalise: reference`` replaced by numbers, which are taken in order: what is inside
    first (``parts.unmeasured`` has the same order)."""
    kind, inside = _nested(spec)
    changed = {key: with_scales(part, scales) for key, part in inside.items()}
    if kind is None:
        return (changed if isinstance(spec, Mapping) else list(changed.values())) if inside else spec
    new = dict(spec)
    if inside:
        new[kind] = changed if isinstance(spec[kind], Mapping) else list(changed.values())
    if new.get("normalise") == "reference":
        mean, std = next(scales)
        new["normalise"] = {"mean": mean, "std": std}
    return new


def first_folder(spec: Any) -> str | None:
    """The first model that the settings name, whose tokenizer will do where nobody names another; None without one."""
    spec = long_form(spec)
    kind, inside = _nested(spec)
    if kind in ("model", "classifier"):
        return str(spec[kind])
    return next((found for part in inside.values() if (found := first_folder(part))), None)
