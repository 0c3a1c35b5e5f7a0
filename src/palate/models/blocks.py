"""The two halves of a Llama layer on a flat array of tokens, with gradients written by hand.

    x + o( attention( norm(x) ) )          x + down( silu(gate(norm(x))) * up(norm(x)) )

By themselves, automatic gradients keep what every single operation read. Here each half keeps its input and the results
of its matrix products; what is made of them number by number (norm, silu, the product) is cheap, and made again in the
backward pass. That is two fifths less to keep for every token, and fewer passes over memory. Once differentiable.

Where a half holds anything but plain linear layers (an adapter, a hook, autocast) its modules are called one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Call(NamedTuple):
    """One attention: queries [start, stop) over keys in the given slices; causal, or by a mask [1, 1, queries, keys]."""

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None


class Places(NamedTuple):
    """Of one layer: which tokens go on, where everybody stands, and who sees whom."""

    read: Tensor | None  # int64 [A], the tokens whose states go on; None = all
    q_turn: tuple[Tensor, Tensor]  # cosine and sine of those tokens' positions, [A, 1, D/2]
    k_turn: tuple[Tensor, Tensor]  # of all, [L, 1, D/2]
    calls: Sequence[Call]


def attention_half(layer: Any, x: Tensor, places: Places) -> Tensor:
    """x, [L, H], plus what its attention adds, of the tokens that go on: [A, H]."""
    part, norm = layer.self_attn, layer.input_layernorm
    projections = (part.q_proj, part.k_proj, part.v_proj)
    if part.o_proj.bias is None and not hasattr(part, "q_norm") and _are_plain(x, *projections, part.o_proj):
        weights = (*(p.weight for p in projections), part.o_proj.weight, *(p.bias for p in projections))
        found: Tensor = _AttentionHalf.apply(x, norm.weight, norm.variance_epsilon, *weights, places, part.head_dim)  # type: ignore[no-untyped-call]
        return found
    h = rms_norm(norm, x)
    k, v = part.k_proj(h), part.v_proj(h)
    if places.read is not None:
        x, h = x[places.read], h[places.read]
    q = part.q_proj(h)
    if hasattr(part, "q_norm"):  # Qwen 3: of each head by itself
        q, k = (
            rms_norm(each, y.unflatten(-1, (-1, part.head_dim))) for each, y in ((part.q_norm, q), (part.k_norm, k))
        )
        q, k = q.flatten(-2), k.flatten(-2)
    return x + part.o_proj(_Attention.apply(q, k, v, places, part.head_dim))  # type: ignore[no-untyped-call]


def feed_forward_half(layer: Any, x: Tensor) -> Tensor:
    """x plus what its feed-forward layer adds, [A, H]."""
    part, norm = layer.mlp, layer.post_attention_layernorm
    linears = (part.gate_proj, part.up_proj, part.down_proj)
    if all(linear.bias is None for linear in linears) and _are_plain(x, *linears):
        weights = (linear.weight for linear in linears)
        found: Tensor = _FeedForwardHalf.apply(x, norm.weight, norm.variance_epsilon, *weights)  # type: ignore[no-untyped-call]
        return found
    return x + part(rms_norm(norm, x))


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in a few passes."""
    found: Tensor = _RMSNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return found


def _are_plain(x: Tensor, *linears: Any) -> bool:
    """Is each just ``x W^T + b`` in the type of the states, with nobody listening?"""
    return not torch.is_autocast_enabled("cpu") and all(
        type(linear) is nn.Linear
        and linear.weight.dtype == x.dtype
        and not (linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks)
        for linear in linears
    )


class _FeedForwardHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, epsilon: float, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor
    ) -> Tensor:
        scale = _inverse_size(x, epsilon)
        h = _normed(x, norm, scale)
        gate, up = h @ gate_weight.T, h @ up_weight.T
        ctx.save_for_backward(x, norm, scale, gate_weight, up_weight, down_weight, gate, up)
        return torch.addmm(x, functional.silu(gate).mul_(up), down_weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, scale, gate_weight, up_weight, down_weight, gate, up = ctx.saved_tensors
        wants_gate, wants_up, wants_down = ctx.needs_input_grad[3:6]
        opened = functional.silu(gate)
        down_grad = grad.T @ (opened * up) if wants_down else None
        product_grad = grad @ down_weight
        up_grad = opened.mul_(product_grad)
        gate_grad = torch.ops.aten.silu_backward(product_grad.mul_(up), gate)
        h = _normed(x, norm, scale)
        gate_weight_grad = gate_grad.T @ h if wants_gate else None
        up_weight_grad = up_grad.T @ h if wants_up else None
        h_grad = torch.mm(up_grad, up_weight, out=h).addmm_(gate_grad, gate_weight)
        x_grad, norm_grad = _norm_gradients(h_grad, x, norm, scale)
        return x_grad.add_(grad), norm_grad, None, gate_weight_grad, up_weight_grad, down_grad


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        epsilon: float,
        q_weight: Tensor,
        k_weight: Tensor,
        v_weight: Tensor,
        o_weight: Tensor,
        q_bias: Tensor | None,
        k_bias: Tensor | None,
        v_bias: Tensor | None,
        places: Places,
        size: int,
    ) -> Tensor:
        scale = _inverse_size(x, epsilon)
        h = _normed(x, norm, scale)
        k, v = functional.linear(h, k_weight, k_bias), functional.linear(h, v_weight, v_bias)
        going_on = x if places.read is None else x[places.read]
        h = h if places.read is None else h[places.read]
        attended = _attended(functional.linear(h, q_weight, q_bias), k, v, places, size)
        ctx.save_for_backward(x, norm, scale, q_weight, k_weight, v_weight, o_weight, *attended)
        ctx.places = places
        return torch.addmm(going_on, attended[3].view(len(going_on), -1).to(x.dtype), o_weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, scale, q_weight, k_weight, v_weight, o_weight, *attended = ctx.saved_tensors
        read = ctx.places.read
        wants_q, wants_k, wants_v, wants_o = ctx.needs_input_grad[3:7]
        wants_q_bias, wants_k_bias, wants_v_bias = ctx.needs_input_grad[7:10]
        o_grad = grad.T @ attended[3].view(len(grad), -1).to(x.dtype) if wants_o else None
        q_grad, k_grad, v_grad = _attention_gradients(grad @ o_weight, attended, ctx.places)
        h = _normed(x, norm, scale)
        k_weight_grad, v_weight_grad = k_grad.T @ h if wants_k else None, v_grad.T @ h if wants_v else None
        q_weight_grad = q_grad.T @ (h if read is None else h[read]) if wants_q else None
        h_grad = torch.mm(k_grad, k_weight, out=h).addmm_(v_grad, v_weight)
        if read is None:
            h_grad.addmm_(q_grad, q_weight)
        else:
            h_grad.index_add_(0, read, q_grad @ q_weight)
        x_grad, norm_grad = _norm_gradients(h_grad, x, norm, scale)
        x_grad = x_grad.add_(grad) if read is None else x_grad.index_add_(0, read, grad)
        return (
            x_grad,
            norm_grad,
            None,
            q_weight_grad,
            k_weight_grad,
            v_weight_grad,
            o_grad,
            q_grad.sum(0) if wants_q_bias else None,
            k_grad.sum(0) if wants_k_bias else None,
            v_grad.sum(0) if wants_v_bias else None,
            None,
            None,
        )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = _inverse_size(x, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return _normed(x, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        x_grad, weight_grad = _norm_gradients(grad_rows, rows, weight, scale.view(-1, 1))
        return x_grad.view(x.shape), weight_grad, None


def _inverse_size(x: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), [..., 1], in float32 at least."""
    size = torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True)
    return size.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _normed(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (x * scale).mul_(weight).to(x.dtype)


def _norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``weight * x^`` with x^ = scale x, [n, H]: dx = scale * (w g - x^ mean(w g x^)), dw = sum(g x^)."""
    low, grad, weight = x.dtype, wide(grad), wide(weight)
    normed = x * scale
    product = grad * normed
    weight_grad = product.sum(0)
    mean = torch.mv(product, weight).div_(x.shape[-1])
    x_grad = torch.mul(grad, weight, out=product).addcmul_(normed, mean[:, None], value=-1).mul_(scale)
    return x_grad.to(low), weight_grad


class _Attention(torch.autograd.Function):
    """Of flat q [A, heads D], k, v [L, key-value heads D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, places: Places, size: int) -> Tensor:
        attended = _attended(q, k, v, places, size)
        ctx.save_for_backward(*attended)
        ctx.places = places
        return attended[3].view(len(q), -1).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_attention_gradients(grad, ctx.saved_tensors, ctx.places), None, None


def _attended(q: Tensor, k: Tensor, v: Tensor, places: Places, size: int) -> list[Tensor]:
    """Rotary embedding and attention, call by call: turned q, k and v by heads, [n, heads, D], what comes out, normalisers.

    In float32 at least: the kernel's backward is slower in bf16, up to three times for short rows.
    """
    q, k, v = (x.view(len(x), -1, size) for x in (q, k, wide(v)))
    copies = q.shape[1] // k.shape[1]
    q, k = _turned(q, *places.q_turn), _turned(k, *places.k_turn)
    out = torch.empty_like(q)
    q_heads, k_heads, v_heads, out_heads = _by_heads(q), _by_heads(k, copies), _by_heads(v, copies), _by_heads(out)
    normalisers = []
    for call in places.calls:
        part, normaliser = _flash(
            _taken(q_heads, call.queries),
            _taken(k_heads, *call.keys),
            _taken(v_heads, *call.keys),
            0.0,
            call.mask is None,
            attn_mask=_mask(call, q),
        )
        _taken(out_heads, call.queries).copy_(part)
        normalisers.append(normaliser)
    return [q, k, v, out, *normalisers]


def _attention_gradients(grad: Tensor, attended: Sequence[Tensor], places: Places) -> tuple[Tensor, Tensor, Tensor]:
    """Of flat q, k and v, in the type of ``grad``, from that of what attention gives."""
    q, k, v, out, *normalisers = attended
    copies = q.shape[1] // k.shape[1]
    q_heads, k_heads, v_heads, out_heads = _by_heads(q), _by_heads(k, copies), _by_heads(v, copies), _by_heads(out)
    grad_heads = _by_heads(wide(grad).view(q.shape))
    q_grad = torch.empty_like(q)
    k_grad, v_grad = (q.new_zeros(len(k), q.shape[1], q.shape[2]) for _ in range(2))
    q_grad_heads, k_grad_heads, v_grad_heads = _by_heads(q_grad), _by_heads(k_grad), _by_heads(v_grad)
    for call, normaliser in zip(places.calls, normalisers, strict=True):
        q_part, k_part, v_part = _flash_backward(
            _taken(grad_heads, call.queries),
            _taken(q_heads, call.queries),
            _taken(k_heads, *call.keys),
            _taken(v_heads, *call.keys),
            _taken(out_heads, call.queries),
            normaliser,
            0.0,
            call.mask is None,
            attn_mask=_mask(call, q),
        )
        _taken(q_grad_heads, call.queries).copy_(q_part)
        begin = 0
        for keys in call.keys:
            count = keys.stop - keys.start
            _taken(k_grad_heads, keys).add_(k_part.narrow(2, begin, count))
            _taken(v_grad_heads, keys).add_(v_part.narrow(2, begin, count))
            begin += count
    if copies > 1:
        k_grad, v_grad = (x.unflatten(1, (-1, copies)).sum(2) for x in (k_grad, v_grad))
    (q_cos, q_sin), (k_cos, k_sin) = places.q_turn, places.k_turn
    q_grad, k_grad = _turned(q_grad, q_cos, -q_sin), _turned(k_grad, k_cos, -k_sin)
    q_grad, k_grad, v_grad = (x.reshape(len(x), -1).to(grad.dtype) for x in (q_grad, k_grad, v_grad))
    return q_grad, k_grad, v_grad


def _mask(call: Call, q: Tensor) -> Tensor | None:
    """In the type of the queries: of another, the kernel takes it and gives wrong numbers."""
    return None if call.mask is None else call.mask.to(q.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [n, heads, D] by halves; cos, sin: [n, 1, D/2]. With -sin: the inverse, and the gradient."""
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    half = x.shape[-1] // 2
    a, b, out_a, out_b = x[..., :half], x[..., half:], out[..., :half], out[..., half:]
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out


def _by_heads(x: Tensor, copies: int = 1) -> Tensor:
    """[n, heads, D] -> [1, heads * copies, n, D]: a view when each head stands once."""
    return (x if copies == 1 else x.repeat_interleave(copies, 1)).transpose(0, 1)[None]


def _taken(x: Tensor, *slices: slice) -> Tensor:
    """Some tokens of [1, heads, n, D]."""
    parts = [x.narrow(2, s.start, s.stop - s.start) for s in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
