"""AdamW over the trained roles, its schedule, and the one division by the global count."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from palate.errors import ConfigError
from palate.models.precision import master_of, round_to_working
from palate.training.offloaded import OffloadedAdamW
from palate.training.settings import TrainingSettings, steps_of
from palate.types import Method, Models

MIN_8BIT = 4096  # numbers of a parameter; the moments of smaller ones stay in float32
_EMBEDDINGS = ("embed", "wte", "wpe")  # as transformers calls them, of tokens and (GPT-2) of positions


def trained_parameters(models: Models, method: Method) -> dict[str, dict[str, nn.Parameter]]:
    """Role -> name -> parameter, of everything that learns; what two roles share is the first one's.

    Of a weight with a float32 master it is the master.
    """
    found: dict[str, dict[str, nn.Parameter]] = {}
    taken: set[int] = set()
    for role in method.trains:
        named = {name: master_of(p) for name, p in getattr(models, role).named_parameters() if p.requires_grad}
        found[role] = {name: p for name, p in named.items() if id(p) not in taken}
        taken |= {id(p) for p in found[role].values()}
    return found


def make_optimizer(
    parameters: Mapping[str, Mapping[str, nn.Parameter]], settings: TrainingSettings
) -> torch.optim.Optimizer:
    """One AdamW; weight decay on matrices only; each group's ``peak`` is the learning rate that the schedule scales.

    Raises:
        ConfigError: the library that the chosen optimizer needs is not installed.
    """
    parts: list[dict[str, object]] = []
    for role, named in parameters.items():
        value_rate = settings.value_learning_rate if role == "value" else None
        rate = value_rate or settings.learning_rate
        matrices = [p for name, p in named.items() if p.ndim >= 2 and not any(part in name for part in _EMBEDDINGS)]
        taken = {id(p) for p in matrices}
        others = [p for p in named.values() if id(p) not in taken]
        parts += [
            {"params": matrices, "weight_decay": settings.weight_decay, "peak": rate},
            {"params": others, "weight_decay": 0.0, "peak": rate},
        ]
    parts = [part for part in parts if part["params"]]
    betas = (settings.beta1, settings.beta2)
    given: dict[str, Any] = {"lr": settings.learning_rate, "betas": betas, "eps": settings.epsilon}
    if settings.optimizer == "adamw_8bit":
        optimizer = _eight_bit()(parts, **given, min_8bit_size=MIN_8BIT)
    else:
        on_cpu = all(p.device.type == "cpu" for named in parameters.values() for p in named.values())
        offload = settings.optimizer == "adamw_offload" and not on_cpu
        # Fused: one pass over the state, 2 to 3 times as fast as operation by operation on a CPU.
        optimizer = (OffloadedAdamW if offload else torch.optim.AdamW)(parts, **given, fused=True)
    optimizer.register_step_post_hook(lambda stepped, *_: round_to_working(_all(stepped)))
    return optimizer


def _all(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def check_optimizer(settings: TrainingSettings, device: str) -> str:
    """Whether the chosen optimizer can be had; a line where it is no other than the plain one, else "".

    Raises:
        ConfigError: its library is not installed.
    """
    if settings.optimizer == "adamw_8bit":
        _eight_bit()
    if settings.optimizer == "adamw_offload" and torch.device(device).type == "cpu":
        return "training.optimizer=adamw_offload has no effect on a CPU: everything is in its memory anyway."
    return ""


def state_bytes(p: nn.Parameter, optimizer: str) -> int:
    """What the optimizer keeps of a parameter on the parameter's device, in bytes."""
    if optimizer == "adamw_offload" and p.device.type != "cpu":
        return 0
    if optimizer == "adamw_8bit":
        return 2 * (p.numel() + 4 * math.ceil(p.numel() / 256) if p.numel() >= MIN_8BIT else 4 * p.numel())
    return 2 * p.numel() * p.element_size()


def _eight_bit() -> Any:
    """bitsandbytes' AdamW: moments in 8 bits with a scale for each 256 of them (Dettmers et al. 2022, arXiv:2110.02861)."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels for inference that nobody needs here
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f'training.optimizer=adamw_8bit needs the library bitsandbytes ({error}). Install it: pip install "palate[optim]"'
        ) from error
    return AdamW8bit


def schedule(step: int, total: int, settings: TrainingSettings) -> float:
    """Share of the peak learning rate at batch ``step`` (from 0) of ``total``; in (0, 1]."""
    warmup = steps_of(settings.warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
    return settings.final_learning_rate + (1 - settings.final_learning_rate) * falling


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Scale every group's peak; returns the first group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return float(optimizer.param_groups[0]["lr"])


@torch.no_grad()
def divide_gradients(parameters: Iterable[nn.Parameter], count: float) -> None:
    """Turn the gradient of a sum into that of the average over the whole batch."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_div_(grads, count)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradient down to ``max_norm`` (0 = leave it); returns its norm before."""
    return nn.utils.clip_grad_norm_(list(parameters), max_norm or math.inf, foreach=True)
