"""Anthropic's HH-RLHF transcripts -- Bai et al. 2022, arXiv:2204.05862.

    {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "\\n\\nHuman: ...\\n\\nAssistant: ..."}

The last assistant turn is the response, all before it the prompt. A few transcripts of the published files differ
before their last turn, or do not end with the assistant: such a record is no comparison of two responses to one
prompt, and is skipped with a count.
"""

from __future__ import annotations

import re
from typing import Any

from palate.data.formats import fields
from palate.data.kinds import Comparison, Conversation, Demonstration, Message, Prompt, Record, Unusable, at, shorten
from palate.errors import DataError

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def detect(record: dict[str, Any]) -> bool:
    texts = (record.get("chosen"), record.get("rejected"))
    return all(isinstance(t, str) and t.lstrip().startswith("Human:") for t in texts) and not record.get("prompt")


def convert(record: dict[str, Any], kind: str, source: str) -> list[Record]:
    if kind not in ("prompts", "demonstrations", "comparisons"):
        raise fields.cannot("HH-RLHF", "comparisons", kind, source)
    prompt, chosen = _response(fields.text(record, "chosen", source), "chosen", source)
    if kind == "prompts":
        return [Prompt(prompt, fields.others(record, "chosen", "rejected"), source)]
    if kind == "demonstrations":
        return [Demonstration(prompt, chosen, source=source)]
    other, rejected = _response(fields.text(record, "rejected", source), "rejected", source)
    if other != prompt:
        raise Unusable(at(source, "the transcripts differ before their last turn."))
    return [Comparison(prompt, chosen, rejected, source=source)]


def _response(transcript: str, name: str, source: str) -> tuple[Conversation, str]:
    turns = parse(transcript)
    if not turns:
        expected = 'Expected "\\n\\nHuman: ...\\n\\nAssistant: ..."'
        raise DataError(at(source, f'"{name}" is not a transcript: "{shorten(transcript)}". {expected}.'))
    if turns[-1]["role"] != "assistant" or len(turns) < 2 or turns[-2]["role"] != "user":
        raise Unusable(at(source, "a transcript does not end with a human turn and the assistant's answer."))
    return turns[:-1], turns[-1]["content"]


def parse(transcript: str) -> Conversation:
    """A transcript's turns, without the white space around them; () when it does not begin with one."""
    pieces = _TURN.split(transcript.strip())
    if pieces[0]:
        return ()
    said: list[Message] = []
    for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True):
        said.append({"role": _ROLES[speaker], "content": content.strip()})
    return tuple(said)
