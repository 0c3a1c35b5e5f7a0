"""The weights of a Llama-shaped model, as a flat decoding step wants them: few, packed, and with the constants inside.

* queries, keys and values are one product, scaled; the gain of the norm before a product is in its weights;
* the two halves that rotary embedding turns into each other lie side by side, so that a turn is one complex product;
* an adapter's low-rank update is added.

A bf16 model's are bf16 where the processor has units for that, and only their products are; else, and with an adapter in
float32, they are widened.

The copies are made anew for every sampling, for weights change between two. ``serves`` says whether the model is of the
build, device and dtype for it, without a copy of anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palate.generation.bunch import Shape
from palate.generation.packed import MOST_WEIGHTS, Packed, available
from palate.models import trunk
from palate.models.precision import has_bf16_units


class Layer(NamedTuple):
    """One layer's products."""

    attention_epsilon: Tensor  # what is added to the sum of squares, a scalar
    query_key_value: Packed
    output: Packed
    feed_forward_epsilon: Tensor
    gate: Packed
    up: Packed
    down: Packed


class Weights(NamedTuple):
    """All that the flat step reads."""

    shape: Shape
    heads: int  # of the queries
    embedding: Tensor  # [V, H]
    layers: list[Layer]
    epsilon: Tensor
    head: Packed
    turns: Tensor  # complex [positions, 1, D/2]


def serves(model: nn.Module) -> bool:
    """Can the flat step run the model, adapters as they are switched now?"""
    core = _core(model)
    if not (available() and hasattr(core, "base_model") and trunk.supported(core) and _is_plain(core)):
        return False
    base, head = core.base_model, core.get_output_embeddings()
    if type(base.embed_tokens) is not nn.Embedding or type(head) is not nn.Linear:
        return False
    linears = [module for layer in base.layers for module in _linears(layer)]
    if not all(_is_linear(module) for module in linears):
        return False
    tensors = [tensor for module in (*linears, head, base.embed_tokens) for tensor in _read(module)]
    if any(t.dtype not in (torch.float32, torch.bfloat16) or t.device.type != "cpu" for t in tensors):
        return False
    whole = [getattr(module, "base_layer", module) for module in (*linears, head, base.embed_tokens)]
    return sum(tensor.numel() for module in whole for tensor in _read(module)) <= MOST_WEIGHTS


def weights_of(model: nn.Module, rows: int, positions: int) -> Weights:
    """The weights, as they are now, of a model that the flat step ``serves``.

    Args:
        rows: that are decoded at once, about.
        positions: tokens of the longest row.
    """
    core = _core(model)
    base, head = core.base_model, core.get_output_embeddings()
    linears = [[_linear(module) for module in _linears(layer)] for layer in base.layers]
    tensors = [tensor for layer in linears for part in layer for tensor in part if tensor is not None]
    dtypes = {tensor.dtype for tensor in (*tensors, *_read(head), base.embed_tokens.weight)}
    dtype = torch.bfloat16 if dtypes == {torch.bfloat16} and has_bf16_units() else torch.float32
    attention = base.layers[0].self_attn
    size = attention.head_dim
    shape = Shape(len(linears), len(linears[0][1][0]) // size, size)
    heads = len(linears[0][0][0]) // size
    epsilon = _epsilon(base.norm)
    cos, sin = (x[0, :, None, : size // 2] for x in base.rotary_emb(epsilon, torch.arange(positions)[None]))
    return Weights(
        shape,
        heads,
        base.embed_tokens.weight.detach().to(dtype),
        [_layer(layer, parts, rows, dtype) for layer, parts in zip(base.layers, linears, strict=True)],
        epsilon,
        Packed(*_as((head.weight, head.bias), dtype), rows, gain=_gain(base.norm)),
        torch.complex(cos, sin),
    )


def _core(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_plain(core: Any) -> bool:
    """Nothing hangs on a module that its weights do not show, and no norm is inside the attention."""
    attention = core.base_model.layers[0].self_attn
    return not hasattr(attention, "q_norm") and not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in core.modules()
    )


def _linears(layer: Any) -> list[Any]:
    attention = [getattr(layer.self_attn, f"{name}_proj") for name in "qkvo"]
    return attention + [getattr(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")]


def _is_linear(module: Any) -> bool:
    """Is it a linear layer, or one with LoRA updates that add up to its weight?"""
    if type(module) is nn.Linear:
        return True
    if type(getattr(module, "base_layer", None)) is not nn.Linear or not hasattr(module, "get_delta_weight"):
        return False
    if not hasattr(module, "lora_A") or module.merged:
        return False
    return not any(
        module.lora_variant.get(name) or getattr(module.lora_B[name], "bias", None) is not None
        for name in _active(module)
    )


def _active(module: Any) -> list[str]:
    """The adapters that a LoRA layer adds now."""
    return [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]


def _read(module: Any) -> list[Tensor]:
    """The parameters that a linear layer or an embedding is made of now."""
    if not hasattr(module, "base_layer"):
        return list(module.parameters())
    updates = [part[name].weight for name in _active(module) for part in (module.lora_A, module.lora_B)]
    return [*module.base_layer.parameters(), *updates]


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, with its LoRA updates."""
    base = getattr(module, "base_layer", module)
    if base is module or not _active(module):
        return base.weight.detach(), base.bias
    return base.weight.detach() + sum(module.get_delta_weight(name) for name in _active(module)), base.bias


def _layer(layer: Any, parts: list[Any], rows: int, dtype: torch.dtype) -> Layer:
    (q, q_bias), (k, k_bias), (v, v_bias), output, gate, up, down = (_as(part, dtype) for part in parts)
    attention = layer.self_attn
    size = attention.head_dim
    weight = torch.cat([_side_by_side(q, size), _side_by_side(k, size), v])
    bias = None
    if q_bias is not None:
        bias = torch.cat([_side_by_side(q_bias, size), _side_by_side(k_bias, size), v_bias]).detach()
    scale = torch.ones(len(weight))
    scale[: len(q)] = attention.scaling
    gain = _gain(layer.post_attention_layernorm)
    return Layer(
        _epsilon(layer.input_layernorm),
        Packed(weight, bias, rows, gain=_gain(layer.input_layernorm), scale=scale),
        Packed(*output, rows),
        _epsilon(layer.post_attention_layernorm),
        Packed(*gate, rows, gain=gain),
        Packed(*up, rows, gain=gain),
        Packed(*down, rows),
    )


def _as(part: tuple[Tensor, Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Any]:
    weight, bias = part
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _side_by_side(x: Tensor, size: int) -> Tensor:
    """Rows [heads D, ...] of every head from 0 1 2 .. | a b c .. to 0 a 1 b 2 c ..."""
    return x.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)


def _gain(norm: Any) -> Tensor:
    """x / sqrt(mean(x^2) + e) * w = x / sqrt(sum(x^2) + n e) * (w sqrt(n)): the last factor, [n]."""
    return norm.weight.detach().float() * len(norm.weight) ** 0.5


def _epsilon(norm: Any) -> Tensor:
    return torch.full((), norm.variance_epsilon * len(norm.weight))
