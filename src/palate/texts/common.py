"""What every job on texts begins with: a model with its chat, a device, a context."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from palate.data.chat import Chat
from palate.data.items import EncodeReport
from palate.models.load import load_policy, load_tokenizer
from palate.stage.chats import chat_of

Progress = Callable[[int, int], None] | None
LONGEST = 1024  # tokens of a row where neither the caller nor the model says


def say_cut(report: EncodeReport, longest: int) -> None:
    """Warn of what did not fit, with its count; nothing is cut in silence."""
    for count, what in (
        (report.truncated_prompt, "prompts were cut at their beginning"),
        (report.truncated_response, "responses were cut at their end"),
    ):
        if count:
            warnings.warn(f"{count:,} of {report.read:,} {what} to fit {longest:,} tokens.", stacklevel=3)


def device_of(name: str) -> str:
    """ "auto" = cuda where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def policy_with_chat(
    model: str, chat_template: str | None, system: str | None, dtype: str, device: str
) -> tuple[torch.nn.Module, Chat]:
    """A frozen policy and its chat."""
    tokenizer = load_tokenizer(model)
    chat = chat_of(model, tokenizer, chat_template, system)
    return load_policy(model, dtype=dtype, device=device_of(device), trainable=False, tokenizer=tokenizer), chat


def context_of(model: Any) -> int:
    """Tokens that a model can hold; a million where it names no limit."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
    return int(getattr(config, "max_position_embeddings", None) or 1_000_000)
