"""What is to be run, in which order, what of it is done, and how long the rest takes. Pure: no file, no process."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import scaling
from catalogue import JOBS

START_S = 14.0  # imports, model and data, and the machine's rate before each run


class Cell(NamedTuple):
    """One run of one tool. ``axis`` and ``value`` are set for a point of a scaling table."""

    threads: int
    job: str
    tool: str
    repeat: int
    axis: str = ""
    value: int = 0

    @property
    def point(self) -> Cell:
        """The same whatever the repeat."""
        return self._replace(repeat=0)

    @property
    def name(self) -> str:
        """Of all its repeats."""
        what = f"{self.axis} {self.value:,}, {self.job}" if self.axis else self.job
        return f"{what}, {self.tool}, {self.threads} thread{'s' * (self.threads > 1)}"

    def __str__(self) -> str:
        return f"{self.name}, repeat {self.repeat + 1}"


def cells(
    able: Mapping[str, Sequence[str]],
    *,
    jobs: Iterable[str],
    axes: Iterable[str],
    threads: Sequence[int],
    repeats: int,
    scaling_repeats: int,
    ends: bool = False,
) -> list[Cell]:
    """All cells in order.

    Thread counts one after the other; within one whole rounds of all jobs, so that an interruption leaves a table of
    fewer repeats and not of fewer jobs; then the scaling points, with the first thread count. For each job the tools
    take turns, and every other time backwards: whatever drifts on the machine meets all tools alike.

    Args:
        able: for each job, the tools that can do it.
        ends: of every axis only the smallest and the largest value.
    """
    found = []
    jobs = list(jobs)
    for count in threads:
        for repeat in range(repeats):
            for job in jobs:
                found += [Cell(count, job, tool, repeat) for tool in in_turn(able[job], repeat)]
    for repeat in range(scaling_repeats):
        for axis in axes:
            job, values = scaling.AXES[axis].job, scaling.AXES[axis].values
            for value in (values[0], values[-1]) if ends else values:
                turn = in_turn([tool for tool in scaling.TOOLS if tool in able[job]], repeat)
                found += [Cell(threads[0], job, tool, repeat, axis, value) for tool in turn]
    return found


def in_turn(names: Sequence[str], repeat: int) -> list[str]:
    """Forwards, and every other repeat backwards."""
    return list(names) if repeat % 2 == 0 else list(names)[::-1]


def cell_of(run: Mapping[str, Any]) -> Cell:
    """The cell that a run was of."""
    return Cell(run["threads"], run["job"], run["key"], run["repeat"], run.get("axis", ""), run.get("value", 0))


def still_to_do(wanted: Sequence[Cell], runs: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """The cells without a figure. A failed run is tried again, a failed point of scaling (it did not fit) is not."""
    done: set[Cell] = set()
    hopeless: set[Cell] = set()
    for run in runs:
        cell = cell_of(run)
        if "error" not in run:
            done.add(cell)
        elif cell.axis:
            hopeless.add(cell.point)
    return [cell for cell in wanted if cell not in done and cell.point not in hopeless]


def without(runs: Iterable[Any], again: Collection[Cell]) -> list[Any]:
    """The runs that stay in the results when cells are measured again: all but those cells' own."""
    return [run for run in runs if cell_of(run) not in again]


def guess(cell: Cell, cost: float, steps: int, threads_of_machine: int) -> float:
    """Seconds that a cell takes, roughly; ``cost`` is the tool's for the peer's one second."""
    if cell.axis:
        each = scaling.AXES[cell.axis].seconds(cell.value)
    else:
        each = JOBS[cell.job].peer_s
    slower = min(2, threads_of_machine) / min(cell.threads, 2)
    return START_S + steps * each * cost * slower


def seconds_left(guessed: Mapping[Cell, float], to_do: Iterable[Cell], measured: Mapping[Cell, float]) -> float:
    """The guesses of what is to do, scaled by how the finished cells compared with theirs.

    Two minutes as guessed are thrown in, so that the first cell alone does not decide.
    """
    known = [cell for cell in measured if cell in guessed]
    scale = (120 + sum(measured[cell] for cell in known)) / (120 + sum(guessed[cell] for cell in known))
    return scale * sum(guessed[cell] for cell in to_do)


def clock(seconds: float) -> str:
    """12 s, 7 min, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
