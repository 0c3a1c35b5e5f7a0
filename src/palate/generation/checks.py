"""What is refused before anything is sampled, and how it is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from palate.errors import ConfigError, DataError, ModelError
from palate.models.rotary import turning_length

# Layers that keep keys and values of every token; the others keep a state that cannot be cut or padded.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_ENDLESS = 2**31


def context_length(model: nn.Module) -> int:
    """Tokens of prompt and response together that the model was made for; very many if it names no limit.

    Raises:
        ModelError: a layer is not attention.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
    if others:
        raise ModelError(
            f"{config.model_type}: its {', '.join(others)} layers keep a state that this sampler has no cache for. "
            "Expected attention layers only. Choose another model."
        )
    return getattr(config, "max_position_embeddings", None) or _ENDLESS


def check_request(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    samples_per_prompt: int,
    stop_token_ids: Sequence[int],
    max_batch_rows: int,
    records: Sequence[Any] | None,
) -> None:
    """Numbers in range and ids in the vocabulary; see ``sample``."""
    for name, value in (("samples_per_prompt", samples_per_prompt), ("max_batch_rows", max_batch_rows)):
        if value < 1:
            raise ConfigError(f"{name} = {value}: expected 1 or more.")
    if records is not None and len(records) != len(prompts):
        raise ConfigError(f"{len(records)} records for {len(prompts)} prompts: expected one for each.")
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[union-attr, operator]
    for token in stop_token_ids:
        if not 0 <= token < vocabulary:
            raise ConfigError(f"stop token {token} is not in the model's vocabulary of {vocabulary} tokens.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(
                f"{name_prompt(number, records)} has no tokens: a response needs at least one to follow. "
                "Give a prompt, or a tokenizer that begins texts with a token (BOS)."
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise DataError(
                f"{name_prompt(number, records)} holds token {min(prompt) if min(prompt) < 0 else max(prompt)}, but "
                f"the model's vocabulary has {vocabulary} tokens. Tokenize with the model's own tokenizer."
            )


def check_room(prompts: Sequence[Sequence[int]], context: int, records: Sequence[Any] | None) -> None:
    """Every prompt leaves room for one token at least."""
    for number, prompt in enumerate(prompts):
        if len(prompt) >= context:
            raise DataError(
                f"{name_prompt(number, records)} has {len(prompt)} tokens and leaves no room for a response: the "
                f"model's context is {context} tokens, prompt and response together. Shorten the prompt or set a "
                "smaller max_prompt_length."
            )


def check_angles(
    models: Sequence[nn.Module],
    prompts: Sequence[Sequence[int]],
    room: int,
    context: int,
    records: Sequence[Any] | None,
) -> None:
    """No row may come to cross the length above which LongRoPE turns all of it otherwise.

    What was drawn below that length followed the one set of angles; a trainer, which sees the whole row, goes by the other.
    Rows that begin above it, and rows that cannot get there, are turned one way from their first token to their last.

    Args:
        models: those that say how probable a token is.
        room: tokens that a prompt may grow by; context: tokens of prompt and response together; at most, both.
    """
    for limit in {turning_length(model) for model in models}:
        for number, prompt in enumerate(prompts):
            longest = min(len(prompt) + room, context)
            if len(prompt) <= limit < longest:
                raise DataError(
                    f"{name_prompt(number, records)} has {len(prompt)} tokens, and with its response may have {longest}: the "
                    f"model turns rows of more than {limit:g} tokens by other angles (LongRoPE), all of a row, so that the "
                    f"response would begin as the one model's and end as another's. Set data.max_length to {limit:g}, lower "
                    "sampling.max_new_tokens, or leave the prompt out."
                )


def name_prompt(number: int, records: Sequence[Any] | None) -> str:
    """How an error calls a prompt: by its number, and by where it was read if that is known."""
    source = getattr(records[number], "source", "") if records is not None else ""
    return f"{source}: prompt {number}" if source else f"prompt {number}"
