"""What a person sees while a stage runs: a bar with rate, time left and the numbers that matter; lines where no one looks."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console

from palate.training.times import shares, tokens_per_second

Metrics = dict[str, Any]
SECONDS_BETWEEN_LINES = 10.0
BATCHES_OF_PACE = 8  # the bar's tokens a second are those of the last few batches
# The numbers that matter, most telling first; a stage shows the first three that it has.
TELLING = ("score", "kl/reference", "reward/accuracy", "length/response", "loss")


def speaker(quiet: bool) -> Callable[[Any], None]:
    """Prints to standard error, or nothing."""
    if quiet:
        return lambda _: None
    width = None if sys.stderr.isatty() else 140  # a log file has no width of its own
    console = Console(stderr=True, highlight=False, soft_wrap=True, width=width)
    return lambda text: console.print(text, markup=False) if isinstance(text, str) else console.print(text)


def figures(metrics: Metrics) -> str:
    """The two or three numbers that matter of this stage."""
    shown = [name for name in TELLING if name in metrics][:3]
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in shown)


def pace(batches: Iterable[Metrics]) -> str:
    """Tokens a second, and of a method that samples where the time goes; "" before the first batch."""
    batches = list(batches)
    rate = tokens_per_second(batches)
    samples = any("time/rollout" in metrics for metrics in batches)
    return f"{rate:,.0f} tokens/s" + (f": {shares(batches)}" if samples else "") if rate else ""


def watched(stream: Iterable[Metrics], total: int, what: str, quiet: bool) -> Iterator[Metrics]:
    """The same metrics, shown as they pass.

    Args:
        stream: from the loop. total: batches of the whole run. what: the stage's name.
    """
    if quiet:
        yield from stream
    elif sys.stderr.isatty():
        yield from _bar(stream, total, what)
    else:
        yield from _lines(stream, total, what)


def _lines(stream: Iterable[Metrics], total: int, what: str) -> Iterator[Metrics]:
    first: int | None = None
    started, said, judged = time.monotonic(), 0.0, 0.0
    since: list[Metrics] = []  # the last line
    for metrics in stream:
        now, step = time.monotonic(), int(metrics["step"])
        if metrics["split"] == "validation":
            if now - judged >= SECONDS_BETWEEN_LINES or step == total:
                _say(f"{what} {step}/{total}  held out: {figures(metrics)}")
                judged = now
        else:
            first = step - 1 if first is None else first  # a resumed run begins later
            since.append(metrics)
            if now - said >= SECONDS_BETWEEN_LINES or step == total:
                left = (total - step) * (now - started) / (step - first)
                _say(f"{what} {step}/{total}  {figures(metrics)}  {left:.0f} s left")
                if speed := pace(since):
                    _say(f"  {speed}")
                said, since = now, []
        yield metrics


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _bar(stream: Iterable[Metrics], total: int, what: str) -> Iterator[Metrics]:
    from rich.console import RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Told(Progress):
        """A bar with lines of text below it, each cut at the terminal's width."""

        below: tuple[str, ...] = ()

        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            yield from (Text(f"  {line}", no_wrap=True, overflow="ellipsis") for line in self.below if line)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    last: deque[Metrics] = deque(maxlen=BATCHES_OF_PACE)
    with Told(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        for metrics in stream:
            if metrics["split"] == "validation":
                progress.console.print(
                    f"{what} {metrics['step']}/{total}  held out: {figures(metrics)}", highlight=False
                )
            else:
                last.append(metrics)
                progress.below = (figures(metrics), pace(last))
                progress.update(task, completed=metrics["step"])
            yield metrics
