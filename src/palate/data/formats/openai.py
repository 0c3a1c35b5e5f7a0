"""OpenAI's shapes for chat fine-tuning, TRL's {"messages"} among them.

    {"messages": [{"role", "content"}, ...]}                                      demonstrations, of every turn
    {"input": {"messages": [...]}, "preferred_output": [message], "non_preferred_output": [message]}   comparisons

Turns after the assistant's last one are left out. Tool calls are kept for the template.
"""

from __future__ import annotations

from typing import Any

from palate.data.formats import fields
from palate.data.kinds import Comparison, Demonstration, Prompt, Record


def detect(record: dict[str, Any]) -> bool:
    return isinstance(record.get("messages"), list) or ("preferred_output" in record and "input" in record)


def convert(record: dict[str, Any], kind: str, source: str) -> list[Record]:
    if "preferred_output" in record:
        return [_preference(record, kind, source)]
    if kind not in ("prompts", "demonstrations"):
        raise fields.cannot('"messages"', "demonstrations", kind, source)
    turns = fields.messages(fields.required(record, "messages", source), "messages", source)
    turns = fields.with_system(record, turns, source)
    if kind == "prompts":
        prompt = fields.until_user(turns, "messages", source)
        return [Prompt(prompt, fields.others(record, "messages", "system"), source)]
    prompt, response = fields.last_response(turns, "messages", source)
    return [Demonstration(prompt, response, every_turn=True, source=source)]


def _preference(record: dict[str, Any], kind: str, source: str) -> Record:
    held = fields.required(record, "input", source)
    held = held.get("messages") if isinstance(held, dict) else held
    prompt = fields.messages(held, "input.messages", source)
    if kind == "prompts":
        return Prompt(prompt, fields.others(record, "input", "preferred_output", "non_preferred_output"), source)
    if kind == "demonstrations":
        return Demonstration(prompt, fields.said(record["preferred_output"], "preferred_output", source), source=source)
    if kind != "comparisons":
        raise fields.cannot('"preferred_output"', "comparisons", kind, source)
    names = ("preferred_output", "non_preferred_output")
    good, bad = (fields.said(fields.required(record, name, source), name, source) for name in names)
    return Comparison(prompt, good, bad, source=source)
