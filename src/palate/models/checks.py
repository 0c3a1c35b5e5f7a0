"""What a loaded model has to be, found out before it is used: complete, finite, causal, as wide as its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from palate.errors import ModelError
from palate.models.heads import base_of, scalar_head


def check_tokenizer(model: nn.Module, tokenizer: Any, where: str | Path = "model") -> None:
    """Every token of the tokenizer has a row in the model's embedding; a larger embedding is fine.

    Raises:
        ModelError: naming tokens that have none.
    """
    rows = base_of(model).get_input_embeddings().weight.shape[0]
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if beyond:
        some = ", ".join(f"{token!r} = {i}" for token, i in sorted(beyond.items(), key=lambda item: item[1])[:3])
        raise ModelError(
            f"{where}: the tokenizer knows {len(beyond)} token(s) that the model's embedding of {rows} rows has no place "
            f"for: {some}. Use the tokenizer that the model was trained with, or enlarge the model once: "
            "model.resize_token_embeddings(len(tokenizer)); save both together."
        )


def same_vocabulary(first: Any, second: Any) -> bool:
    """Do two tokenizers give every token the same id?"""
    return first is second or bool(first.get_vocab() == second.get_vocab())


def refuse_missing(where: str | Path, missing: set[str]) -> None:
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ModelError(
            f"{where}: the folder has no weights for {len(missing)} parts of the model ({some}); they would be random. "
            "Its config does not belong to its weights, or it was saved incompletely."
        )


@torch.no_grad()
def check_weights(model: nn.Module, where: str | Path) -> None:
    """No NaN and no Inf among the weights."""
    bad = [(name, weight) for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if bad:
        name, weight = bad[0]
        count = int((~weight.isfinite()).sum())
        raise ModelError(
            f"{where}: {len(bad)} weight tensor(s) hold NaN or Inf, first {name} ({count} of {weight.numel()} numbers). The "
            "run that saved them had diverged; take an earlier checkpoint."
        )


def _probe(model: nn.Module) -> torch.Tensor:
    """A short row of ids that no model takes for padding; int64 [1, 6]."""
    inner = base_of(model)
    embedding = inner.get_input_embeddings()
    ids = sorted(set(range(min(16, embedding.weight.shape[0]))) - {inner.config.pad_token_id})
    return torch.tensor([(ids * 6)[:6]], device=embedding.weight.device)


@torch.no_grad()
def check_left_to_right(model: Any, where: str | Path) -> None:
    """What a token's state says may not depend on later tokens: found out by changing the last one."""
    inner, ids = base_of(model).eval(), _probe(model)
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    first, second = (inner.base_model(input_ids=x).last_hidden_state[0, :-1].float() for x in (ids, changed))
    tolerance = 1e-5 if inner.dtype == torch.float32 else 5e-3
    if bool((first - second).abs().max() > tolerance * first.abs().max()):
        raise ModelError(
            f"{where}: {type(inner).__name__} lets a token see later tokens (an encoder); a language model that reads "
            'from left to right was expected. As a reward it can serve as {"classifier": ..., "label": ...}.'
        )


@torch.no_grad()
def check_reads_last_token(model: Any, where: str) -> None:
    """The number is the head on the last token's state, and nothing more: found out by trying."""
    head, ids = scalar_head(model), _probe(model)
    model.eval()
    if isinstance(head, nn.Linear):
        ours = head(model.base_model(input_ids=ids).last_hidden_state[0, -1].to(head.weight.dtype))
        theirs = model(input_ids=ids).logits[0]
        if torch.allclose(ours.float(), theirs.float(), atol=1e-3, rtol=2e-2, equal_nan=True):
            return
    raise ModelError(
        f"{where}: {type(model).__name__} does not read its score off the last token with one linear layer, so it has no "
        'value for every token. As a reward it can serve as {"classifier": ..., "label": ...}.'
    )


def context_length(model: Any, tokenizer: Any) -> int:
    """Tokens that a model can read at most."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None) or 10**9
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    first = getattr(embeddings, "padding_idx", None)
    if isinstance(first, int):
        limit -= first + 1  # RoBERTa counts positions from there
    return int(min(limit, tokenizer.model_max_length))
