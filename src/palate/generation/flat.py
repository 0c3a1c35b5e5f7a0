"""A decoding step of our own for Llama-shaped models on the CPU: a dozen operations a layer, and none for padding.

The model's own modules cost ten times what their products cost when a step has a few dozen tokens: Python, masks and
copies. Here all rows' tokens stand one after another in [R, H], products run from packed weights
(``flat_weights.py``), and attention is made bunch by bunch (``bunch.py``). Prompts are read the same way, without
padding; in the last layer only keys and values of a prompt's tokens are needed, but for its last. Log-probs are the
model's own up to rounding: ``agrees`` tries, once a model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from palate.generation.bunch import Bunch
from palate.generation.flat_weights import Layer, Weights

_PROMPT_TOKENS_AT_ONCE = 1024
_TRIED = (3, 5)  # tokens of the prompts that ``agrees`` tries
FEWEST_POSITIONS = max(_TRIED) + 1

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class FlatSteps:
    """Rows of one model that are being sampled; see ``decode.Steps``."""

    refills = True

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.bunches: list[Bunch] = []

    def read(self, prompts: Sequence[Sequence[int]], copies: int, steps: int) -> Tensor:
        bunch = Bunch(self.weights.shape, [len(prompt) for prompt in prompts], copies, steps)
        self.bunches.append(bunch)
        logits, first = [], 0
        while first < len(prompts):
            last, tokens = first + 1, len(prompts[first])
            while last < len(prompts) and tokens + len(prompts[last]) <= _PROMPT_TOKENS_AT_ONCE:
                tokens += len(prompts[last])
                last += 1
            logits.append(self._read(bunch, first, prompts[first:last]))
            first = last
        return torch.cat(logits)

    def _read(self, bunch: Bunch, number: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prompts ``number``, ``number`` + 1, ... of a bunch: their keys and values, and the logits after them."""
        weights = self.weights
        shape, heads = weights.shape, weights.heads
        x = torch.nn.functional.embedding(torch.tensor([t for prompt in prompts for t in prompt]), weights.embedding)
        turns = torch.cat([weights.turns[: len(prompt)] for prompt in prompts])
        ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0).tolist()
        spans = [slice(end - len(prompt), end) for end, prompt in zip(ends, prompts, strict=True)]
        for depth, layer in enumerate(weights.layers):
            queries, key_values = self._query_key_values(depth, x, turns)
            last = depth == shape.layers - 1
            mixed = torch.empty(len(prompts) if last else len(x), heads * shape.size)
            for place, span in enumerate(spans):
                bunch.write_prompt(depth, number + place, key_values[span])
                asked = slice(span.stop - 1, span.stop) if last else span
                q, (k, v) = queries[asked].flatten(1, 2), key_values[span].unbind(1)
                k, v = (y.repeat_interleave(heads // shape.heads, 1) if heads > shape.heads else y for y in (k, v))
                q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))
                out = _flash(q, k, v, 0.0, not last, scale=1.0)[0]
                mixed[place if last else span] = out[0].transpose(0, 1).flatten(1)
            if last:
                x = x[torch.tensor(ends) - 1]
            x = layer.output.plus(mixed, x)
            x = _feed_forward(layer, x)
        return weights.head(_scaled(x, weights.epsilon))

    def step(self, tokens: Tensor, position: Tensor) -> Tensor:
        weights = self.weights
        x = torch.nn.functional.embedding(tokens, weights.embedding)
        turns = weights.turns[position]
        for bunch in self.bunches:
            bunch.begin_token()
        for depth, layer in enumerate(weights.layers):
            queries, key_values = self._query_key_values(depth, x, turns)
            mixed, begin = [], 0
            for bunch in self.bunches:
                end = begin + bunch.rows
                mixed.append(bunch.attend(depth, queries[begin:end], key_values[begin:end]))
                begin = end
            x = layer.output.plus(mixed[0] if len(mixed) == 1 else torch.cat(mixed), x)
            x = _feed_forward(layer, x)
        return weights.head(_scaled(x, weights.epsilon))

    def _query_key_values(self, depth: int, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [n, key-value heads, G, D] and keys and values [n, 2, key-value heads, D] of tokens [n, H]."""
        weights, layer = self.weights, self.weights.layers[depth]
        _, heads, size = weights.shape
        both = layer.query_key_value(_scaled(x, layer.attention_epsilon))
        turning = both[:, : (weights.heads + heads) * size].unflatten(1, (-1, size // 2, 2))
        torch.view_as_complex(turning).mul_(turns)
        queries = both[:, : weights.heads * size].unflatten(1, (heads, -1, size))
        return queries, both[:, weights.heads * size :].unflatten(1, (2, heads, size))

    def drop(self, done: Tensor) -> Tensor:
        orders, begin = [], 0
        for bunch, part in zip(self.bunches, done.split([bunch.rows for bunch in self.bunches]), strict=True):
            rows = bunch.rows
            order = bunch.drop(part) if bool(part.any()) else torch.arange(rows)
            orders.append(order + begin)
            begin += rows
        self.bunches = [bunch for bunch in self.bunches if bunch.rows]
        return torch.cat(orders)


def _scaled(x: Tensor, epsilon: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + epsilon); the rest of the norm is in the weights."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x * torch.addcmul(epsilon, length, length).rsqrt_()


def _feed_forward(layer: Layer, x: Tensor) -> Tensor:
    h = _scaled(x, layer.feed_forward_epsilon)
    return layer.down.plus(layer.up.times(h, layer.gate.silu(h)), x)


def agrees(model: nn.Module, weights: Weights) -> bool:
    """Does the flat way give the model's own logits? Tried with two prompts, two rows each, and one token more."""
    size = len(weights.embedding)
    rows = [[(7 * i + 3) % size for i in range(length)] for length in _TRIED]
    steps = FlatSteps(weights)
    low = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    first = steps.read(rows, 2, 2)
    token = torch.full((4,), 1 % size)
    second = steps.step(token, torch.tensor(_TRIED).repeat_interleave(2))[::2]
    for row, *ours in zip(rows, first, second, strict=True):
        ids = torch.tensor([[*row, 1 % size]])
        own = model(input_ids=ids, use_cache=False).logits[0, -2:].float()
        if own.shape[-1] != size or not _near(torch.stack(ours), own, low=low):
            return False
    return True


def _near(ours: Tensor, own: Tensor, *, low: bool) -> bool:
    """Are two models' logits [n, V] one model's up to rounding?"""
    if low:  # of all together: every layer rounds, and the largest of thousands of differences says little
        ours, own = (x - x.mean(-1, keepdim=True) for x in (ours, own))
        return bool((ours - own).norm() <= 5e-2 * own.norm())
    return torch.allclose(ours.log_softmax(-1), own.log_softmax(-1), atol=1e-3, rtol=1e-3)
