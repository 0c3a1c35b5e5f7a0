"""Judgements from other tools and for them: one short file a format, with ``read(where)`` or ``write(answers, ...)``.

``import_file`` puts a file's single judgements into a store, ``export_file`` writes a store's answers in a format.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from palate.data.formats.convert import check_target, write_lines
from palate.errors import ConfigError, DataError
from palate.feedback import views
from palate.feedback.exchange.lines import Settings
from palate.feedback.exchange.taken import Imported, Taken, take, task_for
from palate.feedback.store import Store
from palate.feedback.task import Task

IMPORTS = ("label_studio", "argilla", "hh_rlhf", "ultrafeedback", "rlhf_v", "jsonl")
EXPORTS = (
    *("preference", "ranking", "kto", "stepwise", "rlhf_v", "ddpo", "sft", "hh_rlhf", "ultrafeedback", "argilla"),
    "label_studio",
)
LISTS = ("argilla", "label_studio")  # one JSON list, as those tools read it, in place of JSON lines


def read_file(where: str | Path, tool: str) -> Taken:
    """The judgements in a file.

    Raises:
        ConfigError: no such format.
        DataError: with the place of what cannot be read.
    """
    if tool not in IMPORTS:
        raise ConfigError(f'nothing is read from "{tool}". Expected one of: {", ".join(IMPORTS)}.')
    found: Taken = importlib.import_module(f"palate.feedback.exchange.{tool}").read(where)
    if not found.judged:
        left = ", ".join(f"{count} {reason}" for reason, count in found.left_out.most_common())
        raise DataError(f"{where}: no judgement could be read; left out: {left or 'nothing'}.")
    return found


def import_file(path: str | Path, where: str | Path, tool: str, task: Task | None = None) -> Imported:
    """Put a file's judgements into a store; one that is not there is made, with a task that asks what they answer.

    Args:
        path: of the store.
        where: the file.
        tool: a name of ``IMPORTS``.
        task: of a store that is made; None = what the file answers.
    """
    taken = read_file(where, tool)
    store = Store.open(path) if Path(path).exists() else Store.create(path, task or task_for(taken))
    with store:
        if task is not None:
            store.set_task(task)
        return take(store, taken)


def export_file(
    store: Store,
    kind: str,
    target: str | Path = "-",
    *,
    settings: Settings | None = None,
    decided: bool = True,
    validation: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a store's answers in a format, with FILE.provenance.json beside it.

    Args:
        kind: a name of ``EXPORTS``.
        target: a file, or "-" for standard output.
        decided: an adjudicator's decision stands in place of the answers it is about.
        validation: share of the prompts that goes to a second file, FILE with ".validation" before its ending, in
            [0, 1). A prompt is on one side, by the hash that ``palate train`` uses.
        seed: of that split.
    Returns:
        Provenance.
    Raises:
        ConfigError: an unknown format, or one that the task's questions cannot fill.
        DataError: the file exists.
    """
    if kind not in EXPORTS:
        raise ConfigError(f'nothing is exported as "{kind}". Expected one of: {", ".join(EXPORTS)}.')
    if kind in LISTS and Path(target).suffix in (".jsonl", ".ndjson"):
        raise ConfigError(f"{target}: {kind} reads one JSON list, and no lines. Name the file .json.")
    if validation and str(target) == "-":
        raise ConfigError("a split needs two files. Name the first with --out.")
    settings = settings or Settings()
    targets = [str(target)] + ([_beside(target)] if validation else [])
    for each in targets:
        check_target(each, overwrite=overwrite)
    given = views.labels(store, decided=decided)
    lines = importlib.import_module(f"palate.feedback.exchange.{kind}").write(given, store.task, settings)
    sides = lines.split(validation, seed) if validation else (lines.rows(),)
    for each, rows in zip(targets, sides, strict=True):
        (_write_list if kind in LISTS else write_lines)(each, rows, overwrite=overwrite)
    made = views.Made(lines.rows(), lines.left_out)
    about = views.provenance(store, given, made, kind=kind, decided=decided, validation=validation, **vars(settings))
    if str(target) != "-":
        write_lines(f"{target}.provenance.json", [about], overwrite=True)
    return about


def _beside(target: str | Path) -> str:
    path = Path(target)
    return str(path.with_name(f"{path.stem}.validation{path.suffix}"))


def _write_list(target: str | Path, rows: list[dict[str, Any]], *, overwrite: bool) -> None:
    """One JSON list, a record a line; the file appears when it is complete."""
    text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
    if str(target) == "-":
        print(text, end="")
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    if path.exists() and not overwrite:
        raise DataError(f"{target} appeared while it was being written, and is not overwritten.")
    os.replace(partial, path)
