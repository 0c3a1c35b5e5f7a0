"""``palate label annotators``: who may log in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from palate.cli.label.stores import StoreFile, open_store
from palate.cli.options import JsonFlag
from palate.cli.output import print_json

Name = Annotated[str, typer.Argument(help="The annotator's name.")]
Url = Annotated[str, typer.Option("--url", help="Where the server is, for the link.")]
Days = Annotated[float, typer.Option("--days", min=0.01, help="After which the login link ends.")]


def add(
    store: StoreFile,
    name: Name,
    role: Annotated[str, typer.Option("--role", "-r", help="annotator, adjudicator, or admin.")] = "annotator",
    url: Url = "http://127.0.0.1:8765",
    days: Days = 7.0,
    as_json: JsonFlag = False,
) -> None:
    """Add somebody, and print a login link that works once."""
    from palate.feedback import people

    with open_store(store) as opened:
        person = people.add_person(opened, name, role)
        token = people.issue_link(opened, person.name, days=days)
    _say_link(person.name, person.pseudonym, token, url, as_json)


def link(
    store: StoreFile,
    name: Name,
    url: Url = "http://127.0.0.1:8765",
    days: Days = 7.0,
    as_json: JsonFlag = False,
) -> None:
    """Print a new login link for somebody."""
    from palate.feedback import people

    with open_store(store) as opened:
        token = people.issue_link(opened, name, days=days)
        pseudonym = next(each.pseudonym for each in people.people(opened) if each.name == name)
    _say_link(name, pseudonym, token, url, as_json)


def list_(store: StoreFile, as_json: JsonFlag = False) -> None:
    """Everybody, with pseudonym and role."""
    from palate.feedback import people

    with open_store(store) as opened:
        found = people.people(opened)
    if as_json:
        print_json([dataclasses.asdict(person) for person in found])
        return
    for person in found:
        typer.echo(
            f"{person.pseudonym}  {person.role:<12} {person.name}{'' if person.active else '  (may not log in)'}"
        )


def deactivate(store: StoreFile, name: Name) -> None:
    """Take away the right to log in; open sessions end, answers stay."""
    _change(store, name, active=False)


def activate(store: StoreFile, name: Name) -> None:
    """Give back the right to log in."""
    _change(store, name, active=True)


def role(
    store: StoreFile, name: Name, role: Annotated[str, typer.Argument(help="annotator, adjudicator, admin.")]
) -> None:
    """Give somebody another role."""
    _change(store, name, role=role)


def forget(store: StoreFile, name: Name) -> None:
    """Erase a name; the pseudonym and its answers stay."""
    from palate.feedback import people

    with open_store(store) as opened:
        typer.echo(f"{name} is now only known as {people.forget_name(opened, name)}", err=True)


def _change(store: Path, name: str, **what: Any) -> None:
    from palate.feedback import people

    with open_store(store) as opened:
        person = people.change_person(opened, name, **what)
    typer.echo(f"{person.name}: {person.role}, {'may' if person.active else 'may not'} log in", err=True)


def _say_link(name: str, pseudonym: str, token: str, url: str, as_json: bool) -> None:
    where = f"{url.rstrip('/')}/login#{token}"
    if as_json:
        print_json({"name": name, "pseudonym": pseudonym, "token": token, "link": where})
    else:
        typer.echo(where)
        typer.echo(f"{name} ({pseudonym}) logs in with this link, once.", err=True)


annotators = typer.Typer(help="Who may log in.", no_args_is_help=True)
for command in (add, link, list_, deactivate, activate, role, forget):
    annotators.command(command.__name__.rstrip("_"))(command)
