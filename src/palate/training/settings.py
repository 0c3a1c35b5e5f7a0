"""Settings of the loop. What belongs to a paper's method is a field of the method; this is the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from palate.errors import ConfigError

if TYPE_CHECKING:
    from palate.types import Method

OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_offload")
OLD_LOGPROBS = ("auto", "trainer", "sampler")


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how fast, how often.

    Attributes:
        learning_rate: peak step size of AdamW; > 0; chosen by method and model size unless set.
        value_learning_rate: the value model's, for methods that train one; None = ``learning_rate``.
        schedule: "cosine" (to ``final_learning_rate``), "linear", or "constant", after the warm-up.
        warmup: steps of linear warm-up; a number below 1 is a share of all steps.
        final_learning_rate: what the schedule ends at, as a share of ``learning_rate``; in [0, 1].
        epochs: passes over the data; may be a fraction. Ignored when ``max_steps`` is set.
        max_steps: batches to train on; None = by ``epochs``.
        batch_size: prompts (groups) a batch.
        tokens_per_microbatch: real tokens in one forward and backward; bounds memory, never changes a result. 0 = 1,024
            on a CPU, 16,384 on a GPU.
        activation_checkpointing: keep what enters each layer and make the rest again in the backward pass: a fraction of the
            memory for activations, a step about a third longer, the same gradients. For long rows and big models.
        weight_decay: AdamW's, on matrices only (not on norms, biases and embeddings).
        beta1, beta2, epsilon: AdamW's.
        optimizer: "adamw"; "adamw_8bit" = its two moments in 8 bits each (2 bytes a weight instead of 8 in float32; needs
            ``palate[optim]``; slower on a CPU); "adamw_offload" = its moments in the computer's memory between updates (no
            byte of the GPU's; the same numbers; no effect on a CPU).
        max_grad_norm: the gradient is scaled down to this norm; 0 = never.
        eval_every: batches between evaluations; a number below 1 is a share of all batches; 0 = only at the end.
        save_every: batches between checkpoints, likewise; 0 = only at the end.
        keep_last: checkpoints to keep besides the best.
        patience: evaluations without a better ``best_metric`` before stopping early; 0 = never stop early.
        best_metric: validation metric that names the best checkpoint; "" = "loss".
        best_is: "lowest" or "highest".
        samples_every: batches between entries in samples.jsonl for methods that sample; 0 = first and last only.
        rollouts_ahead: 0 = a batch is drawn, then trained on. 1 = while a batch is trained on, the next one is drawn in the
            background by the policy as it was before that batch's updates; importance weights correct for it
            (docs/asynchronous.md). Pays where there is a spare core; costs a copy of the trained weights.
        old_logprobs: log-probs of what was sampled, before the update. "trainer" = computed by the trainer, whatever sampled.
            "sampler" = those of the draw, which saves a forward pass of the policy; in float32, with the embedded sampler.
            The first look at every batch then checks them, by the loss's ratio or, in ``online_dpo``, by what it says of
            its pairs; refused where nothing would (``xpo``, ``trpo``, ``best_of_n``). "auto" = "sampler" where both are the same
            arithmetic (a Llama-shaped model in float32 on a CPU, embedded sampler), else "trainer".
        importance: "sequence", a weight for each response, exact until it is cut; "token", one for each token, for long
            responses whose weights vary too much. Refused without ``rollouts_ahead``.
        importance_max: a larger weight is cut to this; >= 1, usually 2. Refused without ``rollouts_ahead``.
        seed: of data order, dropout and sampling.
    """

    learning_rate: float = 1e-5
    value_learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    final_learning_rate: float = 0.1
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 32
    tokens_per_microbatch: int = 0
    activation_checkpointing: bool = False
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    optimizer: str = "adamw"
    max_grad_norm: float = 1.0
    eval_every: float = 0.1
    save_every: float = 0.1
    keep_last: int = 2
    patience: int = 0
    best_metric: str = ""
    best_is: str = "lowest"
    samples_every: int = 10
    rollouts_ahead: int = 0
    old_logprobs: str = "auto"
    importance: str = "sequence"
    importance_max: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        rate = self.value_learning_rate
        _require(rate is None or rate > 0, "value_learning_rate", rate, "a number above 0, or nothing")
        _require(
            self.schedule in ("cosine", "linear", "constant"), "schedule", self.schedule, "cosine, linear, constant"
        )
        _require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, ", ".join(OPTIMIZERS))
        _require(self.best_is in ("lowest", "highest"), "best_is", self.best_is, "lowest or highest")
        _require(self.rollouts_ahead in (0, 1), "rollouts_ahead", self.rollouts_ahead, "0 or 1")
        _require(self.old_logprobs in OLD_LOGPROBS, "old_logprobs", self.old_logprobs, "auto, trainer or sampler")
        _require(self.importance in ("sequence", "token"), "importance", self.importance, "sequence or token")
        _require(self.importance_max >= 1, "importance_max", self.importance_max, "a number of at least 1")
        _require(
            0 <= self.final_learning_rate <= 1, "final_learning_rate", self.final_learning_rate, "a share in [0, 1]"
        )
        _require(self.epochs > 0, "epochs", self.epochs, "a number above 0")
        _require(self.max_steps is None or self.max_steps > 0, "max_steps", self.max_steps, "a whole number above 0")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "a whole number above 0")
        for name in (
            "tokens_per_microbatch",
            "warmup",
            "weight_decay",
            "max_grad_norm",
            "eval_every",
            "save_every",
            "keep_last",
            "patience",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")

    def microbatch_tokens(self, device_type: str) -> int:
        """Real tokens of one forward and backward on this kind of device."""
        return self.tokens_per_microbatch or (1024 if device_type == "cpu" else 16384)

    def total_steps(self, items: int) -> int:
        """Batches in the whole run over ``items`` prompts."""
        if self.max_steps:
            return self.max_steps
        batches = self.epochs * items / min(self.batch_size, max(1, items))
        return max(1, math.ceil(batches - 1e-9))  # up: no item of the last epoch is left out


def check_ahead(settings: TrainingSettings, method: Method, *, environment: bool, filters: Sequence[str] = ()) -> None:
    """Refuse to draw ahead where that would be wrong.

    Args:
        filters: settings of the sampler that make the drawn distribution another one than the policy's.
    Raises:
        ConfigError: the method samples nothing, or has no correction for responses of an older policy, or none once they
            are filtered; or an environment answers, and what it said cannot be kept in a checkpoint.
    """
    if not settings.rollouts_ahead:
        return
    name = type(method).__module__.rpartition(".")[-1]
    found = f"training.rollouts_ahead: found {settings.rollouts_ahead}, expected 0 with {name}, which"
    if method.reads != "prompts":
        raise ConfigError(f"{found} reads {method.reads} and samples nothing. Leave it out.")
    if not getattr(method, "off_policy", ""):
        raise ConfigError(
            f"{found} with these settings has no correction for responses of an older policy: it would learn something "
            "else. Leave it out, or take a method that has one (docs/asynchronous.md lists them)."
        )
    if filters and method.off_policy == "weights":  # type: ignore[attr-defined]
        raise ConfigError(
            f"{', '.join(filters)} with training.rollouts_ahead: responses are then drawn from less than the whole softmax, and "
            f"the importance weights of {name} are ratios of whole ones: they would correct for another draw than there was. "
            "Leave the one or the other out."
        )
    if environment:
        raise ConfigError(
            "training.rollouts_ahead: found 1, expected 0 with an environment: conversations that are drawn ahead cannot be "
            "kept in a checkpoint, so that a run could not be resumed exactly. Leave it out."
        )


def steps_of(value: float, total: int) -> int:
    """A setting in batches: as it is from 1 up, a share of ``total`` below 1, and 0 stays 0."""
    return 0 if value == 0 else int(value) if value >= 1 else max(1, round(value * total))


def _require(ok: bool, name: str, found: object, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"training.{name}: found {found!r}, expected {wanted}.")
