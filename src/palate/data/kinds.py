"""The six kinds of records, each checked when it is made; ``records`` reads and writes them.

A prompt is a plain string, or a conversation: a tuple of messages, each a dict with "role" and "content" (a string).
Every record carries ``source``, "file:line", so that whatever is found wrong with it later can name the place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from palate.errors import DataError

Message = dict[str, Any]
Conversation = tuple[Message, ...]
PromptText = str | Conversation
Spans = tuple[tuple[int, int], ...]

KINDS = ("prompts", "demonstrations", "comparisons", "corrections", "rankings", "judgements")
ROLES = ("system", "user", "assistant", "tool")

# How a record of each kind looks in palate's own JSONL; shown in errors.
SHAPES = {
    "prompts": '{"prompt": ...}',
    "demonstrations": '{"prompt": ..., "response": "..."}',
    "comparisons": '{"prompt": ..., "chosen": "...", "rejected": "..."}',
    "corrections": '{"prompt": ..., "chosen": "...", "rejected": "...", "chosen_spans"?: [[0, 3]], "rejected_spans"?: [[0, 3]]}',
    "rankings": '{"prompt": ..., "responses": ["...", "..."], "ranks": [1, 2]}',
    "judgements": '{"prompt": ..., "response": "...", "desirable": true}',
}


class Unusable(DataError):
    """A record with a known flaw of a public data set: skipped with a count when read, where other faults stop."""


@dataclass(frozen=True)
class Prompt:
    """Something to respond to.

    Attributes:
        prompt: text or conversation.
        fields: the record's other fields, for reward functions (e.g. "answer").
        source: "file:line".
    Raises:
        DataError: the prompt is neither text nor a conversation, or a message has no known role or no text.
    """

    prompt: PromptText
    fields: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _checked_prompt(self.prompt, self.source))
        if not isinstance(self.fields, Mapping):
            raise DataError(at(self.source, f"fields are {_a(self.fields)}; expected a mapping from name to value."))


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a response to imitate.

    Attributes:
        prompt: text or conversation.
        response: the response's text; an empty one is dropped, with a count, when records are encoded.
        every_turn: the assistant's earlier turns in ``prompt`` are to be imitated too.
        source: "file:line".
    """

    prompt: PromptText
    response: str
    every_turn: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _checked_prompt(self.prompt, self.source))
        _check_text(self.response, '"response"', self.source)
        _check_bool(self.every_turn, '"every_turn"', self.source)


@dataclass(frozen=True)
class Comparison:
    """Of two responses to a prompt, ``chosen`` is the better.

    Attributes:
        prompt: text or conversation.
        chosen, rejected: the responses' texts.
        margin: by how much, in reward units, or None; finite.
        probability: how surely ``chosen`` is preferred, in [0, 1], or None (= 1).
        annotator: who said so, or None.
        source: "file:line".
    """

    prompt: PromptText
    chosen: str
    rejected: str
    margin: float | None = None
    probability: float | None = None
    annotator: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _checked_prompt(self.prompt, self.source))
        _check_text(self.chosen, '"chosen"', self.source)
        _check_text(self.rejected, '"rejected"', self.source)
        _check_number(self.margin, '"margin"', self.source)
        _check_number(self.probability, '"probability"', self.source, low=0.0, high=1.0)
        _check_annotator(self.annotator, self.source)


@dataclass(frozen=True)
class SegmentedComparison:
    """A response and its correction: a comparison that says where the two differ.

    Attributes:
        prompt: text or conversation.
        chosen: the corrected text.
        rejected: the text before.
        chosen_spans, rejected_spans: what was changed, (start, end) in characters of that text, 0 <= start <= end <=
            length; start == end is a seam, where something was taken out. None = found by a diff of the two texts
            (``segments.found_spans``). Kept in order, overlapping and touching ones as one.
        annotator: who said so, or None.
        source: "file:line".
    """

    prompt: PromptText
    chosen: str
    rejected: str
    chosen_spans: Spans | None = None
    rejected_spans: Spans | None = None
    annotator: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _checked_prompt(self.prompt, self.source))
        for name in ("chosen", "rejected"):
            text, spans = getattr(self, name), getattr(self, f"{name}_spans")
            _check_text(text, f'"{name}"', self.source)
            object.__setattr__(self, f"{name}_spans", _checked_spans(spans, f'"{name}_spans"', len(text), self.source))
        _check_annotator(self.annotator, self.source)


@dataclass(frozen=True)
class Ranking:
    """Several responses to a prompt, in order of preference.

    Attributes:
        prompt: text or conversation.
        responses: K >= 2 texts.
        ranks: K whole numbers >= 1, 1 = best, equal = tie.
        annotator: who said so, or None.
        source: "file:line".
    """

    prompt: PromptText
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    annotator: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _checked_prompt(self.prompt, self.source))
        object.__setattr__(self, "responses", _checked_list(self.responses, '"responses"', self.source))
        object.__setattr__(self, "ranks", _checked_list(self.ranks, '"ranks"', self.source))
        for i, response in enumerate(self.responses):
            _check_text(response, f'"responses"[{i}]', self.source)
        if len(self.ranks) != len(self.responses):
            found = f'"ranks" has {len(self.ranks)} entries for {len(self.responses)} "responses"'
            raise DataError(at(self.source, f"{found}; expected one rank for each response, 1 = best, equal = tie."))
        if len(self.responses) < 2:
            raise DataError(at(self.source, f"{len(self.responses)} responses to rank; expected at least two."))
        for i, rank in enumerate(self.ranks):
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < 2**31:
                raise DataError(at(self.source, f'"ranks"[{i}] is {rank!r}; expected a whole number >= 1 (1 = best).'))
        _check_annotator(self.annotator, self.source)


@dataclass(frozen=True)
class Judgement:
    """A response that is good or bad on its own.

    Attributes:
        prompt: text or conversation.
        response: the response's text.
        desirable: True = good.
        annotator: who said so, or None.
        source: "file:line".
    """

    prompt: PromptText
    response: str
    desirable: bool
    annotator: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _checked_prompt(self.prompt, self.source))
        _check_text(self.response, '"response"', self.source)
        _check_bool(self.desirable, '"desirable"', self.source)
        _check_annotator(self.annotator, self.source)


Record = Prompt | Demonstration | Comparison | SegmentedComparison | Ranking | Judgement


def at(source: str, message: str) -> str:
    """``message`` with its place before it, when there is one."""
    return f"{source}: {message}" if source else message


def prompt_key(prompt: PromptText) -> str:
    """A text that is equal for equal prompts; a conversation of one user message equals its plain text."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user" and len(prompt[0]) == 2:
        return prompt[0]["content"]
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)


def describe(value: Any) -> str:
    """A value as an error shows it: its type and the beginning of its text."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = "too large to be shown"
    return f"{_a(value)}: {shorten(text)}" if value is not None else "null"


def shorten(text: str, width: int = 80) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _checked_prompt(prompt: Any, source: str) -> PromptText:
    if isinstance(prompt, str):
        _check_text(prompt, '"prompt"', source)
        return prompt
    if not isinstance(prompt, list | tuple):
        raise DataError(at(source, f'"prompt" is {describe(prompt)}. Expected a string or a list of messages.'))
    if not prompt:
        raise DataError(at(source, '"prompt" is a conversation without messages.'))
    for i, message in enumerate(prompt):
        _check_message(message, f'"prompt"[{i}]', source)
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            at(source, 'the conversation in "prompt" ends with an assistant turn; expected a user turn to respond to.')
        )
    return tuple(prompt)


def _check_message(message: Any, name: str, source: str) -> None:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise DataError(at(source, f'{name} is {describe(message)}. Expected {{"role": "user", "content": "..."}}.'))
    if message["role"] not in ROLES:
        raise DataError(
            at(source, f"{name} has the unknown role {message['role']!r}. Known roles: {', '.join(ROLES)}.")
        )
    _check_text(message["content"], f'{name}["content"]', source)


def _checked_list(value: Any, name: str, source: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise DataError(at(source, f"{name} is {describe(value)}. Expected a list."))
    return tuple(value)


def _checked_spans(value: Any, name: str, length: int, source: str) -> Spans | None:
    """In order; those that overlap or touch are one, for both say that the same characters were changed."""
    if value is None:
        return None
    checked = [
        _checked_span(span, f"{name}[{i}]", length, source) for i, span in enumerate(_checked_list(value, name, source))
    ]
    found: list[tuple[int, int]] = []
    for start, end in sorted(checked, key=lambda span: (span[0], -span[1])):
        # A seam at the end of a span stays: it is about what follows the span.
        if found and (start < found[-1][1] or start == found[-1][0] or start == found[-1][1] < end):
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return tuple(found)


def _checked_span(span: Any, name: str, length: int, source: str) -> tuple[int, int]:
    whole = isinstance(span, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in span)
    if not whole or len(span) != 2:
        raise DataError(at(source, f"{name} is {describe(span)}. Expected [start, end], two whole numbers."))
    if not 0 <= span[0] <= span[1] <= length:
        text = name.split("_")[0].strip('"')
        found = f'{name} is {list(span)}, and "{text}" has {length:,} characters'
        raise DataError(at(source, f"{found}. Expected 0 <= start <= end <= {length}; end is the first one unchanged."))
    return span[0], span[1]


def _check_text(value: Any, name: str, source: str) -> None:
    if not isinstance(value, str):
        raise DataError(at(source, f"{name} is {describe(value)}. Expected a string."))
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"{name} holds half a character (\\u{ord(value[error.start]):04x} at {error.start})"
            raise DataError(at(source, f"{found}; such text cannot be tokenised. Repair or remove it.")) from None


def _check_number(value: Any, name: str, source: str, low: float = -math.inf, high: float = math.inf) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(at(source, f"{name} is {describe(value)}. Expected a number."))
    if not is_finite(value) or not low <= value <= high:
        wanted = "a finite number" if high == math.inf else f"a number from {low:g} to {high:g}"
        raise DataError(at(source, f"{name} is {shorten(repr(value))}. Expected {wanted}."))


def is_finite(value: float) -> bool:
    """Neither NaN nor beyond what a float32 of a batch can hold."""
    return abs(value) <= 3.4028234663852886e38  # false for NaN; a whole number of any size is compared exactly


def _check_bool(value: Any, name: str, source: str) -> None:
    if not isinstance(value, bool):
        raise DataError(at(source, f"{name} is {describe(value)}. Expected true or false."))


def _check_annotator(value: Any, source: str) -> None:
    if value is not None and not isinstance(value, str):
        raise DataError(at(source, f'"annotator" is {describe(value)}. Expected a string.'))


def _a(value: Any) -> str:
    names = {str: "a string", list: "a list", tuple: "a list", dict: "an object", bool: "a boolean", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number" if isinstance(value, float) else "a value")
