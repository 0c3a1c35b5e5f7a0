"""Alpaca's shape (Stanford, 2023), with the fields that other tools put beside it.

    {"instruction", "input"?: text, "output", "system"?: text, "history"?: [[user, assistant], ...]}    demonstrations
    {"instruction", "input"?, "chosen", "rejected"}, or "output": [better, worse]                       comparisons
    {"instruction", "input"?, "output": [best, ..., worst]}                                             rankings
    {"instruction", "input"?, "output", "kto_tag": bool}                                                judgements

The prompt is the instruction, followed by an empty line and the input when there is one. Alpaca's own frame
("Below is an instruction ...") is left to the chat template.
"""

from __future__ import annotations

from typing import Any

from palate.data.formats import fields, history
from palate.data.kinds import Comparison, Demonstration, Judgement, Prompt, PromptText, Ranking, Record


def detect(record: dict[str, Any]) -> bool:
    return "instruction" in record and "completions" not in record and "prompt" not in record


def convert(record: dict[str, Any], kind: str, source: str) -> list[Record]:
    prompt = _prompt(record, kind, source)
    if kind == "prompts":
        return [Prompt(prompt, fields.others(record, "instruction", "input", "system", "history"), source)]
    if kind == "comparisons" and "chosen" in record:
        chosen, rejected = (fields.required(record, name, source) for name in ("chosen", "rejected"))
        return [Comparison(prompt, chosen, rejected, source=source)]
    output = fields.required(record, "output", source)
    if kind in ("comparisons", "rankings"):
        return [_ordered(prompt, output, kind, source)]
    if kind == "judgements":
        return [Judgement(prompt, output, fields.required(record, "kto_tag", source), source=source)]
    if isinstance(record.get("kto_tag"), bool):
        raise fields.judged("kto_tag", source)
    return [Demonstration(prompt, output, source=source)]


def _prompt(record: dict[str, Any], kind: str, source: str) -> PromptText:
    instruction = fields.text(record, "instruction", source)
    further = fields.text(record, "input", source) if record.get("input") is not None else ""
    if further.strip():
        instruction = f"{instruction}\n\n{further}"
    turns = (*history.turns(record.get("history"), source), {"role": "user", "content": instruction})
    turns = fields.with_system(record, turns, source)
    return instruction if len(turns) == 1 else turns


def _ordered(prompt: PromptText, output: Any, kind: str, source: str) -> Record:
    if not isinstance(output, list):
        raise fields.cannot('Alpaca with one "output"', "demonstrations", kind, source)
    if kind == "comparisons" and len(output) == 2:
        return Comparison(prompt, output[0], output[1], source=source)
    return Ranking(prompt, tuple(output), tuple(range(1, len(output) + 1)), source=source)
