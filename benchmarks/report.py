"""From ``results.json`` to the tables and the pictures: ``python benchmarks/report.py FOLDER``.

Of each run the first steps are left out (warm-up: allocators, lazily loaded code). Rates are sums over the other steps,
not means of rates. A row shows the median of its runs.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import needed
import scaling
from catalogue import JOBS, Wanted
from workload import SIZES

PHASES = ("generation", "scoring", "update")
Row = dict[str, Any]


def summary(results: Row) -> list[Row]:
    """One row for each (threads, job, tool), with ratios to the job's peer as shipped and tuned."""
    runs = [run for run in results["runs"] if not run.get("axis")]
    peaks: dict[int, float] = {}
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for run in runs:
        peaks[run["threads"]] = max(run["gflops"], peaks.get(run["threads"], 0.0))
        groups.setdefault((run["threads"], run["job"], run["tool"]), []).append(run)
    rows = {}
    for (threads, job, tool), of_tool in groups.items():
        good = [figures(run, results["settings"], peaks[threads]) for run in of_tool if "error" not in run]
        row: Row = {"threads": threads, "job": job, "tool": tool, "runs": len(good)}
        if len(good) < len(of_tool):
            row["error"] = next(run["error"] for run in of_tool if "error" in run)
        for name in good[0] if good else ():
            row[name] = statistics.median(one[name] for one in good)
        if good:
            row["tokens_s_range"] = [min(one["tokens_s"] for one in good), max(one["tokens_s"] for one in good)]
        rows[threads, job, tool] = row
    for (threads, job, _), row in rows.items():
        for peer, ending in ((JOBS[job].peer, ""), (JOBS[job].tuned, "_tuned")):
            other = rows.get((threads, job, peer), {})
            if "tokens_s" in row and "tokens_s" in other:
                row["speed_ratio" + ending] = row["tokens_s"] / other["tokens_s"]
                row["memory_ratio" + ending] = row["memory_mb"] / other["memory_mb"]
    tools = list(dict.fromkeys(run["tool"] for run in runs if run["tool"] != "palate"))
    places = {tool: place for place, tool in enumerate(["palate", *sorted(tools, key=_tool_order)])}
    order = list(JOBS)
    return sorted(rows.values(), key=lambda r: (-r["threads"], order.index(r["job"]), places[r["tool"]]))


def _tool_order(tool: str) -> tuple[bool, int]:
    """Peers before others, as shipped before tuned; the rest as they came."""
    peers = [name for job in JOBS.values() for name in (job.peer, job.tuned)]
    return (tool not in peers, peers.index(tool) if tool in peers else 0)


def figures(run: Row, settings: Row, peak: float) -> dict[str, float]:
    """The figures of one run.

    Args:
        peak: the machine's best rate, GFLOP/s.
    """
    job = JOBS[run["job"]]
    steps = run["steps"][min(job.warmup, len(run["steps"]) - 1) :]
    seconds, tokens = sum(step["s"] for step in steps), sum(step["tokens"] for step in steps)
    all_tokens = sum(step["tokens"] for step in run["steps"])
    # What the counted steps need of the whole run's work: their share of its tokens.
    parts = {name: n * tokens / all_tokens for name, n in needed_operations(run["job"], settings).items()}
    row = {
        "tokens_s": tokens / seconds,
        "samples_s": job.samples * len(steps) / seconds,
        "s_step": seconds / len(steps),
        "tokens_cpu_s": tokens / sum(step["cpu_s"] for step in steps),
        "memory_mb": scaling.memory(run),
        "import_mb": run["import_mb"],
        "share": sum(parts.values()) / seconds / peak / 1e9,
        "machine_gflops": run["gflops"],
        "tokens_step": all_tokens / len(run["steps"]),
        "ready_s": run["ready_s"],
    }
    if job.samples_responses:
        spent = {name: sum(step["phases"].get(name, 0.0) for step in steps) for name in PHASES}
        row |= {name: spent[name] / seconds for name in PHASES}
        if spent["update"]:
            row["update_share"] = parts["update"] / spent["update"] / peak / 1e9
    return row


def needed_operations(job: str, settings: Row) -> dict[str, float]:
    """Operations that the whole run needs, by phase, from the lengths of the records that it works through."""
    hidden, intermediate, layers, _ = SIZES[settings.get("size", 10)]
    shape = needed.Shape(hidden, intermediate, layers, settings["workload"]["vocabulary"])
    lengths, steps = settings["workload"]["lengths"], settings["steps"][job]
    prompts = [prompt for (prompt,) in lengths["prompts"]]
    pairs = lengths["pairs"][: 8 * steps]
    if job == "sft":
        return {"update": needed.sft(shape, lengths["sft"][: 16 * steps])}
    if job == "reward":
        return {"update": needed.reward(shape, pairs)}
    if job == "kto":
        return {"update": needed.kto(shape, pairs)}
    if job in ("dpo", "dpo_cached", "orpo"):
        return {"update": needed.preference(shape, pairs, reference=job == "dpo")}
    if job == "ppo":
        return needed.ppo(shape, prompts[: 32 * steps], response=64, epochs=4)
    if job in ("generation", "generation_groups"):
        size = 4 if job == "generation_groups" else 1
        return {"generation": steps * needed.generation(shape, prompts[: 32 // size], response=128, size=size)}
    size = 2 if job == "online_dpo" else 4
    return needed.group(shape, prompts[: 32 // size * steps], response=64, size=size)


def table(rows: Sequence[Row], results: Row) -> str:
    """Markdown: every tool's figures."""
    where, settings = results["machine"], results["settings"]
    place = where.get("gpu") or f"{where['processor']}, {where['cores']} cores"
    runs = sorted({row["runs"] for row in rows if row["runs"]}) or [0]
    count = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    of = f"medians of {count} runs, in turns" if runs[-1] > 1 else "one run of each"
    titles = ["job", "tool", "threads", "tokens/s", "x peer", "x tuned", "samples/s", "s/step"]
    titles += ["memory above import, MB", "x peer", "share of peak", "generation / scoring / update"]
    head = (
        f"Measured {settings['started']} on {place}; {of}. Models of {settings.get('size', 10)} million parameters, "
        f"vocabulary {settings['vocabulary']:,}, {settings.get('dtype', 'float32')}. The peer is TRL as shipped (of "
        "generation: transformers' generate), tuned is the same with malloc tuned."
    )
    lines = [
        head,
        "",
        f"| {' | '.join(titles)} |",
        "|" + "---|" * len(titles),
    ]
    for row in rows:
        head = f"| {JOBS[row['job']].title} | {row['tool']} | {row['threads']} |"
        if "tokens_s" not in row:
            lines.append(f"{head} failed: {row['error']} |" + " |" * (len(titles) - 4))
            continue
        phases = " / ".join(f"{100 * row[name]:.0f} %" for name in PHASES) if "update" in row else ""
        lines.append(
            f"{head} {row['tokens_s']:,.0f} | {ratio(row, 'speed_ratio')} | {ratio(row, 'speed_ratio_tuned')} | "
            f"{row['samples_s']:.1f} | {row['s_step']:.2f} | {row['memory_mb']:,.0f} | {ratio(row, 'memory_ratio')} | "
            f"{100 * row['share']:.0f} % | {phases} |"
        )
    lines += [f"\nSkipped: {JOBS[s['job']].title}, {s['tool']}: {s['reason']}." for s in results["skipped"]]
    for threads in sorted({row["threads"] for row in rows}):
        rates = [run["gflops"] for run in results["runs"] if run["threads"] == threads and run["gflops"]]
        swing = f"before single runs {min(rates):,.0f} to {max(rates):,.0f}"
        lines += [
            "",
            f"Matrix multiply, {threads} thread{'s' * (threads > 1)}: peak {max(rates):,.0f} GFLOP/s; {swing}.",
        ]
    return "\n".join(lines) + "\n"


def ratio(row: Row, name: str) -> str:
    return f"{row[name]:.2f}" if name in row else ""


def wanted_of(job: str, vocabulary: int) -> list[tuple[str, float, bool]]:
    """What palate is to reach: (figure of a row, limit, True = at least and False = at most)."""
    wanted: Wanted = JOBS[job].wanted
    memory = wanted.memory_wide if wanted.memory_wide is not None and vocabulary >= 32768 else wanted.memory
    limits = (
        ("speed_ratio", wanted.speed, True),
        ("speed_ratio_tuned", wanted.speed_tuned, True),
        ("memory_ratio", memory, False),
        ("share", wanted.share, True),
        ("update_share", wanted.update_share, True),
    )
    return [(name, limit, least) for name, limit, least in limits if limit is not None]


def verdict(row: Row, name: str, limit: float, at_least: bool) -> str:
    """A cell: the figure, what is wanted, and whether it is met; as it is measured, not as it is rounded."""
    percent = name in ("share", "update_share")
    said = (lambda x: f"{100 * x:.0f} %") if percent else (lambda x: f"{x:.2f}".rstrip("0").rstrip("."))
    wanted = f"{'≥' if at_least else '≤'} {said(limit)}"
    if name not in row:
        return f"not measured ({wanted})"
    met = row[name] >= limit if at_least else row[name] <= limit
    figure = f"{100 * row[name]:.0f} %" if percent else f"{row[name]:.2f}"
    return f"{figure} ({wanted}) {'met' if met else '**not met**'}"


def wanted_table(rows: Sequence[Row], vocabulary: int) -> str:
    """Markdown: palate's figures beside the wanted ones."""
    columns = ("speed_ratio", "speed_ratio_tuned", "memory_ratio", "share", "update_share")
    lines = [
        "| job | threads | speed, x peer | speed, x tuned peer | memory, x peer | share of peak | share of peak, update |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["tool"] != "palate":
            continue
        limits = {name: (limit, least) for name, limit, least in wanted_of(row["job"], vocabulary)}
        shown = {
            "speed_ratio": ratio(row, "speed_ratio"),
            "speed_ratio_tuned": ratio(row, "speed_ratio_tuned"),
            "memory_ratio": ratio(row, "memory_ratio"),
            "share": f"{100 * row['share']:.0f} %" if "share" in row else "",
            "update_share": f"{100 * row['update_share']:.0f} %" if "update_share" in row else "",
        }
        cells = [verdict(row, name, *limits[name]) if name in limits else shown[name] for name in columns]
        lines.append(f"| {JOBS[row['job']].title} | {row['threads']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text(results: Row) -> str:
    """The whole page: figures, wanted figures, scaling."""
    rows, grown = summary(results), scaling.summary([run for run in results["runs"] if run.get("axis")])
    parts = []
    if rows:
        wanted = wanted_table(rows, results["settings"]["vocabulary"])
        parts += [table(rows, results), "## Beside what is wanted\n", wanted]
    if grown:
        parts += ["## How cost grows\n", scaling.table(grown)]
    return "\n".join(parts)


def main(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    (folder / "table.md").write_text(text(results))
    (folder / "summary.json").write_text(json.dumps(summary(results), indent=1))
    import picture  # imports matplotlib, which the tables do not need

    picture.draw(results, folder)
    print(text(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
