"""What a chat template does with an assistant's turn: found by rendering probes, never by reading the template's text."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.data.kinds import Message, shorten
from palate.errors import ConfigError, DataError, ModelError

# Private-use characters: no template strips, escapes or matches them.
MARK = "\ue0f1\ue0f2\ue0f3"

_DEFAULT = """\
{{ BOS }}{% for message in messages -%}
{% if message.role == 'assistant' %}{{ 'Assistant:\\n' + message.content + STOP + '\\n\\n' }}\
{% elif message.role == 'system' %}{{ message.content + '\\n\\n' }}\
{% else %}{{ message.role.capitalize() + ':\\n' + message.content + '\\n\\n' }}{% endif -%}
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"""


def default_template(bos: str = "", stop: str = "") -> str:
    """The template for conversations when a tokenizer brings none.

        <bos>System text

        User:
        What is up?

        Assistant:
        Not much.<stop>

    Only ordinary characters and tokens that the tokenizer already has, so no embedding is untrained; every line of a
    role ends with a line break, so that no word merges with what the policy writes next.

    Args:
        bos: the text of the begin-of-text token, "" for tokenizers that put none.
        stop: the text of the token that ends a turn.
    """
    return _DEFAULT.replace("BOS", json.dumps(bos)).replace("STOP", json.dumps(stop))


def find_template(tokenizer: Any, template: str | None) -> str | None:
    """The Jinja text that a setting means; None = plain text without a template.

    Args:
        template: None = the tokenizer's own; "none" = none; a path to a file; Jinja text.
    Raises:
        ConfigError: neither a file nor Jinja.
    """
    if template is None:
        own = getattr(tokenizer, "chat_template", None)
        return own.get("default") if isinstance(own, dict) else own
    if template == "none":
        return None
    if "{{" in template or "{%" in template:
        return template
    if os.path.isfile(os.path.expanduser(template)):
        return Path(template).expanduser().read_text(encoding="utf-8")
    raise ConfigError(
        f'the chat template "{shorten(template)}" is neither a file nor Jinja text. '
        'Expected a path, Jinja with {{ ... }}, "default", "none", or nothing for the tokenizer\'s own.'
    )


def render(tokenizer: Any, template: str, messages: Sequence[Message], *, respond: bool) -> str:
    """A conversation as the template writes it; ``respond`` adds the header of the assistant's next turn.

    Raises:
        DataError: the template refuses the conversation (roles that do not alternate, no system role, ...).
        ModelError: the template is no valid Jinja.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=respond, chat_template=template
        )
    except TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
    except (TemplateError, TypeError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(f"the chat template refuses the conversation ({roles}): {error}") from None
    return text


@dataclass(frozen=True)
class Shape:
    """How a template writes an assistant's turn after its own generation prompt.

    Attributes:
        opening: text between the generation prompt and the response.
        closing: text after the response that is trained, before the stop token.
        stop: id of the token that ends the turn, or None when the template writes none.
        stop_text: its text as the template writes it, or "".
        rest: what the template writes after a response, whole.
        continues: whether the turn begins with the generation prompt.
        header: what the generation prompt adds to a conversation.
    """

    opening: str
    closing: str
    stop: int | None
    stop_text: str
    rest: str
    continues: bool
    header: str


def shape_of(tokenizer: Any, template: str, system: str | None, stops: Sequence[int]) -> Shape:
    """Render a probe and see what stands around it.

    Args:
        stops: ids that end a response beside the tokenizer's special tokens.
    Raises:
        ModelError: the template does not write the assistant's text at all.
    """
    asked: list[Message] = [{"role": "user", "content": "Hi"}]
    if system is not None:
        asked.insert(0, {"role": "system", "content": system})
    prompt = render(tokenizer, template, asked, respond=True)
    bare = render(tokenizer, template, asked, respond=False)
    full = render(tokenizer, template, [*asked, {"role": "assistant", "content": MARK}], respond=False)
    if MARK not in full:
        raise ModelError(
            "the chat template does not write what the assistant says: its turn is missing from the rendered text. "
            'Give another template, e.g. template "default".'
        )
    start = full.index(MARK)
    rest = full[start + len(MARK) :]
    continues = full[:start].startswith(prompt)
    opening = full[len(prompt) : start] if continues else ""
    header = prompt[len(bare) :] if prompt.startswith(bare) else ""
    stop, stop_text = _first_stop(tokenizer, rest, stops)
    # Without a stop token, white space after a response is the template's way to the next turn, not the response's end.
    closing = rest[: rest.index(stop_text)] if stop is not None else rest.rstrip()
    return Shape(opening, closing, stop, stop_text, rest, continues, header)


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that are no text: named ones and added ones that are marked as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def _first_stop(tokenizer: Any, rest: str, stops: Sequence[int]) -> tuple[int | None, str]:
    """The first special token in the text after a response."""
    ends = special_ids(tokenizer) | set(stops)
    for number in tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else ():
        text = tokenizer.convert_ids_to_tokens(number)
        if number in ends and text and text in rest:
            return number, text
    return None, ""
