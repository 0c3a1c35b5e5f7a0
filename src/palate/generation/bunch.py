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
    """A grid of P prompts with K rows each, read prompt by prompt.

    Args:
        lengths: tokens of each prompt.
        copies: K.
        steps: tokens that are drawn after a prompt at most.
    """

    def __init__(self, shape: Shape, lengths: Sequence[int], copies: int, steps: int) -> None:
        self.shared, self.width, self.rows = copies > 1, max(lengths), len(lengths) * copies
        self.filled = 0 if self.shared else self.width  # columns of ``own`` that hold a token
        self.most = self.filled + steps
        # Zeros, not junk: a hidden column has weight 0, but 0 * NaN is NaN.
        self._allocate(shape, len(lengths), copies)
        self.own = self._part(len(lengths), copies, min(self.filled + _GROWTH, self.most)).zero_()
        # [layers, keys and values, P, heads, width, D]
        self.prompt = torch.zeros(shape.layers, 2, len(lengths) * self.shared, shape.heads, self.width, shape.size)
        # Numbers to add to scores: -inf before a prompt begins, and in empty columns. [P, 1, prompt's and own columns]
        before = self.width - torch.tensor(lengths)
        hidden = torch.where(torch.arange(self.width) < before[:, None, None], float("-inf"), 0.0)
        self.mask = _padded(hidden, self.own.shape[-2] - self.filled)
        # Of each row its place in the grid, prompt K + sample; None: in that order, none missing.
        self.place: Tensor | None = None

    def _allocate(self, shape: Shape, prompts: int, copies: int) -> None:
        """Memory for the grid's last column; pages that nobody has written to yet are not taken."""
        self.memory = torch.empty(shape.layers, 2, prompts * shape.heads * copies * self.most * shape.size)
        self.shape = shape

    def _part(self, prompts: int, copies: int, columns: int) -> Tensor:
        """The beginning of each layer's memory as [layers, keys and values, P, heads, K, columns, D], without gaps."""
        grid = (prompts, self.shape.heads, copies, columns, self.shape.size)
        return self.memory[..., : torch.Size(grid).numel()].unflatten(-1, grid)

    def write_prompt(self, layer: int, number: int, key_values: Tensor) -> None:
        """Keys and values [n, 2, heads, D] of all tokens of a prompt."""
        column = self.width - len(key_values)
        target = self.prompt if self.shared else self.own[:, :, :, :, 0]
        target[layer, :, number, :, column : self.width] = key_values.permute(1, 2, 0, 3)

    def begin_token(self) -> None:
        """The next ``attend`` of every layer is for one token more."""
        if self.filled == self.own.shape[-2]:
            self._grow()
        self.mask[:, :, self.filled - self.own.shape[-2]] = 0
        self.filled += 1
        keys, values = self.own.flatten(2, 4).unbind(1)
        self._keys, self._values = keys.transpose(-1, -2).unbind(0), values.unbind(0)
        self._written = self.own[..., self.filled - 1, :].unbind(0)
        if not self.shared:
            self._written = tuple(each[:, :, :, 0] for each in self._written)
        else:
            keys, values = self.prompt.flatten(2, 3).unbind(1)
            self._prompt_keys, self._prompt_values = keys.unbind(0), values.unbind(0)

    def attend(self, layer: int, queries: Tensor, key_values: Tensor) -> Tensor:
        """Write one token a row and attend to all of its row.

        Args:
            queries: [n, heads, G, D], scaled; each key serves G queries.
            key_values: [n, 2, heads, D].

        Returns:
            [n, heads G D].
        """
        rows, heads, serves, size = queries.shape
        if self.shared:
            return self._attend_sharing(layer, queries, key_values)
        self._written[layer].copy_(key_values.transpose(0, 1))
        scores = torch.bmm(queries.reshape(rows * heads, serves, size), self._keys[layer])
        scores.view(rows, heads * serves, -1).add_(self.mask)
        return torch.bmm(scores.softmax(-1), self._values[layer]).view(rows, -1)

    def _attend_sharing(self, layer: int, queries: Tensor, key_values: Tensor) -> Tensor:
        """In the grid, whose order is prompt, head, sample: one prompt's queries stand together."""
        _, prompts, heads, copies, size = self._written[layer].shape
        serves = queries.shape[2]
        self._written[layer].copy_(self._grid(key_values).permute(2, 0, 3, 1, 4))
        asked = self._grid(queries).transpose(1, 2).contiguous()
        together = asked.view(prompts * heads, copies * serves, size)
        before = torch.bmm(self._prompt_keys[layer], together.transpose(1, 2)).transpose(1, 2)
        own = torch.bmm(asked.view(-1, serves, size), self._keys[layer])
        scores = torch.cat([before, own.view(len(before), copies * serves, -1)], -1)
        scores.view(prompts, -1, scores.shape[-1]).add_(self.mask)
        weights = scores.softmax(-1)
        mixed = torch.bmm(weights[..., : self.width], self._prompt_values[layer]).view(-1, serves, size)
        mixed.baddbmm_(weights[..., self.width :].unflatten(1, (copies, serves)).flatten(0, 1), self._values[layer])
        mixed = mixed.view(prompts, heads, copies, -1).transpose(1, 2).reshape(prompts * copies, -1)
        return mixed if self.place is None else mixed[self.place]

    def _grid(self, x: Tensor) -> Tensor:
        """[n, ...] -> [P, K, ...]; zeros for rows that have ended."""
        _, _, prompts, _, copies, _, _ = self.own.shape
        if self.place is not None:
            x = x.new_zeros(prompts * copies, *x.shape[1:]).index_copy_(0, self.place, x)
        return x.unflatten(0, (prompts, copies))

    def drop(self, done: Tensor) -> Tensor:
        """Forget rows.

        Where none shares a prompt, the last rows move into the holes: a row that ends costs one row's copy at most.
        Where they do, a hole stays a hole until a smaller grid holds all that are left.

        Args:
            done: bool [n].

        Returns:
            int64 [n - number done], for each row that is left its number before.
        """
        order = torch.arange(self.rows)
        left = self.rows - int(done.sum())
        if self.shared:
            order = order[~done]
            self.place = order if self.place is None else self.place[order]
            self.rows = left
            self._tighten()
            return order
        holes = order[:left][done[:left]]
        movers = order[left:][~done[left:]]
        if len(movers):
            self.own[:, :, holes, :, :, : self.filled] = self.own[:, :, movers, :, :, : self.filled]
        order[holes] = movers
        order = order[:left]
        self.own, self.mask, self.rows = self.own[:, :, :left], self.mask[order], left
        if 0 < self.own[0].numel() * self.most // self.own.shape[-2] <= self.memory[0].numel() // 2:
            self._move(torch.arange(left)[:, None])
        return order

    def _tighten(self) -> None:
        """Give memory back when a quarter of the grid or more serves no row any more."""
        if self.place is None or not self.rows:
            return
        _, _, prompts, _, copies, _, _ = self.own.shape
        number = self.place // copies
        used, number, counts = torch.unique(number, return_inverse=True, return_counts=True)
        most = int(counts.max())
        if len(used) * most > prompts * copies * 3 // 4:
            return
        # Rows stand in the grid's order: the n-th of a prompt takes the prompt's n-th place.
        nth = torch.arange(self.rows) - (counts.cumsum(0) - counts)[number]
        rows = self.place.new_zeros(len(used), most)
        rows[number, nth] = self.place
        self._move(rows)
        self.prompt, self.mask = self.prompt[:, :, used], self.mask[used]
        self.place = number * most + nth if self.rows < rows.numel() else None

    def _move(self, rows: Tensor) -> None:
        """To memory of their own: int64 [P, K], places in the grid."""
        old, copies = self.own, self.own.shape[4]
        prompts, samples = rows.shape
        self._allocate(self.shape, prompts, samples)
        self.own = self._part(prompts, samples, old.shape[-2])
        prompt, sample = rows // copies, rows % copies
        heads = torch.arange(self.shape.heads)[:, None]
        for new, each in zip(self.own.flatten(0, 1), old.flatten(0, 1), strict=True):
            new.copy_(each[prompt[:, None], heads, sample[:, None]])

    def _grow(self) -> None:
        """More columns in the same memory, layer by layer: no second copy of the whole, and no new pages but for them."""
        old = self.own
        columns = min(self.filled + _GROWTH, self.most)
        self.own = self._part(old.shape[2], old.shape[4], columns)
        for new, each in zip(self.own.flatten(0, 1), old.flatten(0, 1), strict=True):
            held = each.clone()
            new[..., : self.filled, :] = held
            new[..., self.filled :, :] = 0
        self.mask = _padded(self.mask, columns - self.filled)


def _padded(mask: Tensor, columns: int) -> Tensor:
    """So many columns more, hidden."""
    return torch.nn.functional.pad(mask, (0, columns), value=float("-inf"))
