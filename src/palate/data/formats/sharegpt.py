"""ShareGPT's shape, with the preference and judgement fields that other tools put beside it.

    {"conversations": [{"from": "human" | "gpt" | "system" | ..., "value": text}, ...], "system"?: text}
    {"conversations", "chosen": {"from", "value"}, "rejected": {...}}             comparisons
    {"conversations", "kto_tag": bool}                                            judgements

Roles are translated: human to user, gpt to assistant, observation to tool.
"""

from __future__ import annotations

from typing import Any

from palate.data.formats import fields
from palate.data.kinds import Comparison, Demonstration, Judgement, Prompt, Record


def detect(record: dict[str, Any]) -> bool:
    return isinstance(record.get("conversations"), list)


def convert(record: dict[str, Any], kind: str, source: str) -> list[Record]:
    turns = fields.messages(fields.required(record, "conversations", source), "conversations", source)
    turns = fields.with_system(record, turns, source)
    if kind == "prompts":
        rest = fields.others(record, "conversations", "system", "chosen", "rejected", "kto_tag")
        return [Prompt(fields.until_user(turns, "conversations", source), rest, source)]
    if kind == "comparisons":
        chosen, rejected = (fields.required(record, name, source) for name in ("chosen", "rejected"))
        good, bad = fields.said([chosen], "chosen", source), fields.said([rejected], "rejected", source)
        return [Comparison(turns, good, bad, source=source)]
    if kind == "rankings":
        raise fields.cannot("ShareGPT", "demonstrations, comparisons or judgements", kind, source)
    prompt, response = fields.last_response(turns, "conversations", source)
    if kind == "judgements":
        return [Judgement(prompt, response, fields.required(record, "kto_tag", source), source=source)]
    return [Demonstration(prompt, response, every_turn=True, source=source)]
