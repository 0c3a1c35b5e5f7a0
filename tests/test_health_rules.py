"""What holds of every rule: silent on healthy runs, cheap, harmless, with remedies that are settings of the method."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from made_runs import HEALTHY, PPO, RISING, Course, gold, ramp, ran
from palate.config import load_config
from palate.health import results, reward_hacking
from palate.health.alarm import Alarm, History
from palate.health.watch import RULES, alarmed
from palate.lookup import method_class
from palate.resolve import require_all
from palate.settings_tree import flatten
from palate.training import log


@pytest.mark.parametrize("batches", [1, 2, 9, 10, 11, 40])
def test_a_healthy_run_is_silent_at_any_length(batches: int) -> None:
    course = {"score": RISING, "score__gold": RISING, "kl__reference": ramp(0, 8), "entropy": ramp(1.0, 0.6)}
    made = ran(batches, **course, length__response=ramp(30, 36), diversity__distinct_2=ramp(0.4, 0.33))
    assert [rule.__name__ for rule in RULES if rule(made) is not None] == []


def test_chance_alone_raises_what_a_run_is_asked_about_at_every_batch_in_few_runs() -> None:
    """100 runs that neither gain nor lose, of 60 batches of 16 responses whose scores scatter by 1, and preferences by 0.3."""
    drawn, raised = random.Random(1), dict.fromkeys((results.score_falls, results.loses_to_opponent), 0)
    for _ in range(100):
        whole = ran(
            60, 60, 0.0, score=lambda _: drawn.gauss(0, 0.25), preference__mixture=lambda _: drawn.gauss(0.5, 0.075)
        )
        for rule in raised:
            parts = (History(60, PPO, whole.train[:batches]) for batches in range(20, 61))
            raised[rule] += any(rule(part) is not None for part in parts)
    assert max(raised.values()) <= 3


def test_a_run_without_the_metrics_or_with_nan_in_them_is_silent() -> None:
    for value in (float("nan"), float("inf")):
        made = ran(**{name.replace("/", "__"): value for name in HEALTHY})
        assert [rule.__name__ for rule in RULES if rule(made) is not None] == []
    for n in range(60):
        made.add({"step": n + 41, "split": "train", "loss": 1.0})
    assert [rule.__name__ for rule in RULES if rule(made) is not None] == []


def written(folder: Any, lines: Any) -> Any:
    """What the loop does: a line is in the file when it is seen."""
    for line in lines:
        log.append(folder, "metrics.jsonl", line)
        yield line


def test_a_resumed_run_looks_at_the_batches_before_it_was_stopped(tmp_path: Any) -> None:
    """The first batch, with which is compared, was drawn before the stop; the alarm comes at the same step, once."""
    lines = ran(score=RISING, length__response=ramp(30, 90), score__gold=0.5).train
    whole: list[int] = []

    for name, stop in (("whole", 40), ("early", 7), ("late", 38)):
        (tmp_path / name).mkdir()
        for first, last in ((0, stop), (stop, 40)):
            stream = written(tmp_path / name, lines[first:last])
            list(alarmed(stream, tmp_path / name, History(40, PPO), lambda _: None, [reward_hacking.length_hacking]))
        steps = [entry["step"] for entry in log.read(tmp_path / name, "alarms.jsonl")]
        whole = whole or steps
        assert len(steps) == 1 and steps == whole


def test_a_rule_that_fails_is_said_to_once_and_the_run_goes_on(tmp_path: Any) -> None:
    asked_at, said = [], list[str]()

    def broken(history: History) -> Alarm | None:
        asked_at.append(history.step)
        raise KeyError("score")

    lines = ran(score=ramp(1.0, 0.2)).train
    stream = alarmed(written(tmp_path, lines), tmp_path, History(40, PPO), said.append, [broken, results.score_falls])
    seen = list(stream)
    assert seen == lines and asked_at == [1]
    assert "The rule broken failed" in said[0] and "KeyError" in said[0] and len(said) == 2
    assert [entry["name"] for entry in log.read(tmp_path, "alarms.jsonl")] == ["score_falls"]


def test_a_long_run_is_looked_at_as_often_as_a_tenth_of_a_window_is_new(tmp_path: Any) -> None:
    looked: list[tuple[int, int]] = []

    def rule(history: History) -> Alarm | None:
        looked.append((len(history.train), len(history.held_out)))
        return None

    lines: list[dict[str, Any]] = [{"step": n, "split": "train"} for n in range(1, 1006)]
    lines.insert(13, {"step": 13, "split": "validation"})
    list(alarmed(written(tmp_path, lines), tmp_path, History(1005), lambda _: None, [rule]))
    assert looked[:3] == [(10, 0), (13, 1), (20, 1)] and looked[-2:] == [(1000, 1), (1005, 1)]


def test_rules_cost_no_more_in_a_run_twice_as_long() -> None:
    """How many lines a rule reads of a run of 4,000 batches, and of one of 8,000: no more, but for what it read before."""

    class Counted(list[Any]):
        read = 0

        def __iter__(self) -> Any:
            for line in super().__iter__():
                self.read += 1
                yield line

        def __getitem__(self, at: Any) -> Any:
            if isinstance(at, slice):
                self.read += len(range(*at.indices(len(self))))
            return super().__getitem__(at)

    pairs: dict[str, Course] = {"loss": ramp(0.7, 0.3, 8000), "reward__accuracy": 0.6}
    made = ran(8000, 8000, score=ramp(0, 5, 8000), score__gold=ramp(0, 1, 8000), **pairs)
    for step, loss in ((1, 0.7), (2000, 0.5), (3000, 0.52)):
        made.add({"step": step, "split": "validation", "loss": loss, "reward/accuracy": 0.6})
    made.prompts_held_out = 1000
    for rule in RULES:
        cost = []
        for batches in (3999, 4000, 7999, 8000):
            made.train, whole = Counted(made.train[:batches]), made.train
            assert rule(made) is None, rule.__name__
            cost.append(made.train.read)
            made.train = whole
        assert cost[3] <= cost[1] + 100 * made.window // 4, (rule.__name__, cost)


SAMPLES = ["ppo", "ppo_lagrangian", "trpo", "reinforce", "reinforce_pp", "rloo", "grpo", "dr_grpo", "dapo", "gspo"]
SAMPLES += ["online_dpo", "nash_md", "xpo", "best_of_n"]
GIVEN = ["model=base", "data.train=prompts.jsonl", "out=run", "sampling.temperature=0.7", "sampling.top_p=0.9"]
GIVEN += ["reward.judge.model=reward", "reward.gold.function=rules.py:gold", "reward.gold.weight=0"]


@pytest.mark.parametrize("method", SAMPLES)
def test_every_setting_that_a_remedy_gives_is_one_of_the_method_and_within_its_range(method: str) -> None:
    more = ["method.cost=gold", "method.cost_limit=0.5"] if method == "ppo_lagrangian" else []
    more += [] if method in ("ppo", "ppo_lagrangian", "trpo", "reinforce", "reinforce_pp") else ["samples_per_prompt=4"]
    more += ["training.rollouts_ahead=1"] if getattr(method_class(method), "off_policy", "") == "weights" else []
    given = [text for text in (*GIVEN, *more) if "top_p" not in text or "training.rollouts_ahead=1" not in more]
    settings = flatten(load_config(method, overrides=given).to_dict())
    bad: dict[str, Course] = {
        "score": ramp(0, 9),
        "score__gold": gold(2.0, -1.0),
        "score__ensemble_std": ramp(0.2, 0.9),
        "length__response": ramp(30, 90),
        "length__no_eos": ramp(0.05, 0.95),
        "kl__reference": ramp(0, 90),
        "diversity__distinct_2": ramp(0.4, 0.02),
        "entropy": ramp(1.0, 0.01),
        "clip_fraction": 0.5,
        "kl__old": 0.2,
    }
    own: dict[str, dict[str, Course]] = {
        "training.rollouts_ahead=1": {"importance__effective": 0.3},
        "method.value_clip": {"value__explained_variance": -0.3},
        "method.delta": {"trust_region__accepted": 0.0},
        "method.mixture": {"preference__mixture": 0.4},
        "method.cost": {"cost": 0.8, "lagrange__multiplier": settings.get("method.multiplier_max", 0.0)},
    }
    for key, courses in own.items():
        bad |= courses if key in settings or key in given else {}
    worse: dict[str, Course] = {
        "score": ramp(1, -1),
        "entropy": ramp(1.0, 4.0),
        "kl__reference": -3.0,
        "kl__sampler": 1.0,
    }
    equal: dict[str, Course] = {"score": 0.01, "score__std": 0.0, "groups__all_equal": 0.99}
    runs = [ran(settings=settings, noise=1e-4, **courses) for courses in (bad, worse, equal)]
    raised = [alarm for rule in RULES for made in runs if (alarm := rule(made)) is not None]
    assert len({alarm.name for alarm in raised}) >= 11
    told = {text for alarm in raised for remedy in alarm.remedies for text in re.findall(r"[a-z_.]+=[^\s,;]+", remedy)}
    assert len(told) > 6
    for text in told:
        require_all(load_config(method, overrides=[*given, text]))
    named = {
        key for alarm in raised for key in re.findall(r"missing_eos_\w+", " ".join((*alarm.causes, *alarm.remedies)))
    }
    assert {f"method.{key}" for key in named} <= set(settings)
    assert method != "dapo" or not any("dapo" in remedy for alarm in raised for remedy in alarm.remedies)
