"""Two responses and which of them was preferred, as evaluation sets and arenas write it.

    {"prompt", "response_1" | "response_a", "response_2" | "response_b", "preferred" | "winner": which}

Which: 1 or 2, "a" or "b", "model_a" or "model_b", "response_1", ...; "tie" or 0 is a ranking of equals.
"""

from __future__ import annotations

from typing import Any

from palate.data.formats import fields
from palate.data.kinds import Comparison, Prompt, Ranking, Record, at, describe
from palate.errors import DataError

_PAIRS = (("response_1", "response_2"), ("response_a", "response_b"))
_ANSWERS = ("preferred", "winner", "preference")
_SIDES = {"1": 0, "a": 0, "2": 1, "b": 1}


def detect(record: dict[str, Any]) -> bool:
    return "prompt" in record and _names(record) is not None and any(name in record for name in _ANSWERS)


def convert(record: dict[str, Any], kind: str, source: str) -> list[Record]:
    prompt = fields.prompt(fields.required(record, "prompt", source), source)
    names = _names(record) or _PAIRS[0]
    if kind == "prompts":
        return [Prompt(prompt, fields.others(record, "prompt", *names, *_ANSWERS), source)]
    if kind not in ("comparisons", "rankings"):
        raise fields.cannot("numbered", "comparisons", kind, source)
    first, second = (fields.text(record, name, source) for name in names)
    side = _side(record, kind, source)
    if side is None or kind == "rankings":
        return [Ranking(prompt, (first, second), {None: (1, 1), 0: (1, 2), 1: (2, 1)}[side], source=source)]
    chosen, rejected = (first, second) if side == 0 else (second, first)
    return [Comparison(prompt, chosen, rejected, source=source)]


def _names(record: dict[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if all(name in record for name in pair)), None)


def _side(record: dict[str, Any], kind: str, source: str) -> int | None:
    name = next((name for name in _ANSWERS if record.get(name) is not None), None)
    if name is None:
        raise fields.missing(record, "preferred", source)
    answer = str(record[name]).lower()
    if answer in ("0", "tie", "both", "tie (bothbad)", "both_bad"):
        return None
    side = _SIDES.get(answer.removeprefix("model_").removeprefix("response_"))
    if side is None:
        raise DataError(at(source, f'"{name}" is {describe(record[name])}. Expected 1 or 2, "a" or "b", or "tie".'))
    return side
