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

from palate.models.activations import Context, checkpointed
from palate.models.blocks import Call, Places, attention_half, feed_forward_half, rms_norm, wide
from palate.models.rotary import has_fixed_angles

# pre-norm, RMS norm, rotary halves, gated feed-forward
KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
QUERIES_AT_ONCE = 192  # responses of a group that share one masked attention call


class Row(NamedTuple):
    """One row: its real tokens, and the first of those positions whose state is read."""

    ids: list[int]
    first: int


class Layout(NamedTuple):
    """Where everything stands in the flat arrays."""

    ids: Tensor  # int64 [L]
    position: Tensor  # int64 [L], within its row
    read: Tensor  # int64 [A], tokens whose last state is computed: of each row from ``first`` on, row by row
    calls: list[Call]  # attention of all layers but the last
    last_calls: list[Call]  # of the last: queries count in ``read``


def supported(model: Any) -> bool:
    """Is the trunk of a known build, without a sliding window and with angles that no row's length changes, on the CPU?"""
    base = model.base_model
    config = base.config
    return (
        type(base).__name__ in KNOWN
        and base.embed_tokens.weight.device.type == "cpu"
        and getattr(config, "hidden_act", None) in ("silu", "swish")
        and not any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
        and (type(base).__name__ != "MistralModel" or config.sliding_window is None)
        and not (base.training and getattr(config, "attention_dropout", 0.0))
        and has_fixed_angles(base)
    )


def layout(groups: Sequence[Sequence[Row]]) -> Layout:
    """Lay out groups of rows; the rows of a group share what they have in common."""
    ids: list[int] = []
    position: list[int] = []
    read: list[int] = []
    calls: list[Call] = []
    last_calls: list[Call] = []
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
            calls.append(Call(mine, (mine,), None))
        else:
            if shared:
                prefix = slice(start, start + shared)
                calls.append(Call(prefix, (prefix,), None))
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
) -> list[Call]:
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
        calls.append(Call(slice(first + begin, first + end), keys, mask))
        begin = end
    return calls


def states(model: Any, plan: Layout, again: Context | None = None) -> Tensor:
    """The trunk's last hidden states, after the final norm, of the tokens in ``plan.read``: [A, H].

    Args:
        again: given, only what enters a layer is kept for the backward pass, and the layer is run again in this context.
    """
    base = model.base_model
    x = _embedded(base.embed_tokens, plan.ids)
    turns = base.rotary_emb(wide(x[:0]), plan.position[None])
    cos, sin = (half[0, :, None, : half.shape[-1] // 2] for half in turns)
    places = Places(None, (cos, sin), (cos, sin), plan.calls)
    last = Places(plan.read, (cos[plan.read], sin[plan.read]), (cos, sin), plan.last_calls)
    for number, layer in enumerate(base.layers):
        here = last if number == len(base.layers) - 1 else places
        x = _layer(layer, x, here) if again is None else checkpointed(again)(_layer, layer, x, here)
    return rms_norm(base.norm, x)


def _layer(layer: Any, x: Tensor, places: Places) -> Tensor:
    return feed_forward_half(layer, attention_half(layer, x, places))


def _embedded(module: Any, ids: Tensor) -> Tensor:
    if type(module) is nn.Embedding and module.weight.dtype == torch.bfloat16 and module.padding_idx is None:
        return _Lookup.apply(module.weight, ids)  # type: ignore[no-untyped-call,no-any-return]
    return module(ids)  # type: ignore[no-any-return]


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
