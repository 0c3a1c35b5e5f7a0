"""Metrics of runs made by hand, for the rules that look at them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from palate.health.alarm import Alarm, History

PPO = {
    "method.name": "ppo",
    "method.kl_coef": 0.05,
    "method.adaptive_kl_target": None,
    "method.kl_budget": None,
    "method.target_kl": None,
    "method.epochs": 4,
    "method.minibatches": 1,
    "method.clip": 0.2,
    "method.entropy_coef": 0.0,
    "method.missing_eos_penalty": 0.0,
    "method.value_clip": 0.2,
    "method.value_coef": 0.1,
    "training.learning_rate": 3e-5,
    "training.value_learning_rate": None,
    "training.batch_size": 32,
    "sampling.max_new_tokens": 64,
    "sampling.temperature": 1.0,
    "samples_per_prompt": 1,
    "reward.judge.model": "runs/reward/model",
    "reward.gold.function": "rules.py:gold",
    "reward.gold.weight": 0,
    "dtype": "float32",
}
HEALTHY = {
    "score": 0.2,
    "score/std": 1.0,
    "score/gold": 0.5,
    "kl/reference": 3.0,
    "kl/old": 0.005,
    "kl/sampler": 1e-9,
    "clip_fraction": 0.05,
    "entropy": 1.0,
    "length/response": 30.0,
    "length/no_eos": 0.02,
    "diversity/distinct_2": 0.4,
    "value/explained_variance": 0.6,
}
Course = float | Callable[[int], float]


def ran(batches: int = 40, total: int = 40, noise: float = 0.02, settings: Any = None, **courses: Course) -> History:
    """A run whose metrics are healthy but for those given, each a number or a function of the batch (from 0).

    A ``/`` in a name is written ``__``. Noise is relative.
    """
    drawn = random.Random(0)
    given = HEALTHY | {name.replace("__", "/"): course for name, course in courses.items()}
    made = History(total, PPO if settings is None else settings)
    for n in range(batches):
        values = {name: course(n) if callable(course) else course for name, course in given.items()}
        line = {name: value + noise * abs(value) * drawn.gauss(0, 1) for name, value in values.items()}
        made.add({"step": n + 1, "split": "train", **line})
    return made


def ramp(start: float, end: float, over: int = 40, begins: int = 0) -> Callable[[int], float]:
    return lambda n: start + (end - start) * min(1.0, max(0, n - begins) / (over - 1 - begins))


RISING = ramp(0.0, 1.5)


def asked(rule: Any, history: History) -> Alarm:
    found: Alarm | None = rule(history)
    assert found is not None and found.name == rule.__name__ and found.step == history.step
    assert found.causes and found.remedies and all(isinstance(value, int | float) for value in found.numbers.values())
    return found


def gold(best: float, end: float) -> Callable[[int], float]:
    """From 0 up to its best at the 20th batch, then down."""
    return lambda n: best * n / 19 if n < 20 else best + (end - best) * (n - 19) / 20
