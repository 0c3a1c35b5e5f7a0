"""Linear layers on a CPU with their weights laid out for a few rows at a time.

A decoding step multiplies the same weights by a few dozen rows, over and over. oneDNN does that up to a third faster
than the default when it may rearrange the weights first, and rearranging costs less than one step. The packed copies
live as long as one sampling; small models only, for they take the weights' memory a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MOST_WEIGHTS = 2**28  # numbers: 1 GiB in float32. Larger models are left as they are.


class Packed:
    """x W^T + b, float32, from a packed copy of W [out, in], best for ``rows`` rows at once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product, in the same pass."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "swish", [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Run every float32 ``nn.Linear`` on the CPU from packed weights for a while, best for ``rows`` rows at once.

    The weights must not change inside the block: the copies would not.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear and _packable(module)]
    if not available() or sum(module.weight.numel() for module in linears) > MOST_WEIGHTS:
        linears = []
    try:
        for module in linears:
            module.forward = _forward(module, rows)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for module in linears:
            vars(module).pop("forward", None)


def available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _packable(module: nn.Linear) -> bool:
    """A layer whose forward somebody else has replaced stays theirs."""
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and "forward" not in vars(module)


def _forward(module: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    packed = Packed(module.weight, module.bias, rows)

    def forward(input: Tensor) -> Tensor:
        return packed(input)

    return forward
