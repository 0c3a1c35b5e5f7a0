"""The mathematics of a trust-region step: its size, and the solution of F x = g without F."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class TrustRegion(NamedTuple):
    """How far a policy may move at once, and how the step is found.

    Attributes:
        delta: largest mean KL(old || new), nats a token; 0.01 in the paper.
        damping: added to the diagonal of F; 0.1.
        iterations: of conjugate gradient; 10.
        backtracks: how often the step is shortened before it is given up; 10.
        shrink: by which factor, in (0, 1); 0.5 to 0.8.
    """

    delta: float = 0.01
    damping: float = 0.1
    iterations: int = 10
    backtracks: int = 10
    shrink: float = 0.8


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """x with F x = target, [D], for symmetric positive definite F known only by its products.

    Args:
        product: v -> F v, [D] -> [D].
        iterations: at most so many; D of them are exact, up to rounding.
        tolerance: ends when the squared residual is this share of the squared target.

    >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradient(lambda v: matrix @ v, torch.tensor([1.0, 2.0]), 2)
    tensor([0.0909, 0.6364])

    Source: Hestenes and Stiefel 1952; in Schulman et al. 2015 (arXiv:1502.05477), appendix C.
    """
    x, residual = torch.zeros_like(target), target.clone()
    direction, size = residual.clone(), residual @ residual
    enough = tolerance * size
    for _ in range(iterations):
        if size <= enough:
            break
        turned = product(direction)
        length = size / (direction @ turned)
        x = x + length * direction
        residual = residual - length * turned
        new_size = residual @ residual
        direction, size = residual + (new_size / size) * direction, new_size
    return x
