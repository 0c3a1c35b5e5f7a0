"""AdamW over the trained roles, its schedule, and the one division by the global count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from palate.models.precision import master_of, round_to_working
from palate.training.settings import TrainingSettings, steps_of
from palate.types import Method, Models

_EMBEDDINGS = ("embed", "wte", "wpe")  # as transformers calls them, of tokens and (GPT-2) of positions


def trained_parameters(models: Models, method: Method) -> dict[str, dict[str, nn.Parameter]]:
    """Role -> name -> parameter, of everything that learns: of a weight with a float32 master, the master."""
    return {
        role: {name: master_of(p) for name, p in getattr(models, role).named_parameters() if p.requires_grad}
        for role in method.trains
    }


def make_optimizer(
    parameters: Mapping[str, Mapping[str, nn.Parameter]], settings: TrainingSettings
) -> torch.optim.AdamW:
    """One AdamW; weight decay on matrices only; each group's ``peak`` is the learning rate that the schedule scales."""
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
    optimizer = torch.optim.AdamW(
        parts,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
    optimizer.register_step_post_hook(lambda stepped, *_: round_to_working(_all(stepped)))
    return optimizer


def _all(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


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
