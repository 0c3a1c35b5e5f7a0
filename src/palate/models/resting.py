"""Frozen models that rest in the computer's memory and are on the device only while they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Move = Callable[[Tensor], Tensor]


class Resting:
    """Models whose weights are somewhere else until they are needed.

    Their weights never change, so they are copied to the device and never back: letting go of the copies is all that it
    takes to rest. Made by ``rest``, which leaves models and numbers as they are.

    Attributes:
        visits: how often they were brought to the device.
    """

    def __init__(self, models: Sequence[nn.Module], home: Move, fetch: Move) -> None:
        tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
        self._tensors = list({id(t): t for t in tensors}.values())
        self._home = [home(t.data) for t in self._tensors]
        self._fetch, self.visits = fetch, 0
        self._let_go()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Within it the models are on the device."""
        self.visits += 1
        for tensor, home in zip(self._tensors, self._home, strict=True):
            tensor.data = self._fetch(home)
        try:
            yield
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for tensor, home in zip(self._tensors, self._home, strict=True):
            tensor.data = home

    def wake(self) -> None:
        """Bring them back for good."""
        for tensor, home in zip(self._tensors, self._home, strict=True):
            tensor.data = self._fetch(home)


def rest(models: Sequence[nn.Module], device: torch.device) -> Resting:
    """Put models that are on a device to rest in the computer's memory.

    Args:
        models: frozen; no weight of theirs may be one that is trained.
        device: where they are brought when they are asked.
    """

    def home(tensor: Tensor) -> Tensor:
        kept = torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda")
        return kept.copy_(tensor)

    return Resting(models, home, lambda tensor: tensor.to(device, non_blocking=True))
