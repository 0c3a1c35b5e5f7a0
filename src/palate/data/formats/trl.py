"""TRL's shapes: prompt + completion (+ label), and preferences with explicit or implicit prompts, as text or messages.

    {"prompt", "completion"}                          demonstrations
    {"prompt", "completion", "label": bool}           judgements
    {"prompt"?, "chosen", "rejected"}                 comparisons; without "prompt", the messages both have in common
    {"text"}                                          demonstrations of plain text, with an empty prompt

https://huggingface.co/docs/trl/dataset_formats. Chosen and rejected *texts* without a prompt are refused: where two
texts begin alike says nothing about where the prompt ends. ``{"messages": ...}`` is read by ``openai``.
"""

from __future__ import annotations

from typing import Any

from palate.data.formats import fields
from palate.data.kinds import (
    Comparison,
    Conversation,
    Demonstration,
    Judgement,
    Message,
    Prompt,
    PromptText,
    Record,
    at,
)
from palate.errors import DataError


def detect(record: dict[str, Any]) -> bool:
    if "completion" in record or isinstance(record.get("chosen"), list) or isinstance(record.get("rejected"), list):
        return True
    return isinstance(record.get("text"), str) and not {"prompt", "question"} & record.keys()


def convert(record: dict[str, Any], kind: str, source: str) -> list[Record]:
    if kind == "prompts":
        return [_prompt(record, source)]
    if kind == "demonstrations":
        if "completion" not in record and isinstance(record.get("text"), str):
            return [Demonstration("", record["text"], source=source)]
        if isinstance(record.get("label"), bool):
            raise fields.judged("label", source)
        prompt, response = _completion(record, kind, source)
        return [Demonstration(prompt, response, source=source)]
    if kind == "judgements":
        prompt, response = _completion(record, kind, source)
        return [Judgement(prompt, response, fields.required(record, "label", source), source=source)]
    if kind == "comparisons":
        prompt, chosen, rejected = _preference(record, source)
        further = fields.options(record, "margin", "probability", "annotator")
        return [Comparison(prompt, chosen, rejected, source=source, **further)]
    raise fields.cannot("TRL", "demonstrations, judgements or comparisons", kind, source)


def _prompt(record: dict[str, Any], source: str) -> Prompt:
    rest = fields.others(record, "prompt", "chosen", "rejected", "completion")
    if record.get("prompt") is not None or "chosen" not in record:
        return Prompt(fields.prompt(fields.required(record, "prompt", source), source), rest, source)
    return Prompt(_preference(record, source)[0], rest, source)


def _completion(record: dict[str, Any], kind: str, source: str) -> tuple[PromptText, str]:
    prompt = fields.prompt(fields.required(record, "prompt", source), source)
    completion = fields.required(record, "completion", source)
    if isinstance(completion, str):
        return prompt, completion
    turns = fields.messages(completion, "completion", source)
    if len(turns) == 1:
        return prompt, fields.said(completion, "completion", source)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(at(source, '"completion" has no turn of the assistant: there is no response.'))
    return fields.last_response((*_as_turns(prompt), *turns), "completion", source)


def _preference(record: dict[str, Any], source: str) -> tuple[PromptText, str, str]:
    chosen, rejected = (fields.required(record, name, source) for name in ("chosen", "rejected"))
    given = record.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if given is None:
            raise fields.missing(record, "prompt", source)
        return fields.prompt(given, source), chosen, rejected
    good, bad = fields.messages(chosen, "chosen", source), fields.messages(rejected, "rejected", source)
    prompt = fields.prompt(given, source) if given is not None else ""
    if len(good) == len(bad) == 1 and given is not None:
        return prompt, fields.said(chosen, "chosen", source), fields.said(rejected, "rejected", source)
    return _implicit(good, bad, prompt, source)


def _implicit(good: Conversation, bad: Conversation, prompt: PromptText, source: str) -> tuple[PromptText, str, str]:
    """Prompt and responses of two conversations that differ in their last turn only."""
    if len(good) != len(bad) or good[:-1] != bad[:-1] or good[-1]["role"] != "assistant" or len(good) < 2:
        raise DataError(
            at(
                source,
                f'"chosen" ({len(good)} messages) and "rejected" ({len(bad)} messages) differ before their last turn. '
                "Expected the same conversation with another last assistant turn.",
            )
        )
    before = good[:-1]
    turns = _as_turns(prompt) if prompt else ()
    # A prompt that stands both in "prompt" and at the head of both conversations (UltraFeedback, binarized) counts once.
    if before[: len(turns)] != turns and not _ends_alike(before, turns):
        before = (*turns, *before)
    return before, good[-1]["content"], bad[-1]["content"]


def _ends_alike(before: Conversation, turns: Conversation) -> bool:
    return bool(turns) and before[-len(turns) :] == turns


def _as_turns(prompt: PromptText) -> tuple[Message, ...]:
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
