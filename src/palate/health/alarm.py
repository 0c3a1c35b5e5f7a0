"""An alarm, the history that rules look at, and what a few of its lines say together.

A rule is a pure function ``rule(history) -> Alarm | None`` of the metrics so far; its alarm has its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

Line = Mapping[str, Any]
SURE = 3.0  # standard errors


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong.

    Attributes:
        name: of the rule that raised it, and of a heading in docs/health.md.
        step: batches done when it was seen.
        evidence: one sentence with the numbers and what they were measured on.
        numbers: the same for machines.
        causes: likely ones, the likeliest first.
        remedies: settings to give another run, the first to try first.
    """

    name: str
    step: int
    evidence: str
    numbers: Mapping[str, float]
    causes: Sequence[str]
    remedies: Sequence[str]

    def entry(self) -> dict[str, Any]:
        """A line of ``alarms.jsonl``."""
        return {**asdict(self), "causes": list(self.causes), "remedies": list(self.remedies)}


@dataclass
class History:
    """The metrics of a run so far, in order, and what its settings are.

    Attributes:
        total: batches of the whole run.
        settings: by dotted key; a key that the method has not is not there.
        train, held_out: lines of ``metrics.jsonl``, a batch and an evaluation each.
        prompts_held_out: what an evaluation is measured on; 0 = not known, and rules that must know it say nothing.
        is_due: rules are to be asked now: after an evaluation, the last batch, and as often as a tenth of a window is new.
    """

    total: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    train: list[Line] = field(default_factory=list)
    held_out: list[Line] = field(default_factory=list)
    prompts_held_out: int = 0
    is_due: bool = False
    _averages: dict[tuple[str, int], Average | None] = field(default_factory=dict, repr=False, compare=False)

    def add(self, line: Line) -> None:
        lines = self.train if line.get("split", "train") == "train" else self.held_out
        lines.append(line)
        pace = max(1, self.window // 10)
        self.is_due = lines is self.held_out or len(self.train) % pace == 0 or len(self.train) >= self.total

    @property
    def step(self) -> int:
        """Batches done."""
        return max((int(lines[-1]["step"]) for lines in (self.train, self.held_out) if lines), default=0)

    @property
    def window(self) -> int:
        """Batches whose average is looked at: a tenth of the run, from 10 to 200."""
        return min(200, max(10, self.total // 10))

    @property
    def recent(self) -> Sequence[Line]:
        """The last ``window`` batches; fewer in a run that has not so many yet."""
        return self.train[-self.window :]

    @property
    def first(self) -> Sequence[Line]:
        return self.train[: self.window]

    def seen(self, *names: str) -> list[Line]:
        """The recent batches that have all these metrics, as numbers; none at once where the last few have not.

        Rules are asked at every line, and most are about metrics that a method has not.
        """
        return having(self.recent, *names) if any(has([line], *names) for line in self.train[-3:]) else []

    def in_windows(self, name: str) -> Iterator[tuple[Sequence[Line], Average]]:
        """Window by window what is before the recent batches, and the metric's average; windows without it are left out.

        A whole window changes no more, and is averaged once: a long run has many.
        """
        width = self.window
        for start in range(0, len(self.train) - 2 * width + 1, width):
            if (name, start) not in self._averages:
                lines = self.train[start : start + width]
                self._averages[name, start] = average(lines, name) if has(lines, name) else None
            found = self._averages[name, start]
            if found is not None:
                yield self.train[start : start + width], found

    def under_way(self, parts: int) -> bool:
        """A whole window is there, and one of so many parts of the run is done."""
        return len(self.train) >= max(self.window, self.total / parts)

    def get(self, key: str, default: float) -> float:
        """A setting that is a number."""
        value = self.settings.get(key)
        return default if value is None else float(value)


class Rule(Protocol):
    """``None`` as long as nothing is wrong."""

    __name__: str

    def __call__(self, history: History) -> Alarm | None: ...


class Average(NamedTuple):
    """Mean over batches, and its standard error from how they differ (infinite for one batch)."""

    mean: float
    error: float


def average(lines: Sequence[Line], *names: str) -> Average:
    """Of a metric, or of the first minus the second, over lines."""
    values = [line[names[0]] - (line[names[1]] if len(names) > 1 else 0.0) for line in lines]
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Average(mean, math.inf)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Average(mean, math.sqrt(variance / len(values)))


def has(lines: Sequence[Line], *names: str) -> bool:
    """Are there lines, and do all have these metrics, as numbers?"""
    return bool(lines) and all(math.isfinite(line.get(name, math.nan)) for line in lines for name in names)


def having(lines: Sequence[Line], *names: str) -> list[Line]:
    """The lines that have all these metrics, as numbers."""
    return [line for line in lines if has([line], *names)]


class Change(NamedTuple):
    """What became of a metric since the first batch, which the policy drew before it was trained.

    Attributes:
        before, now: in the first batch; mean over the recent ones.
        noise: what chance may make of it: 3 standard errors, of one batch and of that mean, from how the recent differ.
    """

    before: float
    now: float
    noise: float

    @property
    def rose(self) -> bool:
        return self.now - self.before > self.noise

    @property
    def fell(self) -> bool:
        return self.before - self.now > self.noise


def since_start(history: History, name: str) -> Change | None:
    """None as long as there are no recent batches beside the first one, or where the metric is not there."""
    recent = history.seen(name)
    if len(history.train) <= history.window or len(recent) < 2 or not has(history.train[:1], name):
        return None
    now, error = average(recent, name)
    return Change(history.train[0][name], now, SURE * error * math.sqrt(1 + len(recent)))


def text(alarm: Mapping[str, Any]) -> str:
    """A line of ``alarms.jsonl`` for people."""
    lines = [f"{alarm['name']} (step {alarm['step']}): {alarm['evidence']}"]
    for title, key in (("likely causes", "causes"), ("what to try", "remedies")):
        if alarm.get(key):
            lines.append(f"  {title}: " + "; ".join(alarm[key]))
    return "\n".join(lines)
