"""What the shapes share: reading a field, a list of messages, and the errors when they are not there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palate.data.kinds import SHAPES, Conversation, Message, PromptText, at, describe
from palate.errors import DataError

# The words that data sets use for the four roles.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "developer": "system",
}


def text(record: dict[str, Any], name: str, source: str) -> str:
    """A field that must be there and be a string."""
    value = required(record, name, source)
    if not isinstance(value, str):
        raise DataError(at(source, f'"{name}" is {describe(value)}. Expected a string.'))
    return value


def required(record: dict[str, Any], name: str, source: str) -> Any:
    """A field that must be there; null is not there."""
    if record.get(name) is None:
        raise missing(record, name, source)
    return record[name]


class MissingField(DataError):
    """A field that a record of this shape must have is not there; ``detect`` adds what to do about it."""


def missing(record: dict[str, Any], name: str, source: str) -> MissingField:
    """The error that names the field and what was found."""
    keys = [key for key, value in record.items() if value is not None]
    found = ", ".join(repr(key) for key in keys[:12]) + (", ..." if len(keys) > 12 else "")
    return MissingField(at(source, f'no "{name}" field. Found: {found or "nothing"}.'))


def judged(name: str, source: str) -> DataError:
    """The error when a response that somebody judged is read as one to imitate."""
    return DataError(
        at(
            source,
            f'a response that is judged ("{name}") is no demonstration: it may be what nobody should say. To train on the good '
            f'ones, keep those and leave "{name}" out.',
        )
    )


def cannot(shape: str, holds: str, kind: str, source: str) -> DataError:
    """The error when a shape does not hold that kind of records."""
    return DataError(at(source, f"{shape} records hold {holds}, not {kind}. Expected: {SHAPES[kind]}."))


def others(record: dict[str, Any], *names: str) -> dict[str, Any]:
    """The fields that are not named, for reward functions; "prompt" is the prompt's own, and never one of them."""
    return {key: value for key, value in record.items() if key not in (*names, "prompt") and value is not None}


def options(record: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of the optional fields that are there, under their own names."""
    return {name: record[name] for name in names if record.get(name) is not None}


def objects(value: Any, name: str, source: str) -> list[dict[str, Any]]:
    """A list of objects."""
    if not isinstance(value, list | tuple) or not all(isinstance(each, dict) for each in value):
        raise DataError(at(source, f'"{name}" is {describe(value)}. Expected a list of objects.'))
    return list(value)


def messages(value: Any, name: str, source: str) -> tuple[Message, ...]:
    """A list of messages, each {"role", "content"} or {"from", "value"}; roles in the words of the field.

    Text parts of a message are joined; a message of tool calls without text has the content "". Other fields of a
    message (tool calls, a name) are kept, because templates read them.

    Raises:
        DataError: no list, no role, an unknown role, or something that is not text.
    """
    if not isinstance(value, list | tuple) or not value:
        raise DataError(at(source, f'"{name}" is {describe(value)}. Expected a list of messages.'))
    return tuple(_message(item, f'"{name}"[{i}]', source) for i, item in enumerate(value))


def _message(item: Any, name: str, source: str) -> Message:
    pairs = (("role", "content"), ("from", "value"))
    keys = next((k for k in pairs if isinstance(item, dict) and isinstance(item.get(k[0]), str)), None)
    if keys is None:
        wanted = '{"role": "user", "content": "..."}'
        raise DataError(at(source, f"{name} is {describe(item)}. Expected {wanted}."))
    role, content = item[keys[0]], item.get(keys[1])
    rest = {key: value for key, value in item.items() if key not in keys and value is not None}
    if content is None and rest.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, name, source) for part in content)
    return {"role": _ROLES.get(role, role), "content": content, **rest}


def _part(part: Any, name: str, source: str) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DataError(at(source, f"{name} has the part {describe(part)}. Only text can be read."))


def prompt(value: Any, source: str) -> PromptText:
    """A prompt as it stands in a record: text or messages."""
    if isinstance(value, list | tuple):
        return messages(value, "prompt", source)
    if not isinstance(value, str):
        raise DataError(at(source, f'"prompt" is {describe(value)}. Expected a string or a list of messages.'))
    return value


def with_system(record: dict[str, Any], turns: Conversation, source: str) -> Conversation:
    """The record's "system" text, when it has one, as the first message."""
    system = text(record, "system", source) if record.get("system") is not None else ""
    if system.strip() and turns[0]["role"] != "system":
        return ({"role": "system", "content": system}, *turns)
    return turns


def said(value: Any, name: str, source: str) -> str:
    """The text of a response that is written as a list of one message, the assistant's."""
    turns = messages(value, name, source)
    if [turn["role"] for turn in turns] != ["assistant"]:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(at(source, f'"{name}" has the turns {roles}. Expected one turn, the assistant\'s.'))
    content: str = turns[0]["content"]
    return content


def last_response(turns: Sequence[Message], name: str, source: str) -> tuple[Conversation, str]:
    """A conversation as a prompt and the assistant's last turn.

    Turns after it are left out: nothing in them is a response.
    """
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < 1:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(at(source, f'"{name}" has no assistant turn after a user turn. Found the roles: {roles}.'))
    return tuple(turns[:last]), turns[last]["content"]


def until_user(turns: Sequence[Message], name: str, source: str) -> Conversation:
    """A conversation up to the last turn that can be responded to."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] in ("user", "tool")), default=-1)
    if last < 0:
        raise DataError(at(source, f'"{name}" has no user turn to respond to.'))
    return tuple(turns[: last + 1])
