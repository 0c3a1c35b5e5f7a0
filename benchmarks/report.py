"""From ``results.json`` to the table and the picture: ``python benchmarks/report.py FOLDER``.

Of each run the first steps are left out (warm-up: allocators, lazily loaded code). Rates are sums over the other steps,
not means of rates. A row shows the median of its runs.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import needed
from workload import HIDDEN, INTERMEDIATE, LAYERS

TITLES = {
    "sft": "SFT",
    "reward": "reward model (BT)",
    "dpo": "DPO",
    "dpo_cached": "DPO, reference cached",
    "kto": "KTO",
    "orpo": "ORPO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "online_dpo": "online DPO",
    "ppo": "PPO",
}
SAMPLING = ("grpo", "rloo", "online_dpo", "ppo")
PHASES = ("generation", "scoring", "update")


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each (threads, job, tool), with ratios to TRL as shipped."""
    peaks = {
        threads: max(run["gflops"] for run in results["runs"] if run["threads"] == threads)
        for threads in {run["threads"] for run in results["runs"]}
    }
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        groups.setdefault((run["threads"], run["job"], run["tool"]), []).append(run)
    rows = []
    for (threads, job, tool), runs in groups.items():
        row: dict[str, Any] = {"threads": threads, "job": job, "tool": tool, "runs": len(runs)}
        good = [figures(run, results["settings"], peaks[threads]) for run in runs if "error" not in run]
        if len(good) < len(runs):
            row["error"] = next(run["error"] for run in runs if "error" in run)
        for name in good[0] if good else ():
            row[name] = statistics.median(one[name] for one in good)
        if good:
            row["tokens_s_range"] = [min(one["tokens_s"] for one in good), max(one["tokens_s"] for one in good)]
        rows.append(row)
    for row in rows:
        same = (
            other
            for other in rows
            if (other["threads"], other["job"], other["tool"]) == (row["threads"], row["job"], "TRL")
        )
        peer = next(same, {})
        if "tokens_s" in peer and "tokens_s" in row:
            row["speed_ratio"] = row["tokens_s"] / peer["tokens_s"]
            row["memory_ratio"] = row["memory_mb"] / peer["memory_mb"]
    return rows


def figures(run: dict[str, Any], settings: dict[str, Any], peak: float) -> dict[str, float]:
    """The figures of one run; phases that a tool does not report are left out."""
    skip = min(1 if run["job"] in SAMPLING else 2, len(run["steps"]) - 1)
    steps = run["steps"][skip:]
    seconds, tokens = sum(step["s"] for step in steps), sum(step["tokens"] for step in steps)
    all_tokens = sum(step["tokens"] for step in run["steps"])
    operations = needed_operations(run["job"], settings) * tokens / all_tokens
    row = {
        "tokens_s": tokens / seconds,
        "s_step": seconds / len(steps),
        "tokens_cpu_s": tokens / sum(step["cpu_s"] for step in steps),
        "memory_mb": run["peak_mb"] - run["import_mb"],
        "import_mb": run["import_mb"],
        "share": operations / seconds / peak / 1e9,
        "machine_gflops": run["gflops"],
        "tokens_step": all_tokens / len(run["steps"]),
        "ready_s": run["ready_s"],
    }
    phases = {name: sum(step["phases"].get(name, 0.0) for step in steps) / seconds for name in PHASES}
    if run["job"] in SAMPLING and phases["update"]:
        phases["scoring"] = phases["scoring"] or 1 - phases["generation"] - phases["update"]
        row |= {name: phases[name] for name in PHASES}
    return row


def needed_operations(job: str, settings: dict[str, Any]) -> float:
    """Operations that the whole run needs, from the lengths of the records that it works through."""
    shape = needed.Shape(HIDDEN, INTERMEDIATE, LAYERS, settings["workload"]["vocabulary"])
    lengths, steps = settings["workload"]["lengths"], settings["steps"][job]
    if job == "sft":
        return needed.sft(shape, lengths["sft"][: 16 * steps])
    if job == "reward":
        return needed.reward(shape, lengths["pairs"][: 8 * steps])
    if job in ("dpo", "dpo_cached", "orpo"):
        return needed.preference(shape, lengths["pairs"][: 8 * steps], reference=job == "dpo")
    if job == "kto":
        return needed.kto(shape, lengths["pairs"][: 8 * steps])
    prompts = [prompt for (prompt,) in lengths["prompts"]]
    if job == "ppo":
        return needed.ppo(shape, prompts[: 32 * steps], response=64, epochs=4)
    size = 2 if job == "online_dpo" else 4
    return needed.group(shape, prompts[: 32 // size * steps], response=64, size=size)


def table(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """Markdown."""
    machine, settings = results["machine"], results["settings"]
    titles = ("job", "tool", "threads", "tokens/s", "x TRL", "s/step", "memory above import, MB", "x TRL")
    titles += ("share of fp32 peak", "generation / scoring / update")
    where = f"{machine['processor']}, {machine['cores']} cores"
    how = f"medians of {settings['repeats']} runs, in turns"
    lines = [
        f"Measured {settings['started']} on {where}; {how}. Ratios are to TRL as shipped.",
        "",
        f"| {' | '.join(titles)} |",
        "|" + "---|" * len(titles),
    ]
    order = list(TITLES)
    for row in sorted(rows, key=lambda row: (row["threads"], order.index(row["job"]))):
        head = f"| {TITLES[row['job']]} | {row['tool']} | {row['threads']} |"
        if "tokens_s" not in row:
            lines.append(f"{head} failed: {row['error']} | | | | | | |")
            continue
        phases = " / ".join(f"{100 * row[name]:.0f} %" for name in PHASES) if "update" in row else ""
        lines.append(
            f"{head} {row['tokens_s']:,.0f} | {ratio(row, 'speed_ratio')} | {row['s_step']:.2f} | {row['memory_mb']:,.0f} "
            f"| {ratio(row, 'memory_ratio')} | {100 * row['share']:.0f} % | {phases} |"
        )
    lines += [f"\nSkipped: {TITLES[s['job']]}, {s['tool']}: {s['reason']}." for s in results["skipped"]]
    for threads in sorted({row["threads"] for row in rows}):
        rates = [run["gflops"] for run in results["runs"] if run["threads"] == threads]
        swing = f"before single runs {min(rates):.0f} to {max(rates):.0f}"
        lines += ["", f"fp32 matrix multiply, {threads} threads: peak {max(rates):.0f} GFLOP/s; {swing}."]
    return "\n".join(lines) + "\n"


def ratio(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f}" if name in row else ""


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of speed, memory and share of the peak for each job, one line of panels for each number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "tokens_s" in row]
    if not rows:
        return
    threads = sorted({row["threads"] for row in rows})
    tools = list(dict.fromkeys(row["tool"] for row in rows))
    jobs = [job for job in TITLES if any(row["job"] == job for row in rows)]
    panels = (
        ("tokens_s", "tokens per second", 1),
        ("memory_mb", "memory above import, MB", 1),
        ("share", "share of fp32 peak, %", 100),
    )
    figure, axes = plt.subplots(len(threads), 3, figsize=(13, 3.6 * len(threads)), squeeze=False)
    for line, count in zip(axes, threads, strict=True):
        for ax, (name, title, factor) in zip(line, panels, strict=True):
            for i, tool in enumerate(tools):
                found = {
                    row["job"]: row[name] * factor for row in rows if row["tool"] == tool and row["threads"] == count
                }
                places = [j + 0.8 * (i + 0.5) / len(tools) - 0.4 for j, job in enumerate(jobs) if job in found]
                heights = [found[job] for job in jobs if job in found]
                bars = ax.bar(places, heights, 0.8 / len(tools), label=tool)
                ax.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=1)
            ax.set_xticks(range(len(jobs)), [TITLES[job] for job in jobs])
            ax.set_title(f"{title} ({count} threads)", fontsize=10)
            ax.spines[["top", "right"]].set_visible(False)
            ax.margins(y=0.12)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    rows = summary(results)
    (folder / "summary.json").write_text(json.dumps(rows, indent=1))
    (folder / "table.md").write_text(table(rows, results))
    picture(rows, folder / "picture.png")
    print(table(rows, results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
