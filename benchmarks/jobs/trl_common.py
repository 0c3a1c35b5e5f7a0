"""What the TRL scripts share: the command line, plain fp32 settings, and hooks that count and time."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from command_line import arguments
from probe import Probe

__all__ = ["arguments", "count_tokens", "losses", "plain", "steps_to", "time_parts"]


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """No activation checkpointing, nothing saved or reported: the least a step can be. On a CPU in fp32."""
    return {
        "output_dir": f"{args.scratch}/out",
        "bf16": args.dtype == "bfloat16",
        "use_cpu": args.device == "cpu",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "seed": 0,
    }


def steps_to(probe: Probe, *, rest: str = "") -> Any:
    """A callback that begins with the training and notes every optimizer step (PPO: every iteration).

    Args:
        rest: the phase that has what no other phase of a step has.
    """
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            probe.begin()

        def on_step_end(self, args, state, control, **kwargs):
            if (begun := getattr(probe, "update_begun", None)) is not None:
                probe.add("update", probe.seconds() - begun)
                probe.update_begun = None
            if rest:
                probe.rest(rest)
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


def time_parts(trainer: Any, probe: Probe, **phases: str) -> None:
    """Note the time in the trainer's own methods: ``time_parts(trainer, probe, _generate="generation")``."""
    for method, phase in phases.items():
        setattr(trainer, method, probe.timed(phase, getattr(trainer, method)))


def losses(trainer: Any) -> list[float]:
    """The losses that the trainer logged, to see that it learned."""
    names = ("loss", "loss/policy_avg")
    return [log[name] for log in trainer.state.log_history for name in names if name in log]
