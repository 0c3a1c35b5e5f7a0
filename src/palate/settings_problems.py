"""What is wrong with settings, in words: the key, where it was written, what was found, what was expected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from palate.settings_tree import Layer, closest, flatten

# How a kind of value is written, by its name in a field's annotation.
_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "Path": "a path",
    "dict": "a mapping",
    "list": "a list",
    "tuple": "a list",
    "None": "null",
}
# pydantic's name of what it missed (the first word of its error's type) -> the same.
_MISSED = {name.lower(): words for name, words in _KINDS.items()} | {
    "string": "a text",
    "dataclass": "true, false or settings below it",
}


def unknown_keys(layer: Layer, known: Mapping[str, bool]) -> list[str]:
    """Keys that nobody understands, with the nearest that somebody does.

    Args:
        known: dotted key -> whether keys of one's own may follow below it.
    """
    sections = {key.partition(".")[0] for key in known if "." in key}
    problems = []
    for key, value in flatten(layer.values).items():
        parts = key.split(".")
        if key in known or any(known.get(".".join(parts[:n])) for n in range(1, len(parts))):
            continue
        place = _at(layer, key)
        if key in sections:
            if value not in (None, {}):
                problems.append(f"{place}{key}: found {value!r}, expected a section with keys below it.")
            continue
        near = closest(key, known)
        hint = f' Did you mean "{near}"?' if near else ""
        section = parts[0] if parts[0] in sections else None
        siblings = [k.partition(".")[2] for k in known if section and k.startswith(f"{section}.")]
        listing = f' Known in "{section}": {", ".join(siblings)}.' if section and not near else ""
        if not section and not near:
            listing = f" Known: {', '.join(dict.fromkeys(k.partition('.')[0] for k in known))}."
        problems.append(f'{place}unknown setting "{key}".{hint}{listing}')
    return problems


def truths_as_numbers(layer: Layer, annotations: Mapping[str, Any]) -> list[str]:
    """True or false where a number belongs: Python, and so pydantic, would count it as 1 or 0."""
    return [
        f"{_at(layer, key)}{key}: found {_shown(value)}, expected {_expected(annotations[key])}."
        for key, value in flatten(layer.values).items()
        if isinstance(value, bool)
        and (kinds := _kinds(annotations.get(key, ""))) & {"int", "float"}
        and "bool" not in kinds
    ]


def wrong_values(error: ValidationError, prefix: str, layer: Layer, annotations: Mapping[str, Any]) -> list[str]:
    """pydantic's findings in the house's words, one line each; of a union's branches only the first."""
    lines: dict[str, str] = {}
    for found in error.errors():
        parts = [str(part) for part in found["loc"]]
        key = prefix + ".".join(p for p in parts if p.isidentifier() and p not in ("str", "dict", "list"))
        key = key.rstrip(".")
        inner = found.get("ctx", {}).get("error")
        if inner is not None:  # raised by the settings themselves, in the house's words
            section = key.partition(".")[0]
            text = str(inner) if str(inner).startswith(section) else f"{key}: {inner}"
            named = (f"{section}.{word}" for word in re.findall(r"\w+", text))
            lines.setdefault(key + text, _at(layer, next((k for k in named if k in layer.places), key)) + text)
        elif found["type"] == "missing":
            lines.setdefault(key, _missing(key))
        else:
            whole = not any(isinstance(part, int) for part in found["loc"])  # and not an entry of a list
            wanted = _wanted(found, annotations.get(key) if whole else None)
            lines.setdefault(key, f"{_at(layer, key)}{key}: found {_shown(found['input'])}, expected {wanted}.")
    return list(lines.values())


def _wanted(found: Any, annotation: Any) -> str:
    """What one of pydantic's findings would have liked; by the field's annotation where it is a matter of kinds."""
    context = found.get("ctx", {})
    if found["type"] == "literal_error":
        return str(context["expected"])
    if "ge" in context:
        return f"a number of at least {context['ge']}"
    missed = found["type"].partition("_")[0]
    if missed in _MISSED:
        return (_expected(annotation) if missed != "dataclass" else "") or _MISSED[missed]
    return f"something else: {found['msg'][0].lower()}{found['msg'][1:]}"


def _expected(annotation: Any) -> str:
    """ "a whole number or null", of a field that is ``int | None``; "" of one that says nothing."""
    *others, last = [words for name, words in _KINDS.items() if name in _kinds(annotation)] or [""]
    return f"{', '.join(others)} or {last}" if others else last


def _kinds(annotation: Any) -> set[str]:
    """Names in an annotation, text or type, without what stands in brackets."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation or "")
    while (shorter := re.sub(r"\[[^\[\]]*\]", "", text)) != text:
        text = shorter
    return set(re.findall(r"\w+", text))


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    )


def _missing(key: str) -> str:
    return (
        f'no {key} given. Give --{key}, or "{key}:" in the settings file.'
        if "." not in key
        else f"{key}: must be given."
    )


def _at(layer: Layer, key: str) -> str:
    place = layer.place_of(key)
    return f"{place}: " if place else ""
