"""Linear layers on a CPU with their weights laid out for a few rows at a time.

A decoding step multiplies the same weights by a few dozen rows, over and over. oneDNN does that up to a third faster
than the default when it may rearrange the weights first, and rearranging costs less than one step. The packed copies
live as long as one sampling; small models only, for they take the weights' memory a second time. With bf16 weights a
product of 32 rows takes six to nine tenths of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MOST_WEIGHTS = 2**28  # numbers: 1 GiB in float32, half in bf16. Larger models are left as they are.


class Packed:
    """scale ((gain x) W^T + b) from a packed copy of W [out, in], best for ``rows`` rows at once.

    In float32 gain [in] and scale [out] are folded into the weights. In bf16 they stay outside: folded in they would be
    rounded, and the trainer multiplies by the weights as they are. What goes in is rounded to the weights' type.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        rows: int,
        *,
        gain: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        weight, self.gain, self.scale = weight.detach(), gain, scale
        if weight.dtype == torch.float32:
            self.gain = self.scale = None
            if scale is not None:
                weight = weight * scale[:, None]
                bias = None if bias is None else bias.detach() * scale
            if gain is not None:
                weight = weight * gain
        self.dtype = weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """In float32, whatever the weights are."""
        product = torch.ops.mkldnn._linear_pointwise(self._read(x), self.weight, self.bias, "none", [], "")
        return product.float() if self.scale is None else product * self.scale

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product, in the same pass."""
        return torch.ops.mkldnn._linear_pointwise(self._read(x), self.weight, self.bias, "swish", [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(self._read(x), other, self.weight, self.bias, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(self._read(x), other, self.weight, self.bias, "mul")

    def _read(self, x: Tensor) -> Tensor:
        return (x if self.gain is None else x * self.gain).to(self.dtype)


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
