"""Measure palate and its peers side by side: the same work, the same machine, in turns, medians.

    python benchmarks/run.py                       # every job; an hour or two
    python benchmarks/run.py --quick               # few steps, once: does it run?
    python benchmarks/run.py --jobs ppo --threads 1 2 --repeats 5

Every run is a fresh process. Before each one the machine's matrix-multiply rate is measured: its best is the peak that
shares refer to, and its swing says how far the figures can be trusted. Results go to ``PALATE_BENCH_DIR/results/``:
``results.json`` (every step of every run), ``table.md`` and ``picture.png``.

This process imports no heavy library, so that the memory of the processes that it starts is their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools import HERE, JOBS, Tool, environment, tools
from workload import bench_folder

SAMPLING = ("grpo", "rloo", "online_dpo", "ppo")  # jobs whose step is a whole iteration
STEPS = {job: 6 if job in SAMPLING else 14 for job in JOBS}
QUICK_STEPS = {job: 2 if job in SAMPLING else 4 for job in JOBS}
TIME_LIMIT = 1800  # seconds; a run that takes longer is reported as failed


def main() -> int:
    args = arguments()
    found = tools()
    folder = args.out or bench_folder() / "results"
    folder.mkdir(parents=True, exist_ok=True)
    workload = Path(last_line([sys.executable, HERE / "workload.py", "--vocabulary", args.vocabulary]))
    steps = QUICK_STEPS if args.quick else STEPS
    steps = {job: args.steps or steps[job] for job in args.jobs}
    results: dict[str, Any] = {
        "machine": machine(),
        "settings": settings(args, steps, workload),
        "runs": [],
        "skipped": [],
    }
    wanted = []
    for threads in args.threads:
        for job in args.jobs:
            able = []
            for name in args.tools:
                reason = found[name].missing(job)
                if reason:
                    results["skipped"].append({"job": job, "tool": found[name].name, "reason": reason})
                    print(f"{job}: {found[name].name} is skipped: {reason}", flush=True)
                else:
                    able.append(name)
            wanted.append((threads, job, able))
    for repeat in range(1 if args.quick else args.repeats):
        for threads, job, able in wanted:
            # In turns, and every other time backwards: whatever drifts on the machine meets all tools alike.
            for name in able if repeat % 2 == 0 else able[::-1]:
                run = measured(found[name], job, threads=threads, steps=steps[job], workload=workload, folder=folder)
                results["runs"].append({"repeat": repeat, **run})
                write(folder / "results.json", results)
                print(said(run), flush=True)
    subprocess.run([sys.executable, HERE / "report.py", folder], check=True)
    return 1 if any("error" in run for run in results["runs"]) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--tools", nargs="+", choices=list(tools()), default=list(tools()))
    parser.add_argument("--threads", nargs="+", type=int, default=[os.cpu_count() or 1], help="one table each")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each tool, of which the median counts")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps (of methods that sample: iterations) a run; default 14 (6)"
    )
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--quick", action="store_true", help="once, with few steps")
    parser.add_argument("--out", type=Path, help="folder for the results")
    return parser.parse_args()


def measured(tool: Tool, job: str, *, threads: int, steps: int, workload: Path, folder: Path) -> dict[str, Any]:
    """One run in a fresh process, with the machine's rate before it; ``error`` instead of figures when it failed."""
    scratch = bench_folder() / "running"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    python, script = tool.scripts[job]
    out = scratch / "figures.json"
    run: dict[str, Any] = {"job": job, "tool": tool.name, "threads": threads}
    run["gflops"] = json.loads(last_line([sys.executable, HERE / "peak.py", threads]))["peak"]
    command = [python, script, "--out", out, "--workload", workload, "--scratch", scratch, "--steps", steps]
    log = folder / f"{job}-{tool.name.replace(', ', '-').replace(' ', '-')}.log"
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [str(word) for word in command],
                check=False,
                env=environment(tool, threads),
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return {**run, "error": f"longer than {TIME_LIMIT} s; see {log.name}"}
    if done.returncode or not out.exists():
        return {**run, "error": f"exit {done.returncode}; see {log.name}"}
    return {**run, **json.loads(out.read_text())}


def said(run: dict[str, Any]) -> str:
    """One line on the console for a run."""
    head = f"{run['job']:7} {run['tool']:18} {run['threads']} threads, machine {run['gflops']:.0f} GFLOP/s: "
    if "error" in run:
        return head + run["error"]
    seconds = sum(step["s"] for step in run["steps"])
    rate = sum(step["tokens"] for step in run["steps"]) / seconds
    return head + (
        f"{rate:.0f} tokens/s, {seconds / len(run['steps']):.2f} s/step, "
        f"{run['peak_mb'] - run['import_mb']:.0f} MB above import, {run['total_s']:.0f} s in all"
    )


def machine() -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def settings(args: argparse.Namespace, steps: dict[str, int], workload: Path) -> dict[str, Any]:
    return {
        "steps": steps,
        "repeats": 1 if args.quick else args.repeats,
        "vocabulary": args.vocabulary,
        "workload": json.loads((workload / "workload.json").read_text()),
        "started": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
    }


def last_line(command: list[Any]) -> str:
    """The last line that a helper printed."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def write(path: Path, results: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
