"""``palate label status``, ``verify``, ``backup`` and ``merge``: a store as it stands."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from palate.cli.label.stores import StoreFile, open_store
from palate.cli.options import JsonFlag
from palate.cli.output import print_json


def status(store: StoreFile, as_json: JsonFlag = False) -> None:
    """How far it is: items, answers, contested ones, annotators."""
    from palate.feedback.upkeep import status as status_of

    with open_store(store) as opened:
        found = status_of(opened)
    if as_json:
        print_json(found)
        return
    typer.echo(
        f"{found['title']}\n{found['done']} of {found['wanted']} answers, {found['complete']} of {found['items']} items"
    )
    for name in ("gold", "attention", "contested", "skipped_by_all", "late", "flags", "annotators", "events"):
        if found[name]:
            said = "people" if name == "annotators" else name.replace("_", " ")  # admins among them
            typer.echo(f"{said:<16} {found[name]}")


def verify(
    store: StoreFile,
    after: Annotated[
        str | None, typer.Option("--after", help="A hash noted earlier, which must be in the log.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Recompute every hash of the log, and everything that follows from it. Exit code 1 when something is wrong."""
    from palate.feedback.upkeep import verify as verify_store

    with open_store(store) as opened:
        found = verify_store(opened, after=after)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        for problem in found.problems:
            typer.echo(f"palate: {store}: {problem}", err=True)
        typer.echo(f"{found.events} events, last hash {found.last_hash}" + ("" if found.problems else ": intact"))
    if found.problems:
        raise typer.Exit(1)


def backup(store: StoreFile, target: Annotated[Path, typer.Argument(help="The copy.")]) -> None:
    """Copy a store while it is in use, and check the copy."""
    from palate.feedback.upkeep import backup as back_up

    with open_store(store) as opened:
        found = back_up(opened, target)
    typer.echo(f"{target}: {found.events} events, last hash {found.last_hash}: intact", err=True)


def merge(store: StoreFile, other: Annotated[Path, typer.Argument(help="The store to take in.")]) -> None:
    """Take another store's items, people and answers into this one."""
    from palate.feedback.upkeep import merge as merge_in

    with open_store(store) as opened, open_store(other) as theirs:
        found = merge_in(opened, theirs)
    typer.echo(f"{store}: {found['taken']} events taken, {found['known']} known already", err=True)
