"""Keys and values of rows that began together, and the attention of their next tokens.

A bunch is a few rows whose prompts are of like length, so that hardly any column is padding. Prompts end in the same
column (shorter ones begin later), and every row writes its next token into the same column. Where several rows share a
prompt, the prompt's keys and values are held and read once: its columns are one matrix product for all its rows, and
only what the rows drew themselves is held for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """What the keys of one token are, in all layers."""

    layers: int
    heads: int  # key-value heads
    size: int  # of a head, D


# Columns that are added at once. Matrices that lie in memory without gaps are read twice as fast, so attention runs over
# all columns that there are, hiding those that are still empty: few, for they are read in vain.
_GROWTH = 32


class Bunch:
    """P prompts with K rows each, prompt by prompt until the first row ends.

    Args:
        lengths: tokens of each prompt.
        copies: K.
        steps: tokens that are drawn after a prompt at most.
    """

    def __init__(self, shape: Shape, lengths: Sequence[int], copies: int, steps: int) -> None:
        self.copies, self.width, self.rows = copies, max(lengths), len(lengths) * copies
        self.filled = self.width if copies == 1 else 0  # columns of ``own`` that hold a token
        self.most = self.filled + steps
        self.own = _columns(shape, self.rows, min(self.filled + _GROWTH, self.most))
        self.prompt = self.own if copies == 1 else _columns(shape, len(lengths), self.width)
        # Numbers to add to scores: -inf before a prompt begins, and in empty columns.
        before = self.width - torch.tensor(lengths)
        hidden = torch.where(torch.arange(self.width) < before[:, None, None], float("-inf"), 0.0)  # [P, 1, width]
        empty = torch.full((1, 1, self.own.shape[-2]), float("-inf"))
        self.mask, self.prompt_mask = empty, hidden  # [n or 1, 1, columns of ``own``], [P, 1, width]
        if copies == 1:
            self.mask = empty.repeat(len(lengths), 1, 1)
            self.mask[:, :, : self.width] = hidden
        # Of each row its place among all the prompts' rows, prompt K + sample; None: in that order, none missing.
        self.place: Tensor | None = None

    def write_prompt(self, layer: int, number: int, key_values: Tensor) -> None:
        """Keys and values [n, 2, heads, D] of all tokens of a prompt."""
        column = self.width - len(key_values)
        self.prompt[layer, :, number, :, column : self.width] = key_values.permute(1, 2, 0, 3)

    def begin_token(self) -> None:
        """The next ``attend`` of every layer is for one token more."""
        if self.filled == self.own.shape[-2]:
            self._hold(min(self.filled + _GROWTH, self.most))
            self.mask = torch.nn.functional.pad(self.mask, (0, self.own.shape[-2] - self.filled), value=float("-inf"))
        self.mask[:, :, self.filled] = 0
        self.filled += 1
        self._keys, self._values = _matrices(self.own[:, :, : self.rows])
        if self.copies > 1:
            self._prompt_keys, self._prompt_values = _matrices(self.prompt)

    def attend(self, layer: int, queries: Tensor, key_values: Tensor) -> Tensor:
        """Write one token a row and attend to all of its row.

        Args:
            queries: [n, heads, G, D], scaled; each key serves G queries.
            key_values: [n, 2, heads, D].

        Returns:
            [n, heads G D].
        """
        rows, heads, serves, size = queries.shape
        self.own[layer, :, :rows, :, self.filled - 1] = key_values.transpose(0, 1)
        flat = queries.reshape(rows * heads, serves, size)
        scores = torch.bmm(flat, self._keys[layer])
        scores.view(rows, heads * serves, -1).add_(self.mask)
        if self.copies == 1:
            return torch.bmm(scores.softmax(-1), self._values[layer]).view(rows, -1)
        before = self._by_prompt(queries)
        prompt_scores = torch.bmm(before, self._prompt_keys[layer])
        prompt_scores.view(len(self.prompt_mask), -1, self.width).add_(self.prompt_mask)
        whole = torch.cat([self._by_row(prompt_scores, heads, serves), scores], -1).softmax(-1)
        weights = self._by_prompt(whole[..., : self.width].view(rows, heads, serves, -1))
        mixed = self._by_row(torch.bmm(weights, self._prompt_values[layer]), heads, serves)
        return mixed.baddbmm_(whole[..., self.width :], self._values[layer]).view(rows, -1)

    def _by_prompt(self, x: Tensor) -> Tensor:
        """[n, heads, G, any] -> [P heads, K G, any]; zeros for rows that have ended."""
        _, heads, serves, size = x.shape
        if self.place is not None:
            x = x.new_zeros(self.prompt.shape[2] * self.copies, heads, serves, size).index_copy_(0, self.place, x)
        return x.view(-1, self.copies, heads, serves, size).transpose(1, 2).reshape(-1, self.copies * serves, size)

    def _by_row(self, x: Tensor, heads: int, serves: int) -> Tensor:
        """The way back: [P heads, K G, any] -> [n heads, G, any], a copy."""
        x = x.view(-1, heads, self.copies, serves, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        return (x if self.place is None else x[self.place]).reshape(-1, serves, x.shape[-1])

    def drop(self, done: Tensor) -> Tensor:
        """Forget rows. The last rows move into the holes: a row that ends costs one row's copy at most.

        Args:
            done: bool [n].

        Returns:
            int64 [n - number done], for each row that is left its number before.
        """
        order = torch.arange(self.rows)
        left = self.rows - int(done.sum())
        holes = order[:left][done[:left]]
        movers = order[left:][~done[left:]]
        if len(movers):
            self.own[:, :, holes, :, : self.filled] = self.own[:, :, movers, :, : self.filled]
        order[holes] = movers
        order = order[:left]
        self.rows = left
        if self.copies > 1:
            self.place = order if self.place is None else self.place[order]
        else:
            self.mask = self.mask[order]
        self._shrink()
        return order

    def _shrink(self) -> None:
        """Give memory back whenever half of it serves no row any more."""
        if 0 < self.rows <= self.own.shape[2] // 2:
            self._hold(self.own.shape[-2])
        if self.place is not None and len(self.place):
            used, new = torch.unique(self.place // self.copies, return_inverse=True)
            if len(used) <= self.prompt.shape[2] // 2:
                self.prompt = self.prompt[:, :, used].contiguous()
                self.prompt_mask = self.prompt_mask[used]
                self.place = new * self.copies + self.place % self.copies

    def _hold(self, columns: int) -> None:
        """Move to memory of so many columns, and of no more rows than there are."""
        layers, two, _, heads, _, size = self.own.shape
        held = self.own.new_zeros(layers, two, self.rows, heads, columns, size)
        held[..., : self.filled, :] = self.own[:, :, : self.rows, :, : self.filled]
        self.own = held
        if self.copies == 1:
            self.prompt = held


def _columns(shape: Shape, rows: int, columns: int) -> Tensor:
    """[layers, keys and values, rows, heads, columns, D]. Zeros, not junk: a hidden column has weight 0, but 0 * NaN is
    NaN."""
    return torch.zeros(shape.layers, 2, rows, shape.heads, columns, shape.size)


def _matrices(columns: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys [rows heads, D, columns] and values [rows heads, columns, D] of each layer, views."""
    keys, values = columns.flatten(2, 3).unbind(1)
    return keys.transpose(-1, -2).unbind(0), values.unbind(0)
