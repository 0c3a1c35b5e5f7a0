"""The one loop, for offline and online methods.

    for metrics in train(run): ...

Each batch: collate (or sample), ``prepare`` once, then for every epoch and minibatch of the method: microbatches
forward and backward, one division by the global count, one step. The caller's ``for`` statement prints, plots, stops;
metrics are on the disk before they are yielded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from palate.data.collate import Item
from palate.errors import ConfigError, DataError
from palate.functional.trust_region import TrustRegion
from palate.generation.settings import SamplingSettings
from palate.methods.sft import SFT
from palate.models.activations import checkpoint_activations
from palate.training import checkpoint, guards, log
from palate.training.ahead import Ahead, Stored, corrected
from palate.training.diversity import distinct_pairs
from palate.training.optimizer import (
    clip_gradients,
    divide_gradients,
    make_optimizer,
    schedule,
    set_learning_rate,
    trained_parameters,
)
from palate.training.order import batch_items, minibatch_rows
from palate.training.rollouts import Rollout
from palate.training.settings import TrainingSettings, check_ahead, steps_of
from palate.training.trust_region import trust_region_step
from palate.types import Batch, Mean, Method, Models, Tokens, groups, joined, microbatches, moved

Metrics = dict[str, Any]


@dataclass
class Run:
    """Everything the loop needs, and what it changes.

    Attributes:
        folder: where metrics, samples and checkpoints go.
        method: replaced between batches when it adapts.
        models: the roles; those that ``method.trains`` are changed in place.
        settings: of the loop.
        items: what to train on, one item a prompt.
        validation: what to evaluate on; may be empty.
        collate: items to a batch, for methods that do not sample.
        rollout: prompts to sampled rows, for methods that do.
        pretraining: texts for the loss that ``method.ptx_coef`` mixes in, and ``collate_pretraining`` for them.
        starts_at_reference: policy and reference begin as the same weights; then KL 0 is checked before the first step.
        dtype: that the forward passes compute in, "float32" or "bfloat16".
        awake: a block within which frozen roles that rest elsewhere are on the device.
        best: step and value of the best evaluation.
        stopped: why the run ended, once it has.
        ahead: draws the next batch while one is trained on, where ``settings.rollouts_ahead`` asks for it.
    """

    folder: Path
    method: Method
    models: Models
    settings: TrainingSettings
    items: Sequence[Item]
    validation: Sequence[Item] = ()
    collate: Callable[[Sequence[Item]], Batch] | None = None
    rollout: Rollout | None = None
    pretraining: Sequence[Item] = ()
    collate_pretraining: Callable[[Sequence[Item]], Tokens] | None = None
    starts_at_reference: bool = False
    dtype: str = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    awake: Callable[[], AbstractContextManager[None]] = nullcontext
    best: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    ahead: Ahead | None = None


def train(run: Run) -> Iterator[Metrics]:
    """Train, from the newest checkpoint in the run's folder if there is one.

    Yields:
        one dictionary a batch ("split": "train") and one an evaluation ("split": "validation"); all but ``time/*`` and
        ``tokens/second`` (for ``times.timed``) is also in ``metrics.jsonl``.

    Raises:
        ModelError: NaN or Inf, or a check of ``training.guards`` failed. RunError: a checkpoint could not be written.
    """
    if not run.items:
        raise DataError(f"{run.folder}: there is nothing to train on; the data gave no items.")
    total = run.settings.total_steps(len(run.items))
    sampling: SamplingSettings | None = getattr(run.rollout, "sampling", None)
    filters = () if sampling is None else sampling.filters
    check_ahead(run.settings, run.method, environment=hasattr(run.rollout, "environment"), filters=filters)
    if run.settings.rollouts_ahead:
        assert run.rollout is not None
        run.ahead = Ahead(run.rollout, run.items, run.settings, total)
    try:
        yield from _train(run, total)
    finally:
        if run.ahead is not None:
            run.ahead.close()


def _train(run: Run, total: int) -> Iterator[Metrics]:
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = run.settings
    evaluate_every, save_every = steps_of(settings.eval_every, total), steps_of(settings.save_every, total)
    for role in run.method.trains:
        checkpoint_activations(getattr(run.models, role), settings.activation_checkpointing)
    parameters = trained_parameters(run.models, run.method)
    optimizer = make_optimizer(parameters, settings)
    state = checkpoint.load_newest(run.folder / "checkpoints", parameters, optimizer)
    start = _resume(run, state)
    if state is None and run.validation:
        yield _evaluation(run, 0)
    for step in range(start, total):
        if run.stopped:
            break
        metrics, times = _batch(run, parameters, optimizer, step, total)
        log.append(run.folder, "metrics.jsonl", metrics)
        yield metrics | times
        done = step + 1
        run.stopped = _reason_to_stop(run, metrics)
        improved = False
        if run.validation and (run.stopped or done == total or (evaluate_every and done % evaluate_every == 0)):
            evaluation = _evaluation(run, done)
            improved = _is_best(run, evaluation)
            run.stopped = run.stopped or _patience(run, done, evaluate_every)
            yield evaluation
        if run.stopped or done == total or improved or (save_every and done % save_every == 0):
            _save(run, parameters, optimizer, done)
    run.stopped = run.stopped or f"all {total} batches done"  # in no checkpoint: a run may be given more of them
    if _keeps_best(settings) and run.best:
        checkpoint.load_weights(run.folder / "checkpoints" / f"step-{int(run.best['step'])}", parameters)


def _resume(run: Run, state: Mapping[str, Any] | None) -> int:
    """Put back what the run had at the checkpoint; the step to go on from."""
    if state is None:
        log.cut_back(run.folder, dict.fromkeys(log.FILES, 0))
        return 0
    run.method = checkpoint.restored_method(run.method, state["method"])
    run.best, run.stopped = state["best"], state["stopped"]
    log.cut_back(run.folder, state["sizes"])
    if run.ahead is not None and "rollout" in state:
        run.ahead.restore(Stored(state["tensors"], state["rollout"]), run.device)
    if not state["skipped"]:  # a kill between writing the last checkpoint and removing the one before it
        _remove_old(run)
    return int(state["step"])


def _save(run: Run, parameters: checkpoint.Parameters, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {
        "method": checkpoint.method_state(run.method),
        "best": run.best,
        "stopped": run.stopped,
        "sizes": log.sizes(run.folder),
    }
    stored = run.ahead.stored() if run.ahead is not None else None
    if stored is not None:
        state["rollout"] = stored.facts
    folder = run.folder / "checkpoints"
    checkpoint.save_checkpoint(folder, step, parameters, optimizer, state, stored.tensors if stored else None)
    _remove_old(run)


def _remove_old(run: Run) -> None:
    best_step = int(run.best["step"]) if run.best else None
    checkpoint.remove_old(run.folder / "checkpoints", run.settings.keep_last, best_step)


def _batch(
    run: Run, parameters: checkpoint.Parameters, optimizer: torch.optim.Optimizer, step: int, total: int
) -> tuple[Metrics, Metrics]:
    """Sample or collate, prepare, update: the metrics of one batch, and its times."""
    settings, clock = run.settings, _Clock()
    torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout, where there is any
    learning_rate = set_learning_rate(optimizer, schedule(step, total, settings))
    batch = _prepared(run, step, clock)
    if run.ahead is not None:
        batch = corrected(run.method, batch, settings)
    sums = _measured(run, batch)
    if step == 0 and run.starts_at_reference:
        guards.check_same_reference({name: mean.item() for name, mean in sums.items()}, run.dtype)
    _write_samples(run, batch, step, total)
    clock.lap("time/prepare")
    updates = 0
    region: TrustRegion | None = getattr(run.method, "trust_region", None)
    for epoch in range(getattr(run.method, "epochs", 1) if len(batch) else 0):
        seed = (settings.seed, step, epoch)
        for rows in minibatch_rows(batch, getattr(run.method, "minibatches", 1), *seed):
            part = batch.select(rows.to(batch.tokens.ids.device))
            this, norms = _accumulate(run, parameters, part, step, updates)
            if updates == 0 and epoch == 0:
                guards.check_first_look(this, run.dtype)
                guards.check_pairs_as_drawn(this, part, run.dtype)
                if "policy_logprobs" in batch.tokens.extras and "kl/old" in this:  # the old log-probs are the sampler's
                    sums["kl/sampler"] = Mean(torch.tensor(this["kl/old"]), torch.tensor(1.0))
                if step == 0 and run.starts_at_reference:
                    guards.check_at_reference(run.method, this, run.dtype)
            for name, value in this.items():
                mean = Mean(torch.tensor(value), torch.tensor(1.0))
                sums[name] = sums[name] + mean if name in sums else mean
            if getattr(run.method, "stop", _never)(this):
                break
            for role, norm in norms.items():
                name = "grad_norm" if len(norms) == 1 else f"grad_norm/{role}"
                mean = Mean(torch.tensor(norm), torch.tensor(1.0))
                sums[name] = sums[name] + mean if name in sums else mean
            if region is not None:
                this = _trust_region(run, parameters["policy"], part, region, first=updates == 0)
                for name, value in this.items():
                    sums[name] = Mean(torch.tensor(value), torch.tensor(1.0))
            optimizer.step()
            updates += 1
        else:
            continue
        break
    optimizer.zero_grad(set_to_none=True)
    clock.lap("time/update")
    if hasattr(run.method, "adapt"):
        run.method = run.method.adapt(batch)
    tokens = batch.tokens
    counts = {"tokens/all": int(tokens.attention_mask.sum()), "tokens/response": int(tokens.response_mask.sum())}
    metrics: Metrics = {"step": step + 1, "split": "train"} | {name: mean.item() for name, mean in sorted(sums.items())}
    metrics |= {"learning_rate": learning_rate, "updates": updates} | counts
    return metrics, clock.times | {"tokens/second": counts["tokens/all"] / sum(clock.times.values())}


def _prepared(run: Run, step: int, clock: _Clock) -> Batch:
    """The batch of this step with all that needs no gradient; filled up where the method left groups out."""
    settings, refills = run.settings, getattr(run.method, "refills", 0)
    whole: Any = None
    for attempt in range(1 + refills):
        again = (attempt,) if attempt else ()
        # A refill takes the batch of the same number from another order of the items: nothing has to be remembered.
        items = batch_items(run.items, settings.batch_size, step, settings.seed + _REFILL * attempt)
        if run.ahead is not None and not attempt:
            sampled: Batch = run.ahead.take(step)
        else:
            sampled = _collect(run, items, settings.seed, step, *again)
        clock.lap("time/rollout" if run.rollout else "time/collate")
        with torch.no_grad(), run.awake():
            part = run.method.prepare(run.models, sampled)
        clock.lap("time/prepare")
        whole = part if whole is None else joined(whole, part)
        parts = groups(whole) if refills else []
        if len(parts) >= len(items):
            return whole.select(torch.cat(parts[: len(items)]))  # type: ignore[no-any-return]
    return whole  # type: ignore[no-any-return]


_REFILL = 1_000_000_007


def _measured(run: Run, batch: Batch) -> dict[str, Mean]:
    """What was found out about a batch before it is trained on; of samples, also how varied they are."""
    metrics: dict[str, Mean] = dict(getattr(batch, "metrics", {}))
    if run.rollout is not None:
        metrics["diversity/distinct_2"] = distinct_pairs(batch.tokens)
    return metrics


def _collect(run: Run, items: Sequence[Item], *seed: int) -> Batch:
    """A batch from items: their own rows, or rows sampled for them."""
    if run.rollout is not None:
        return run.rollout(items, *seed)
    assert run.collate is not None, "a run needs either collate or rollout"
    return moved(run.collate(items), run.device)


def _accumulate(
    run: Run, parameters: checkpoint.Parameters, part: Batch, step: int, update: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Gradient of the average loss of one minibatch, however it is cut; its metrics and gradient norms by role."""
    trained = [p for named in parameters.values() for p in named.values()]
    for p in trained:
        p.grad = None
    sums: dict[str, Mean] = {}
    for micro in microbatches(part, run.settings.microbatch_tokens(run.device.type)):
        for name, mean in run.method.loss(run.models, micro).items():
            if name == "loss" and mean.total.requires_grad:  # not when no row of the part has a response token
                mean.total.backward()
            sums[name] = sums[name] + mean.detach() if name in sums else mean.detach()
    count = float(sums["loss"].count)
    if count == 0:
        raise DataError(
            f"Step {step + 1}: no row of the batch has anything to train on. See `palate check` on the data."
        )
    divide_gradients(trained, count)
    metrics = {name: mean.item() for name, mean in sums.items()}
    metrics |= _add_pretraining_gradient(run, step, update)
    norms = {
        role: float(clip_gradients(named.values(), run.settings.max_grad_norm)) for role, named in parameters.items()
    }
    guards.check_finite(metrics["loss"], norms, part, run.folder, step + 1)
    return metrics, norms


def _trust_region(
    run: Run, policy: Mapping[str, torch.nn.Parameter], part: Batch, region: TrustRegion, *, first: bool
) -> dict[str, float]:
    """The policy's step of a method with a trust region, the first time; the optimizer moves the other roles alone."""
    weights = list(policy.values())
    if first:
        return trust_region_step(run, part, weights, region)
    for p in weights:
        p.grad = None
    return {}


def _add_pretraining_gradient(run: Run, step: int, update: int) -> dict[str, float]:
    """PPO-ptx: add the gradient of ``ptx_coef`` times the token-mean language-modelling loss (InstructGPT eq. 2)."""
    coefficient = getattr(run.method, "ptx_coef", 0.0)
    if not coefficient:
        return {}
    assert run.collate_pretraining is not None
    method: Any = run.method
    position = step * method.epochs * method.minibatches + update
    items = batch_items(run.pretraining, method.ptx_batch_size, position, run.settings.seed + 1)
    batch = moved(run.collate_pretraining(items), run.device)
    count, total = int(batch.response_mask.sum()), 0.0
    for micro in microbatches(batch, run.settings.microbatch_tokens(run.device.type)):
        loss = SFT().loss(run.models, micro)["loss"].total
        (loss * (coefficient / count)).backward()
        total += float(loss.detach())
    return {"loss/pretraining": total / count}


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """The method's metrics on the validation items; of sampled responses with a fixed seed for methods that sample."""
    sums: dict[str, Mean] = {}
    size = run.settings.batch_size
    starts = list(range(0, len(run.validation), size))
    if len(starts) > 1 and len(run.validation) - starts[-1] == 1:  # a method may compare an item with others
        starts.pop()
    for start, end in zip(starts, [*starts[1:], len(run.validation)], strict=True):
        batch = _collect(run, run.validation[start:end], run.settings.seed, -1, start)
        with run.awake():
            batch = run.method.prepare(run.models, batch)
        found = _measured(run, batch)
        if run.rollout is None:
            for micro in microbatches(batch, run.settings.microbatch_tokens(run.device.type)):
                for name, mean in run.method.loss(run.models, micro).items():
                    found[name] = found[name] + mean if name in found else mean
        for name, mean in found.items():
            sums[name] = sums[name] + mean if name in sums else mean
    return {name: mean.item() for name, mean in sorted(sums.items())}


def _evaluation(run: Run, step: int) -> Metrics:
    metrics = {"step": step, "split": "validation"} | evaluate(run)
    log.append(run.folder, "metrics.jsonl", metrics)
    return metrics


def _reason_to_stop(run: Run, metrics: Metrics) -> str | None:
    finished: Callable[[Metrics], str | None] = getattr(run.method, "finished", lambda _: None)
    return finished(metrics)


def _keeps_best(settings: TrainingSettings) -> bool:
    return bool(settings.best_metric) or settings.patience > 0


def _is_best(run: Run, evaluation: Metrics) -> bool:
    """Note the evaluation if it beats all before; only asked for when the run looks for a best."""
    if not _keeps_best(run.settings):
        return False
    name = run.settings.best_metric or "loss"
    if name not in evaluation:
        known = ", ".join(key for key, value in evaluation.items() if isinstance(value, float))
        raise ConfigError(f"training.best_metric: no validation metric {name!r}. Found: {known}.")
    sign = 1 if run.settings.best_is == "lowest" else -1
    value = evaluation[name]
    if run.best and sign * value >= sign * run.best["value"]:
        return False
    run.best = {"step": evaluation["step"], "value": value}
    return True


def _patience(run: Run, step: int, every: int) -> str | None:
    if not run.settings.patience or not run.best or not every:
        return None
    without = (step - run.best["step"]) // every
    if without < run.settings.patience:
        return None
    name = run.settings.best_metric or "loss"
    best = f"{run.best['value']:.4f} (step {int(run.best['step'])})"
    return f"{name} has not improved on {best} for {int(without)} evaluations"


def _write_samples(run: Run, batch: Batch, step: int, total: int) -> None:
    """A few sampled responses with their scores, now and then."""
    every = run.settings.samples_every
    if run.rollout is None or not (step in (0, total - 1) or (every and step % every == 0)):
        return
    scores = getattr(batch, "scores", None)
    rows = range(0, len(batch.tokens), max(1, len(batch.tokens) // 4))
    for row, entry in zip(rows, run.rollout.texts(batch.tokens, rows), strict=True):
        score = {} if scores is None else {"score": float(scores[row])}
        log.append(run.folder, "samples.jsonl", {"step": step, **entry, **score})


def _never(metrics: dict[str, float]) -> bool:
    return False


class _Clock:
    """Seconds spent in each part of a batch."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name] = self.times.get(name, 0.0) + now - self._last
        self._last = now
