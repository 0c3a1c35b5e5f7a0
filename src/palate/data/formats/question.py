"""Questions with answers, as problem sets write them (GSM8K).

    {"question", "solution"? or "answer"? or "response"?: text, ...}

A prompt keeps all other fields for reward functions; a demonstration's response is the solution when there is one,
else the answer.
"""

from __future__ import annotations

from typing import Any

from palate.data.formats import fields
from palate.data.kinds import Demonstration, Prompt, Record

_ANSWERS = ("response", "solution", "answer")


def detect(record: dict[str, Any]) -> bool:
    return isinstance(record.get("question"), str) and "prompt" not in record


def convert(record: dict[str, Any], kind: str, source: str) -> list[Record]:
    prompt = fields.text(record, "question", source)
    if kind == "prompts":
        return [Prompt(prompt, fields.others(record, "question"), source)]
    if kind != "demonstrations":
        raise fields.cannot("question", "prompts and demonstrations", kind, source)
    name = next((name for name in _ANSWERS if isinstance(record.get(name), str)), "answer")
    return [Demonstration(prompt, fields.text(record, name, source), source=source)]
