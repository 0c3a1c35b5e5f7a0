"""Responses to prompts as a sampler hands them on: rows of tokens with their prompts' records."""

from __future__ import annotations

from typing import Any

import torch

from palate.data.chat import Chat
from palate.data.kinds import Prompt
from palate.types import Tokens


def rows_of(chat: Chat, pairs: list[tuple[str, str]], **fields: list[Any]) -> Tokens:
    """Rows of (prompt, response), right-padded; ``fields``: a value for each row, None = its record lacks the field."""
    encoded = [chat.encode(prompt, response) for prompt, response in pairs]
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row, _ in encoded])
    response = torch.tensor([list(mask) + [False] * (width - len(mask)) for _, mask in encoded])
    real = torch.arange(width) < torch.tensor([[len(row)] for row, _ in encoded])
    records = [
        Prompt(
            prompt, {name: values[i] for name, values in fields.items() if values[i] is not None}, f"p.jsonl:{i + 1}"
        )
        for i, (prompt, _) in enumerate(pairs)
    ]
    return Tokens(ids, real, response, torch.arange(len(pairs)), {"records": records})
