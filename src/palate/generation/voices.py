"""Whose distribution a token is drawn from: one model's, or the geometric mixture of two.

    p(y_t|s_t) = pi(y_t|s_t)^(1-b) ref(y_t|s_t)^b / Z(s_t),         logits (1 - b) l_pi + b l_ref

normalised at every token. It is not the mixture of whole responses, pi(y|x)^(1-b) ref(y|x)^b / Z(x), whose tokens depend
on what may follow; this one can be sampled (Nash-MD, arXiv:2312.00886, section 7).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from palate.errors import ConfigError, ModelError
from palate.generation.packed import packed_linears

if TYPE_CHECKING:
    from palate.generation.decode import Steps


class Voice(NamedTuple):
    """A model that has a say in every token.

    Attributes:
        model: a causal language model, or a ``PeftModel`` of one.
        weight: of its logits, in (0, 1]; those of all voices add up to 1.
        context: to run it in: what makes a policy its own reference, for ``AdapterOff``.
        values_upright: how its cache lies in memory; see ``cache.py``.
    """

    model: nn.Module
    weight: float = 1.0
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    values_upright: bool = False


def voices_of(model: nn.Module, other: nn.Module | None, mixture: float) -> list[Voice]:
    """The models that are run: one with all the weight, or both.

    Raises:
        ConfigError: ``mixture`` is out of [0, 1], or above 0 without another model.
    """
    if not 0 <= mixture <= 1:
        raise ConfigError(f"mixture = {mixture!r}: expected a number from 0 (the model alone) to 1 (the other alone).")
    if other is None:
        if mixture:
            raise ConfigError(f"mixture = {mixture!r}: there is no other model to mix with. Give one, or mixture 0.")
        return [_voice(model, 1.0)]
    both = [(model, 1 - mixture), (other, mixture)]
    return [_voice(each, weight) for each, weight in both if weight]


def _voice(model: nn.Module, weight: float) -> Voice:
    """``AdapterOff`` is its policy in a context of its own."""
    context = getattr(model, "context", None)
    return Voice(model, weight) if context is None else Voice(model.policy, weight, context)  # type: ignore[arg-type]


@contextmanager
def ready(voices: Sequence[Voice], device: torch.device, rows: int, positions: int) -> Iterator[list[Steps]]:
    """What runs the voices for a while, in eval mode: the flat way if it can run all of them, or their own modules with
    the fastest layers; afterwards they are as before.

    Args:
        rows: that are decoded at once, at most.
        positions: tokens of the longest row, at most.
    """
    from palate.generation.attention import one_token_attention  # imports transformers
    from palate.generation.plain import PlainSteps

    with ExitStack() as stack:
        for model in {id(voice.model): voice.model for voice in voices}.values():  # a policy and its AdapterOff: one
            stack.enter_context(_eval_mode(model))
        flat = _flat_steps(voices, rows, positions)
        if flat is not None:
            yield flat
            return
        upright: dict[int, bool] = {}
        for voice in voices:
            if id(voice.model) not in upright:
                stack.enter_context(packed_linears(voice.model, rows))
                upright[id(voice.model)] = stack.enter_context(one_token_attention(voice.model, device))
        if len(voices) == 1:  # once for all, not at every token
            stack.enter_context(voices[0].context())
            voices = [voices[0]._replace(context=nullcontext)]
        yield [PlainSteps(voice._replace(values_upright=upright[id(voice.model)])) for voice in voices]


_agreed: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose flat way was tried


def _flat_steps(voices: Sequence[Voice], rows: int, positions: int) -> list[Steps] | None:
    from palate.generation.flat import FEWEST_POSITIONS, FlatSteps, agrees
    from palate.generation.flat_weights import serves, weights_of

    steps: list[Steps] = []
    for voice in voices:
        with voice.context():
            if not serves(voice.model):
                return None
            weights = weights_of(voice.model, rows, max(positions, FEWEST_POSITIONS))
            if not (voice.model in _agreed or agrees(voice.model, weights)):
                return None
        _agreed.add(voice.model)
        steps.append(FlatSteps(weights))
    return steps


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards exactly those modules train that did before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def mixed(voices: Sequence[Voice], logits: Sequence[Tensor]) -> Tensor:
    """The logits [R, V] of what all voices say; of a single one, its own to the last bit.

    Raises:
        ModelError: the models have vocabularies of different sizes.
    """
    if len(voices) == 1:
        return logits[0]
    widths = [part.shape[-1] for part in logits]
    if len(set(widths)) > 1:
        raise ModelError(
            f"the models that are mixed have {widths[0]} and {widths[1]} logits a token; expected the same vocabulary. "
            "Take a reference of the policy's own family."
        )
    # Log-probabilities, not logits: a constant that one model adds to all its logits would cost digits.
    total = voices[0].weight * logits[0].log_softmax(-1)
    for voice, part in zip(voices[1:], logits[1:], strict=True):
        total = total + voice.weight * part.log_softmax(-1)
    return total
