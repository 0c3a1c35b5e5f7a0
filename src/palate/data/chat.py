"""From records to token ids and response masks, with the model's own chat template.

The mask is made by position, never by a token's value, so it is right where pad == eos and where a text quotes the
template. A row is the ids of the prompt -- exactly those that generation starts from -- then the ids of the response as
the template writes it after them, then the token that ends the turn. The response mask is True for the response and
that token: a model that never sees its stop token trained never stops.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from palate.data.kinds import Conversation, Message, PromptText, Spans
from palate.data.segments import changed_tokens, moved_spans
from palate.data.template import MARK, default_template, find_template, render, shape_of
from palate.data.tokenizing import Tokenizing, common
from palate.errors import ConfigError, DataError, ModelError


@dataclass(frozen=True)
class Encoded:
    """A prompt with its responses.

    Attributes:
        prompt: ids, ends with the generation prompt.
        prompt_mask: True where an earlier assistant turn of the prompt is trained too; all False unless asked for.
        responses: ids of each response, its stop token at the end.
        rewritten: for each response, whether the template would have lost text of it or would not continue the
            prompt, so that the text was put after the prompt as it is.
        changed: for each response, which of its ids stand in a marked span; empty when no spans were given.
    """

    prompt: list[int]
    prompt_mask: list[bool]
    responses: list[list[int]]
    rewritten: list[bool]
    changed: list[list[bool]] = field(default_factory=list)


class Chat:
    """A tokenizer with its chat template: prompts and responses to ids, ids to response texts.

    A plain-string prompt is one user message where there is a template, and text to be continued where there is none:
    begin-of-text token as the tokenizer does it, prompt, response, stop token. A conversation without a template is
    written by ``template.default_template``.

    Args:
        tokenizer: a transformers tokenizer.
        template: None = the tokenizer's own, if any; "none" = plain text; "default" = the documented default; a path;
            Jinja text.
        system: a system message put before conversations that have none.
        stop_token_ids: further ids that end a response, e.g. ``generation_config.eos_token_id``; the first is appended
            to responses when the template writes no end of turn.

    Attributes:
        template: the Jinja text for plain-string prompts, None = plain text.
        conversation_template: the Jinja text for conversations; what a saved model should carry.
        stop_token_ids: every id that ends a response; the first is the one that is trained. Empty when there is none.
        head: ids that all prompts begin with, kept when a prompt is cut.

    Raises:
        ConfigError: the template is neither a file nor Jinja, or a system message is given without a template.
        ModelError: the template is broken or does not write the assistant's turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        system: str | None = None,
        *,
        stop_token_ids: Sequence[int] | int | None = (),
    ) -> None:
        given = (stop_token_ids,) if isinstance(stop_token_ids, int) else tuple(stop_token_ids or ())
        eos = tokenizer.eos_token_id
        stops = tuple(dict.fromkeys([*given, *([] if eos is None else [eos])]))
        self.tokenizer, self.system, self._forced_plain = tokenizer, system, template == "none"
        self._tokenizing = own = Tokenizing(tokenizer)
        default = default_template(own.literal(own.before), own.literal(stops[:1]))
        self.template = default if template == "default" else find_template(tokenizer, template)
        self.conversation_template = self.template or default
        if system is not None and self.template is None:
            raise ConfigError('a system message needs a chat template, and there is none. Set template: "default".')
        self._shape = shape_of(tokenizer, self.conversation_template, system, stops)
        turn_end = [] if self.template is None or self._shape.stop is None else [self._shape.stop]
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*turn_end, *stops]))
        self.head: tuple[int, ...] = tuple(self._common_head())
        # Some tokenizers cannot write a first word without a space before it; that space is none of the response's.
        written = own.continuations([self._shape.header], ["b"])[0]
        self._adds_space = self.template is not None and own.after_text(written) == " b"

    # -- to ids ------------------------------------------------------------------------------------------------------

    def encode_prompt(self, prompt: PromptText) -> list[int]:
        """The ids that generation starts from; ends with the generation prompt.

        Raises:
            DataError: the template refuses the conversation, or a conversation is given with template "none".
            ModelError: the prompt is empty and the tokenizer has no token to begin a text with.
        """
        return self.encode_prompts([prompt])[0]

    def encode_prompts(self, prompts: Sequence[PromptText]) -> list[list[int]]:
        """``encode_prompt`` for many, at the tokenizer's own speed."""
        return self._prompt_ids(prompts, [self.prompt_text(prompt) for prompt in prompts])

    def encode(self, prompt: PromptText, response: str, every_turn: bool = False) -> tuple[list[int], list[bool]]:
        """The ids of prompt and response, and the response mask.

        Args:
            every_turn: earlier assistant turns of the prompt, with their ends, count as response too.
        Returns:
            (ids, mask), equally long; ids begin with ``encode_prompt(prompt)`` and end with the stop token, if any.
        """
        found = self.encode_many([prompt], [[response]], every_turn=[every_turn])[0]
        ids = found.responses[0]
        return found.prompt + ids, found.prompt_mask + [True] * len(ids)

    def encode_many(
        self,
        prompts: Sequence[PromptText],
        responses: Sequence[Sequence[str]],
        every_turn: Sequence[bool] | None = None,
        spans: Sequence[Sequence[Spans]] | None = None,
    ) -> list[Encoded]:
        """``encode`` for many prompts with any number of responses each, at the tokenizer's own speed.

        Args:
            spans: of each response's text, (start, end) in characters: which tokens are there is found, too.
        """
        texts = [self.prompt_text(prompt) for prompt in prompts]
        prompt_ids = self._prompt_ids(prompts, texts)
        written = [
            [self._response_text(prompt, text, response) for response in several]
            for prompt, text, several in zip(prompts, texts, responses, strict=True)
        ]
        contexts = [text for text, several in zip(texts, written, strict=True) for _ in several]
        flat = [response for several in written for response, _ in several]
        found_ids = self._tokenizing.continuations(contexts, flat)
        places = iter(self._tokenizing.places(contexts, flat, found_ids) if spans is not None else ())
        ids = iter(found_ids)
        stop = list(self.stop_token_ids[:1])
        found = []
        for i, several in enumerate(written):
            mask = [False] * len(prompt_ids[i])
            if every_turn is not None and every_turn[i]:
                mask = self._earlier_turns(prompts[i], texts[i], prompt_ids[i])
            rows = [next(ids) + stop for _ in several]
            changed = []
            for response, (text, _), marked in zip(responses[i], several, spans[i] if spans else (), strict=False):
                moved = moved_spans(marked, response, text, self._shape.opening)
                changed.append(changed_tokens(next(places), moved, then=len(stop)))
            found.append(Encoded(prompt_ids[i], mask, rows, [rewritten for _, rewritten in several], changed))
        return found

    def encode_reply(self, prompt: PromptText, turns: Sequence[Message]) -> list[int]:
        """The ids between two of the policy's turns: a reply as the template writes it, and the next generation prompt.

        Everything before is left as the ids that it is; nothing is tokenised twice.

        Args:
            prompt: the conversation's beginning.
            turns: what was said since; the last is the reply, the one before it the policy's turn, whose ids end with
                its stop token (or were cut where there is none).
        Raises:
            ModelError: the template leaves out the policy's turn or the reply, or the reply has no token.
            DataError: the template refuses the conversation.
        """
        *before, said, reply = turns
        if self._is_plain(prompt):
            context = str(prompt) + "".join(turn["content"] for turn in (*before, said))
            ids = self._tokenizing.continuations([context], [reply["content"]])[0]
            if not ids:
                raise ModelError("the reply to the policy is an empty text, for which there is no token in plain text.")
            return ids
        marked = [*self.messages(prompt), *before, {**said, "content": MARK}, reply]
        _, found, after = render(self.tokenizer, self.conversation_template, marked, respond=True).partition(MARK)
        if not found or _squeezed(reply["content"]) not in _squeezed(after):
            lost = f"the {reply['role']} turn after it" if found else "the assistant's turn once another follows"
            raise ModelError(
                f"the chat template leaves out {lost}, so no conversation can go on. Give a template that writes it, "
                'e.g. chat_template: "default".'
            )
        end = self._shape.closing + self._shape.stop_text
        context = said["content"] + end
        return self._tokenizing.continuations([context], [after.removeprefix(end)])[0]

    # -- to text -----------------------------------------------------------------------------------------------------

    def text(self, ids: Sequence[int]) -> str:
        """The text of response ids, without stop and special tokens and without what the template put around it."""
        kept = [int(number) for number in ids]
        while kept and kept[-1] in self.stop_token_ids:
            kept.pop()
        text = self._tokenizing.after_text(kept)
        if self.template is None:
            return text
        if self._adds_space:
            text = text.removeprefix(" ")
        return text.removeprefix(self._shape.opening).removesuffix(self._shape.closing)

    def prompt_text(self, prompt: PromptText) -> str:
        """The text that is tokenised for a prompt, generation prompt included."""
        if self._is_plain(prompt):
            return str(prompt)
        return render(self.tokenizer, self.conversation_template, self.messages(prompt), respond=True)

    def messages(self, prompt: PromptText) -> Conversation:
        """The conversation that the template is given for a prompt."""
        turns: Conversation = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
        if self.system is not None and not any(turn["role"] == "system" for turn in turns):
            return ({"role": "system", "content": self.system}, *turns)
        return turns

    def check(self) -> list[str]:
        """What is wrong with this tokenizer and template, each as one sentence with its consequence; [] = nothing."""
        from palate.data.chat_check import check

        return check(self)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _is_plain(self, prompt: PromptText) -> bool:
        if not isinstance(prompt, str) and self._forced_plain:
            raise DataError(
                f'the prompt is a conversation of {len(prompt)} messages, and template "none" takes plain text only. '
                'Set template: "default", or give the prompt as a string.'
            )
        return isinstance(prompt, str) and self.template is None

    def _prompt_ids(self, prompts: Sequence[PromptText], texts: Sequence[str]) -> list[list[int]]:
        found, before = [], self._tokenizing.before
        for prompt, ids in zip(prompts, self._tokenizing.ids(texts), strict=True):
            # A template writes its own begin-of-text token; a plain text may quote it, and gets no second one.
            if self._is_plain(prompt) and ids[: len(before)] != before:
                ids = before + ids
            found.append(ids or self._beginning())
        return found

    def _beginning(self) -> list[int]:
        """What an empty prompt begins with: the first response token needs a token before it to be predicted from."""
        begin = self.tokenizer.bos_token_id
        begin = self.stop_token_ids[0] if begin is None and self.stop_token_ids else begin
        if begin is None:
            raise ModelError(
                "an empty prompt needs a begin-of-text or end-of-text token, and the tokenizer names none."
            )
        return [int(begin)]

    def _response_text(self, prompt: PromptText, prompt_text: str, response: str) -> tuple[str, bool]:
        """What is written after the prompt, up to the stop token; whether the template's own way was not followed."""
        if self._is_plain(prompt):
            return response, False
        turns = [*self.messages(prompt), {"role": "assistant", "content": response}]
        full = render(self.tokenizer, self.conversation_template, turns, respond=False)
        shape = self._shape
        inside = len(full) - len(shape.rest)
        if full.startswith(prompt_text) and inside >= len(prompt_text) and full.endswith(shape.rest):
            written = full[len(prompt_text) : inside]
            if _squeezed(response) in _squeezed(written):
                return written + shape.closing, False
        # The template rewrote the conversation or lost text of the response. What the policy would have had to
        # generate is the response's own text, less what the generation prompt has already written of it.
        overlap = max(n for n in range(min(len(shape.header), len(response)) + 1) if prompt_text.endswith(response[:n]))
        opening = shape.opening if not shape.opening.strip() else ""
        return opening + response[overlap if overlap > 1 else 0 :] + shape.closing, True

    def _earlier_turns(self, prompt: PromptText, text: str, ids: Sequence[int]) -> list[bool]:
        """The mask of the assistant's turns in a prompt, each with its stop token.

        The place of a turn is found by rendering the conversation with a mark instead of its text, so it is right
        whatever the template does with history, and a turn that the template leaves out is not trained.
        """
        mask = [False] * len(ids)
        if isinstance(prompt, str):
            return mask
        turns = self.messages(prompt)
        end_text = self._shape.closing + self._shape.stop_text
        spans = []
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant" or not turn["content"].strip():
                continue
            marked = (*turns[:i], {**turn, "content": MARK}, *turns[i + 1 :])
            span = _span(text, render(self.tokenizer, self.conversation_template, marked, respond=True))
            if span is not None:
                start, end = span
                spans.append((start, end + len(end_text) if text.startswith(end_text, end) else end))
        cuts = self._tokenizing.ids([text[:place] for span in spans for place in span])
        for before, until in zip(cuts[::2], cuts[1::2], strict=True):
            first, last = common(before, ids), common(until, ids)
            # A token across the beginning of a turn belongs to it; one across its end is the template's.
            mask[first:last] = [True] * (last - first)
        return mask

    def _common_head(self) -> list[int]:
        one, two = self.encode_prompts(["1", "two"])
        return one[: common(one, two)]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _span(text: str, marked: str) -> tuple[int, int] | None:
    """Where in ``text`` stands what the mark replaced in ``marked``; None when the mark was left out."""
    start = marked.find(MARK)
    if start < 0:
        return None
    after = marked[start + len(MARK) :]
    if not text.startswith(marked[:start]):
        start = len(os.path.commonprefix([text, marked]))
    end = len(text) - len(after)
    if not text.endswith(after) or end < start:
        end = len(text) - len(os.path.commonprefix([text[::-1], marked[::-1]]))
    return (start, end) if start < end else None
