"""What goes wrong in the training of a reward model.

The thresholds are conventions, written beside each rule and in docs/health.md; none is from a paper.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from palate.health.alarm import SURE, Alarm, History, Line, average, has, having

RISE = 0.05  # nats a pair


def reward_overfitting(history: History) -> Alarm | None:
    """The reward model gets better on the comparisons that it is trained on, and worse on those that it is not.

    Alarm: the held-out loss has risen above its best by more than 0.05 nats and 3 standard errors, and the training loss since
    then is lower than before. All evaluations are of the same comparisons, so what counts is how the changes of single ones
    differ. The metrics do not have it: the standard error is taken as that of a spread as large as the loss itself (measured where
    overfitting begins: 0.7 to 1 times the loss for single pairs, 0.4 to 0.5 for rankings of four), over the held-out prompts,
    because comparisons of one prompt go together. Nothing is said where the best checkpoint is kept
    (``training.patience``, ``training.best_metric``): that is the remedy.
    """
    name = "loss/preference" if has(history.held_out[-1:], "loss/preference") else "loss"
    held = having(history.held_out, name, "reward/accuracy")
    # A policy that learns from pairs reports log-probabilities; for it a rising loss may be nothing but growing confidence.
    if len(held) < 2 or not history.prompts_held_out or any(key.startswith("logprob/") for key in held[-1]):
        return None
    if history.get("training.patience", 0.0) or history.settings.get("training.best_metric"):
        return None
    best, now = min(held[:-1], key=lambda line: float(line[name])), held[-1]
    rise = now[name] - best[name]
    limit = max(RISE, SURE * now[name] / math.sqrt(history.prompts_held_out))
    if rise <= limit:
        return None
    before, since = _around(history, name, int(best["step"]))
    if not before or not since or average(since, name).mean >= average(before, name).mean:
        return None
    trained = average(since, name).mean
    numbers = {
        "best": best[name],
        "best_step": best["step"],
        "now": now[name],
        "limit": limit,
        "training": trained,
        "accuracy_best": best["reward/accuracy"],
        "accuracy_now": now["reward/accuracy"],
    }
    evidence = (
        f"the loss on {history.prompts_held_out} held-out prompts rose from {best[name]:.3f} (step {best['step']}) to {now[name]:.3f} "
        f"nats a pair (alarm at {limit:.2f} more), and their accuracy went from {best['reward/accuracy']:.3f} to "
        f"{now['reward/accuracy']:.3f}; on the training pairs the loss fell from {average(before, name).mean:.3f} to {trained:.3f}"
    )
    if has(since, "reward/accuracy"):
        numbers["accuracy_training"] = average(since, "reward/accuracy").mean
        evidence += f", with an accuracy of {numbers['accuracy_training']:.3f}"
    causes, remedies = _known_by_heart(history, best, now)
    return Alarm("reward_overfitting", history.step, evidence + ".", numbers, causes, remedies)


def _around(history: History, name: str, step: int) -> tuple[Sequence[Line], Sequence[Line]]:
    """Training batches up to a step and since then, a window of each at most; before the first step the first batch counts."""
    there = bisect_right(history.train, max(1, step), key=lambda line: int(line["step"]))
    before, since = history.train[max(0, there - history.window) : there], history.train[there:][-history.window :]
    return having(before, name), having(since, name)


def _known_by_heart(history: History, best: Line, now: Line) -> tuple[list[str], list[str]]:
    rate, epochs = history.get("training.learning_rate", 0.0), history.get("training.epochs", 1.0)
    causes, remedies = [], []
    steps = history.settings.get("training.max_steps")
    if epochs > 1 and not steps:
        causes.append(f"too many passes over the same comparisons (training.epochs = {epochs:g})")
        remedies.append(f"training.epochs={max(1.0, epochs * best['step'] / max(1, now['step'])):.2g}")
    elif steps:
        causes.append(f"too many passes over the same comparisons (training.max_steps = {steps:g})")
        remedies.append(f"training.max_steps={max(1, best['step']):g}")
    causes.append(f"learning rate too high (training.learning_rate = {rate:g})")
    causes.append("too few comparisons, or comparisons that are too much alike")
    remedies.append("training.patience=2, which stops early and keeps the best checkpoint")
    remedies.append(f"training.learning_rate={rate / 3:.2g}")
    if not history.get("method.label_smoothing", 1.0):
        causes.append("wrong labels are learnt by heart (method.label_smoothing = 0)")
        remedies.append("method.label_smoothing=0.1, about the share of wrong labels")
    remedies.append("more comparisons, of more prompts")
    return causes, remedies


RULES = (reward_overfitting,)
