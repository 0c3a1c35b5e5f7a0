"""Palate's own shape, which every other is converted to; one field, one meaning.

    {"prompt": text or messages, "response": text, "every_turn"?: bool}
    {"prompt", "chosen": text, "rejected": text, "margin"?: number, "probability"?: number, "annotator"?: text}
    {"prompt", "chosen", "rejected", "chosen_spans"?: [[start, end], ...], "rejected_spans"?: [...], "annotator"?: text}
    {"prompt", "responses": [text, ...], "ranks": [1 = best, ...], "annotator"?: text}
    {"prompt", "response", "desirable": bool, "annotator"?: text}
    {"prompt", anything else}

A question mark means: may be missing. "margin" is in reward units, "probability" that of ``chosen`` being better.
Spans are characters [start, end) of what was changed; a side without them is found by a diff.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from palate.data.formats import fields
from palate.data.kinds import Comparison, Demonstration, Judgement, Prompt, Ranking, Record, SegmentedComparison
from palate.data.segments import comparison_to_correction


def detect(record: dict[str, Any]) -> bool:
    return "prompt" in record


def convert(record: dict[str, Any], kind: str, source: str) -> list[Record]:
    prompt = fields.prompt(fields.required(record, "prompt", source), source)
    if kind == "prompts":
        return [Prompt(prompt, fields.others(record, "prompt"), source)]
    if kind == "demonstrations":
        if record.get("desirable") is not None:
            raise fields.judged("desirable", source)
        response = fields.required(record, "response", source)
        return [Demonstration(prompt, response, source=source, **fields.options(record, "every_turn"))]
    if kind == "rankings" or (kind == "comparisons" and "responses" in record):
        responses = fields.required(record, "responses", source)
        ranks = fields.required(record, "ranks", source)
        return [Ranking(prompt, responses, ranks, source=source, **fields.options(record, "annotator"))]
    if kind == "comparisons":
        chosen, rejected = (fields.required(record, name, source) for name in ("chosen", "rejected"))
        further = fields.options(record, "margin", "probability", "annotator")
        return [Comparison(prompt, chosen, rejected, source=source, **further)]
    if kind == "corrections":
        return [_correction(record, prompt, source)]
    response, desirable = (fields.required(record, name, source) for name in ("response", "desirable"))
    return [Judgement(prompt, response, desirable, source=source, **fields.options(record, "annotator"))]


def _correction(record: dict[str, Any], prompt: Any, source: str) -> SegmentedComparison:
    chosen, rejected = (fields.required(record, name, source) for name in ("chosen", "rejected"))
    further = fields.options(record, "margin", "probability", "annotator")
    plain = comparison_to_correction(Comparison(prompt, chosen, rejected, source=source, **further))
    return replace(plain, **fields.options(record, "chosen_spans", "rejected_spans"))


def to_json(record: Record) -> dict[str, Any]:
    """The JSON object that ``convert`` reads back as the same record."""
    prompt = record.prompt if isinstance(record.prompt, str) else list(record.prompt)
    if isinstance(record, Prompt):
        return {"prompt": prompt, **record.fields}
    if isinstance(record, Demonstration):
        every_turn = {"every_turn": True} if record.every_turn else {}
        return {"prompt": prompt, "response": record.response, **every_turn}
    annotator = {} if record.annotator is None else {"annotator": record.annotator}
    if isinstance(record, Ranking):
        return {"prompt": prompt, "responses": list(record.responses), "ranks": list(record.ranks), **annotator}
    if isinstance(record, Judgement):
        return {"prompt": prompt, "response": record.response, "desirable": record.desirable, **annotator}
    if isinstance(record, SegmentedComparison):
        spans = {name: getattr(record, name) for name in ("chosen_spans", "rejected_spans")}
        marked = {name: [list(span) for span in value] for name, value in spans.items() if value is not None}
        return {"prompt": prompt, "chosen": record.chosen, "rejected": record.rejected, **marked, **annotator}
    numbers = {"margin": record.margin, "probability": record.probability}
    given = {name: value for name, value in numbers.items() if value is not None}
    return {"prompt": prompt, "chosen": record.chosen, "rejected": record.rejected, **given, **annotator}
