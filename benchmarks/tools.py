"""Who is measured: each tool's interpreter, scripts and settings, and whether it is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from catalogue import JOBS
from workload import bench_folder

HERE = Path(__file__).parent
GENERATION = ("generation", "generation_groups")
TRAINING = tuple(job for job in JOBS if job not in GENERATION)

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
        arguments: of all its scripts.
        cost: about how long it takes for the peer's one second; for the estimate of ``--plan`` alone.
        cpu_only: what it is makes no difference on a GPU.
    """

    name: str
    scripts: Mapping[str, tuple[Path, Path]]
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    cost: float = 1.0
    cpu_only: bool = False

    def missing(self, job: str, device: str = "cpu") -> str | None:
        """Why the tool cannot do this job here, or None."""
        if self.cpu_only and device != "cpu":
            return "nothing to tune on a GPU"
        python, script = self.scripts[job]
        if not python.exists():
            return f"no environment {python.parent.parent.name!r}: make it with benchmarks/setup_peers.sh"
        return None if script.exists() else f"{script.name} is not there"


def tools() -> dict[str, Tool]:
    """Every tool by its name on the command line, palate first. A tool has scripts for the jobs that it can do."""
    here, envs, jobs = Path(sys.executable), bench_folder() / "envs", HERE / "jobs"
    trl, trl_ppo, vllm = (envs / name / "bin" / "python" for name in ("trl", "trl-ppo", "vllm"))
    ours = {"PYTHONPATH": str(HERE.parent / "src")}
    palate = {job: (here, jobs / f"palate_{job}.py") for job in TRAINING}
    palate |= dict.fromkeys(GENERATION, (here, jobs / "palate_generation.py"))
    peer = {job: (trl_ppo if job == "ppo" else trl, jobs / f"trl_{job}.py") for job in TRAINING}
    generate = dict.fromkeys(GENERATION, (trl, jobs / "transformers_generation.py"))
    vllm_scripts = dict.fromkeys(GENERATION, (vllm, jobs / "vllm_generation.py"))
    return {
        "palate": Tool("palate", palate, ours, cost=0.25),
        "palate-trainer": Tool(
            "palate, old log-probs by the trainer",
            {job: palate[job] for job in ("grpo", "rloo", "ppo")},
            ours | {"BENCHMARK_OLD_LOGPROBS": "trainer"},
            cost=0.25,
        ),
        "trl": Tool("TRL", peer),
        "trl-tuned": Tool("TRL, malloc tuned", peer, TUNED_MALLOC, cost=0.75, cpu_only=True),
        "generate": Tool("transformers generate", generate, arguments=("--mode", "dynamic")),
        "generate-tuned": Tool(
            "transformers generate, malloc tuned",
            generate,
            TUNED_MALLOC,
            arguments=("--mode", "dynamic"),
            cost=0.9,
            cpu_only=True,
        ),
        "generate-static": Tool("transformers generate, static cache", generate, arguments=("--mode", "static")),
        "batching": Tool("transformers continuous batching", generate, arguments=("--mode", "batching"), cost=3),
        "vllm": Tool("vLLM", vllm_scripts, cost=2),
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
