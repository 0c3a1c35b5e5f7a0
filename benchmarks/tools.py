"""Who is measured: each tool's interpreter, scripts and settings, and whether it is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from workload import bench_folder

HERE = Path(__file__).parent
JOBS = ("sft", "reward", "dpo", "dpo_cached", "kto", "orpo", "grpo", "rloo", "online_dpo", "ppo")

# glibc gives big tensors back to the system after every operation and pays for their pages again; these settings keep
# them. They help a program that makes big temporary tensors, so peers are measured with them as well.
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}


@dataclass(frozen=True)
class Tool:
    """One row of the table for each job.

    Attributes:
        name: as the table says.
        scripts: job -> (interpreter, script).
        environment: what is set beside the common settings.
    """

    name: str
    scripts: Mapping[str, tuple[Path, Path]]
    environment: Mapping[str, str] = field(default_factory=dict)

    def missing(self, job: str) -> str | None:
        """Why the tool cannot do this job here, or None."""
        if job not in self.scripts:
            return f"{self.name} has no script for {job}"
        python, script = self.scripts[job]
        if not python.exists():
            return f"no environment {python.parent.parent.name!r}: make it with benchmarks/setup_peers.sh"
        return None if script.exists() else f"{script.name} is not there"


def tools() -> dict[str, Tool]:
    """Every tool by name, palate first."""
    here, envs = Path(sys.executable), bench_folder() / "envs"
    trl, trl_ppo = envs / "trl" / "bin" / "python", envs / "trl-ppo" / "bin" / "python"
    palate = {job: (here, HERE / "jobs" / f"palate_{job}.py") for job in JOBS}
    peer = {job: (trl_ppo if job == "ppo" else trl, HERE / "jobs" / f"trl_{job}.py") for job in JOBS}
    return {
        "palate": Tool("palate", palate, {"PYTHONPATH": str(HERE.parent / "src")}),
        "trl": Tool("TRL", peer),
        "trl-tuned": Tool("TRL, malloc tuned", peer, TUNED_MALLOC),
    }


def environment(tool: Tool, threads: int) -> dict[str, str]:
    """The environment of one measured process: threads, no network, its own caches, and nothing of ours by accident."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "OMP_", "MKL_", "KMP_"))
    }
    path = os.pathsep.join(filter(None, (str(HERE), tool.environment.get("PYTHONPATH"))))
    return {
        **inherited,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(bench_folder() / "hf"),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        **tool.environment,
        "PYTHONPATH": path,
    }
