"""What tests ask of every engine that draws responses, and what holds for the rows that come back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from palate.generation.sampler import SamplingSettings
from palate.types import Tokens

PROMPTS = [[5, 9, 11], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 8], [2] * 30]
STOP = [2, 17]


def draw(engine: Any, model: nn.Module, prompts: Any = PROMPTS, seed: int = 0, **options: Any) -> Tokens:
    """Responses with the tests' habits: stop tokens 2 and 17, 20 new tokens."""
    names = {"max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k"} & options.keys()
    settings = SamplingSettings(**({"max_new_tokens": 20} | {name: options.pop(name) for name in names}))
    options = {"stop_token_ids": STOP} | options
    return engine(model, prompts, settings, generator=torch.Generator().manual_seed(seed), **options)


def same(a: Tokens, b: Tokens) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.response_mask, b.response_mask)


def check_rows(tokens: Tokens) -> None:
    """Rows of three samples to each of PROMPTS with the records a to e: in order, padded, masked, ended."""
    assert tokens.group.tolist() == [p for p in range(5) for _ in range(3)]
    assert tokens.extras["records"] == [r for r in "abcde" for _ in range(3)]
    for row, prompt in enumerate(p for p in PROMPTS for _ in range(3)):
        length, response = int(tokens.attention_mask[row].sum()), int(tokens.response_mask[row].sum())
        assert length == len(prompt) + response and 1 <= response <= 20
        assert tokens.ids[row, : len(prompt)].tolist() == prompt
        assert tokens.attention_mask[row, :length].all() and not tokens.ids[row, length:].any()
        assert tokens.response_mask[row, len(prompt) : length].all()
        drawn = tokens.ids[row, len(prompt) : length].tolist()
        assert bool(tokens.extras["finished"][row]) == (drawn[-1] in STOP)
        assert not set(drawn[:-1]) & set(STOP) and (drawn[-1] in STOP or response == 20)
    assert int(tokens.attention_mask.sum(-1).max()) == tokens.ids.shape[1]
    ends = {tokens.ids[row][tokens.attention_mask[row]][-1].item() for row in range(len(tokens))}
    assert set(STOP) <= ends, "the seed should show both stop tokens"
