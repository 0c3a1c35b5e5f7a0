"""Settings before they are checked: YAML, flags and dotted overrides as layers that remember where each value stood.

    defaults  <  file (--config)  <  flag (--model M)  <  override (training.learning_rate=1e-5)

A later layer wins key by key; a mapping laid over a mapping is merged, anything else replaces. Every value keeps its
place ("reward.yaml:7", "--model", "override"), so that a message about it can say where to look.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from palate.errors import ConfigError


@dataclass(frozen=True)
class Layer:
    """Nested settings and, for each dotted key, the place where it was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def place_of(self, key: str) -> str:
        """Where a dotted key was set: its own place, or that of the nearest section above it; "" for a default."""
        while key not in self.places and "." in key:
            key = key.rpartition(".")[0]
        return self.places.get(key, "")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its two traps: 1e-5 is a number, and a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(where: str | Path) -> Layer:
    """A settings file, with ``file:line`` as the place of every key.

    Raises:
        ConfigError: the file is missing, not YAML, not a mapping, or names a key twice.
    """
    path = Path(where)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such settings file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a settings file: {error}") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        places: dict[str, str] = {}
        _places(node, "", str(path), places)
        values = loader.construct_document(node) if node is not None else {}  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: settings are a mapping of keys to values, found {type(values).__name__}.")
    return Layer(values, places)


def _places(node: yaml.Node | None, prefix: str, file: str, places: dict[str, str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        place = f"{file}:{key_node.start_mark.line + 1}"
        if key in places:
            raise ConfigError(f'{place}: "{key}" is given a second time (first at {places[key]}). Remove one of them.')
        places[key] = place
        _places(value_node, f"{key}.", file, places)


def parse_value(text: str) -> Any:
    """What a value means on the command line: YAML, so ``1e-5``, ``null``, ``true``, ``[a, b]`` are what they look like.

    Text that is not YAML (``@file``, ``%d``) is taken as it stands, unless it opens a list or mapping.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()  # type: ignore[no-untyped-call]
    except yaml.YAMLError as error:
        if text.lstrip()[:1] in "[{":
            raise ConfigError(f"override value {text!r} opens a list or mapping that is not valid YAML.") from error
        return text
    finally:
        loader.dispose()


def spelled_out(value: Any, key: str) -> Any:
    """A setting that may be a list or mapping, where a text stands for one: YAML that opens one, or a .yaml file.

    Args:
        value: anything but such a text is returned as it is.
        key: of the setting; a file that is a run's settings has it under this name.
    Raises:
        ConfigError: the file is missing or not YAML.
    """
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] in ("{", "["):
        return parse_value(value)
    if not value.endswith((".yaml", ".yml")):
        return value
    path = Path(value)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise ConfigError(f"{key}: {path}: {reason}.") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _places(node, "", str(path), {})  # a key given twice
        found = loader.construct_document(node) if node is not None else None  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    finally:
        loader.dispose()
    if isinstance(found, Mapping) and key in found:
        found = found[key]
    if not isinstance(found, Mapping | list):
        raise ConfigError(f"{key}: {path} holds {found!r:.80}; a list or a mapping was expected.")
    return found


def read_overrides(texts: Iterable[str]) -> Layer:
    """``section.key=value`` arguments.

    Raises:
        ConfigError: an argument without "=", or with an empty key.
    """
    layer = Layer()
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(
                f"{text!r} is not an override. Write section.key=value, as in training.learning_rate=1e-5."
            )
        put(layer, key, parse_value(value), f"override {text}")
    return layer


def put(layer: Layer, key: str, value: Any, place: str) -> None:
    """Set one dotted key of a layer in place."""
    at: dict[str, Any] = layer.values
    *sections, leaf = key.split(".")
    for section in sections:
        if not isinstance(at.get(section), dict):
            at[section] = {}
        at = at[section]
    at[leaf] = value
    layer.places[key] = place


def merge(layers: Sequence[Layer]) -> Layer:
    """Lay later layers over earlier ones."""
    merged = Layer()
    for layer in layers:
        for key, value in flatten(layer.values).items():
            if not isinstance(value, Mapping):  # what it replaces no longer stands anywhere
                for stale in [place for place in merged.places if place.startswith(f"{key}.")]:
                    del merged.places[stale]
        _merge_into(merged.values, layer.values)
        merged.places.update(layer.places)
    return merged


def _merge_into(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, Mapping):
            if not isinstance(below.get(key), dict):
                below[key] = {}
            _merge_into(below[key], value)
        else:
            below[key] = value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; an empty mapping stays as it is."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: a slip of the fingers, or the right key in another section."""
    section, _, leaf = name.rpartition(".")
    keys = list(known)
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(keys) if key.rpartition(".")[0] != section}
    for leaves, cutoff in ((siblings, 0.8), (elsewhere, 0.99), (siblings, 0.6), (elsewhere, 0.75)):
        near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=cutoff)
        if near:
            return leaves[near[0]]
    return None
