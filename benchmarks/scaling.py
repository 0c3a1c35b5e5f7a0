"""How cost grows: the points at which palate and TRL are measured for the second table and picture.

Along each axis one thing changes; the rest is as in the job that is measured, but with 8 demonstrations (of GRPO: 32
responses) a step, few steps, and a limit on time and memory, so that a point which is too big is reported as such.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, WARMUP, ROWS = 3, 1, 8
TOOLS = ("palate", "trl")
VOCABULARY, SIZE = 8192, 10
Row = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """One thing that grows.

    Attributes:
        title: in table and picture.
        job: whose scripts are run.
        values: smallest first.
        peer_s: about how long the peer takes for a step at the smallest value, and at the largest; for ``--plan`` alone.
    """

    title: str
    job: str
    values: tuple[int, ...]
    peer_s: tuple[float, float]

    def seconds(self, value: int) -> float:
        """The peer's seconds of a step, on a straight line between the ends."""
        (first, last), (low, high) = (self.values[0], self.values[-1]), self.peer_s
        return low + (high - low) * (value - first) / (last - first)


AXES = {
    "length": Axis("response length, tokens", "sft", (64, 128, 256, 512, 1024, 2048), (1.5, 35)),
    "vocabulary": Axis("vocabulary, entries", "sft", (8192, 32768, 131072), (2.5, 40)),
    "size": Axis("parameters, millions", "sft", (10, 30, 100, 500), (2.5, 50)),
    "group": Axis("responses to a prompt", "grpo", (1, 4, 8, 16), (13, 13)),
}


def impossible(axis: str, value: int, tool: str) -> str | None:
    """Why a tool cannot be measured at a point whatever the machine."""
    if axis == "group" and value == 1 and tool != "palate":
        return "TRL's GRPO wants two responses to a prompt or more"
    return None


def work(axis: str, value: int) -> tuple[int, int]:
    """Size (millions of parameters) and vocabulary of the model at a point."""
    return (value if axis == "size" else SIZE), (value if axis == "vocabulary" else VOCABULARY)


def arguments(axis: str, value: int, workload: Path) -> list[str]:
    """What the job's script is given beside the model: the records and how many."""
    if axis == "group":
        return ["--records", str(workload / "prompts.jsonl"), "--group", str(value)]
    records = workload.parent / "lengths" / f"sft-{value}.jsonl" if axis == "length" else workload / "sft.jsonl"
    return ["--records", str(records), "--rows", str(ROWS), "--max-length", "4096"]


def summary(runs: Sequence[Row]) -> list[Row]:
    """One row for each (threads, axis, value, tool): medians over runs; a reason where nothing was measured."""
    groups: dict[tuple[int, str, int, str], list[Row]] = {}
    for run in runs:
        groups.setdefault((run["threads"], run["axis"], run["value"], run["tool"]), []).append(run)
    rows = []
    for (threads, axis, value, tool), group in groups.items():
        row: Row = {"threads": threads, "axis": axis, "value": value, "tool": tool, "runs": len(group)}
        good = [run for run in group if "error" not in run]
        if good:
            row["tokens_s"] = statistics.median(rate(run["steps"][WARMUP:]) for run in good)
            row["memory_mb"] = statistics.median(memory(run) for run in good)
        else:
            row["error"] = group[0]["error"]
        rows.append(row)
    order = list(AXES)
    return sorted(
        rows, key=lambda row: (row["threads"], order.index(row["axis"]), row["value"], row["tool"] != "palate")
    )


def rate(steps: Sequence[Row]) -> float:
    """Real tokens per second over steps."""
    return float(sum(step["tokens"] for step in steps) / sum(step["s"] for step in steps))


def memory(run: Row) -> float:
    """MB above import, on a GPU of its memory."""
    return float(run["gpu_mb"] if "gpu_mb" in run else run["peak_mb"] - run["import_mb"])


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each point, the tools side by side."""
    if not rows:
        return ""
    lines = [
        "| what grows | | threads | palate, tokens/s | TRL, tokens/s | ratio | palate, MB | TRL, MB | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    points = dict.fromkeys((row["threads"], row["axis"], row["value"]) for row in rows)
    for threads, axis, value in points:
        at = {r["tool"]: r for r in rows if (r["threads"], r["axis"], r["value"]) == (threads, axis, value)}
        pair = [at.get(tool, {"error": "not measured"}) for tool in ("palate", "TRL")]
        cells = [f"{AXES[axis].title} ({AXES[axis].job})", f"{value:,}", str(threads)]
        for name in ("tokens_s", "memory_mb"):
            found = [row.get(name) for row in pair]
            cells += [
                row["error"] if number is None else f"{number:,.0f}" for row, number in zip(pair, found, strict=True)
            ]
            cells.append("" if None in found else f"{found[0] / found[1]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def load(path: Path) -> list[Row]:
    """The runs of scaling in a file of results."""
    return [run for run in json.loads(path.read_text())["runs"] if run.get("axis")]
