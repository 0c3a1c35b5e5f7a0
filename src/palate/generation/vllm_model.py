"""A policy as vLLM is told of it: its kind, its shape, its weights under the names of its folder, the room for its cache."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from palate.models.adapters import is_adapted, merged_weights
from palate.models.heads import base_of

_BLOCK = 128  # tokens; the cache's blocks are this large on a CPU, smaller elsewhere


def served_weights(model: nn.Module, parts: set[str]) -> Mapping[str, Tensor]:
    """All weights under the names that the model's folder would have, an adapter added in; views where nothing changes.

    Args:
        parts: of vLLM's model. A head that is the embedding stands in no folder, but where vLLM has such a part it must be
            given: on a CPU it keeps the head's weights once more, packed.
    Raises:
        ModelError: the model has an adapter that is not a LoRA.
    """
    from transformers.core_model_loading import revert_weight_conversion

    inner = base_of(model)
    weights = merged_weights(model) if is_adapted(model) else model.state_dict()
    copies = getattr(inner, "all_tied_weights_keys", {})
    weights = {name: w for name, w in weights.items() if name not in copies or name.partition(".")[0] in parts}
    # transformers keeps some models (mixtures of experts) in other tensors than their files have.
    return revert_weight_conversion(inner, weights)


def kind_of(model: nn.Module) -> tuple[str, torch.dtype]:
    """Architecture and dtype to compute in."""
    inner = base_of(model)
    dtype = getattr(inner, "compute_dtype", None) or inner.get_input_embeddings().weight.dtype
    return type(inner).__name__, dtype


def named(kind: tuple[str, torch.dtype]) -> str:
    return f"{kind[0]} in {str(kind[1]).removeprefix('torch.')}"


def write_config(model: nn.Module, folder: str) -> None:
    """The model's shape, where vLLM reads it; a few kilobytes, no weights."""
    config = copy.deepcopy(base_of(model).config)
    config.architectures = [type(base_of(model)).__name__]
    config.eos_token_id = None  # min_tokens would hold it back, whatever ends a response here
    config.save_pretrained(folder)


def cache_bytes(model: nn.Module, max_length: int, rows: int, dtype: torch.dtype) -> int:
    """Keys and values of ``rows`` rows of ``max_length`` tokens, in whole blocks, and a row's more for vLLM's own use."""
    config = base_of(model).config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    columns = -(-max_length // _BLOCK) * _BLOCK
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize * columns * (rows + 1)
