"""Measure palate and its peers side by side: the same work, the same machine, in turns, medians.

    python benchmarks/run.py                       # everything, for hours; --plan says how long, and starts nothing
    python benchmarks/run.py --resume              # go on where it was interrupted: finished cells are left alone
    python benchmarks/run.py --quick               # few steps, once: does it run?
    python benchmarks/run.py --jobs ppo --threads 2 1 --repeats 5
    python benchmarks/run.py --scaling length vocabulary
    python benchmarks/run.py --device cuda --size 500

Everything is all jobs, with all cores and with one, and then the scaling tables. ``--jobs`` or ``--scaling`` alone
leaves the other out. Results go to ``PALATE_BENCH_DIR/results/``: ``results.json`` (every step of every run, written
after each), ``table.md``, ``picture.png``, ``scaling.png``. Ctrl-C writes the tables of what there is.

This process imports no heavy library, so that the memory of the processes that it starts is their own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import scaling
from catalogue import JOBS
from plan import Cell, cells, clock, guess, seconds_left, still_to_do, without
from process import last_line, machine, measured, said
from tools import HERE, Tool, tools
from workload import SIZES, bench_folder, folder_of

TIME_LIMIT, SCALING_TIME_LIMIT = 1800, 300  # seconds of one run


def main() -> int:
    args = arguments()
    found = tools()
    folder = args.out or bench_folder() / "results"
    able, skipped = who_can(found, args)
    wanted = cells(
        able,
        jobs=args.jobs,
        axes=args.scaling,
        threads=args.threads,
        repeats=args.repeats,
        scaling_repeats=args.scaling_repeats,
        ends=args.quick,
    )
    results = earlier(folder / "results.json", args) or {"settings": {}, "runs": []}
    guessed = {cell: guess(cell, found[cell.tool].cost, steps_of(cell, args), os.cpu_count() or 1) for cell in wanted}
    to_do = still_to_do(wanted, results["runs"])
    if args.plan:
        show_plan(wanted, to_do, guessed, skipped)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    workload = Path(
        last_line([sys.executable, HERE / "workload.py", "--vocabulary", args.vocabulary, "--size", args.size])
    )
    results |= {
        "machine": machine(args.device),
        "settings": settings(args, workload, results["settings"]),
        "runs": without(results["runs"], set(to_do)),
        "skipped": skipped,
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        run_all(to_do, guessed, results, found, args, workload=workload, folder=folder)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted; go on with --resume. So far:\n", flush=True)
    write(folder / "results.json", results)
    subprocess.run([sys.executable, HERE / "report.py", folder], check=True)
    failed = any("error" in run and not run.get("axis") for run in results["runs"])
    return 130 if interrupted else int(failed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), help="default: all, unless --scaling is given")
    parser.add_argument("--scaling", nargs="+", choices=list(scaling.AXES), help="default: all, unless --jobs is given")
    parser.add_argument("--tools", nargs="+", choices=list(tools()), default=list(tools()))
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", nargs="+", type=int, help=f"one after the other; default: {cores} and 1")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each tool, of which the median counts")
    parser.add_argument("--scaling-repeats", type=int, default=3, help="the same at each point of the scaling tables")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps, iterations or generations of a run; default: by job"
    )
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--size", type=int, choices=SIZES, help="millions of parameters; default 10, on a GPU 500")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: matrix products in bf16")
    parser.add_argument("--quick", action="store_true", help="once, with few steps, all cores, the ends of the scaling")
    parser.add_argument("--resume", action="store_true", help="keep the results there are, and measure what is missing")
    parser.add_argument("--plan", action="store_true", help="print what would be run and how long it takes")
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args()
    if args.jobs is None and args.scaling is None:
        args.jobs, args.scaling = list(JOBS), list(scaling.AXES)
    args.jobs, args.scaling = args.jobs or [], args.scaling or []
    one = args.quick or args.device == "cuda"
    args.threads = args.threads or list(dict.fromkeys([cores] if one else [cores, 1]))
    args.size = args.size or (10 if args.device == "cpu" else 500)
    args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    if args.quick:
        args.repeats = args.scaling_repeats = 1
    return args


def who_can(found: dict[str, Tool], args: argparse.Namespace) -> tuple[dict[str, list[str]], list[dict[str, str]]]:
    """For each job the tools that can do it here; and who cannot, with the reason."""
    able: dict[str, list[str]] = {}
    skipped = []
    for job in dict.fromkeys([*args.jobs, *(scaling.AXES[axis].job for axis in args.scaling)]):
        able[job] = []
        for name in args.tools:
            if job not in found[name].scripts:
                continue
            reason = found[name].missing(job, args.device)
            if reason is None:
                able[job].append(name)
            else:
                skipped.append({"job": job, "tool": found[name].name, "reason": reason})
    return able, skipped


def steps_of(cell: Cell, args: argparse.Namespace) -> int:
    if cell.axis:
        return scaling.STEPS
    return args.steps or (JOBS[cell.job].quick if args.quick else JOBS[cell.job].steps)


def show_plan(wanted: list[Cell], to_do: list[Cell], guessed: dict[Cell, float], skipped: list[dict[str, str]]) -> None:
    """One line for each tool that is left out, and one for all repeats of a cell."""
    left_out: dict[tuple[str, str], list[str]] = {}
    for one in skipped:
        left_out.setdefault((one["tool"], one["reason"]), []).append(JOBS[one["job"]].title)
    for (tool, reason), titles in left_out.items():
        print(f"left out: {tool} ({'; '.join(titles)}): {reason}")
    all_runs, runs_to_do = (Counter(cell.point for cell in some) for some in (wanted, to_do))
    seconds = {cell.point: guessed[cell] for cell in to_do}
    for point, runs in all_runs.items():
        if left := runs_to_do[point]:
            of = f" of {runs}" if left < runs else ""
            print(f"{point.name}: {left}{of} run{'s' * (runs > 1)} to do, about {clock(seconds[point])} each")
        else:
            print(f"{point.name}: done")
    total = seconds_left(guessed, to_do, {})
    print(f"{len(to_do)} of {len(wanted)} cells to do, about {clock(total)} (guessed for a machine of two slow cores)")


def run_all(
    to_do: list[Cell],
    guessed: dict[Cell, float],
    results: dict[str, Any],
    found: dict[str, Tool],
    args: argparse.Namespace,
    *,
    workload: Path,
    folder: Path,
) -> None:
    """Every cell in turn; results are written after each."""
    measured_s = {}
    for number, cell in enumerate(to_do):
        if cell not in still_to_do([cell], results["runs"]):  # a point that did not fit the first time
            continue
        left = clock(seconds_left(guessed, to_do[number:], measured_s))
        print(f"[{number + 1}/{len(to_do)}, about {left} left] {cell} ...", flush=True)
        run = one_run(cell, found[cell.tool], args, workload=workload, folder=folder)
        measured_s[cell] = run["wall_s"]
        results["runs"].append(run)
        write(folder / "results.json", results)
        print(f"    {said(run)}", flush=True)


def one_run(cell: Cell, tool: Tool, args: argparse.Namespace, *, workload: Path, folder: Path) -> dict[str, Any]:
    run = {"job": cell.job, "tool": tool.name, "key": cell.tool, "threads": cell.threads, "repeat": cell.repeat}
    words: list[Any] = ["--steps", steps_of(cell, args)]
    name = "-".join(filter(None, (cell.job, cell.tool, cell.axis, str(cell.value or ""))))
    model = workload
    if cell.axis:
        run |= {"axis": cell.axis, "value": cell.value}
        if reason := scaling.impossible(cell.axis, cell.value, cell.tool):
            return {**run, "error": reason, "gflops": 0.0, "wall_s": 0.0}
        size, vocabulary = scaling.work(cell.axis, cell.value)
        try:
            model = Path(last_line([sys.executable, HERE / "scaled.py", "--size", size, "--vocabulary", vocabulary]))
        except subprocess.CalledProcessError:
            return {**run, "error": "its model could not be made", "gflops": 0.0, "wall_s": 0.0}
        words += scaling.arguments(cell.axis, cell.value, folder_of(scaling.VOCABULARY, scaling.SIZE))
    else:
        words += JOBS[cell.job].arguments
    return run | measured(
        tool,
        cell.job,
        threads=cell.threads,
        workload=model,
        log=folder / f"{name}.log",
        arguments=words,
        limit_s=SCALING_TIME_LIMIT if cell.axis else TIME_LIMIT,
        device=args.device,
        dtype=args.dtype,
    )


def settings(args: argparse.Namespace, workload: Path, before: dict[str, Any]) -> dict[str, Any]:
    """What the results were measured with; ``before``: the same of the runs that are kept."""
    steps = {job: steps_of(Cell(1, job, "palate", 0), args) for job in args.jobs}
    return {
        "steps": before.get("steps", {}) | steps,
        "vocabulary": args.vocabulary,
        "size": args.size,
        "device": args.device,
        "dtype": args.dtype,
        "workload": json.loads((workload / "workload.json").read_text()),
        "started": before.get("started") or time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
    }


def earlier(path: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """The results that ``--resume`` goes on from. Without it, what lies there is put aside, not lost."""
    if not path.exists():
        return None
    results: dict[str, Any] = json.loads(path.read_text())
    if not args.resume:
        if not args.plan:
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(path.stat().st_mtime))
            path.rename(path.with_name(f"results-{stamp}.json"))
        return None
    before = results["settings"]
    for name in ("vocabulary", "size", "device"):
        if before[name] != getattr(args, name):
            sys.exit(
                f"{path}: was measured with --{name} {before[name]}, not {getattr(args, name)}. Give another --out."
            )
    for job in args.jobs:
        steps = steps_of(Cell(1, job, "palate", 0), args)
        if before["steps"].get(job, steps) != steps:
            sys.exit(f"{path}: {job} was measured with {before['steps'][job]} steps, not {steps}. Give another --out.")
    return results


def write(path: Path, results: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
