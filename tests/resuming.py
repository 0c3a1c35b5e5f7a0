"""Runs that are stopped and go on, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from palate.training.loop import Run, train


def stopped_and_resumed(new_run: Callable[[Path], Run], folder: Path, *stops: int) -> Run:
    """A run in ``folder`` that is dropped after so many yields, each time begun anew, and at last finished."""
    for stop in stops:
        steps = train(new_run(folder))
        for _ in range(stop):
            next(steps)
        steps.close()
    list(train(run := new_run(folder)))
    return run


def everything(folder: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
