"""Talking to a model, turn by turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from palate.data.collate import encode_records, prompt_ids
from palate.data.kinds import Prompt, PromptText
from palate.generation.sampler import SamplingSettings, sample
from palate.texts.common import context_of, policy_with_chat, say_cut
from palate.training.order import seeded


class Conversation:
    """A conversation with a model; one without a chat template continues what was said, as one text."""

    def __init__(
        self,
        model: str,
        decoding: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        system: str | None = None,
        chat_template: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
    ) -> None:
        self.policy, self.chat = policy_with_chat(model, chat_template, system, dtype, device)
        self.settings, self.seed = SamplingSettings(**(decoding or {})), seed
        self.turns: list[dict[str, Any]] = []
        self.said = 0

    def restart(self) -> None:
        """Forget what was said."""
        self.turns = []

    def say(self, text: str) -> str:
        """The model's answer, which is remembered; the oldest turns are cut when its context is full."""
        turns = (*self.turns, {"role": "user", "content": text})
        plain = self.chat.template is None
        prompt: PromptText = "".join(str(turn["content"]) for turn in turns) if plain else turns
        room = max(2, context_of(self.policy) - self.settings.max_new_tokens)
        items, report = encode_records([Prompt(prompt)], "prompts", self.chat, max_length=room)
        say_cut(report, room)
        tokens = sample(
            self.policy,
            prompt_ids(items),
            self.settings,
            stop_token_ids=self.chat.stop_token_ids,
            generator=seeded(self.seed, self.said),
        )
        answer = self.chat.text(tokens.ids[0][tokens.response_mask[0]].tolist())
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        self.said += 1
        return answer
