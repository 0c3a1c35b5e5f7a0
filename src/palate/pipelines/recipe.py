"""Reading a pipeline's YAML: variables, stages, references between them, overrides.

    name: mine
    out: runs/mine
    variables: {seed: 0}
    stages:
      sft:  {do: train, method: sft, model: ./base, data: demonstrations.jsonl, seed: ${seed}}
      ppo:  {do: train, method: ppo, model: "${sft}/model", reward: my_package:my_function, data: prompts.jsonl}

``${name}`` is a variable, or the folder of an earlier stage. Overrides are ``variable=value`` or ``stage.key=value``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from palate.errors import ConfigError
from palate.settings_tree import Layer, closest, merge, read_overrides, read_yaml

_KEYS = ("name", "description", "out", "variables", "stages")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Step:
    """One stage: its name, what it does, and its settings with every reference replaced."""

    name: str
    do: str
    settings: Layer
    place: str


@dataclass(frozen=True)
class Recipe:
    """A pipeline that is ready to run."""

    name: str
    description: str
    out: Path
    variables: Mapping[str, Any]
    steps: tuple[Step, ...]


def built_in() -> list[str]:
    """Names of the pipelines that come with palate."""
    folder = resources.files("palate.pipelines")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def find_recipe(name: str | Path) -> Path:
    """A built-in pipeline's name, or a YAML file, as a path.

    Raises:
        ConfigError: neither.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path  # a missing file is reported when it is read
    if str(name) in built_in():
        return Path(str(resources.files("palate.pipelines").joinpath(f"{name}.yaml")))
    near = closest(str(name), built_in())
    hint = f' Did you mean "{near}"?' if near else ""
    raise ConfigError(f"no pipeline {str(name)!r}.{hint} Built in: {', '.join(built_in())}; or give a .yaml file.")


def read_recipe(name: str | Path, *, out: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a pipeline.

    Args:
        name: a built-in pipeline's name, or a YAML file.
        out: folder of the whole run; None = the file's ``out``, else runs/<name>.
        overrides: ``variable=value`` or ``stage.key=value``.

    Raises:
        ConfigError: unknown keys, stages or references; each with its place.
    """
    path = find_recipe(name)
    file = read_yaml(path)
    for key in file.values:
        if key not in _KEYS:
            raise ConfigError(f'{file.place_of(key)}: unknown key "{key}". A pipeline has: {", ".join(_KEYS)}.')
    stages, variables = file.values.get("stages"), file.values.get("variables") or {}
    if not isinstance(stages, dict) or not stages or not all(isinstance(s, dict) for s in stages.values()):
        raise ConfigError(f"{path}: no stages. Expected stages: {{name: {{do: train, ...}}, ...}}.")
    clash = sorted(set(stages) & set(variables))
    if clash:
        raise ConfigError(f'{path}: "{clash[0]}" is both a variable and a stage. Rename one of them.')
    whole = merge([file, _addressed(read_overrides(overrides), stages, variables)])
    title = str(file.values.get("name") or path.stem)
    folder = Path(out or file.values.get("out") or Path("runs") / title)
    known = dict(whole.values.get("variables") or {})
    steps = []
    for stage in stages:
        steps.append(_step(stage, whole, known))
        known[stage] = str(folder / stage)
    return Recipe(
        title, str(file.values.get("description") or ""), folder, whole.values.get("variables") or {}, tuple(steps)
    )


def _addressed(given: Layer, stages: Mapping[str, Any], variables: Mapping[str, Any]) -> Layer:
    """Overrides as they would stand in the file."""
    values: dict[str, Any] = {}
    for key, value in given.values.items():
        if key in variables:
            values.setdefault("variables", {})[key] = value
        elif key in stages and isinstance(value, dict):
            values.setdefault("stages", {})[key] = value
        else:
            near = closest(key, [*variables, *stages])
            hint = f' Did you mean "{near}"?' if near else ""
            raise ConfigError(
                f'override: "{key}" is neither a variable nor a stage.{hint} '
                f"Variables: {', '.join(variables) or 'none'}; stages: {', '.join(stages)}."
            )
    places = {
        f"{'variables' if k.partition('.')[0] in variables else 'stages'}.{k}": v for k, v in given.places.items()
    }
    return Layer(values, places)


def _step(name: str, whole: Layer, known: Mapping[str, Any]) -> Step:
    prefix = f"stages.{name}."
    places = {k.removeprefix(prefix): v for k, v in whole.places.items() if k.startswith(prefix)}
    at = whole.place_of(f"stages.{name}")
    settings = _replaced(dict(whole.values["stages"][name]), known, at)
    do = settings.pop("do", None)
    if not isinstance(do, str):
        raise ConfigError(f'{at}: stage "{name}" does not say what to do. Add do: train (or sample, annotate, ...).')
    return Step(name, do, Layer(settings, places), at)


def _replaced(value: Any, known: Mapping[str, Any], place: str) -> Any:
    """``${name}`` replaced; a text that is nothing but one reference becomes the variable's own value."""
    if isinstance(value, dict):
        return {key: _replaced(item, known, place) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, known, place) for item in value]
    if not isinstance(value, str):
        return value
    for name in _REFERENCE.findall(value):
        if name not in known:
            near = closest(name, known)
            hint = f' Did you mean "{near}"?' if near else ""
            raise ConfigError(
                f"{place}: ${{{name}}} is no variable and no earlier stage.{hint} Known: {', '.join(known)}."
            )
    if (whole := _REFERENCE.fullmatch(value)) is not None:
        return known[whole[1]]
    return _REFERENCE.sub(lambda match: str(known[match[1]]), value)
