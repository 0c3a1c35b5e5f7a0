"""Means and moments that do not see masked slots, whatever those hold."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over True slots, in float32 at least (a count above 256 is no bf16 number); 0 when there are none.

    Args:
        values: any shape; masked slots may hold NaN.
        mask: bool, same shape.

    >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    wide = torch.where(mask, values, 0).to(torch.promote_types(values.dtype, torch.float32))
    return wide.sum() / mask.sum().clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor, *, ddof: int = 0) -> Tensor:
    """Variance over True slots, divided by (count - ddof), in float32 at least; 0 when that is not positive."""
    wide = torch.where(mask, values, 0).to(torch.promote_types(values.dtype, torch.float32))
    deviation = torch.where(mask, wide - masked_mean(wide, mask), 0)
    count = mask.sum() - ddof
    return torch.where(count > 0, deviation.square().sum() / count.clamp(min=1), 0)


def row_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the True slots of each row, [..., T] -> [...]; 0 where there are none. Masked slots may hold NaN."""
    return torch.where(mask, values, 0).sum(-1)


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True slots of each row, [..., T] -> [...]; 0 where there are none. Masked slots may hold NaN."""
    return row_sum(values, mask) / mask.sum(-1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, ddof: int = 0, eps: float = 1e-8) -> Tensor:
    """Scale the True slots to unit variance, and to zero mean if asked; masked slots become 0.

    Args:
        values: any shape, any unit.
        mask: bool, same shape.
        shift_mean: False keeps the mean where it was: rewards are scaled so, advantages are shifted too.
        ddof: 0 divides the variance by n (OpenAI 2019), 1 by n - 1 (TRL, verl).
        eps: added to the variance inside the square root.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), released code.
    """
    # Junk goes before any product: 0 * NaN in a backward pass is NaN. In float64, because the mean of equal float32
    # numbers is often not that number, and with nearly no variance the difference would be scaled up to 1.
    wide = torch.where(mask, values, 0).double()
    mean = masked_mean(wide, mask)
    scaled = (wide - mean) * torch.rsqrt(masked_variance(wide, mask, ddof=ddof) + eps)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0).to(values.dtype)


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of everything seen so far; floats, so that JSON keeps them exactly."""

    count: float = 0.0  # type: ignore[assignment]  # hides tuple.count
    mean: float = 0.0
    squares: float = 0.0

    def including(self, values: Tensor) -> Moments:
        """With ``values`` (any shape) added: Chan, Golub and LeVeque 1983, the pairwise update."""
        values = values.detach().double()
        count = float(values.numel())
        if not count:
            return self
        mean = float(values.mean())
        squares = float((values - mean).square().sum())
        total, gap = self.count + count, mean - self.mean
        return Moments(
            total,
            self.mean + gap * count / total,
            self.squares + squares + gap * gap * self.count * count / total,
        )

    @property
    def std(self) -> float:
        """Standard deviation with n - 1; 1 before there are two values or when all are equal."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return variance**0.5 or 1.0
