"""``palate label simulate``: simulated annotators, who answer through HTTP."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from palate.cli.label.tokens import annotators_of
from palate.cli.options import JsonFlag, SameResult
from palate.cli.output import print_json, progress
from palate.errors import ConfigError


def simulate(
    gold: Annotated[str, typer.Option("--gold", "-g", help="What they want: module:function, or JSONL with scores.")],
    store: Annotated[
        Path | None, typer.Argument(help="The store that is served: gives them login links. Or --token-file.")
    ] = None,
    url: Annotated[str, typer.Option("--url", "-u", help="Where the server is.")] = "http://127.0.0.1:8765",
    annotators: Annotated[int, typer.Option("--annotators", "-n", min=1, max=100)] = 5,
    answers: Annotated[int, typer.Option("--answers", "-a", min=1, help="In all.")] = 200,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help='Lines "name role token", as palate label serve takes them.')
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Noise, in units of gold; 0 = none.")] = 1.0,
    reliability: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of items looked at.")] = 1.0,
    side_bias: Annotated[float, typer.Option(help="Units of gold for the response shown first.")] = 0.0,
    length_bias: Annotated[float, typer.Option(help="Units of gold for each word.")] = 0.0,
    fatigue: Annotated[float, typer.Option(min=0.0, help="Loss of reliability after 100 answers, in logs.")] = 0.0,
    tie_width: Annotated[float, typer.Option(min=0.0, help="Differences below it are ties.")] = 0.0,
    people: Annotated[
        Path | None, typer.Option("--people", help="YAML: {name: {reliability: 0.5, ...}}, over the options above.")
    ] = None,
    seed: SameResult = 0,
    as_json: JsonFlag = False,
) -> None:
    """Simulated annotators answer through HTTP: to try a task, and what it yields, before people are paid.

    In a store they are named simulated-1, simulated-2, ... Nothing else tells their answers from people's.
    """
    from palate.feedback.simulated_people import Character, gold_of
    from palate.feedback.simulated_people import simulate as act

    if (store is None) == (token_file is None):
        raise ConfigError("give the STORE that is served, or a --token-file, and not both: they need to log in.")
    prefer = gold_of(gold)
    common = {"temperature": temperature, "reliability": reliability, "side_bias": side_bias, "tie_width": tie_width}
    common |= {"length_bias": length_bias, "fatigue": fatigue}
    tokens = _links(store, annotators) if store is not None else annotators_of(Path(str(token_file)), annotators)
    own = _people(people, list(tokens))
    characters = {name: _character(Character, common | own.get(name, {}), name) for name in tokens}
    acted = act(url, tokens, prefer, characters, answers=answers, seed=seed, progress=progress("answering"))
    if as_json:
        print_json(acted.as_dict())
        return
    each = ", ".join(f"{name} {count}" for name, count in acted.answers.items())
    said = f"{sum(acted.answers.values())} answers in {acted.seconds:.1f} s ({each or 'nobody had anything to do'})"
    typer.echo(said + ("; nothing is left to do" if acted.done else ""), err=True)


def _links(store: Path, count: int) -> dict[str, str]:
    """Login tokens of simulated-1, simulated-2, ...; they are added where they are not there."""
    from palate.feedback import people
    from palate.feedback.learned import SIMULATED
    from palate.feedback.store import Store

    with Store.open(store) as opened:
        known = {person.name for person in people.people(opened)}
        names = [f"{SIMULATED}{number}" for number in range(1, count + 1)]
        for name in names:
            if name not in known:
                people.add_person(opened, name)
        return {name: people.issue_link(opened, name, token=secrets.token_urlsafe(32)) for name in names}


def _people(path: Path | None, names: list[str]) -> dict[str, dict[str, Any]]:
    if path is None:
        return {}
    from palate.settings_tree import read_yaml

    values = read_yaml(path).values
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]!r} is none of the annotators: {', '.join(names)}.")
    return {name: dict(settings) for name, settings in values.items()}


def _character(kind: Any, settings: dict[str, Any], name: str) -> Any:
    try:
        return kind(**settings)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}. Known: {', '.join(kind.__dataclass_fields__)}.") from None
