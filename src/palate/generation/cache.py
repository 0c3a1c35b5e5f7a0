"""A key-value cache that is allocated once and written in place, behind transformers' ``Cache``.

All rows of a batch stand in one buffer per layer, [rows, heads, columns, head size]. Prompts end in the same column
(shorter ones begin later), so every row writes its next token into the same column, and the distance of two columns
is the distance of two positions, as a sliding window needs it. ``transformers``' own dynamic cache copies everything
at every token: on a small model that is nine tenths of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Place:
    """Where all layers write next. An object of its own: a layer that held the cache would be a reference cycle, and
    gigabytes of buffers would wait for the garbage collector."""

    rows: slice
    past: int  # columns that the next forward reads; 0 while prompts are read
    width: int
    copies: int
    size: tuple[int, int]
    values_upright: bool


class RowCache(Cache):
    """Keys and values of the rows that are being sampled.

    Args:
        rows, columns: the buffer's size, [rows, heads, columns, head size] in each layer.
        copies: rows that share a prompt, K; prompt number p fills rows p K to (p + 1) K.
        width: tokens of the longest prompt; the first sampled token goes into this column.
        values_upright: values lie in memory as [rows, heads, head size, columns], as ``attention.py`` reads them.
    """

    def __init__(self, *, rows: int, columns: int, copies: int, width: int, values_upright: bool = False) -> None:
        self.place = _Place(slice(0, rows), 0, width, copies, (rows, columns), values_upright)
        self.filled = width
        super().__init__(layer_class_to_replicate=partial(_Layer, self.place))  # type: ignore[arg-type]

    def read_prompts(self, first: int, last: int) -> None:
        """The next forward reads prompts ``first`` to ``last`` (excluded), each for its K rows."""
        copies = self.place.copies
        self.place.rows, self.place.past = slice(first * copies, last * copies), 0

    def read_tokens(self, rows: int) -> None:
        """The next forward reads one more token in each of the first ``rows`` rows."""
        self.place.rows, self.place.past = slice(0, rows), self.filled
        self.filled += 1

    def drop(self, done: Tensor) -> Tensor:
        """Forget rows, so that the others are the first ones.

        The last rows move into the holes: a row that ends costs one row's copy at most, and nothing else moves.

        Args:
            done: bool [R], of the rows in use.

        Returns:
            int64 [R - number done], for each row that is left its number before.
        """
        order = torch.arange(len(done), device=done.device)
        left = len(done) - int(done.sum())
        holes = order[:left][done[:left]]
        movers = order[left:][~done[left:]]
        if len(movers):
            for layer in self.layers:
                layer.move(movers, holes, self.filled)  # type: ignore[union-attr]
        order[holes] = movers
        return order[:left]


class _Layer(CacheLayerMixin):
    """One layer's buffers, allocated when the layer is first used."""

    is_sliding = False  # a sliding window is cut by the mask
    keys: Any  # tensors, once the layer is used
    values: Any

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self.place.size
        # Zeros, not junk: a masked column has weight 0, but 0 * NaN is NaN.
        self.keys = key_states.new_zeros(rows, key_states.shape[1], columns, key_states.shape[-1])
        if self.place.values_upright:
            upright = value_states.new_zeros(rows, value_states.shape[1], value_states.shape[-1], columns)
            self.values = upright.transpose(-1, -2)
        else:
            self.values = value_states.new_zeros(rows, value_states.shape[1], columns, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.place.past:
            return self._append(self.keys, key_states), self._append(self.values, value_states)
        self._spread(self.keys, key_states)
        self._spread(self.values, value_states)
        return key_states, value_states

    def _append(self, buffer: Tensor, states: Tensor) -> Tensor:
        """Write one token's states; returns all of the rows' states so far, a view."""
        held = buffer[self.place.rows, :, : self.place.past + 1]
        held[:, :, -1:] = states
        return held

    def _spread(self, buffer: Tensor, states: Tensor) -> None:
        """Write a prompt's states into all rows that share it."""
        place = self.place
        target = buffer[place.rows, :, place.width - states.shape[-2] : place.width]
        target.unflatten(0, (-1, place.copies)).copy_(states[:, None])

    def move(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        if self.is_initialized:
            for buffer in (self.keys, self.values):
                buffer[targets, :, :columns] = buffer[sources, :, :columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.past + query_length, 0

    def get_seq_length(self) -> int:
        return self.place.past

    def get_max_length(self) -> int:
        return self.place.size[1]
