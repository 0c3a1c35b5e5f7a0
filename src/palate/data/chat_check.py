"""Findings about a tokenizer and its chat template, by trying them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from palate.data.kinds import Conversation, Message, shorten
from palate.data.template import MARK, render
from palate.errors import PalateError

if TYPE_CHECKING:
    from palate.data.chat import Chat

_ASK, _SAY = "What is two and two?", "Two and two is four."


def check(chat: Chat) -> list[str]:
    """Every finding as one sentence with its consequence, and what to do where there is something to do."""
    found = [*_stops(chat), *_tokens_around(chat)]
    if chat.template is not None:
        found += [*_generation_prompt(chat), *_history(chat)]
    return found + _round_trip(chat)


def _stops(chat: Chat) -> list[str]:
    if not chat.stop_token_ids:
        named = [t for t in _vocabulary(chat.tokenizer) if any(word in t.lower() for word in ("eos", "end", "</s>"))]
        near = f" Its vocabulary has {', '.join(named[:4])}." if named else ""
        return [
            (
                f"No stop token: the tokenizer names no end-of-text token, so the model never learns to stop.{near} "
                "Set tokenizer.eos_token, or give stop_token_ids."
            )
        ]
    if chat.template is None or chat._shape.stop is not None:
        return []
    stop = chat.tokenizer.convert_ids_to_tokens(chat.stop_token_ids[0])
    after = f'"{shorten(chat._shape.rest)}"' if chat._shape.rest else "nothing"
    return [
        (
            f"The template drops the end of turn: after a response it writes {after}, which holds no stop token. "
            f"{stop} is appended to responses so that the model learns to stop; earlier turns stay without it."
        )
    ]


def _vocabulary(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [token.content for _, token in sorted(added.items())]


def _tokens_around(chat: Chat) -> list[str]:
    found = []
    bos = chat.tokenizer.bos_token_id
    ids = chat.encode_prompt(_ASK)
    if bos is not None and ids[:2] == [bos, bos]:
        found.append(
            f"Double begin-of-text: prompts begin with {chat._tokenizing.literal(ids[:2])}. Repair the template."
        )
    if (
        chat.template is not None
        and chat._tokenizing.before
        and ids[: len(chat._tokenizing.before)] != chat._tokenizing.before
    ):
        found.append(
            f"The template writes no {chat._tokenizing.literal(chat._tokenizing.before)} although the tokenizer begins texts with it; prompts "
            "begin without it, as in transformers. Add {{ bos_token }} to the template if the model was trained so."
        )
    if chat._tokenizing.after:
        found.append(
            f"The tokenizer ends every text with {chat._tokenizing.literal(chat._tokenizing.after)}; it is left out after prompts and "
            "written once after responses."
        )
    return found


def _generation_prompt(chat: Chat) -> list[str]:
    shape = chat._shape
    if not shape.continues:
        return [
            (
                f'The template does not continue its own generation prompt "{shorten(shape.header)}": responses are put after '
                "it as they are."
            )
        ]
    if shape.opening.strip():
        return [
            (
                f'The template writes "{shorten(shape.opening)}" between the generation prompt and the response; it is '
                "trained as the beginning of the response, because generation has to write it."
            )
        ]
    return []


def _history(chat: Chat) -> list[str]:
    """Whether earlier assistant turns stand in the prompt as they were said."""
    found = []
    for said, what in ((MARK, "leaves out"), (f"<think>{MARK}</think>Four.", "removes the <think> part of")):
        turns: list[Message] = [
            {"role": "user", "content": _ASK},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "Thanks. And three and three?"},
        ]
        try:
            text = render(chat.tokenizer, chat.template or "", chat.messages(tuple(turns)), respond=True)
        except PalateError as error:
            return [f"Conversations of several turns cannot be written: {error}"]
        if MARK not in text:
            found.append(f"The template {what} earlier assistant turns: it is neither seen by the model nor trained.")
            break
    return found


def _round_trip(chat: Chat) -> list[str]:
    prompts: list[str | Conversation] = [_ASK]
    found = []
    for prompt in prompts:
        say = _SAY if chat.template is not None else " " + _SAY
        ids, mask = chat.encode(prompt, say)
        back = chat.text([i for i, kept in zip(ids, mask, strict=True) if kept])
        if back != say:
            found.append(f'A response does not survive tokenising: "{say}" comes back as "{shorten(back)}".')
        if chat.stop_token_ids and ids[-2:] == [chat.stop_token_ids[0]] * 2:
            found.append(f"Responses end with two {chat._tokenizing.literal(ids[-1:])}.")
    return found
