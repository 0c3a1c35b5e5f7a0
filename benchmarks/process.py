"""One measured run: a fresh process with the machine's rate before it. Also facts about the machine."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import HERE, Tool, environment
from workload import bench_folder


def measured(
    tool: Tool,
    job: str,
    *,
    threads: int,
    workload: Path,
    log: Path,
    arguments: Sequence[Any],
    limit_s: float,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """The run's figures; ``error`` instead of them when it failed.

    Args:
        log: file for what the process prints.
        arguments: of the script, beside those that all have.
        limit_s: a run that takes longer is reported as failed.
    """
    started = time.monotonic()
    scratch = bench_folder() / "running" / str(os.getpid())
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    python, script = tool.scripts[job]
    out = scratch / "figures.json"
    run: dict[str, Any] = {
        "gflops": json.loads(last_line([sys.executable, HERE / "peak.py", threads, device, dtype]))["peak"]
    }
    command = [python, script, "--out", out, "--workload", workload, "--scratch", scratch]
    command += ["--device", device, "--dtype", dtype, *tool.arguments, *arguments]
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [str(word) for word in command],
                check=False,
                env=environment(tool, threads),
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                preexec_fn=limit_memory if device == "cpu" else None,
            )
            if done.returncode in (
                -signal.SIGINT,
                -signal.SIGTERM,
            ):  # meant for us all: no figure, and no failure either
                raise KeyboardInterrupt
            error = failure(done.returncode, log) if done.returncode or not out.exists() else None
        except subprocess.TimeoutExpired:
            error = f"longer than {limit_s:.0f} s"
        if error is None:
            run |= json.loads(out.read_text())
    shutil.rmtree(scratch, ignore_errors=True)
    run |= {"wall_s": time.monotonic() - started} | ({"error": error} if error else {})
    return run


def failure(code: int, log: Path) -> str:
    """Why a process failed: no memory, or see for yourself."""
    text = log.read_text(errors="replace")
    starved = ("not enough memory", "Cannot allocate memory", "MemoryError", "std::bad_alloc", "out of memory")
    if code == -9 or any(sign in text for sign in starved):
        return "does not fit in memory"
    return f"exit {code}; see {log.name}"


def limit_memory() -> None:
    """In the process to be: an allocation beyond the memory that is free fails, rather than the machine.

    Linux counts private writable memory against RLIMIT_DATA; elsewhere nothing is limited.
    """
    if sys.platform == "linux":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):  # what caches would give back counts as well
                free = int(line.split()[1]) * 1024
        most = int(0.9 * free)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def said(run: dict[str, Any]) -> str:
    """A run's figures on the console."""
    if "error" in run:
        return str(run["error"])
    seconds = sum(step["s"] for step in run["steps"])
    rate = sum(step["tokens"] for step in run["steps"]) / seconds
    memory = run["gpu_mb"] if "gpu_mb" in run else run["peak_mb"] - run["import_mb"]
    return (
        f"{rate:,.0f} tokens/s, {seconds / len(run['steps']):.2f} s/step, {memory:,.0f} MB, {run['wall_s']:.0f} s in "
        f"all; machine {run['gflops']:.0f} GFLOP/s"
    )


def machine(device: str) -> dict[str, Any]:
    """Facts for the head of the table."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    facts = {
        "processor": model,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if device == "cuda":
        query = "import torch; print(torch.cuda.get_device_name())"
        facts["gpu"] = last_line([sys.executable, "-c", query])
    return facts


def last_line(command: Sequence[Any]) -> str:
    """The last line that a helper printed."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]
