"""Prompts with earlier turns beside them, and responses ranked by their order (OpenAssistant exports among them).

    {"history": [[user, assistant], ...], "prompt": text, "response": text}                    demonstrations
    {"history"?, "prompt", "ranked_responses": [best, ..., worst]}                             rankings, comparisons
    {"history", "prompt", "chosen", "rejected"}                                                comparisons

Earlier turns may also be a list of messages. Without history a prompt stays plain text.
"""

from __future__ import annotations

from typing import Any

from palate.data.formats import fields, palate
from palate.data.kinds import Message, PromptText, Ranking, Record, at, describe
from palate.errors import DataError


def detect(record: dict[str, Any]) -> bool:
    return isinstance(record.get("prompt"), str) and ("history" in record or "ranked_responses" in record)


def convert(record: dict[str, Any], kind: str, source: str) -> list[Record]:
    instruction = fields.text(record, "prompt", source)
    before = turns(record.get("history"), source)
    prompt: PromptText = (*before, {"role": "user", "content": instruction}) if before else instruction
    if kind in ("comparisons", "rankings") and "ranked_responses" in record:
        responses = record["ranked_responses"]
        if not isinstance(responses, list):
            raise DataError(at(source, f'"ranked_responses" is {describe(responses)}. Expected a list, best first.'))
        ranks = tuple(range(1, len(responses) + 1))
        return [Ranking(prompt, tuple(responses), ranks, source=source, **fields.options(record, "annotator"))]
    rest = fields.others(record, "history", "prompt")
    return palate.convert({"prompt": prompt, **rest}, kind, source)


def turns(value: Any, source: str) -> tuple[Message, ...]:
    """Pairs of what the user and the assistant said, as messages."""
    if not value:
        return ()
    if not isinstance(value, list | tuple):
        raise DataError(at(source, f'"history" is {describe(value)}. Expected a list of [user, assistant] pairs.'))
    if isinstance(value[0], dict):
        return fields.messages(value, "history", source)
    said: list[Message] = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise DataError(at(source, f'"history"[{i}] is {describe(pair)}. Expected [user, assistant].'))
        said += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return tuple(said)
