"""What the TRL scripts share: the command line, plain fp32 settings, and hooks that count and time."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from probe import Probe


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="JSON file for the figures")
    parser.add_argument("--workload", required=True)
    parser.add_argument("--scratch", required=True, help="an empty folder")
    parser.add_argument("--steps", type=int, required=True)
    return parser.parse_args()


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """fp32 without activation checkpointing, nothing saved or reported: the least a step can be."""
    return {
        "output_dir": f"{args.scratch}/out",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "seed": 0,
    }


def steps_to(probe: Probe) -> Any:
    """A callback that begins with the training and notes every optimizer step (PPO: every iteration)."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            probe.begin()

        def on_step_end(self, args, state, control, **kwargs):
            if (begun := getattr(probe, "update_begun", None)) is not None:
                probe.add("update", probe.seconds() - begun)
                probe.update_begun = None
            probe.step()

    return Steps()


def count_tokens(probe: Probe, *, update_mark: bool = False) -> None:
    """Count the real tokens of every forward that keeps a gradient; with ``update_mark`` note when the first began."""
    import torch
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaModel.forward

    @functools.wraps(forward)
    def counting(self, input_ids=None, attention_mask=None, inputs_embeds=None, **kwargs):
        if torch.is_grad_enabled():
            if update_mark and getattr(probe, "update_begun", None) is None:
                probe.update_begun = probe.seconds()
            rows = input_ids if input_ids is not None else inputs_embeds
            two_dimensional = torch.is_tensor(attention_mask) and attention_mask.dim() == 2
            probe.tokens(int(attention_mask.sum()) if two_dimensional else rows.shape[0] * rows.shape[1])
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)

    modeling_llama.LlamaModel.forward = counting


def time_generation(trainer: Any, probe: Probe) -> None:
    """Note the time in the trainer's own ``_generate``, where it samples the responses of a step."""
    generate = trainer._generate

    def timed(*positional: Any, **named: Any) -> Any:
        with probe.phase("generation"):
            return generate(*positional, **named)

    trainer._generate = timed


def losses(trainer: Any) -> list[float]:
    """The losses that the trainer logged, to see that it learned."""
    names = ("loss", "loss/policy_avg")
    return [log[name] for log in trainer.state.log_history for name in names if name in log]
