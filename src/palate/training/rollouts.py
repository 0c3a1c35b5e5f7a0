"""Sampling the batch that an online method learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from palate.data.chat import Chat
from palate.data.collate import Item, prompt_ids
from palate.generation.sampler import SamplingSettings, sample
from palate.training.order import seeded
from palate.types import Tokens


@dataclass
class Rollout:
    """Prompts to sampled rows.

    Attributes:
        policy: samples the responses.
        chat: for the stop tokens and for turning ids into text.
        sampling: temperature, lengths, filters.
        samples_per_prompt: K >= 1; the K rows of a prompt share a group.
    """

    policy: nn.Module
    chat: Chat
    sampling: SamplingSettings
    samples_per_prompt: int = 1

    def __call__(self, items: Sequence[Item], *seed: int, progress: Callable[[int, int], None] | None = None) -> Tokens:
        """K responses to each prompt; the same seed numbers give the same samples."""
        with torch.no_grad():
            return sample(
                self.policy,
                prompt_ids(items),
                self.sampling,
                samples_per_prompt=self.samples_per_prompt,
                stop_token_ids=self.chat.stop_token_ids,
                generator=seeded(*seed),
                records=[item.record for item in items],
                progress=progress,
            )

    def texts(self, tokens: Tokens, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Prompt, response and whether it ended by itself, of the given rows: what ``palate score`` reads again."""
        records: Any = tokens.extras["records"]
        return [
            {
                "prompt": records[row].prompt,
                "response": self.chat.text(tokens.ids[row][tokens.response_mask[row]].tolist()),
                "finished": bool(tokens.extras["finished"][row]),
            }
            for row in rows
        ]
