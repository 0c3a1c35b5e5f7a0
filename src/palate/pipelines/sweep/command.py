"""What ``palate sweep`` does, from its arguments to the files and the table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.pipelines.sweep.page import as_json, axes_of, on_the_front, split_axes, table_of, write_sweep
from palate.pipelines.sweep.plan import Plan, make_plan
from palate.pipelines.sweep.run import Measuring, Outcome, check_plan, run_sweep


@dataclass(frozen=True)
class Request:
    """The arguments of the command; what they mean is said in ``palate sweep --help``."""

    methods: str | None
    texts: Sequence[str]
    file: Path | None
    flags: Mapping[str, Any]
    out: str | None
    measuring: Measuring
    axes: str | None = None
    jobs: int = 1
    verbose: bool = False
    silent: bool = False


def run_command(request: Request) -> dict[str, Any]:
    """Plan, run, measure; after each run the files are written anew.

    Returns:
        What ``sweep.json`` holds.
    Raises:
        ConfigError: anything that can be seen to be wrong before the first run.
    """
    say = _silent if request.silent else _say
    measuring = request.measuring
    plan = make_plan(
        request.methods,
        request.texts,
        file=request.file,
        flags=request.flags,
        out=request.out,
        reward=measuring.reward,
    )
    split_axes(request.axes)
    check_plan(plan, measuring)
    about = about_measuring(plan, measuring)
    say(f"{len(plan.settings)} runs in {plan.out}. {about}")

    def written(outcomes: list[Outcome]) -> None:
        write_sweep(plan, outcomes, measuring, axes_of(request.axes, outcomes), about)

    outcomes = run_sweep(plan, measuring, jobs=request.jobs, quiet=not request.verbose, say=say, after=written)
    axes = axes_of(request.axes, outcomes)
    best = on_the_front(outcomes, axes)
    if not request.silent:
        _print(plan, outcomes, axes, best)
    return as_json(plan, outcomes, axes, best)


def about_measuring(plan: Plan, measuring: Measuring) -> str:
    """In one sentence: on what, with what, against what."""
    config = plan.settings[0].config
    if "policy" not in config.method.settings.needs:
        return "Reward models are judged on the pairs that each run held out."
    where = measuring.prompts or config.data.validation
    on = f"prompts of {where}" if where else "the prompts that the runs hold out"
    own = [key for key in plan.keys if key in ("seed", "training.seed") or key.startswith("data.")]
    if not where and own:
        on = f"the prompts that each run holds out ({own[0]} makes them differ; --prompts FILE makes them the same)"
    text = (
        f"Measured on {on}, at most {measuring.limit}, {measuring.samples_per_prompt} answers to each at temperature 1"
    )
    text += f"; KL to {config.reference or 'the model that training starts from'}."
    if measuring.reward is None and "reward" not in config.method.settings.needs:
        said = " No reward is given" + (", only gold" if measuring.gold else "")
        text += f"{said}: accuracy and margin are what the policy itself says of held-out pairs."
    return text


def _print(plan: Plan, outcomes: Sequence[Outcome], axes: tuple[str, str] | None, best: set[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = table_of(plan, outcomes, axes, best, brief=True)
    table = Table()
    for column in found.columns:
        table.add_column(column, justify="right" if column in found.numbers else "left", overflow="fold")
    for row in found.rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(stderr=True, highlight=False)
    console.print(table)
    for outcome in outcomes:
        if outcome.state == "failed":
            console.print(Text(f"failed: {outcome.setting.name}: {outcome.error}"), soft_wrap=True)
    console.print(f"picture: {plan.out / 'sweep.html'}   table: {plan.out / 'sweep.csv'}", soft_wrap=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    return None
