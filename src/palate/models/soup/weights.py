"""The weights of a soup, and the mean of tensors with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor

from palate.errors import ConfigError

LONGEST_LIST = 200  # soups of one grid


def grid(models: int, points: int) -> list[tuple[float, ...]]:
    """All weights in steps of 1 / (points - 1), from all of the first to all of the last.

    >>> grid(2, 3)
    [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    >>> len(grid(3, 5))
    15

    Raises:
        ConfigError: fewer than 2 points, or more soups than anybody would measure.
    """
    if points < 2:
        raise ConfigError(
            f"--grid {points}: at least 2 was expected; 2 gives the models themselves, 3 adds the middle."
        )
    steps = points - 1
    count = math.comb(steps + models - 1, models - 1)
    if count > LONGEST_LIST:
        raise ConfigError(
            f"--grid {points} of {models} models is {count} soups; at most {LONGEST_LIST} are made at once."
        )
    return sorted((tuple(n / steps for n in parts) for parts in _parts(steps, models)), reverse=True)


def _parts(total: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write ``total`` as a sum of ``count`` whole numbers >= 0."""
    for bars in combinations(range(total + count - 1), count - 1):
        edges = (-1, *bars, total + count - 1)
        yield tuple(b - a - 1 for a, b in pairwise(edges))


def soup_name(weights: Sequence[float]) -> str:
    """Folder name of one soup of a family.

    >>> soup_name((0.75, 0.25))
    '0.75-0.25'
    """
    return "-".join(f"{weight:.4g}" for weight in weights)


def check_weights(weights: Sequence[float], models: int) -> tuple[float, ...]:
    """The weights as they are.

    Raises:
        ConfigError: another number than there are models, below 0, not finite, or with another sum than 1.
    """
    given = ",".join(f"{w:g}" for w in weights)
    if len(weights) != models:
        raise ConfigError(f"--weights {given}: {len(weights)} weight(s) for {models} models; one each was expected.")
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ConfigError(f"--weights {given}: numbers of at least 0 were expected.")
    if abs(sum(weights) - 1) > 1e-6:
        total = sum(weights)
        hint = f" Did you mean {','.join(f'{w / total:.4g}' for w in weights)}?" if total > 0 else ""
        raise ConfigError(f"--weights {given}: their sum is {total:g}; 1 was expected.{hint}")
    return tuple(float(w) for w in weights)


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i in float32 (float64 of float64), in the dtype of the first; whole numbers as the first has them.

    What has weight 0 takes no part, so that a weight of 1 gives back its model bit by bit.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first
    wide = torch.promote_types(first.dtype, torch.float32)
    total = torch.zeros(first.shape, dtype=wide)
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight:
            total += weight * tensor.to(wide)
    return total.to(first.dtype)
