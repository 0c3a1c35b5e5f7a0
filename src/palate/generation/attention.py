"""Attention of one new token a row, for CPUs: two batched matrix-vector products over the cache as it lies in memory.

``scaled_dot_product_attention`` is built for many queries; with one query a row it takes twice the time of this. Only
models that run with it ("sdpa") on a CPU are switched, and only while they are sampled from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "palate_one_token"


@contextmanager
def one_token_attention(model: nn.Module, device: torch.device) -> Iterator[bool]:
    """Run the model with this module's attention for a while, where that is faster; says whether it is so."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    before = config._attn_implementation
    if device.type != "cpu" or before != "sdpa":
        yield False
        return
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _mask)
    config._attn_implementation = _NAME
    try:
        yield True
    finally:
        config._attn_implementation = before


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(K q + mask) V, in transformers' shapes.

    Args:
        query: [R, heads, n, D]; several tokens (n > 1, prompts) go to "sdpa".
        key, value: [R, key-value heads, L, D]; each serves heads / (key-value heads) = G queries.
        attention_mask: float [R, 1, 1, L], 0 or -inf, from ``_mask``; None = all columns count.

    Returns:
        [R, n, heads, D].
    """
    rows, heads, tokens, size = query.shape
    if tokens > 1 or kwargs.get("position_bias") is not None:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    queries = query.view(rows, key.shape[1], -1, size) * (size**-0.5 if scaling is None else scaling)
    scores = key @ queries.transpose(-1, -2)  # [R, key-value heads, L, G]: the keys stay as they are in memory
    # Through two dimensions, so that a G of 1 gets the strides for which the second product is fast (four times).
    scores = scores.transpose(-1, -2).reshape(-1, key.shape[2]).view(*queries.shape[:3], -1)
    if attention_mask is not None:
        scores += attention_mask
    mixed = value.transpose(-1, -2) @ scores.softmax(-1).transpose(-1, -2)  # [R, key-value heads, D, G]
    return mixed.transpose(-1, -2).reshape(rows, 1, heads, -1), None


def _mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """The mask of "sdpa"; for one token as numbers to add, made once for all layers."""
    allowed = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, dtype=dtype, **kwargs)
    if allowed is None or allowed.shape[-2] > 1:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))
