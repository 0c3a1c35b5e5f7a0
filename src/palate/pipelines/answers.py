"""Models answering prompts, and rewards reading the answers: what several stages need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from palate.data.chat import Chat
from palate.data.records import Prompt, read_records
from palate.generation.sampler import SamplingSettings, sample
from palate.models.load import load_policy, load_tokenizer
from palate.models.rewards import find_function
from palate.stage.chats import chat_of
from palate.types import Tokens

GoldMany = Callable[[list[Any], list[str]], list[float]]


@dataclass(frozen=True)
class Speaker:
    """A policy with its chat template, ready to answer."""

    policy: nn.Module
    chat: Chat

    @classmethod
    def load(cls, where: str) -> Speaker:
        """From a model folder or hub name, on the CPU in float32."""
        return cls(load_policy(where, trainable=False), chat_of(where, load_tokenizer(where)))

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Tokens:
        """Sampled rows, ordered by prompt; ``extras["records"]`` holds the prompts."""
        return sample(
            self.policy,
            self.chat.encode_prompts([p.prompt for p in prompts]),
            SamplingSettings(max_new_tokens=max_new_tokens, temperature=temperature),
            samples_per_prompt=samples_per_prompt,
            stop_token_ids=self.chat.stop_token_ids,
            generator=torch.Generator().manual_seed(seed),
            max_batch_rows=256,
            records=prompts,
        )

    def texts(self, tokens: Tokens) -> list[str]:
        """The responses as text, one a row."""
        return [self.chat.text(ids[mask].tolist()) for ids, mask in zip(tokens.ids, tokens.response_mask, strict=True)]


def read_prompts(where: str) -> list[Prompt]:
    """A file of prompts; files of responses and rankings will do as well."""
    return [record for record in read_records(where, "prompts") if isinstance(record, Prompt)]


def gold_function(where: str) -> GoldMany:
    """``module:function`` as a function of prompts and responses, in the form of a reward function."""
    function: GoldMany = find_function(where)
    return function
