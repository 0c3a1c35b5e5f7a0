"""How a command opens a store, and finds a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from palate.feedback.store import Store
    from palate.feedback.task import Task

StoreFile = Annotated[Path, typer.Argument(help="The store, e.g. feedback.db.")]
TaskFile = Annotated[
    str | None, typer.Option("--task", "-t", help="YAML file, or a template: see palate label templates.")
]


def open_store(path: Path) -> Store:
    """A store that is there."""
    from palate.feedback.store import Store

    return Store.open(path)


def open_or_make(path: Path, task: str | None) -> Store:
    """A store, made where it is not there; ``task``, if given, is its task from now on."""
    from palate.feedback.store import Store

    if not path.exists():
        return Store.create(path, task_of(task))
    store = Store.open(path)
    if task is not None:
        store.set_task(task_of(task))
    return store


def task_of(where: str | None) -> Task:
    """A YAML file's task, or a template's."""
    from palate.feedback import task
    from palate.settings_tree import read_yaml

    if where is None or (not where.endswith((".yaml", ".yml")) and not Path(where).exists()):
        return task.template(where or "instructgpt")
    layer = read_yaml(where)
    return task.task_of(layer.values, layer.place_of)
