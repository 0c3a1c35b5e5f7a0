"""Where the time of a run went: ``times.jsonl``, one line a batch and one an evaluation.

A file of its own, because no two runs take the same time, while the other files of a run are the same bytes for the same
settings. So it is cut back by step when a run is resumed, and checkpoints know nothing of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.training import log

FILE = "times.jsonl"
PARTS = {
    "time/rollout": "generation",
    "time/collate": "collating",
    "time/prepare": "scoring",
    "time/update": "update",
    "time/evaluation": "evaluation",
}
_KEPT = ("step", "split", "tokens/all", "tokens/second", *PARTS)
Line = Mapping[str, Any]


def timed(stream: Iterable[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """The same metrics; how long each took is in ``times.jsonl`` before the loop goes on (to a checkpoint, perhaps).

    Args:
        stream: straight from the loop. The first line says where it begins: what stands in the file from there on was
            written by a run that was killed, and is done again.
        folder: the run's.
    """
    started, begun = time.perf_counter(), False
    for metrics in stream:
        line = {name: metrics[name] for name in _KEPT if name in metrics}
        if metrics["split"] == "validation":
            line["time/evaluation"] = time.perf_counter() - started
        if not begun:
            log.keep_before(folder, FILE, metrics["step"])
            begun = True
        log.append(folder, FILE, line)
        yield metrics
        started = time.perf_counter()


def spent(lines: Iterable[Line]) -> dict[str, float]:
    """Seconds in each part, by its name in ``PARTS``; parts that the run does not have are left out."""
    found: dict[str, float] = {}
    for line in lines:
        for name in PARTS:
            if name in line:
                found[name] = found.get(name, 0.0) + line[name]
    return {name: found[name] for name in PARTS if name in found}


def tokens_per_second(lines: Iterable[Line]) -> float:
    """Tokens of the batches, prompts included, by the time that the batches took; 0 where no batch is among the lines."""
    batches = [line for line in lines if line.get("tokens/all") and line.get("tokens/second")]
    seconds = sum(line["tokens/all"] / line["tokens/second"] for line in batches)
    return sum(line["tokens/all"] for line in batches) / seconds if seconds else 0.0


def shares(lines: Iterable[Line]) -> str:
    """ "generation 61 %, scoring 9 %, update 30 %": the parts that are not next to nothing."""
    seconds = spent(lines)
    whole = sum(seconds.values())
    return ", ".join(f"{PARTS[n]} {100 * s / whole:.0f} %" for n, s in seconds.items() if s >= whole / 200)


def summary(lines: Sequence[Line]) -> str:
    """What a finished run says of its time, in one line."""
    batches = sum(line["split"] == "train" for line in lines)
    what = f"{batches} batch{'es' * (batches != 1)} in {sum(spent(lines).values()):,.0f} s"
    return f"{what}, {tokens_per_second(lines):,.0f} tokens/s: {shares(lines)}"
