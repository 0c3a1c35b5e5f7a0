"""What bf16 gains on this CPU: palate in float32, mixed and bfloat16 on the same steps, taking turns in one process.

    python benchmarks/precision.py                     # 10 M and 100 M parameters, SFT and DPO; a markdown table
    python benchmarks/precision.py --sizes 10M --jobs sft --steps 12

The data are the common workload's (``workload.py``); the models are random, of 10.7 M parameters (the workload's own) and
of 97.5 M (hidden 768, intermediate 2,048, 12 layers, 12 heads). A step is 16 demonstrations or 8 pairs with their
reference, as in the other tables. Every dtype makes the same steps from the same weights: step n in each, then step n + 1.
The first step is left out; a rate is the median over the others. Memory is measured in processes of their own, two steps
each. Loss is the mean of the last quarter of the steps: the same data in the same order, so it may be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probe import peak_mb
from workload import HEADS, HIDDEN, INTERMEDIATE, LAYERS, make

DTYPES = ("float32", "mixed", "bfloat16")
SIZES = {"10M": (HIDDEN, INTERMEDIATE, LAYERS, HEADS), "100M": (768, 2048, 12, 12)}
JOBS: dict[str, dict[str, Any]] = {
    "sft": {"data": "sft", "batch": 16, "rate": 1e-3, "more": {}},
    "dpo": {"data": "pairs", "batch": 8, "rate": 1e-4, "more": {"reference_cache": "off"}},
}


def policy(folder: Path, size: str, tokenizer_from: Path) -> Path:
    """The folder of a random Llama of this size, made when it is not there."""
    target = folder / size
    if not (target / "config.json").exists():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        hidden, intermediate, layers, heads = SIZES[size]
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).float().save_pretrained(target)
        tokenizer.save_pretrained(target)
    return target


def training(job: str, dtype: str, model: Path, work: Path, steps: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """The metrics of each step, as a user's run makes them."""
    from palate.config import load_settings
    from palate.stage.run import load_stage, loop_run, reference_asked_once
    from palate.training.loop import train

    what = JOBS[job]
    settings = {
        "model": str(model),
        "out": str(scratch / f"{job}-{dtype}"),
        "device": "cpu",
        "dtype": dtype,
        "data": {
            "train": str(work / f"{what['data']}.jsonl"),
            "limit": what["batch"] * steps,
            "validation_fraction": 0.0,
            "max_length": 512,
        },
        "training": {
            "max_steps": steps,
            "batch_size": what["batch"],
            "learning_rate": what["rate"],
            "eval_every": 0,
            "save_every": 0,
        },
        **what["more"],
    }
    stage = load_stage(load_settings(job, settings=settings), say=lambda _: None)
    stage.config.out.mkdir(parents=True)
    yield from train(loop_run(reference_asked_once(stage, lambda _: None)))


def side_by_side(job: str, dtypes: list[str], model: Path, work: Path, steps: int) -> dict[str, dict[str, float]]:
    """Tokens a second and loss of each dtype, step by step in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = {dtype: training(job, dtype, model, work, steps + 1, Path(scratch)) for dtype in dtypes}
        rates: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
        losses: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
        for step in range(steps):  # the last, after which a run is written to disk, is not made
            for dtype in dtypes if step % 2 else reversed(dtypes):
                started = time.perf_counter()
                metrics = next(runs[dtype])
                spent = time.perf_counter() - started
                losses[dtype].append(metrics["loss"])
                if step:
                    rates[dtype].append(metrics["tokens/all"] / spent)
    last = max(1, steps // 4)
    return {
        dtype: {"rate": statistics.median(rates[dtype]), "loss": statistics.mean(losses[dtype][-last:])}
        for dtype in dtypes
    }


def memory(job: str, dtype: str, model: Path, work: Path) -> float:
    """Peak resident memory above import of two steps in a fresh process, MB."""
    command = [sys.executable, __file__, "--memory", job, dtype, str(model), str(work)]
    return float(
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    )


def _memory_here(job: str, dtype: str, model: Path, work: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM and AutoTokenizer
    before = peak_mb()
    with tempfile.TemporaryDirectory() as scratch:
        steps = training(job, dtype, model, work, 3, Path(scratch))
        next(steps), next(steps)
    print(json.dumps(peak_mb() - before))


def main() -> None:
    parser = argparse.ArgumentParser(description="palate in float32, mixed and bfloat16, side by side.")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=8, help="the first is a warm-up")
    parser.add_argument("--no-memory", action="store_true", help="leave the processes that measure memory out")
    parser.add_argument("--no-speed", action="store_true", help="measure memory alone")
    parser.add_argument("--memory", nargs=4, metavar=("JOB", "DTYPE", "MODEL", "WORKLOAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        _memory_here(args.memory[0], args.memory[1], Path(args.memory[2]), Path(args.memory[3]))
        return
    import torch

    work = make(8192)
    models = work.parent.parent / "precision"
    units = "with" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "without"
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU {units} bf16 units, {os.cpu_count()} cores\n"
    )
    print("| size | job | dtype | tokens/s | of float32 | loss | peak memory above import |")
    print("|---|---|---|---|---|---|---|")
    for size in args.sizes:
        model = policy(models, size, work / "policy")
        for job in args.jobs:
            found = {} if args.no_speed else side_by_side(job, args.dtypes, model, work, args.steps)
            for dtype in args.dtypes:
                held = "" if args.no_memory else f"{memory(job, dtype, model, work):,.0f} MB"
                cells = ["", "", ""]
                if found:
                    share = found[dtype]["rate"] / found[args.dtypes[0]]["rate"]
                    cells = [f"{found[dtype]['rate']:,.0f}", f"{share:.2f}", f"{found[dtype]['loss']:.4f}"]
                print("|", " | ".join([size, job, dtype, *cells, held]), "|", flush=True)


if __name__ == "__main__":
    main()
