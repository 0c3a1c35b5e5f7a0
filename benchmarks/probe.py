"""What a measured process writes down: wall time of every step, of phases within it, tokens, memory.

Used inside every measured process, palate's and the peers', so it imports the standard library only. Where the process
works on a GPU, clocks are read when the GPU has finished, and its own peak of allocated memory is written down too.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def peak_mb() -> float:
    """The largest resident memory of this process so far, in MB (2**20 bytes).

    ``ru_maxrss`` survives exec, so that a process started by a big parent begins with the parent's peak; Linux's
    VmHWM does not, and is preferred where it exists.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def gpu() -> Any:
    """``torch.cuda`` if this process has begun to use a GPU, else None; torch is not imported for the question."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def now() -> float:
    """Seconds on a clock, when all work given to a GPU is done."""
    if (cuda := gpu()) is not None:
        cuda.synchronize()
    return time.perf_counter()


class Probe:
    """Collects the figures of one run and writes them as JSON.

    Call ``imported()`` after all imports, ``begin()`` before the first step, ``step()`` after each one.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)
        self.facts: dict[str, Any] = {"steps": []}
        self._phases: dict[str, float] = {}
        self._tokens = 0
        self._inner = 0.0  # seconds of phases inside the one that is running
        self._started = time.perf_counter()
        self._last: float | None = None
        self._cpu = 0.0

    def imported(self) -> None:
        """Note what Python and libraries take before any work."""
        self.facts["import_s"] = time.perf_counter() - self._started
        self.facts["import_mb"] = peak_mb()

    def begin(self) -> None:
        """The next step starts now."""
        self._last, self._cpu = now(), time.process_time()
        self.facts.setdefault("ready_s", self._last - self._started)

    def tokens(self, count: int) -> None:
        """Real (non-padding) tokens trained on or drawn, added to the current step."""
        self._tokens += count

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds of a part of the current step, e.g. "generation"; a phase inside another counts for itself alone."""
        outside, self._inner = self._inner, 0.0
        started = now()
        try:
            yield
        finally:
            spent = now() - started
            self.add(name, spent - self._inner)
            self._inner = outside + spent

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time noted as a phase."""

        @functools.wraps(function)
        def timed(*positional: Any, **named: Any) -> Any:
            with self.phase(name):
                return function(*positional, **named)

        return timed

    def add(self, name: str, seconds: float) -> None:
        self._phases[name] = self._phases.get(name, 0.0) + seconds

    def rest(self, name: str) -> None:
        """What the current step took outside all phases so far is this phase's."""
        self.add(name, self.seconds() - sum(self._phases.values()))

    def seconds(self) -> float:
        """Since the current step began."""
        assert self._last is not None, "begin() comes first"
        return now() - self._last

    def step(self, **metrics: float) -> None:
        """A step ended: note it and begin the next."""
        step = {"s": self.seconds(), "cpu_s": time.process_time() - self._cpu, "tokens": self._tokens}
        self.facts["steps"].append({**step, "phases": self._phases, "metrics": metrics})
        self._phases, self._tokens = {}, 0
        self.begin()

    def write(self, **facts: Any) -> None:
        """Write everything to the file; the last thing a measured process does."""
        total = time.perf_counter() - self._started
        facts |= {"peak_mb": peak_mb(), "total_s": total}
        if (cuda := gpu()) is not None:
            facts["gpu_mb"] = cuda.max_memory_allocated() / 2**20
        self.out.write_text(json.dumps({**self.facts, **facts}, indent=1))
