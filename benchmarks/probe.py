"""What a measured process writes down: wall time of every step, of phases within it, tokens, memory.

Used inside every measured process, palate's and the peers', so it imports the standard library only.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
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


class Probe:
    """Collects the figures of one run and writes them as JSON.

    Call ``imported()`` after all imports, ``begin()`` before the first step, ``step()`` after each one.
    """

    def __init__(self, out: str) -> None:
        self.out = Path(out)
        self.facts: dict[str, Any] = {"steps": []}
        self._phases: dict[str, float] = {}
        self._tokens = 0
        self._started = time.perf_counter()
        self._last: float | None = None
        self._cpu = 0.0

    def imported(self) -> None:
        """Note what Python and libraries take before any work."""
        self.facts["import_s"] = time.perf_counter() - self._started
        self.facts["import_mb"] = peak_mb()

    def begin(self) -> None:
        """The next step starts now."""
        self._last, self._cpu = time.perf_counter(), time.process_time()
        self.facts.setdefault("ready_s", self._last - self._started)

    def tokens(self, count: int) -> None:
        """Real (non-padding) tokens trained on, added to the current step."""
        self._tokens += count

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds of a part of the current step, e.g. "generation"."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        self._phases[name] = self._phases.get(name, 0.0) + seconds

    def seconds(self) -> float:
        """Since the current step began."""
        assert self._last is not None, "begin() comes first"
        return time.perf_counter() - self._last

    def step(self, **metrics: float) -> None:
        """A step ended: note it and begin the next."""
        step = {"s": self.seconds(), "cpu_s": time.process_time() - self._cpu, "tokens": self._tokens}
        self.facts["steps"].append({**step, "phases": self._phases, "metrics": metrics})
        self._phases, self._tokens = {}, 0
        self.begin()

    def write(self, **facts: Any) -> None:
        """Write everything to the file; the last thing a measured process does."""
        total = time.perf_counter() - self._started
        self.out.write_text(json.dumps({**self.facts, "peak_mb": peak_mb(), "total_s": total, **facts}, indent=1))
