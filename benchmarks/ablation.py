"""What each lever of palate's speed and memory is worth: SFT and DPO with one taken away at a time, and with all of them.

    python benchmarks/ablation.py                            # half an hour
    python benchmarks/ablation.py --jobs sft --repeats 1 --steps 4

Nothing in the library can be set so: a lever is taken away by replacing the function that has it, here, in the measured
process. Every cell is a process of its own; cells take turns, every other round backwards; medians. Prints a Markdown
table, and writes ``results.json`` as ``run.py`` does.
"""

from __future__ import annotations

import argparse
import os
import runpy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import catalogue
import report
from process import last_line, machine, measured, said
from run import TIME_LIMIT, settings, write
from tools import HERE, TUNED_MALLOC, Tool
from workload import bench_folder

CELL = "PALATE_ABLATION"  # in the environment of a measured process: which lever it goes without
JOBS = ("sft", "dpo")


def padded_rows() -> None:
    """The model's own forward on rows sorted by length, in buckets; no shared prompt, the last layer everywhere."""
    from palate.models import forward

    forward._has_flat_trunk = lambda model: False


def no_shared_prompt() -> None:
    from palate.models import trunk

    layout = trunk.layout
    trunk.layout = lambda groups: layout([[row] for group in groups for row in group])


def last_layer_everywhere() -> None:
    import torch

    from palate.models import trunk

    states = trunk.states

    def everywhere(model: Any, plan: Any, again: Any = None) -> Any:
        whole = plan._replace(read=torch.arange(len(plan.ids)), last_calls=plan.calls)
        return states(model, whole, again)[plan.read]

    trunk.states = everywhere


def automatic_gradients() -> None:
    """Every module by itself: what each operation read is kept."""
    from palate.models import blocks

    blocks._are_plain = lambda *args: False


def head_in_one_piece() -> None:
    """Logits of a whole microbatch's response tokens at once, and what automatic gradients make of them."""
    from palate.models import plain_head

    def plain(
        hidden: Any, weight: Any, targets: Any, *, bias: Any, temperature: float, softcap: Any, with_entropy: bool
    ) -> Any:
        assert softcap is None and not with_entropy, "not needed by the jobs measured here"
        logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        logprobs = (logits / temperature).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        return logprobs, hidden.new_zeros(len(hidden))

    plain_head.logprobs_and_entropy = plain


def head_everywhere() -> None:
    """The model's own logits at all positions, padding included; with padded rows, for those have them."""
    from palate.models import forward

    forward.plain_head = lambda model: None


def nothing_kept() -> None:
    """Log-probabilities are made again in the backward pass however few they are."""
    from palate.functional import logprobs

    logprobs.KEPT_ELEMENTS = 0


def twice_the_microbatch() -> None:
    from palate.training.settings import TrainingSettings

    TrainingSettings.microbatch_tokens = lambda self, device_type: 2048


def activation_checkpointing() -> None:
    from palate.models import activations
    from palate.training import loop

    loop.checkpoint_activations = lambda model, on: activations.checkpoint_activations(model, True)


def none_of_them() -> None:
    """One padded batch through the model's own forward, logits at all positions: what a plain script does."""
    from palate.models import forward
    from palate.training.settings import TrainingSettings

    padded_rows()
    head_everywhere()
    forward.BUCKET_TOKENS = {"cpu": 10**9}
    TrainingSettings.microbatch_tokens = lambda self, device_type: 10**9


AS_IT_IS = "palate as it is"
WITHOUT: dict[str, Callable[[], None]] = {
    AS_IT_IS: lambda: None,
    "padded rows instead of real tokens": padded_rows,
    "the prompt computed for each of its responses": no_shared_prompt,
    "the last layer at every token": last_layer_everywhere,
    "gradients inside layers by autograd": automatic_gradients,
    "the head in one piece, by autograd": head_in_one_piece,
    "the head at every position, on padded rows": head_everywhere,
    "log-probs of the vocabulary always made again": nothing_kept,
    "microbatches of 2,048 tokens": twice_the_microbatch,
    "none of them: one padded batch, all logits": none_of_them,
    "added: activation checkpointing": activation_checkpointing,
    "added: malloc keeps its pages": lambda: None,
}
ENVIRONMENT = {"added: malloc keeps its pages": TUNED_MALLOC}


def cell() -> None:
    """In a measured process: take the lever away, and do the job as ``run.py`` would have it done."""
    job, name = os.environ[CELL].split(":", 1)
    WITHOUT[name]()
    sys.path.insert(0, str(HERE / "jobs"))
    runpy.run_path(str(HERE / "jobs" / f"palate_{job}.py"), run_name="__main__")


def main() -> int:
    args = arguments()
    folder = args.out or bench_folder() / "ablation"
    folder.mkdir(parents=True, exist_ok=True)
    workload = Path(last_line([sys.executable, HERE / "workload.py", "--vocabulary", args.vocabulary]))
    results: dict[str, Any] = {"machine": machine(args.device), "settings": settings(args, workload, {}), "runs": []}
    script = (Path(sys.executable), Path(__file__).resolve())
    source = {"PYTHONPATH": str(HERE.parent / "src")}
    for repeat in range(args.repeats):
        for job in args.jobs:
            names = [name for name in WITHOUT if not args.levers or name == AS_IT_IS or name in args.levers]
            for name in names if repeat % 2 == 0 else names[::-1]:
                more = {CELL: f"{job}:{name}", **ENVIRONMENT.get(name, {})}
                tool = Tool(name, {job: script}, source | more)
                run = {"job": job, "tool": name, "threads": args.threads, "repeat": repeat} | measured(
                    tool,
                    job,
                    threads=args.threads,
                    workload=workload,
                    log=folder / "last.log",
                    arguments=["--steps", args.steps],
                    limit_s=TIME_LIMIT,
                    device=args.device,
                    dtype=args.dtype,
                )
                results["runs"].append(run)
                write(folder / "results.json", results)
                print(f"{job}, {name}: {said(run)}", file=sys.stderr, flush=True)
    found = "\n".join(table(job, results) for job in args.jobs)
    (folder / "table.md").write_text(found)
    print(found)
    return 1 if any("error" in run for run in results["runs"]) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--levers", nargs="+", choices=list(WITHOUT), help="some of them only")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each cell, of which the median counts")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps a run; the first two are left out")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.set_defaults(quick=False, size=10, device="cpu", dtype="float32")
    return parser.parse_args()


def table(job: str, results: dict[str, Any]) -> str:
    """Markdown: one line a lever."""
    peak = max(run["gflops"] for run in results["runs"])
    rows: dict[str, dict[str, float]] = {}
    for name in WITHOUT:
        runs = [run for run in results["runs"] if (run["job"], run["tool"]) == (job, name) and "error" not in run]
        if runs:
            good = [report.figures(run, results["settings"], peak) for run in runs]
            rows[name] = {key: statistics.median(one[key] for one in good) for key in good[0]}
    whole = rows[AS_IT_IS]
    lines = [
        f"**{catalogue.JOBS[job].title}**",
        "",
        f"| without | tokens/s | x {AS_IT_IS} | memory above import, MB | x {AS_IT_IS} | share of fp32 peak |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        speed, memory = row["tokens_s"] / whole["tokens_s"], row["memory_mb"] / whole["memory_mb"]
        figures = f"{row['tokens_s']:,.0f} | {speed:.2f} | {row['memory_mb']:,.0f} | {memory:.2f} | {100 * row['share']:.0f} %"
        lines.append(f"| {name} | {figures} |")
    rates = [run["gflops"] for run in results["runs"]]
    return "\n".join([*lines, "", f"fp32 matrix multiply: {min(rates):.0f} to {max(rates):.0f} GFLOP/s.", ""])


if __name__ == "__main__":
    sys.exit(cell() if CELL in os.environ else main())
