"""Which public shape a record has."""

from __future__ import annotations

from difflib import get_close_matches
from types import ModuleType
from typing import Any

from palate.data.formats import (
    alpaca,
    fields,
    hh_rlhf,
    history,
    numbered,
    openai,
    palate,
    question,
    rlhf_v,
    sharegpt,
    trl,
    ultrafeedback,
)
from palate.data.kinds import KINDS, SHAPES, Comparison, Record, at
from palate.data.segments import comparison_to_correction
from palate.errors import ConfigError, DataError

# In the order in which they are tried: the more particular shape first.
FORMATS: dict[str, ModuleType] = {
    "hh_rlhf": hh_rlhf,
    "rlhf_v": rlhf_v,
    "history": history,
    "numbered": numbered,
    "ultrafeedback": ultrafeedback,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "openai": openai,
    "trl": trl,
    "question": question,
    "palate": palate,
}


def detect_format(record: dict[str, Any]) -> str | None:
    """The name of the shape that a record has, or None.

    >>> detect_format({"instruction": "Say hello.", "output": "Hello."})
    'alpaca'
    """
    return next((name for name, shape in FORMATS.items() if shape.detect(record)), None)


def find_format(name: str) -> ModuleType:
    """The shape of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f'unknown format "{name}".{hint} Formats: auto, {", ".join(sorted(FORMATS))}.')
    return FORMATS[name]


def check_kind(kind: str) -> None:
    """Raises:
    ConfigError: no such kind of records.
    """
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f'unknown kind of records "{kind}".{hint} Kinds: {", ".join(KINDS)}.')


def convert_record(record: dict[str, Any], kind: str, source: str, *, format: str = "auto") -> list[Record]:
    """The records of a kind that are in one JSON object, usually one.

    Args:
        format: a name of ``FORMATS``, or "auto"; an object of no known shape is read as palate's own.
    Raises:
        DataError: a field is missing or of the wrong type, with the place, what was found and how to convert.
    """
    name = (detect_format(record) or "palate") if format == "auto" else format
    try:
        found = _converted(find_format(name), record, kind, source)
    except fields.MissingField as error:
        raise DataError(f"{error} {_help(record, kind, name)}") from None
    return found


def _converted(shape: ModuleType, record: dict[str, Any], kind: str, source: str) -> list[Record]:
    """What the shape reads; corrections from its comparisons, where it has no spans of its own."""
    if kind != "corrections" or shape is palate:
        records: list[Record] = shape.convert(record, kind, source)
        return records
    found = shape.convert(record, "comparisons", source)
    if not all(isinstance(each, Comparison) for each in found):
        raise DataError(
            at(source, f"a ranking says which response is better, not what was corrected. Expected: {SHAPES[kind]}.")
        )
    return [comparison_to_correction(each) for each in found]


def _help(record: dict[str, Any], kind: str, tried: str) -> str:
    shape = detect_format(record)
    if shape == "palate" != tried and _readable(record, kind, shape):
        return f"It has palate's own shape, and the records before it that of {tried}: one file, one shape."
    if shape is not None and shape != tried and _readable(record, kind, shape):
        return f"Convert with: palate convert --from {shape}"
    return f"Expected, for {kind}: {SHAPES[kind]}. Other shapes: palate convert --help"


def _readable(record: dict[str, Any], kind: str, shape: str) -> bool:
    try:
        _converted(FORMATS[shape], record, kind, "")
    except DataError:
        return False
    return True
