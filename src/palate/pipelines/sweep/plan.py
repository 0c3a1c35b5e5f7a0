"""From ``beta=0.05,0.1 training.learning_rate=1e-5,1e-4`` to one named run for every combination.

beta=0.1,0.5      a short name, where one section only has a setting of that name: method.beta
seed=0,1,2        any setting, several values: one run each
training.epochs=2 one value: the same in every run, and in no run's name
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.config import RunConfig, known_keys, load_config, long_forms
from palate.errors import ConfigError
from palate.lookup import method_class
from palate.settings_tree import parse_value, read_yaml

METHOD = "method.name"
SHORT = ("seed", "data", "lora")  # understood by the settings themselves
LONGEST_NAME = 100


@dataclass(frozen=True)
class Setting:
    """One run of a sweep.

    Attributes:
        name: of its folder; says what is swept, and nothing else.
        values: swept key -> its value here.
        method: that it trains with.
        overrides: ``key=value`` texts, as on the command line.
        config: checked, with its folder.
    """

    name: str
    values: Mapping[str, Any]
    method: str
    overrides: tuple[str, ...]
    config: RunConfig


@dataclass(frozen=True)
class Plan:
    """A sweep before it runs.

    Attributes:
        out: the folder of all its runs.
        keys: what is swept, in the order of the command.
        settings: one for each combination; the last key changes fastest.
        file, flags: what all runs share.
    """

    out: Path
    keys: tuple[str, ...]
    settings: tuple[Setting, ...]
    file: str | None
    flags: Mapping[str, Any]


def make_plan(
    methods: str | None,
    texts: Sequence[str],
    *,
    file: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    reward: str | None = None,
) -> Plan:
    """Every combination of the values, checked before anything runs.

    Args:
        methods: a method, several with commas between them, or None: the file names it.
        texts: ``key=value`` or ``key=value,value``.
        file, flags: as ``config.load_config`` takes them.
        out: folder of the sweep; None = runs/sweep-METHOD.
        reward: a setting of those runs whose method learns from one.
    Raises:
        ConfigError: a short name that is none or several, a value given twice, or what any run would refuse.
    """
    names = [part.strip() for part in (methods or "").split(",") if part.strip()] or _named_in(file)
    swept, fixed = _axes(texts, names)
    if len(names) > 1:
        swept = {METHOD: names} | swept
    if not names:
        raise ConfigError("no method is named. Write: palate sweep METHOD key=value,value ...")
    folder = Path(out or Path("runs") / f"sweep-{'-'.join(names)}")
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    combinations = [dict(zip(swept, texts, strict=True)) for texts in itertools.product(*swept.values())]
    values = [{key: parse_value(text) for key, text in texts.items()} for texts in combinations]
    settings = []
    for name, texts_here, here in zip(_folder_names(values), combinations, values, strict=True):
        method = texts_here.get(METHOD, names[0])
        overrides = (*fixed, *(f"{key}={text}" for key, text in texts_here.items() if key != METHOD))
        own = {"out": str(folder / name)} | ({"reward": reward} if _learns_from_a_reward(method) else {})
        config = load_config(method, file=file, flags={**given, **own}, overrides=overrides)
        settings.append(Setting(name, here, method, overrides, config))
    return Plan(folder, tuple(swept), tuple(settings), None if file is None else str(file), given)


def _learns_from_a_reward(method: str) -> bool:
    found = method_class(method)
    return "reward" in found.needs and "reward" not in found.trains


def _named_in(file: str | Path | None) -> list[str]:
    if file is None:
        return []
    section = long_forms(read_yaml(file)).values.get("method")
    return [str(section["name"])] if isinstance(section, dict) and section.get("name") else []


def _axes(texts: Sequence[str], methods: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """(key -> texts of its values, in order; the overrides that hold for all)."""
    swept: dict[str, list[str]] = {}
    fixed = []
    for text in texts:
        short, equals, given = text.partition("=")
        if not equals or not short:
            raise ConfigError(f"{text!r} is nothing to sweep. Write key=value,value, as in beta=0.05,0.1,0.5.")
        key, values = full_key(short, methods), split_values(given)
        if key in ("out", METHOD):
            raise ConfigError(f"{text!r}: {_PLACES[key]}")
        if any(not value for value in values) and len(values) > 1:
            raise ConfigError(f"{text!r}: an empty value between commas.")
        parsed = [parse_value(value) for value in values]
        if any(value in parsed[:i] for i, value in enumerate(parsed)):
            raise ConfigError(f"{text!r}: a value stands there twice.")
        if key in swept:
            raise ConfigError(f"{text!r}: {key} is swept already.")
        if len(values) > 1:
            swept[key] = values
        else:
            fixed.append(f"{key}={given}")
    return swept, fixed


_PLACES = {
    "out": "every run has a folder of its own below --out.",
    METHOD: "name the methods first, with commas: palate sweep dpo,ipo ...",
}


def split_values(text: str) -> list[str]:
    """At the commas that stand outside brackets and quotation marks.

    >>> split_values("0.1,[1, 2],{a: 1, b: 2}")
    ['0.1', '[1, 2]', '{a: 1, b: 2}']
    """
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        else:
            depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def full_key(short: str, methods: Sequence[str]) -> str:
    """The dotted key that a short name means: the one section that has a setting of this name.

    Raises:
        ConfigError: several sections have one.
    """
    if "." in short or short in SHORT or short == "method":
        return METHOD if short == "method" else short
    known = dict.fromkeys(key for method in methods for key in known_keys(method_class(method)))
    if short in known:
        return short
    found = [key for key in known if key.rpartition(".")[2] == short]
    if len(found) > 1:
        raise ConfigError(f'"{short}" may be {" or ".join(found)}. Write which.')
    return found[0] if found else short  # the settings say what they know instead


def _name(values: Mapping[str, Any]) -> str:
    """``beta=0.1__learning_rate=1e-5``: readable, and the same whenever the same settings are asked for."""
    leaves = [key.rpartition(".")[2] for key in values]
    parts = []
    for (key, value), leaf in zip(values.items(), leaves, strict=True):
        label = key if leaves.count(leaf) > 1 else leaf
        parts.append(_written(value) if key == METHOD else f"{label}={_written(value)}")
    name = "__".join(parts) or "only"
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _written(value: Any) -> str:
    """A value as a part of a file's name; a number always in the same way (1e-5, 0.00001 and 1.0e-5 are one run)."""
    if isinstance(value, float):
        text = f"{value:g}"
        text = text if float(text) == value else repr(value)
        return re.sub(r"e([+-])0*(\d)", lambda m: f"e{'-' if m[1] == '-' else ''}{m[2]}", text)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-") or "empty"


def _folder_names(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names, all different: two values that are written alike ("a/b", "a-b") get a digest of their own."""
    names = [_name(here) for here in values]
    return [
        f"{name}-{hashlib.sha256(repr(sorted(here.items())).encode()).hexdigest()[:6]}"
        if names.count(name) > 1
        else name
        for name, here in zip(names, values, strict=True)
    ]


def label_of(values: Mapping[str, Any], but: Sequence[str] = ()) -> str:
    """What a setting is called in tables and pictures: ``beta 0.1, learning_rate 1e-5``."""
    shown = {key: value for key, value in values.items() if key not in but}
    return ", ".join(f"{short_key(key)} {_written(value)}".strip() for key, value in shown.items())


def short_key(key: str) -> str:
    """The last part of a key, of a weight with what it weighs; a method needs no name for what it is."""
    section, _, leaf = key.rpartition(".")
    return "" if key == METHOD else f"{section.rpartition('.')[2]} {leaf}".strip() if leaf == "weight" else leaf
