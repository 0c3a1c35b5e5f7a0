"""RLHF-V -- Yu et al. 2023, arXiv:2312.00849: answers about pictures, and what people corrected in them; text only.

    {"text": {"question", "chosen", "rejected"} or the same as JSON text, "image"?, "image_path"?, "origin_split"?, ...}
    {"question", "chosen", "rejected", "image"?, ...}                                    RLAIF-V, arXiv:2405.17220

``chosen`` is the corrected answer. The published files do not mark what was changed: a diff finds it. **The picture is
not read**: a prompt is the question alone. As prompts, records keep their other fields ("image_path", "idx"), without
the picture's bytes.
"""

from __future__ import annotations

import json
from typing import Any

from palate.data.formats import fields
from palate.data.kinds import Comparison, Demonstration, Prompt, Record, at, describe
from palate.errors import DataError

_KEYS = ("question", "chosen", "rejected")


def detect(record: dict[str, Any]) -> bool:
    inner = _answers(record)
    return inner is not None and all(isinstance(inner.get(key), str) for key in _KEYS) and "prompt" not in record


def convert(record: dict[str, Any], kind: str, source: str) -> list[Record]:
    inner = _answers(record)
    if inner is None:
        expected = 'Expected an object with "question", "chosen" and "rejected", or its JSON'
        raise DataError(at(source, f'"text" is {describe(record["text"])}. {expected}.'))
    prompt, chosen, rejected = (fields.text(inner, key, source) for key in _KEYS)
    if kind == "prompts":
        return [Prompt(prompt, fields.others(record, *_KEYS, "text", "image"), source)]
    if kind == "demonstrations":
        return [Demonstration(prompt, chosen, source=source)]
    if kind != "comparisons":
        raise fields.cannot("RLHF-V", "corrections", kind, source)
    return [Comparison(prompt, chosen, rejected, source=source)]


def _answers(record: dict[str, Any]) -> dict[str, Any] | None:
    """Where question and answers stand: in the record, in its "text", or in the JSON of that."""
    if "text" not in record:
        return record
    value = record["text"]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) else None
