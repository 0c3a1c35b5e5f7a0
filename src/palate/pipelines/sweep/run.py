"""Running a sweep: every setting an ordinary run, measured when it is done; what failed is said, and the others go on."""

from __future__ import annotations

import hashlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from palate.config import RunConfig
from palate.data.kinds import Prompt, Record, prompt_key
from palate.data.records import read_records
from palate.errors import ConfigError, DataError, PalateError
from palate.pipelines.measure import Measured, Yardstick, along, implicit, last_held_out, run_policy
from palate.pipelines.sweep.plan import Plan, Setting
from palate.resolve import require_all, with_device
from palate.run_folder import read_settings, write_text
from palate.stage.records import opening, read_sides

Say = Callable[[str], None]
EVALUATION = "sweep_evaluation.json"


@dataclass(frozen=True)
class Measuring:
    """How every finished run is measured.

    Attributes:
        reward: a reward as ``models.rewards.load_reward`` takes it; None = the runs' own, where their method has one.
        gold: another one, which nothing was trained on; None = none.
        prompts: file of held-out prompts; None = what the runs hold out.
        limit: at most so many prompts.
        samples_per_prompt: responses to each.
        seed: of the sampling.
        checkpoints: also measure the checkpoints that a run kept.
    """

    reward: Any = None
    gold: Any = None
    prompts: str | None = None
    limit: int = 128
    samples_per_prompt: int = 2
    seed: int = 0
    checkpoints: bool = False


@dataclass
class Outcome:
    """What became of one setting: "finished", "failed" (with why), or "waiting"."""

    setting: Setting
    state: str = "waiting"
    error: str = ""
    seconds: float = 0.0
    measured: Measured = field(default_factory=dict)
    way: list[dict[str, Any]] = field(default_factory=list)  # {"step", quantities} at checkpoints, oldest first
    start: Measured = field(default_factory=dict)  # of the reference itself


def check_plan(plan: Plan, measuring: Measuring) -> None:
    """Refuse what can be seen to be wrong before anything runs.

    Raises:
        ConfigError: a run lacks data or a reward, or there is nothing held out to measure on.
    """
    for setting in plan.settings:
        require_all(setting.config)
        needs = setting.config.method.settings.needs
        if "policy" in needs and measuring.prompts is None:
            data = setting.config.data
            if data.validation is None and data.validation_fraction == 0:
                raise ConfigError(
                    "a sweep measures on held-out prompts, and data.validation_fraction=0 holds none out. Give --prompts "
                    "FILE or --validation FILE."
                )
    known = [setting.config.method.settings for setting in plan.settings]
    if len({"policy" in method.needs for method in known}) > 1:
        raise ConfigError(
            "the methods train different roles (policies, reward models); sweep them one after the other."
        )


def run_sweep(
    plan: Plan,
    measuring: Measuring,
    *,
    jobs: int = 1,
    quiet: bool = True,
    say: Say,
    after: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """Run and measure every setting; a finished run is not repeated, an unfinished one goes on.

    Args:
        jobs: processes at a time, >= 1.
        quiet: the runs print nothing themselves.
        say: told what happens.
        after: called with all outcomes whenever one is done.
    """
    outcomes = [Outcome(setting) for setting in plan.settings]
    tape = _Tape(plan, measuring)
    count = len(outcomes)
    for done, (number, seconds, error) in enumerate(_trained(plan, jobs, quiet, say), start=1):
        outcome = outcomes[number]
        outcome.seconds = seconds
        outcome.state, outcome.error = ("failed", error) if error else ("finished", "")
        if not error:
            try:
                outcome.measured, outcome.way, outcome.start = tape.measure(outcome.setting)
            except Exception as problem:  # noqa: BLE001  # one run that cannot be measured must not end the sweep
                outcome.state, outcome.error = "failed", _told(plan, outcome.setting, problem)
        said = f"failed: {outcome.error}" if outcome.error else f"{seconds:.0f} s   {_figures(outcome.measured)}"
        say(f"{done}/{count} {outcome.setting.name}   {said}")
        after(outcomes)
    return outcomes


def _figures(measured: Measured) -> str:
    shown = [name for name in ("kl", "score", "gold", "accuracy", "margin", "nll") if name in measured]
    return "   ".join(f"{name} {measured[name][0]:.3g}" for name in shown)


def _trained(plan: Plan, jobs: int, quiet: bool, say: Say) -> Iterator[tuple[int, float, str]]:
    """(number of the setting, seconds, what went wrong or "") as they end."""
    if jobs == 1:
        for number, setting in enumerate(plan.settings):
            say(f"{number + 1}/{len(plan.settings)} {setting.name}")
            started = time.monotonic()
            error = _train(plan, setting, quiet)
            yield number, time.monotonic() - started, error
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_few_threads, initargs=(threads,)
    ) as pool:
        futures = {pool.submit(_timed, plan, setting): number for number, setting in enumerate(plan.settings)}
        for future in as_completed(futures):
            seconds, error = future.result()
            yield futures[future], seconds, error


def _few_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _timed(plan: Plan, setting: Setting) -> tuple[float, str]:
    started = time.monotonic()
    error = _train(plan, setting, quiet=True)
    return time.monotonic() - started, error


def _train(plan: Plan, setting: Setting, quiet: bool) -> str:
    """Train one setting; "" or what went wrong."""
    from palate.stage import run_stage

    try:
        run_stage(setting.config, quiet=quiet)
    except Exception as error:  # noqa: BLE001  # out of memory, a reward that raised: whatever it is, the others go on
        return _told(plan, setting, error)
    return ""


def _told(plan: Plan, setting: Setting, error: Exception) -> str:
    """One line; of what is no message for users the traceback goes into a file beside the run."""
    if isinstance(error, PalateError):
        return str(error)
    where = plan.out / f"{setting.name}.error.txt"
    where.parent.mkdir(parents=True, exist_ok=True)
    write_text(where, "".join(traceback.format_exception(error)))
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (more in {where})"


class _Tape:
    """Measures finished runs; the yardstick is made again only where another is needed."""

    def __init__(self, plan: Plan, measuring: Measuring) -> None:
        self.plan, self.measuring = plan, measuring
        self.weighs = measuring.reward is None and any(key.partition(".")[0] == "reward" for key in plan.keys)
        self.key: Any = None
        self.stick: Yardstick | None = None
        self.start: Measured = {}

    def measure(self, setting: Setting) -> tuple[Measured, list[dict[str, Any]], Measured]:
        """From the run's folder where it was measured in the same way before."""
        config = _as_it_ran(setting.config)
        method = config.method.settings
        found = _last(config.out)
        if "policy" not in method.needs:
            return found | _judged(config.out), [], {}
        records, prompts = self._held_out(config)
        how = self._how(config, prompts)
        kept = config.out / EVALUATION
        if kept.exists():
            old = json.loads(kept.read_text(encoding="utf-8"))
            if old["how"] == how:
                return found | old["measured"], old["way"], old["start"]
        measured, way = self._now(config, records, prompts, how)
        text = json.dumps({"how": how, "measured": measured, "way": way, "start": self.start}, indent=1)
        write_text(kept, text + "\n")
        return found | measured, way, self.start

    def _now(
        self, config: RunConfig, records: Sequence[Record], prompts: Sequence[Prompt], how: Mapping[str, Any]
    ) -> tuple[Measured, list[dict[str, Any]]]:
        if self.stick is None or self.key != how:
            asked = self.measuring
            self.stick, self.key = None, how  # let go of the old models first
            self.stick = Yardstick.of(
                config,
                prompts,
                reward=self._reward(config),
                gold=asked.gold,
                samples_per_prompt=asked.samples_per_prompt,
                seed=asked.seed,
            )
            self.start = {} if self.stick.reference is None else self._own(self.stick.measure(self.stick.reference))
        policy, stick, kind = run_policy(config.out, config), self.stick, config.method.settings.reads
        measured = self._own(stick.measure(policy))
        paired = kind in ("comparisons", "corrections", "rankings")
        if stick.reward is None and stick.reference is not None and paired and records:
            from palate.data.collate import encode_records

            items, _ = encode_records(records, kind, stick.chat, max_length=config.data.max_length or 1024)
            measured |= implicit(policy, stick.reference, items, kind, config.device)
        way = along(config.out, policy) if how["way"] else ()
        return measured, [{"step": step, **self._own(stick.measure(now))} for step, now in way]

    def _reward(self, config: RunConfig) -> Any:
        """What scores the responses: what was asked for, else what the run was trained on.

        Where the weights of a sum are swept, all are measured with the same: 1 each.
        """
        if self.measuring.reward is not None:
            return self.measuring.reward
        if "reward" not in config.method.settings.needs:
            return None
        return _unweighted(config.reward) if self.weighs else config.reward

    def _own(self, measured: Measured) -> Measured:
        """Of swept weights the parts are comparable, and their sum is not."""
        parts = any(name.startswith("score/") for name in measured)
        return {k: v for k, v in measured.items() if k != "score"} if self.weighs and parts else measured

    def _held_out(self, config: RunConfig) -> tuple[Sequence[Record], list[Prompt]]:
        """Held-out records of the run's own kind, and at most ``limit`` different prompts."""
        asked = self.measuring
        records: Sequence[Record] = read_sides(config).validation
        source = records
        if asked.prompts is not None:
            words = config.data.prompt_words
            source = read_records(asked.prompts, "prompts")
            source = [opening(record, words) for record in source] if words else source
        prompts: dict[str, Prompt] = {}
        for record in source:
            fields = record.fields if isinstance(record, Prompt) else {}
            prompts.setdefault(prompt_key(record.prompt), Prompt(record.prompt, fields, record.source))
        if not prompts:
            raise DataError(f"{config.data.train}: nothing is held out to measure on. Give --prompts FILE.")
        return records, list(prompts.values())[: asked.limit]

    def _how(self, config: RunConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Everything that the numbers depend on besides the policy itself, as JSON gives it back."""
        asked, names = self.measuring, [prompt_key(prompt.prompt) for prompt in prompts]
        how = {
            "prompts": len(prompts),
            "of": hashlib.sha256("\n".join(names).encode()).hexdigest()[:16],
            "samples_per_prompt": asked.samples_per_prompt,
            "seed": asked.seed,
            "max_new_tokens": config.sampling.max_new_tokens,
            "max_length": config.data.max_length,
            "reference": config.reference or (config.model if isinstance(config.model, str) else None),
            "chat": [config.tokenizer, config.data.chat_template, config.data.system],
            "reward": self._reward(config),
            "gold": asked.gold,
            "way": asked.checkpoints,
            "dtype": config.dtype,
        }
        found: dict[str, Any] = json.loads(json.dumps(how, default=str))
        return found


def _unweighted(reward: Any) -> Any:
    """A sum with all its weights 1, so that runs that weigh differently are measured alike."""
    if isinstance(reward, Mapping):
        return {k: _unweighted(v) if isinstance(v, Mapping) else v for k, v in reward.items() if k != "weight"}
    return [_unweighted(part) for part in reward] if isinstance(reward, list) else reward


def _as_it_ran(config: RunConfig) -> RunConfig:
    """The settings with what was filled in when the run was started (lengths)."""
    ran = read_settings(config.out / "config.yaml")
    config = with_device(config)
    if config.data.max_length is None and ran.get("data", {}).get("max_length"):
        config = config.fill("data.max_length", ran["data"]["max_length"], "the run")
    return config


def _last(run: Path) -> Measured:
    return {f"held_out/{name}": [value] for name, value in last_held_out(run).items()}


def _judged(run: Path) -> Measured:
    """A reward run's own judgement on held-out pairs."""
    where = run / "evaluation.json"
    if not where.exists():
        return {}
    found = json.loads(where.read_text(encoding="utf-8"))
    accuracy = found["accuracy"]
    return {
        "accuracy": [accuracy["estimate"], accuracy["low"], accuracy["high"]],
        "nll": [found["nll"]],
        "ece": [found["ece"]],
    }
