"""Which item is trained on when: a pure function of (seed, position), so that resuming needs no random state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from palate.types import Batch, groups

T = TypeVar("T")


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose stream depends on all the numbers and their order."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


@lru_cache(maxsize=4)
def _permutation(items: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(items, generator=seeded(seed, epoch)).tolist()
    return order


def batch_items(items: Sequence[T], batch_size: int, step: int, seed: int) -> list[T]:
    """The items of batch ``step`` (from 0): shuffled epochs, one after the other; every item once an epoch."""
    size, n = min(batch_size, len(items)), len(items)
    return [items[_permutation(n, seed, i // n)[i % n]] for i in range(step * size, (step + 1) * size)]


def minibatch_rows(batch: Batch, minibatches: int, *seed: int) -> list[Tensor]:
    """Row numbers of each minibatch: whole groups, shuffled; int64 each."""
    parts = groups(batch)
    order = torch.randperm(len(parts), generator=seeded(*seed)).tolist()
    chunks = torch.tensor_split(torch.arange(len(parts)), min(minibatches, len(parts)))
    return [torch.cat([parts[i] for i in sorted(order[j] for j in chunk.tolist())]) for chunk in chunks]
