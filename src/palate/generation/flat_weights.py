"""The weights of a Llama-shaped model, as a flat decoding step wants them: few, packed, and with the constants inside.

* queries, keys and values are one product, scaled; the gain of the norm before a product is in its weights;
* the two halves that rotary embedding turns into each other lie side by side, so that a turn is one complex product;
* an adapter's low-rank update is added.

A bf16 model's are bf16 where the processor has units for that, and only their products are; else, and with an adapter in
float32, they are widened.

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
    dtypes = {tensor.dtype for tensor in tensors}
    if not dtypes <= {torch.float32, torch.bfloat16} or {t.device.type for t in tensors} != {"cpu"}:
        return None
    if sum(tensor.numel() for tensor in tensors) > MOST_WEIGHTS:
        return None
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
