"""What the palate scripts share: the settings of a run, and the loop with a probe in it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from command_line import arguments
from probe import Probe

__all__ = ["HERE", "arguments", "measure"]
HERE = Path(__file__).parent


def measure(
    name: str, args: argparse.Namespace, *, passes: int, training: dict[str, Any], data: dict[str, Any], **more: Any
) -> None:
    """Train on the workload as a user's script would, and write down every step.

    Args:
        name: of the method.
        passes: how often the update reads every row (PPO: epochs x two models).
        training, data, more: settings by section, as ``palate.train`` takes them.
    """
    probe = Probe(args.out)

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from palate.config import load_settings
    from palate.stage.run import load_stage, loop_run, reference_asked_once
    from palate.training.loop import train

    # Palate imports these when it needs them; a peer has them at the start, and memory is counted from there.
    assert AutoModelForCausalLM and AutoModelForSequenceClassification and AutoTokenizer
    probe.imported()
    settings = {
        "out": f"{args.scratch}/run",
        "device": args.device,
        # On a GPU as a peer's bf16=True: weights in fp32, matrix products in bf16.
        "dtype": "float32" if args.dtype == "float32" else "mixed",
        "data": {"validation_fraction": 0.0, "max_length": args.max_length, **data},
        "training": {
            "max_steps": args.steps,
            "eval_every": 0,
            "save_every": 0,
            "old_logprobs": os.environ.get("BENCHMARK_OLD_LOGPROBS", "auto"),
            **training,
        },
        **more,
    }
    stage = load_stage(load_settings(name, settings=settings), say=print)
    stage.config.out.mkdir(parents=True)
    run = loop_run(reference_asked_once(stage, print))
    losses = []
    probe.begin()
    for metrics in train(run):
        probe.tokens(passes * metrics["tokens/all"])
        if run.rollout is not None:
            for phase, lap in (("generation", "rollout"), ("scoring", "prepare"), ("update", "update")):
                probe.add(phase, metrics[f"time/{lap}"])
        losses.append(metrics.get("loss/policy", metrics["loss"]))
        probe.step()
    probe.write(losses=losses, items=len(run.items))
