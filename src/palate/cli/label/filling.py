"""``palate label init``, ``import`` and ``templates``: what is to be judged, and how."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from palate.cli.label.serving import need
from palate.cli.label.stores import StoreFile, TaskFile, open_or_make, task_of


def init(store: StoreFile, task: TaskFile = None) -> None:
    """Make a new store with a task (default: the form of InstructGPT)."""
    from palate.feedback.store import Store

    with Store.create(store, task_of(task)) as made:
        typer.echo(f"{store}: {made.task.title}", err=True)


def import_(
    store: StoreFile,
    records: Annotated[str, typer.Argument(help="Responses, comparisons or rankings: JSONL, or - for standard input.")],
    task: TaskFile = None,
    kind: Annotated[str, typer.Option("--kind", "-k", help="task, gold (answers known), or attention.")] = "task",
    images: Annotated[Path | None, typer.Option("--images", help="Folder of the pictures that records name.")] = None,
    combinations: Annotated[
        int | None, typer.Option("--combinations", min=1, help="Items of a prompt with more responses than are shown.")
    ] = None,
    from_tool: Annotated[
        str | None,
        typer.Option(
            "--from", help="Also the judgements: label_studio, argilla, hh_rlhf, ultrafeedback, rlhf_v, or jsonl."
        ),
    ] = None,
) -> None:
    """Put prompts with responses into a store; it is made where it is not there. Importing again adds only what is new.

    With --from, other people's judgements of them come too, each as one annotator's answer.
    """
    if from_tool is not None:
        from palate.feedback.exchange import import_file

        said = import_file(store, records, from_tool, None if task is None else task_of(task))
        typer.echo(f"{store}: {said}", err=True)
        return
    from palate.feedback.items import add_items, read_candidates

    candidates = read_candidates(records, kind=kind)
    with open_or_make(store, task) as opened:
        if any(candidate.images for candidate in candidates):
            need("PIL")
            from palate.server.images import add_image

            folder = images or Path(records).parent
            candidates = [
                dataclasses.replace(each, images=tuple(add_image(opened, name, folder) for name in each.images))
                for each in candidates
            ]
        typer.echo(f"{store}: {add_items(opened, candidates, combinations_of=combinations)}", err=True)


def templates(
    name: Annotated[str | None, typer.Argument(help="Print this one, to start one's own from.")] = None,
) -> None:
    """List the built-in tasks, or print one."""
    from palate.feedback import task

    if name is None:
        for each in task.templates():
            typer.echo(f"{each:<12} {task.template(each).title}")
    else:
        task.template(name)
        typer.echo(task.template_text(name), nl=False)
