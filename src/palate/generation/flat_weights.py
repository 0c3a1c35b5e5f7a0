"""The weights of a Llama-shaped model, as a flat decoding step wants them: few, packed, and with the constants inside.

* queries, keys and values are one product, scaled; the gain of the norm before a product is in its weights;
* the two halves that rotary embedding turns into each other lie side by side, so that a turn is one complex product;
* an adapter's low-rank update is added.

The copies are made anew for every sampling, for weights change between two. ``None`` says that the model is of another
build, device or dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palate.generation.bunch import Shape
from palate.generation.packed import MOST_WEIGHTS, Packed, available
from palate.models import trunk


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


def weights_of(model: nn.Module, rows: int, positions: int) -> Weights | None:
    """A model's weights as they are now, adapters as they are switched now.

    Args:
        rows: that are decoded at once, about.
        positions: tokens of the longest row.
    """
    core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not (available() and hasattr(core, "base_model") and trunk.supported(core) and _is_plain(core)):
        return None
    base, head = core.base_model, core.get_output_embeddings()
    if type(base.embed_tokens) is not nn.Embedding or type(head) is not nn.Linear:
        return None
    linears: list[list[Any]] = [
        [_linear(getattr(block, name)) for block, name in _names(layer)] for layer in base.layers
    ]
    parts = [part for layer in linears for part in layer] + [(head.weight, head.bias)]
    if any(part is None for part in parts):
        return None
    tensors = [tensor for part in parts if part for tensor in part if tensor is not None] + [base.embed_tokens.weight]
    if {tensor.dtype for tensor in tensors} != {torch.float32} or {t.device.type for t in tensors} != {"cpu"}:
        return None
    if sum(tensor.numel() for tensor in tensors) > MOST_WEIGHTS:
        return None
    attention = base.layers[0].self_attn
    size = attention.head_dim
    shape = Shape(len(linears), len(linears[0][1][0]) // size, size)
    heads = len(linears[0][0][0]) // size
    cos, sin = (x[0, :, None, : size // 2].float() for x in base.rotary_emb(head.weight, torch.arange(positions)[None]))
    return Weights(
        shape,
        heads,
        base.embed_tokens.weight.detach(),
        [_layer(layer, parts, rows, heads) for layer, parts in zip(base.layers, linears, strict=True)],
        _epsilon(base.norm),
        Packed(head.weight * _gain(base.norm), head.bias, rows),
        torch.complex(cos, sin),
    )


def _is_plain(core: Any) -> bool:
    """Nothing hangs on a module that its weights do not show, and no norm is inside the attention."""
    attention = core.base_model.layers[0].self_attn
    return not hasattr(attention, "q_norm") and not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in core.modules()
    )


def _names(layer: Any) -> list[tuple[Any, str]]:
    attention = [(layer.self_attn, f"{name}_proj") for name in "qkvo"]
    return attention + [(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")]


def _linear(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer, with its LoRA updates; None when it is anything else."""
    if type(module) is nn.Linear:
        return module.weight.detach(), module.bias
    base = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or not hasattr(module, "get_delta_weight") or not hasattr(module, "lora_A"):
        return None
    if module.merged:
        return None
    if module.disable_adapters:
        return base.weight.detach(), base.bias
    active = [name for name in module.active_adapters if name in module.lora_A]
    if any(module.lora_variant.get(name) or getattr(module.lora_B[name], "bias", None) is not None for name in active):
        return None
    return base.weight.detach() + sum(module.get_delta_weight(name) for name in active), base.bias


def _layer(layer: Any, parts: list[Any], rows: int, heads: int) -> Layer:
    (q, q_bias), (k, k_bias), (v, v_bias), output, gate, up, down = parts
    attention = layer.self_attn
    size, scaling = attention.head_dim, attention.scaling
    turned = [(_side_by_side(q, size) * scaling, q_bias), (_side_by_side(k, size), k_bias), (v, v_bias)]
    weight = torch.cat([each for each, _ in turned]) * _gain(layer.input_layernorm)
    bias = None
    if q_bias is not None:
        bias = torch.cat([_side_by_side(q_bias, size) * scaling, _side_by_side(k_bias, size), v_bias]).detach()
    gain = _gain(layer.post_attention_layernorm)
    return Layer(
        _epsilon(layer.input_layernorm),
        Packed(weight, bias, rows),
        Packed(output[0], output[1], rows),
        _epsilon(layer.post_attention_layernorm),
        Packed(gate[0] * gain, gate[1], rows),
        Packed(up[0] * gain, up[1], rows),
        Packed(down[0], down[1], rows),
    )


def _side_by_side(x: Tensor, size: int) -> Tensor:
    """Rows [heads D, ...] of every head from 0 1 2 .. | a b c .. to 0 a 1 b 2 c ..."""
    return x.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)


def _gain(norm: Any) -> Tensor:
    """x / sqrt(mean(x^2) + e) * w = x / sqrt(sum(x^2) + n e) * (w sqrt(n)): the last factor, [n]."""
    return norm.weight.detach() * len(norm.weight) ** 0.5


def _epsilon(norm: Any) -> Tensor:
    return torch.full((), norm.variance_epsilon * len(norm.weight))
