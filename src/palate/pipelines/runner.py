"""Run a pipeline stage by stage; a finished stage is kept, a killed one resumes, by the same command.

A stage that trains has a run folder of its own and resumes by itself (``palate.stage``). Any other stage is written to
``<stage>.part`` and renamed when it is complete. ``.stages/<stage>.json`` is written last: it holds the settings that
the stage was run with, its figures, and its seconds.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palate.errors import RunError
from palate.pipelines.recipe import Recipe, Step, read_recipe
from palate.pipelines.stages import STAGES, check_stage, run_stage_of
from palate.run_folder import differences, write_text


def run_pipeline(
    name: str | Path, *, out: str | Path | None = None, overrides: Sequence[str] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run a pipeline to its end.

    Args:
        name: a built-in pipeline's name (``quickstart``), or a YAML file.
        out: folder of the whole run; None = what the file says.
        overrides: ``variable=value`` or ``stage.key=value``.
        quiet: print nothing.

    Returns:
        {"out": folder, "seconds": of all stages, "stages": {stage: its figures}}.

    Raises:
        ConfigError: something in the file is wrong; said before any stage runs, where it can be.
        RunError: the folder holds stages that were run with other settings.
    """
    recipe = read_recipe(name, out=out, overrides=overrides)
    for step in recipe.steps:
        check_stage(step)
    done = [_finished(recipe, step) for step in recipe.steps]
    say = _silent if quiet else _printed
    facts: dict[str, Any] = {}
    say(f"[bold]{recipe.name}[/bold]  {recipe.description}\nfolder: {recipe.out}")
    for number, (step, record) in enumerate(zip(recipe.steps, done, strict=True), start=1):
        say(f"\n[bold]{number}/{len(recipe.steps)} {step.name}[/bold]", end="  ")
        if record is None:
            say(f"[dim]{STAGES[step.do].doing}[/dim]")
            record = _run(recipe, step, quiet)
        else:
            say("[dim]already done[/dim]")
        facts[step.name] = record["figures"] | {"seconds": record["seconds"]}
        say(f"   {_line(record)}")
        for text in record["figures"].get("print", ()):
            say(text)
    return {
        "out": str(recipe.out),
        "seconds": sum(figures["seconds"] for figures in facts.values()),
        "stages": {stage: {k: v for k, v in figures.items() if k != "print"} for stage, figures in facts.items()},
    }


def _finished(recipe: Recipe, step: Step) -> dict[str, Any] | None:
    """The record of a finished stage, None when it is still to be run.

    Raises:
        RunError: it was finished with other settings.
    """
    where = _marker(recipe, step)
    if not where.exists():
        return None
    record: dict[str, Any] = json.loads(where.read_text(encoding="utf-8"))
    found = differences(record["settings"], _settings(step))
    if found:
        raise RunError(
            f"{recipe.out / step.name}: this stage was run with other settings:\n  "
            + "\n  ".join(found)
            + "\nGive another --out for a new run, or the old settings to continue this one."
        )
    return record


def _run(recipe: Recipe, step: Step, quiet: bool) -> dict[str, Any]:
    folder = recipe.out / step.name
    started = time.monotonic()
    if STAGES[step.do].settings is None:  # training resumes by itself
        figures = run_stage_of(step, folder, recipe, quiet)
    else:
        part = folder.with_name(f"{step.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # without a marker it is not known to be complete
        try:
            part.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{part}: cannot be made: {error.strerror}.") from error
        figures = run_stage_of(step, part, recipe, quiet)
        part.rename(folder)
    record = {"settings": _settings(step), "figures": figures, "seconds": round(time.monotonic() - started, 1)}
    marker = _marker(recipe, step)
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_text(marker, json.dumps(record, indent=1, ensure_ascii=False))
    return record


def _marker(recipe: Recipe, step: Step) -> Path:
    return recipe.out / ".stages" / f"{step.name}.json"


def _settings(step: Step) -> dict[str, Any]:
    """As JSON gives them back."""
    settings: dict[str, Any] = json.loads(json.dumps({"do": step.do, **step.settings.values}))
    return settings


def _line(record: dict[str, Any]) -> str:
    shown = [f"{k} {_short(v)}" for k, v in record["figures"].items() if isinstance(v, int | float | str)]
    return f"[green]✓[/green] {record['seconds']:.0f} s   " + "   ".join(shown[:6])


def _short(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value}"


def _printed(text: Any, end: str = "\n") -> None:
    from rich.console import Console

    Console(highlight=False).print(text, end=end, soft_wrap=True)


def _silent(text: Any, end: str = "\n") -> None:
    return None
