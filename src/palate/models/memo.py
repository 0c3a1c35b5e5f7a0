"""A trunk's states kept for the second head that reads them.

Where a value head stands on the policy's own trunk, log-probs and values of the same rows take the same pass. The first
of two readers leaves its states here, and the other takes them away: a pass is served once, to another reader, for the
very same rows, weights and mode. They are also let go when the rows are, when a gradient has gone through them (its graph
is used up), when an optimizer steps, and when the trunk is run again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from palate.models.heads import hidden_size
from palate.types import Tokens

KEPT_BYTES = 2**28  # of states without a gradient; with one, the graph holds them anyway


class _Kept(NamedTuple):
    reader: int
    tokens: weakref.ref[Tokens]
    moment: tuple[Any, ...]
    reads: list[Any]


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_shared: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def read_by_several(trunk: nn.Module) -> None:
    """From now on a pass of this trunk is kept for the next reader."""
    if not _shared:  # fused optimizers leave the weights' versions as they were
        register_optimizer_step_post_hook(lambda *_: _kept.clear())
    _shared.add(trunk)


def read_once(model: Any, tokens: Tokens, run: Callable[[], Iterable[Any]]) -> Iterable[Any]:
    """``run()``, or what it gave to another reader of the trunk a moment ago.

    Args:
        model: who reads: the Hugging Face model around the trunk.
        tokens: the rows; known by identity.
        run: makes the states, as objects with ``states``.
    """
    trunk: Any = getattr(model, "base_model", None)
    if trunk not in _shared or not _worth_keeping(model, tokens):
        return run()
    moment = _moment(model, trunk, tokens)
    kept = _kept.pop(trunk, None)
    if kept is not None and kept.reader != id(model) and kept.tokens() is tokens and kept.moment == moment:
        return kept.reads
    reads = list(run())
    forget = _forgetting(trunk)
    for read in reads:
        if read.states.requires_grad:
            read.states.register_hook(forget)
    _kept[trunk] = _Kept(id(model), weakref.ref(tokens, forget), moment, reads)
    return reads


def _worth_keeping(model: Any, tokens: Tokens) -> bool:
    if torch.is_grad_enabled():
        return True
    return int(tokens.response_mask.sum()) * hidden_size(model) * 4 <= KEPT_BYTES


def _moment(model: Any, trunk: Any, tokens: Tokens) -> tuple[Any, ...]:
    """What a pass depends on besides who the rows are. What is written through ``p.data`` into its own memory is not seen."""
    switches = [
        (layer.disable_adapters, tuple(layer.active_adapters), str(getattr(layer, "scaling", "")))
        for layer in trunk.modules()
        if isinstance(getattr(layer, "disable_adapters", None), bool)  # a method of transformers' own models
    ]
    weights = [(p._version, p.data_ptr(), p.requires_grad) for p in trunk.parameters()]
    rows = [each._version for each in (tokens.ids, tokens.attention_mask, tokens.response_mask)]
    return torch.is_grad_enabled(), trunk.training, getattr(model, "compute_dtype", None), switches, weights, rows


def _forgetting(trunk: nn.Module) -> Callable[[Any], None]:
    """A callback that lets go of what is kept of the trunk, without holding it."""
    held = weakref.ref(trunk)

    def forget(_: Any) -> None:
        there = held()
        if there is not None:
            _kept.pop(there, None)

    return forget
