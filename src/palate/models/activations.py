"""Activation checkpointing: keep what enters each layer, and make what is inside it again in the backward pass.

Memory for activations falls to about one layer's worth plus one state a token and layer; a step takes about a third
longer. Gradients are the same numbers. Both ways through a model ask here, the flat one and the model's own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from palate.errors import ConfigError
from palate.models.heads import base_of

Context = Callable[[], contextlib.AbstractContextManager[Any]]


def checkpoint_activations(model: nn.Module, on: bool = True) -> None:
    """Say how a model is run where a gradient is wanted; an adapter's base is what is marked.

    Raises:
        ConfigError: its layers are not of the kind that can be run again one by one.
    """
    inner = base_of(getattr(model, "policy", model))  # a role that borrows a trunk holds it as its policy
    if on and not _layers(inner):
        raise ConfigError(
            f"training.activation_checkpointing: {type(inner).__name__} has no layers that can be run again one by one. "
            "Leave it out; a smaller training.tokens_per_microbatch lowers memory too."
        )
    if on or hasattr(inner, "activation_checkpointing"):
        inner.activation_checkpointing = on


def checkpoints_activations(model: Any) -> bool:
    """Is the model, as unwrapped by the forward room, to be run so here and now?"""
    return torch.is_grad_enabled() and bool(getattr(model, "activation_checkpointing", False))


def checkpointed(again: Context) -> Callable[..., Any]:
    """A caller of functions, ``call(function, *args)``, that runs them a second time, in ``again()``, for the gradient.

    The context matters where one trunk plays several roles: by then another role's adapter may be on.
    """
    return partial(checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again()))


@contextlib.contextmanager
def checkpointing_layers(model: Any, again: Context) -> Iterator[None]:
    """Within it, the layers of a model that is marked run so in the model's own forward."""
    layers = _layers(model) if checkpoints_activations(model) else []
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer._gradient_checkpointing_func, layer.gradient_checkpointing = checkpointed(again), True
        layer.training = True  # of the layer alone, who asks for it; what is inside keeps its mode, and its dropout
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.gradient_checkpointing, layer.training = False, mode


def _layers(model: nn.Module) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import, and seldom needed

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
