"""Checks on in every run: what must hold if nothing is broken, and what is kept when it does not."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from palate.errors import ModelError
from palate.methods.dpo import pair_weight
from palate.types import Batch, Comparisons, Mean, Method, Tokens

FIRST_LOOK = {"float32": 1e-5, "bfloat16": 1e-2}  # nats: rounding of one forward against another in this type
_TWO_PASSES = (
    "The same weights give other log-probabilities in two passes: look for dropout, a stateful layer, or a numerically "
    "unstable attention kernel. Where the first pass was the sampler's (training.old_logprobs), set "
    "training.old_logprobs=trainer: kl/sampler then says how far it is off."
)


def check_first_look(metrics: dict[str, float], dtype: str) -> None:
    """At the first look at fresh samples the policy is the one that sampled them: ratio 1, KL(old, new) 0.

    Raises:
        ModelError: two forward passes of the same weights disagree (dropout left on, an unstable kernel).
    """
    if "ratio" not in metrics:
        return
    tolerance = FIRST_LOOK.get(dtype, 1e-2)
    if not (abs(metrics["ratio"] - 1) <= tolerance and metrics["kl/old"] <= tolerance):  # NaN is not within it
        raise ModelError(
            f"First look at fresh samples: probability ratio {metrics['ratio']:.6f}, kl/old {metrics['kl/old']:.2e}; "
            f"expected 1 and 0 (within {tolerance:g}). {_TWO_PASSES}"
        )


def check_pairs_as_drawn(metrics: dict[str, float], part: Batch, dtype: str) -> None:
    """The same of pairs, whose loss has no ratio: where log-probs of the draw were kept, those of the loss are their sums.

    The mean over pairs of each side is compared, as a share of itself.

    Raises:
        ModelError: sampler and loss disagree about the same rows and weights.
    """
    kept = part.tokens.extras.get("policy_logprobs")
    if not isinstance(part, Comparisons) or not isinstance(kept, Tensor):
        return
    drawn, weight, tolerance = kept.sum(-1), pair_weight(part), FIRST_LOOK.get(dtype, 1e-2)
    for side, rows in (("chosen", part.chosen), ("rejected", part.rejected)):
        found, wanted = Mean.of(drawn[rows], weight).item(), metrics[f"logprob/{side}"]
        if not abs(found - wanted) <= tolerance * max(1.0, abs(wanted)):  # NaN is not within it
            raise ModelError(
                f"First look at fresh samples: logprob/{side} is {wanted:.6f} nats, and the sampler said {found:.6f} when it "
                f"drew the same responses; expected the same (within {tolerance:g} of it). {_TWO_PASSES}"
            )


def check_same_reference(metrics: dict[str, float], dtype: str) -> None:
    """Before the first step the policy is its reference: KL 0.

    Raises:
        ModelError: the reference was loaded from other weights, or an adapter is on where it should be off.
    """
    kl, tokens = metrics.get("kl/reference_k3", 0.0), max(1.0, metrics.get("length/response", 1.0))
    if not kl / tokens <= FIRST_LOOK.get(dtype, 1e-2):  # NaN is not within it
        raise ModelError(
            f"Before the first step the policy should be its reference, but kl/reference_k3 is {kl:.4f} nats a "
            "sequence. Look for an adapter that is on in the reference, or other weights than the policy's."
        )


def check_at_reference(method: Method, metrics: dict[str, float], dtype: str) -> None:
    """Before the first step the policy is its reference: the method's own metrics are what it says they are then.

    A method may say so by ``at_reference() -> dict[str, float]``, e.g. that its loss is log 2.

    Raises:
        ModelError: they are not: the reference has other weights, an adapter is on where it should be off, dropout.
    """
    wanted: dict[str, float] = getattr(method, "at_reference", dict)()
    tolerance = 10 * FIRST_LOOK.get(dtype, 1e-2)  # a metric adds the rounding of many tokens
    for name, value in wanted.items():
        if not abs(metrics[name] - value) <= tolerance * max(1.0, abs(value)):  # NaN is not within it
            raise ModelError(
                f"Before the first step the policy should be its reference, and then {name} is {value:.6g}; found "
                f"{metrics[name]:.6g}. Look for an adapter that is on in the reference, other weights than the "
                "policy's, or dropout."
            )


def check_finite(loss: float, norms: dict[str, float], batch: Batch, folder: Path, step: int) -> None:
    """Loss and gradient are numbers.

    Raises:
        ModelError: they are not; the batch is kept beside the metrics and named.
    """
    if math.isfinite(loss) and all(math.isfinite(norm) for norm in norms.values()):
        return
    path = folder / f"failed-batch-step-{step}.safetensors"
    save_file(_tensors(batch), path)
    found = ", ".join([f"loss {loss}"] + [f"gradient norm of {role} {norm}" for role, norm in norms.items()])
    raise ModelError(
        f"Step {step}: {found}. No step was made with it; the batch is in {path}, the last checkpoint is intact. "
        "Usual causes: learning rate too high, bf16 or fp16 weights, a broken row. Lower training.learning_rate and "
        "start a new run, or look at the batch."
    )


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch by name, the rows' own first."""
    tokens: Tokens = batch.tokens
    fields = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    fields |= {name: value for name, value in tokens.extras.items()}
    if batch is not tokens:
        fields |= {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {name: value.detach().contiguous().clone() for name, value in fields.items() if isinstance(value, Tensor)}
