"""``palate label simulate``, ``plan``, ``next``, and what ``import --from``, ``export`` and ``sample --k`` do."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from palate.errors import ConfigError

StoreFile = Annotated[Path, typer.Argument(help="The store, e.g. feedback.db.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same result.")]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", help="For rewards that have none of their own.")]


def register(label: typer.Typer) -> None:
    """Add the commands to ``palate label``."""
    for command in (simulate, plan, next_):
        label.command("next" if command is next_ else command.__name__)(command)


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
    seed: Seed = 0,
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
    tokens = _links(store, annotators) if store is not None else _tokens(Path(str(token_file)), annotators)
    own = _people(people, list(tokens))
    characters = {name: _character(Character, common | own.get(name, {}), name) for name in tokens}
    with _progress("answering") as progress:
        acted = act(url, tokens, prefer, characters, answers=answers, seed=seed, progress=progress)
    if as_json:
        _print(acted.as_dict())
        return
    each = ", ".join(f"{name} {count}" for name, count in acted.answers.items())
    said = f"{sum(acted.answers.values())} answers in {acted.seconds:.1f} s ({each or 'nobody had anything to do'})"
    typer.echo(said + ("; nothing is left to do" if acted.done else ""), err=True)


def plan(
    store: StoreFile,
    run: Annotated[
        list[str] | None, typer.Option("--run", help="LABELS=FOLDER of a reward model trained on so many; repeat.")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="Comparisons that no run saw: file, or another store.")
    ] = None,
    more: Annotated[list[int] | None, typer.Option("--more", min=1, help="Say what so many more would buy.")] = None,
    target: Annotated[float | None, typer.Option("--target", min=0.5, max=1.0, help="Accuracy wanted.")] = None,
    tokenizer: Tokenizer = None,
    seed: Seed = 0,
    as_json: JsonFlag = False,
) -> None:
    """How far people agree, what that allows a model, and with runs how much more labels would buy."""
    from palate.texts.planning import plan_labels

    with _progress("scoring") as progress:
        found = plan_labels(
            store,
            runs=[_run(text) for text in run or ()],
            held_out=held_out,
            more=more or (),
            target=target,
            seed=seed,
            tokenizer=tokenizer,
            progress=progress,
        )
    if as_json:
        _print(found.to_dict())
    else:
        typer.echo(found.text())


def next_(
    store: StoreFile,
    reward: Annotated[
        list[str] | None, typer.Option("--reward", help="Reward models whose disagreement counts; repeat.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="Items to put first; default: all.")] = None,
    random_share: Annotated[
        float, typer.Option("--random-share", min=0.0, max=1.0, help="Of these, drawn at random.")
    ] = 0.2,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say it, and change nothing.")] = False,
    tokenizer: Tokenizer = None,
    as_json: JsonFlag = False,
) -> None:
    """Put first what would tell most: by the answers so far, or by the disagreement of reward models."""
    from palate.texts.planning import set_next

    with _progress("scoring") as progress:
        found = set_next(
            store,
            rewards=reward or (),
            count=count,
            random_share=random_share,
            seed=seed,
            dry_run=dry_run,
            tokenizer=tokenizer,
            progress=progress,
        )
    if as_json:
        _print(found)
        return
    done = "would come" if dry_run else "come"
    typer.echo(f"{found['items']} items {done} first, by {found['by']}; {found['random']} of them drawn at random")


def sample_candidates(
    models: list[str],
    prompts: list[Any],
    out: str,
    *,
    store: Path | None,
    task: str | None,
    k: int,
    temperatures: str,
    decoding: dict[str, Any],
    seed: int,
    chat_template: str | None,
    dtype: str,
    device: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """What ``palate sample --k`` does: different responses to each prompt, into a file or a store."""
    from dataclasses import asdict

    from palate.cli_label import _task
    from palate.feedback.store import Store
    from palate.texts.candidates import Plan, numbers, sample_to_file, sample_to_store

    if store is not None and out != "-":
        raise ConfigError("responses go to --store or to --out, not to both.")
    if as_json and store is None and out == "-":
        raise ConfigError("--json prints counts on standard output, where the responses go. Name a file with --out.")
    plan = Plan(
        models,
        numbers(temperatures, "temperature"),
        k,
        decoding,
        seed,
        chat_template=chat_template,
        dtype=dtype,
        device=device,
    )
    with _progress("sampling") as progress:
        if store is not None:
            made = sample_to_store(
                store, plan, prompts, make=lambda: Store.create(store, _task(task)), progress=progress
            )
        else:
            made = sample_to_file(out, plan, prompts, overwrite=overwrite, progress=progress)
    where = str(store or out)
    if as_json:
        _print({"out": where, **asdict(made)})
    else:
        typer.echo(f"{where}: {made}", err=True)


def import_judgements(store: Path, records: str, tool: str, task: Any) -> None:
    """What ``palate label import --from`` does."""
    from palate.feedback.exchange import import_file

    typer.echo(f"{store}: {import_file(store, records, tool, task)}", err=True)


def export_other(
    store: Any,
    kind: str,
    out: str,
    question: str | None,
    consensus: bool,
    decided: bool,
    margins: Any,
    overwrite: bool,
    conversational: bool,
    validation: float,
    tokenizer: str | None,
) -> None:
    """What ``palate label export`` does for other tools."""
    from palate.feedback.exchange import Settings, export_file

    if consensus and (kind != "preference" or margins is not None):
        raise ConfigError("--consensus is an option of preference and comparisons, and has margins of its own.")
    settings = Settings(question, "consensus" if consensus else "each", margins, conversational, tokenizer=tokenizer)
    about = export_file(
        store, kind, out, settings=settings, decided=decided, validation=validation, overwrite=overwrite
    )
    left = ", ".join(f"{count} {reason}" for reason, count in about["left_out"].items())
    said = f"{about['records']} records of {about['answers']} answers"
    typer.echo(said + (f"; left out: {left}" if left else ""), err=True)


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


def _tokens(path: Path, count: int) -> dict[str, str]:
    """The tokens of the first ``count`` annotators of a file."""
    try:
        if os.stat(path).st_mode & 0o077:
            raise ConfigError(f"{path}: others on this machine can read it. First: chmod 600 {path}")
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    found = {parts[0]: parts[2] for parts in lines if len(parts) == 3 and parts[1] == "annotator"}
    if len(found) < count:
        raise ConfigError(f'{path}: {len(found)} lines "name annotator token"; expected at least {count}.')
    return dict(list(found.items())[:count])


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


def _run(text: str) -> tuple[int, str]:
    labels, _, folder = text.partition("=")
    if not labels.isdecimal() or not folder:
        raise ConfigError(f"run {text!r}: expected LABELS=FOLDER, e.g. 200=runs/reward-200/model.")
    return int(labels), folder


@contextlib.contextmanager
def _progress(what: str) -> Any:
    """A line on standard error with rate and ETA, where somebody looks at it."""
    import sys

    if not sys.stderr.isatty():
        yield None
        return
    from palate.console import progress_line

    yield progress_line(what)


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
