"""AdamW whose moments are in the computer's memory, and visit the device a few parameters at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

AT_ONCE = 2**26  # numbers whose moments are on the device together: 512 MiB in float32
_MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdamW(torch.optim.AdamW):
    """The same numbers as ``torch.optim.AdamW``: the same kernel runs on the same device.

    The moments, eight bytes for each trained float32 number, cross to the device and back in every step; weights and
    gradients stay where they are. ``state_device`` is where moments are between steps.
    """

    state_device = torch.device("cpu")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        groups = self.param_groups
        try:
            for group in groups:
                for part in _parts([p for p in group["params"] if p.grad is not None]):
                    visiting = [(p, key) for p in part for key in _MOMENTS if key in self.state[p]]
                    home = {(p, key): self.state[p][key] for p, key in visiting}
                    for p, key in visiting:
                        self.state[p][key] = self.fetched(home[p, key], p)
                    self.param_groups = [{**group, "params": part}]
                    super().step()
                    for p in part:
                        for key in _MOMENTS:
                            self.state[p][key] = self.put_back(self.state[p][key], home.get((p, key)))
        finally:
            self.param_groups = groups
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to pinned memory do not wait by themselves, and a checkpoint reads them

    def fetched(self, moment: Tensor, p: nn.Parameter) -> Tensor:
        """A moment where its parameter is."""
        return moment.to(p.device, non_blocking=True)

    def put_back(self, moment: Tensor, home: Tensor | None) -> Tensor:
        """A moment in the computer's memory, in its place there once it has one."""
        if home is None or home.device != self.state_device:
            pinned = moment.device.type == "cuda"
            home = torch.empty_like(moment, device=self.state_device, pin_memory=pinned)
        return home.copy_(moment, non_blocking=True)


def _parts(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    part: list[nn.Parameter] = []
    held = 0
    for p in parameters:
        if part and held + p.numel() > AT_ONCE:
            yield part
            part, held = [], 0
        part.append(p)
        held += p.numel()
    if part:
        yield part
