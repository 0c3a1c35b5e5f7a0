"""A model that people talk to: loaded once, one answer at a time, first come first served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from palate.data.kinds import Message
from palate.errors import ConfigError
from palate.generation.settings import SamplingSettings


class Speaker(Protocol):
    """What the arena needs of a model.

    Attributes:
        about: name, content hash, how it is sampled; kept with every conversation, and never shown.
        line: held while it answers; asyncio's locks are given in the order in which they were asked for.
    """

    about: dict[str, Any]
    line: asyncio.Lock

    def answer(self, turns: Sequence[Message], seed: int, ended: list[bool]) -> Iterator[str]:
        """Pieces of the answer to a conversation; at the end whether it ended by itself is put into ``ended``."""


class Served:
    """A model folder, embedded."""

    def __init__(
        self,
        name: str,
        where: str,
        settings: SamplingSettings,
        *,
        system: str | None = None,
        chat_template: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
    ) -> None:
        from palate.texts.candidates import content_hash
        from palate.texts.common import policy_with_chat

        self.policy, self.chat = policy_with_chat(where, chat_template, system, dtype, device)
        self.policy.eval()
        self.settings = settings
        self.about: dict[str, Any] = {
            "name": name,
            "where": where,
            "hash": content_hash(where),
            "settings": asdict(settings),
            "system": system,
        }
        self.line = asyncio.Lock()
        self._alone = threading.Lock()  # a person who left may leave a last token to be drawn

    def answer(self, turns: Sequence[Message], seed: int, ended: list[bool]) -> Iterator[str]:
        from palate.data.collate import encode_records, prompt_ids
        from palate.data.kinds import Prompt, PromptText
        from palate.generation.stream import pieces, stream
        from palate.texts.common import context_of
        from palate.training.order import seeded

        plain = self.chat.template is None
        prompt: PromptText = "".join(str(turn["content"]) for turn in turns) if plain else tuple(turns)
        room = max(2, context_of(self.policy) - self.settings.max_new_tokens)
        with self._alone:
            items, _ = encode_records([Prompt(prompt)], "prompts", self.chat, max_length=room)
            stops, ids = self.chat.stop_token_ids, prompt_ids(items)[0]
            tokens: list[int] = []
            drawn = stream(self.policy, ids, self.settings, stop_token_ids=stops, generator=seeded(seed))
            yield from pieces(_noted(drawn, tokens), self.chat.text)
            ended.append(bool(tokens) and tokens[-1] in stops)


def _noted(drawn: Iterator[int], into: list[int]) -> Iterator[int]:
    for token in drawn:
        into.append(token)
        yield token


def name_and_folder(given: str) -> tuple[str, str]:
    """ "name=folder", or a folder, whose name is its last part that says something.

    >>> name_and_folder("runs/ppo/model"), name_and_folder("new=runs/ppo/model")
    (('ppo', 'runs/ppo/model'), ('new', 'runs/ppo/model'))
    """
    name, equals, where = given.partition("=")
    if equals and name and "/" not in name:
        return name, where
    parts = [part for part in Path(given).parts if part not in ("model", "/", ".", "..")]
    return (parts[-1] if parts else given), given


def load_models(given: Sequence[str], settings: SamplingSettings, **options: Any) -> list[Speaker]:
    """The models of a command line.

    Raises:
        ConfigError: two of one name, or one model twice.
    """
    named = [name_and_folder(each) for each in given]
    for which, what in ((0, "name"), (1, "folder")):
        values = [each[which] for each in named]
        for value in values:
            if values.count(value) > 1:
                raise ConfigError(
                    f'two models with the {what} "{value}". Give each a name and a folder of its own: --model NAME=FOLDER.'
                )
    return [Served(name, where, settings, **options) for name, where in named]
