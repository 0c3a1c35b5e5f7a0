"""A Llama-shaped trunk on real tokens only: no padding, a shared prompt once, the last layer only where it is read.

The rows of a batch stand one after another in a flat array [L, H], so that every matrix product runs on real tokens.
Attention is made group by group, and three things are left out that nobody would see:

* what several rows of a group begin with is computed once; each row then sees that prefix and itself;
* tokens after the last state that is read;
* in the last layer, all but keys and values of tokens whose own state is not read (most of a prompt).

It uses the model's own modules, so adapters work, and gives the model's own numbers up to rounding; ``agrees`` finds out,
once a model, whether it does. Models of another build and other devices take the padded way in ``forward.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model")  # pre-norm, RMS norm, rotary halves, gated feed-forward
QUERIES_AT_ONCE = 192  # responses of a group that share one masked attention call

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Row(NamedTuple):
    """One row: its real tokens, and the first of those positions whose state is read."""

    ids: list[int]
    first: int


class _Call(NamedTuple):
    """One attention: queries [start, stop) over keys in the given slices; causal, or by a mask [1, 1, queries, keys]."""

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None


class Layout(NamedTuple):
    """Where everything stands in the flat arrays."""

    ids: Tensor  # int64 [L]
    position: Tensor  # int64 [L], within its row
    read: Tensor  # int64 [A], tokens whose last state is computed: of each row from ``first`` on, row by row
    calls: list[_Call]  # attention of all layers but the last
    last_calls: list[_Call]  # of the last: queries count in ``read``


def supported(model: Any) -> bool:
    """Is the trunk of a known build, without a sliding window, on the CPU?"""
    base = model.base_model
    config = base.config
    return (
        type(base).__name__ in KNOWN
        and base.embed_tokens.weight.device.type == "cpu"
        and getattr(config, "hidden_act", None) in ("silu", "swish")
        and not any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
        and (type(base).__name__ != "MistralModel" or config.sliding_window is None)
        and not (base.training and getattr(config, "attention_dropout", 0.0))
    )


def layout(groups: Sequence[Sequence[Row]]) -> Layout:
    """Lay out groups of rows; the rows of a group share what they have in common."""
    ids: list[int] = []
    position: list[int] = []
    read: list[int] = []
    calls: list[_Call] = []
    last_calls: list[_Call] = []
    for rows in groups:
        start, first_read = len(ids), len(read)
        shared = _shared(rows)
        ids += rows[0].ids[:shared]
        position += range(shared)
        owner = [-1] * shared  # which row a token belongs to; -1 = all
        for number, row in enumerate(rows):
            read += range(len(ids) + row.first - shared, len(ids) + len(row.ids) - shared)
            ids += row.ids[shared:]
            position += range(shared, len(row.ids))
            owner += [number] * (len(row.ids) - shared)
        mine = slice(start, len(ids))
        if len(rows) == 1:
            calls.append(_Call(mine, (mine,), None))
        else:
            if shared:
                prefix = slice(start, start + shared)
                calls.append(_Call(prefix, (prefix,), None))
            queries = list(range(start + shared, len(ids)))
            calls += _masked_calls(queries, start + shared, start, shared, owner, position)
        last_calls += _masked_calls(read[first_read:], first_read, start, shared, owner, position)
    return Layout(torch.tensor(ids), torch.tensor(position), torch.tensor(read), calls, last_calls)


def _shared(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with, before the first whose state is read by any."""
    limit = min(row.first for row in rows)
    if len(rows) == 1:
        return limit
    columns = zip(*(row.ids[:limit] for row in rows), strict=True)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), limit)


def _masked_calls(
    queries: list[int], first: int, start: int, shared: int, owner: list[int], position: list[int]
) -> list[_Call]:
    """Attention of some tokens of a group, a few rows at a time, over the prefix and those rows.

    Args:
        queries: flat numbers of the tokens, row by row; ``first``: where the first of them stands among the queries.
        start: of the group, in the flat arrays; shared: tokens of its prefix.
        owner: row of each token of the group. position: of every flat token.
    """
    calls = []
    begin = 0
    while begin < len(queries):
        end = min(begin + QUERIES_AT_ONCE, len(queries))
        while end < len(queries) and owner[queries[end] - start] == owner[queries[end - 1] - start]:
            end += 1
        part = queries[begin:end]
        rows = {owner[query - start] for query in part}
        own = [start + i for i in range(shared, len(owner)) if owner[i] in rows]
        keys = (
            (slice(start, own[-1] + 1),)
            if own[0] == start + shared
            else (
                slice(start, start + shared),
                slice(own[0], own[-1] + 1),
            )
        )
        key = torch.cat([torch.arange(s.start, s.stop) for s in keys])
        who, where = torch.tensor(owner)[key - start], torch.tensor(position)[key]
        query = torch.tensor(part)
        query_who, query_where = torch.tensor(owner)[query - start, None], torch.tensor(position)[query, None]
        seen = ((who == query_who) | (who == -1)) & (where <= query_where)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[None, None]
        calls.append(_Call(slice(first + begin, first + end), keys, mask))
        begin = end
    return calls


def states(model: Any, plan: Layout) -> Tensor:
    """The trunk's last hidden states, after the final norm, of the tokens in ``plan.read``: [A, H]."""
    base = model.base_model
    x = _embedded(base.embed_tokens, plan.ids)
    turns = base.rotary_emb(_wide(x[:0]), plan.position[None])
    cos, sin = (half[0, :, None, : half.shape[-1] // 2] for half in turns)
    for number, layer in enumerate(base.layers):
        attention = layer.self_attn
        h = _norm(layer.input_layernorm, x)
        k, v = attention.k_proj(h), attention.v_proj(h)
        q_turn, calls = (cos, sin), plan.calls
        if number == len(base.layers) - 1:
            x, h, q_turn, calls = x[plan.read], h[plan.read], (cos[plan.read], sin[plan.read]), plan.last_calls
        q = attention.q_proj(h)
        x = x + attention.o_proj(_Attention.apply(q, k, v, q_turn, (cos, sin), calls, attention.head_dim))
        x = x + layer.mlp(_norm(layer.post_attention_layernorm, x))
    return _norm(base.norm, x)


def _embedded(module: Any, ids: Tensor) -> Tensor:
    if type(module) is nn.Embedding and module.weight.dtype == torch.bfloat16 and module.padding_idx is None:
        return _Lookup.apply(module.weight, ids)  # type: ignore[no-untyped-call,no-any-return]
    return module(ids)  # type: ignore[no-any-return]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(module: Any, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


class _Lookup(torch.autograd.Function):
    """Rows of a bf16 embedding; what a token adds to its gradient is summed in float32, however often it stands."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        seen, place = ids.unique(return_inverse=True)
        sums = torch.zeros(len(seen), ctx.shape[1], device=grad.device).index_add_(0, place, grad.float())
        return grad.new_zeros(ctx.shape).index_copy_(0, seen, sums.to(grad.dtype)), None


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), [L, H], in a few passes; within in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = _wide(x)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = scale * (w g - x^ mean(w g x^)),  x^ = x * scale."""
        x, weight, scale = ctx.saved_tensors
        low, grad, weight = x.dtype, _wide(grad), _wide(weight)
        normed = x * scale
        product = grad * normed
        weight_grad = product.sum(0)
        mean = torch.mv(product, weight).div_(x.shape[-1])
        return (grad * weight).addcmul_(normed, mean[:, None], value=-1).mul_(scale).to(low), weight_grad, None


class _Attention(torch.autograd.Function):
    """Rotary embedding and attention, call by call, of flat q [A, heads D], k, v [L, key-value heads D].

    Within in float32 at least: the kernel's backward is slower in bf16, up to three times for short rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_turn: tuple[Tensor, Tensor],
        k_turn: tuple[Tensor, Tensor],
        calls: list[_Call],
        size: int,
    ) -> Tensor:
        low, v = q.dtype, _wide(v)
        q, k, v = (x.view(len(x), -1, size) for x in (q, k, v))
        copies = q.shape[1] // k.shape[1]
        q, k = _turned(q, *q_turn), _turned(k, *k_turn)
        k, v = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (k, v))
        out = torch.empty_like(q)
        normalisers = []
        for call in calls:
            part, normaliser = _flash(
                _heads_first(q[call.queries]),
                _heads_first(_taken(k, call.keys)),
                _heads_first(_taken(v, call.keys)),
                0.0,
                call.mask is None,
                attn_mask=call.mask,
            )
            out[call.queries] = part[0].transpose(0, 1)
            normalisers.append(normaliser)
        ctx.save_for_backward(q, k, v, out, *normalisers)
        ctx.rest = (q_turn, k_turn, calls, copies)
        return out.view(len(out), -1).to(low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *normalisers = ctx.saved_tensors
        q_turn, k_turn, calls, copies = ctx.rest
        low, grad = grad.dtype, _wide(grad).view(q.shape)
        q_grad, k_grad, v_grad = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for call, normaliser in zip(calls, normalisers, strict=True):
            parts = _flash_backward(
                _heads_first(grad[call.queries]),
                _heads_first(q[call.queries]),
                _heads_first(_taken(k, call.keys)),
                _heads_first(_taken(v, call.keys)),
                _heads_first(out[call.queries]),
                normaliser,
                0.0,
                call.mask is None,
                attn_mask=call.mask,
            )
            dq, dk, dv = (part[0].transpose(0, 1) for part in parts)
            q_grad[call.queries] = dq
            begin = 0
            for keys in call.keys:
                end = begin + keys.stop - keys.start
                k_grad[keys] += dk[begin:end]
                v_grad[keys] += dv[begin:end]
                begin = end
        if copies > 1:
            k_grad, v_grad = (x.unflatten(1, (-1, copies)).sum(2) for x in (k_grad, v_grad))
        (q_cos, q_sin), (k_cos, k_sin) = q_turn, k_turn
        q_grad, k_grad = _turned(q_grad, q_cos, -q_sin), _turned(k_grad, k_cos, -k_sin)
        return *(x.reshape(len(x), -1).to(low) for x in (q_grad, k_grad, v_grad)), None, None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [n, heads, D] by halves; cos, sin: [n, 1, D/2]. With -sin: the inverse, and the gradient."""
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    half = x.shape[-1] // 2
    a, b, out_a, out_b = x[..., :half], x[..., half:], out[..., :half], out[..., half:]
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out


def _taken(x: Tensor, slices: tuple[slice, ...]) -> Tensor:
    return x[slices[0]] if len(slices) == 1 else torch.cat([x[s] for s in slices])


def _heads_first(x: Tensor) -> Tensor:
    """[n, heads, D] -> [1, heads, n, D], a view."""
    return x.transpose(0, 1)[None]
