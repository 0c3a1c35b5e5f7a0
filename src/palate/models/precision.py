"""Mixed precision on a CPU: bf16 copies of the weights that work, float32 masters that learn.

bf16 holds 8 bits of a number, so that an update of less than 1/512 of a weight is lost in it; its products take half the
time or less where the processor has units for them. So a trained weight is held twice:

    the model's parameter   bf16: all that forward, backward, head and sampler see; rounded anew once an optimizer step
    its master              float32, a parameter of its own: what is clipped, stepped, kept in checkpoints and saved

A weight's gradient comes in bf16, is added to its master's in float32 and forgotten at once. What does not learn (other
roles, the base under an adapter) is held in bf16 alone. Scalar heads and adapters are small, and stay in float32.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from palate.models.heads import HEAD_NAMES

AT_ONCE = (
    1 << 18
)  # numbers added at once: a sum of two types widens a copy first, and a big copy costs more than its sum
NOT_FASTER = (
    "this CPU has no units for bfloat16 products: dtype={dtype} halves the weights' memory here, but will not be faster "
    "than float32"
)


def has_bf16_units() -> bool:
    """Does this processor multiply bf16 faster than float32 (AVX-512 BF16, AMX, or an ARM's bf16 instructions)?"""
    if platform.machine().lower() in ("x86_64", "amd64"):
        asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        return any(ask is not None and ask() for ask in asked)
    mkldnn = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(torch.backends.mkldnn.is_available() and mkldnn is not None and mkldnn())


def use_working_copies(model: nn.Module, *, masters: bool = True) -> nn.Module:
    """Hold a float32 model in bf16, in place; what learns gets a master. Scalar heads and adapters stay as they are.

    Args:
        masters: False, nothing gets one: for weights that are about to be frozen.
    """
    adapted = hasattr(model, "peft_config")
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32 or _stays(name) or (adapted and weight.requires_grad):
            continue
        exact = weight.data
        weight.data = exact.to(torch.bfloat16)
        if weight.requires_grad and masters:
            _give_master(weight, exact)
    return model


def _stays(name: str) -> bool:
    return any(part in HEAD_NAMES or part.startswith("lora_") for part in name.split("."))


def _give_master(weight: Any, exact: Tensor) -> None:
    weight.master = nn.Parameter(exact)
    weight.master.working = weight
    weight.register_post_accumulate_grad_hook(_hand_over)


@torch.no_grad()
def _hand_over(weight: Any) -> None:
    """Add a working copy's gradient to its master's."""
    master, weight.grad, grad = weight.master, None, weight.grad
    if master.grad is None:
        master.grad = grad.float()
    elif grad.numel() <= AT_ONCE:
        master.grad.add_(grad)
    else:
        rows = max(1, AT_ONCE * len(grad) // grad.numel())
        for total, more in zip(master.grad.split(rows), grad.split(rows), strict=True):
            total.add_(more)


def master_of(weight: nn.Parameter) -> nn.Parameter:
    """What learns in a parameter's place: its float32 master, or itself."""
    return getattr(weight, "master", weight)


@torch.no_grad()
def round_to_working(masters: Iterable[Tensor]) -> None:
    """Make the working copies of these masters anew; parameters that are no masters are passed over."""
    for master in masters:
        working = getattr(master, "working", None)
        if working is not None:
            working.copy_(master)


@contextlib.contextmanager
def exact_weights(model: nn.Module) -> Iterator[None]:
    """Within it the model's parameters are their masters, float32, as they are to be saved; costs no memory."""
    rounded = [(weight, weight.data) for weight in model.parameters() if master_of(weight) is not weight]
    try:
        for weight, _ in rounded:
            weight.data = master_of(weight).data
        yield
    finally:
        for weight, data in rounded:
            weight.data = data
