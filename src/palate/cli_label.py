"""``palate label``: collecting people's feedback. What the commands do is in ``palate.feedback`` and ``palate.server``."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate.errors import ConfigError

if TYPE_CHECKING:
    from palate.feedback.store import Store
    from palate.feedback.task import Task

label = typer.Typer(
    help="Collect people's feedback: a store, a page to answer on, records for training.", no_args_is_help=True
)
annotators = typer.Typer(help="Who may log in.", no_args_is_help=True)
label.add_typer(annotators, name="annotators")

PACKAGES = ("fastapi", "uvicorn", "nh3", "markdown_it", "PIL")
StoreFile = Annotated[Path, typer.Argument(help="The store, e.g. feedback.db.")]
Name = Annotated[str, typer.Argument(help="The annotator's name.")]
TaskFile = Annotated[
    str | None, typer.Option("--task", "-t", help="YAML file, or a template: see palate label templates.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Days = Annotated[float, typer.Option("--days", min=0.01, help="After which the login link ends.")]


@label.command()
def init(store: StoreFile, task: TaskFile = None) -> None:
    """Make a new store with a task (default: the form of InstructGPT)."""
    from palate.feedback.store import Store

    with Store.create(store, _task(task)) as made:
        typer.echo(f"{store}: {made.task.title}", err=True)


@label.command("import")
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
        from palate.cli_feedback import import_judgements

        return import_judgements(store, records, from_tool, None if task is None else _task(task))
    from palate.feedback.items import add_items, read_candidates

    candidates = read_candidates(records, kind=kind)
    with _open_or_make(store, task) as opened:
        if any(candidate.images for candidate in candidates):
            _need("PIL")
            from palate.server.images import add_image

            folder = images or Path(records).parent
            candidates = [
                dataclasses.replace(each, images=tuple(add_image(opened, name, folder) for name in each.images))
                for each in candidates
            ]
        typer.echo(f"{store}: {add_items(opened, candidates, combinations_of=combinations)}", err=True)


@label.command()
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


@label.command()
def serve(
    store: StoreFile,
    task: TaskFile = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0 = any free one.")] = 8765,
    public_url: Annotated[
        str | None, typer.Option("--public-url", help="Where people reach it, e.g. https://label.example.org.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help='Lines "name role token": log in once with each, from this start.'),
    ] = None,
    rate: Annotated[float, typer.Option("--rate", min=0.1, help="Requests a second of one annotator.")] = 5.0,
    as_json: JsonFlag = False,
) -> None:
    """Serve the page on which annotators answer. Stop it at any time: what was acknowledged is on the disk."""
    for package in PACKAGES:
        _need(package)
    # Without a task, a name that is not there is a name mistyped: an empty store would look like lost work.
    with _open(store) if task is None else _open_or_make(store, task) as opened:
        run_server(opened, host, port, public_url, token_file, rate, as_json)


def run_server(
    opened: Store,
    host: str,
    port: int,
    public_url: str | None,
    token_file: Path | None,
    rate: float,
    as_json: bool,
    *,
    title: str | None = None,
    arena: Any = None,
) -> None:
    """Serve a store until Ctrl-C; ``arena``: with models to talk to."""
    import socket

    import uvicorn

    from palate.feedback import people
    from palate.server.app import make_app
    from palate.server.auth import access, check_listening, is_loopback
    from palate.server.guard import Limits

    if token_file is not None:
        _take_tokens(opened, token_file)
    first = None
    if is_loopback(host) and not people.people(opened):
        first = people.issue_link(opened, people.add_person(opened, "admin", "admin").name)
    check_listening(opened, host)
    with _listen(socket, host, port) as listening:
        found = listening.getsockname()[1]
        names = access(host, found, public_url)
        url = public_url.rstrip("/") if public_url else f"http://{f'[{host}]' if ':' in host else host}:{found}"
        if as_json:
            _print({"url": url, "link": None if first is None else f"{url}/login#{first}"})
        typer.echo(f"{url}   {title or opened.task.title}   (Ctrl-C stops)", err=True)
        if first is not None:
            typer.echo(f"Log in once as admin: {url}/login#{first}", err=True)
        else:
            typer.echo(f"Login links: palate label annotators link {opened.path} NAME --url {url}", err=True)
        if not names.secure and not is_loopback(host):
            typer.echo(
                "palate: without https everybody on the way can read along. Put a proxy with TLS before it.",
                err=True,
            )
        settings = uvicorn.Config(
            make_app(opened, names, Limits(rate=rate, burst=max(60, int(12 * rate))), arena),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=None if arena is None else 3,  # an answer may take minutes
            limit_concurrency=500,
        )
        uvicorn.Server(settings).run(sockets=[listening])


@label.command()
def status(store: StoreFile, as_json: JsonFlag = False) -> None:
    """How far it is: items, answers, contested ones, annotators."""
    from palate.feedback.upkeep import status as status_of

    with _open(store) as opened:
        found = status_of(opened)
    if as_json:
        _print(found)
        return
    typer.echo(
        f"{found['title']}\n{found['done']} of {found['wanted']} answers, {found['complete']} of {found['items']} items"
    )
    for name in ("gold", "attention", "contested", "skipped_by_all", "late", "flags", "annotators", "events"):
        if found[name]:
            said = "people" if name == "annotators" else name.replace("_", " ")  # admins among them
            typer.echo(f"{said:<16} {found[name]}")


@label.command()
def verify(
    store: StoreFile,
    after: Annotated[
        str | None, typer.Option("--after", help="A hash noted earlier, which must be in the log.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Recompute every hash of the log, and everything that follows from it. Exit code 1 when something is wrong."""
    from palate.feedback.upkeep import verify as verify_store

    with _open(store) as opened:
        found = verify_store(opened, after=after)
    if as_json:
        _print(dataclasses.asdict(found))
    else:
        for problem in found.problems:
            typer.echo(f"palate: {store}: {problem}", err=True)
        typer.echo(f"{found.events} events, last hash {found.last_hash}" + ("" if found.problems else ": intact"))
    if found.problems:
        raise typer.Exit(1)


@label.command()
def backup(store: StoreFile, target: Annotated[Path, typer.Argument(help="The copy.")]) -> None:
    """Copy a store while it is in use, and check the copy."""
    from palate.feedback.upkeep import backup as back_up

    with _open(store) as opened:
        found = back_up(opened, target)
    typer.echo(f"{target}: {found.events} events, last hash {found.last_hash}: intact", err=True)


@label.command()
def merge(store: StoreFile, other: Annotated[Path, typer.Argument(help="The store to take in.")]) -> None:
    """Take another store's items, people and answers into this one."""
    from palate.feedback.upkeep import merge as merge_in

    with _open(store) as opened, _open(other) as theirs:
        found = merge_in(opened, theirs)
    typer.echo(f"{store}: {found['taken']} events taken, {found['known']} known already", err=True)


@label.command()
def export(
    store: StoreFile,
    kind: Annotated[
        str,
        typer.Option(
            "--as",
            help="comparisons, rankings, judgements, demonstrations, corrections, answers, csv, or events; of "
            "conversations with models battles, thumbs, signals; for other "
            "tools preference, ranking, kto, stepwise, rlhf_v, ddpo, sft, hh_rlhf, ultrafeedback, argilla, label_studio.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="File, or - for standard output.")] = "-",
    question: Annotated[str | None, typer.Option("--question", help="Id; default: the first that fits.")] = None,
    consensus: Annotated[
        bool, typer.Option("--consensus", help="One comparison a pair, with the share for it.")
    ] = False,
    individual: Annotated[
        bool, typer.Option("--individual", help="All answers also where an adjudicator decided; no decisions.")
    ] = False,
    margins: Annotated[str | None, typer.Option("--margins", help="Of the strengths, e.g. 0.33,0.67,1.")] = None,
    ties: Annotated[str, typer.Option("--ties", help='"drop", or "half": probability 1/2.')] = "drop",
    histories: Annotated[
        str, typer.Option("--histories", help='battles: "same" prompt on both sides, or "winner": the chosen one\'s.')
    ] = "same",
    least: Annotated[float, typer.Option("--least", help="signals: lowest probability that is kept.")] = 0.5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    conversational: Annotated[
        bool, typer.Option("--conversational", help="preference, kto, sft: prompts and responses as messages.")
    ] = False,
    validation: Annotated[
        float,
        typer.Option("--validation", min=0.0, max=0.9, help="Share of prompts for FILE.validation; other tools'."),
    ] = 0.0,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="ddpo: also the weight of every token of this model's.")
    ] = None,
) -> None:
    """Write what people said: records for training, single answers, or the log itself."""
    from palate.cli_feedback import export_other
    from palate.feedback.exchange import EXPORTS
    from palate.feedback.export import export as export_as

    numbers = None if margins is None else _numbers(margins)
    if kind in EXPORTS:
        with _open(store) as opened:
            return export_other(
                opened,
                kind,
                out,
                question,
                consensus,
                not individual,
                numbers,
                overwrite,
                conversational,
                validation,
                tokenizer,
            )
    if conversational or validation or tokenizer is not None:
        raise ConfigError(
            f"--conversational, --validation and --tokenizer are no options of {kind}: {', '.join(EXPORTS)}."
        )
    with _open(store) as opened:
        about = export_as(
            opened,
            kind,
            out,
            question=question,
            consensus=consensus,
            decided=not individual,
            margins=numbers,
            ties=ties,
            histories=histories,
            least=least,
            overwrite=overwrite,
        )
    if "left_out" in about:
        left = ", ".join(f"{count} {reason}" for reason, count in about["left_out"].items())
        typer.echo(
            f"{about['records']} {kind} of {about['answers']} answers" + (f"; left out: {left}" if left else ""),
            err=True,
        )


@annotators.command()
def add(
    store: StoreFile,
    name: Name,
    role: Annotated[str, typer.Option("--role", "-r", help="annotator, adjudicator, or admin.")] = "annotator",
    url: Annotated[str, typer.Option("--url", help="Where the server is, for the link.")] = "http://127.0.0.1:8765",
    days: Days = 7.0,
    as_json: JsonFlag = False,
) -> None:
    """Add somebody, and print a login link that works once."""
    from palate.feedback import people

    with _open(store) as opened:
        person = people.add_person(opened, name, role)
        token = people.issue_link(opened, person.name, days=days)
    _say_link(person.name, person.pseudonym, token, url, as_json)


@annotators.command()
def link(
    store: StoreFile,
    name: Name,
    url: Annotated[str, typer.Option("--url", help="Where the server is, for the link.")] = "http://127.0.0.1:8765",
    days: Days = 7.0,
    as_json: JsonFlag = False,
) -> None:
    """Print a new login link for somebody."""
    from palate.feedback import people

    with _open(store) as opened:
        token = people.issue_link(opened, name, days=days)
        pseudonym = next(each.pseudonym for each in people.people(opened) if each.name == name)
    _say_link(name, pseudonym, token, url, as_json)


@annotators.command("list")
def list_(store: StoreFile, as_json: JsonFlag = False) -> None:
    """Everybody, with pseudonym and role."""
    from palate.feedback import people

    with _open(store) as opened:
        found = people.people(opened)
    if as_json:
        _print([dataclasses.asdict(person) for person in found])
        return
    for person in found:
        typer.echo(
            f"{person.pseudonym}  {person.role:<12} {person.name}{'' if person.active else '  (may not log in)'}"
        )


@annotators.command()
def deactivate(store: StoreFile, name: Name) -> None:
    """Take away the right to log in; open sessions end, answers stay."""
    _change(store, name, active=False)


@annotators.command()
def activate(store: StoreFile, name: Name) -> None:
    """Give back the right to log in."""
    _change(store, name, active=True)


@annotators.command()
def role(
    store: StoreFile, name: Name, role: Annotated[str, typer.Argument(help="annotator, adjudicator, admin.")]
) -> None:
    """Give somebody another role."""
    _change(store, name, role=role)


@annotators.command()
def forget(store: StoreFile, name: Name) -> None:
    """Erase a name; the pseudonym and its answers stay."""
    from palate.feedback import people

    with _open(store) as opened:
        typer.echo(f"{name} is now only known as {people.forget_name(opened, name)}", err=True)


def _change(store: Path, name: str, **what: Any) -> None:
    from palate.feedback import people

    with _open(store) as opened:
        person = people.change_person(opened, name, **what)
    typer.echo(f"{person.name}: {person.role}, {'may' if person.active else 'may not'} log in", err=True)


def _open(path: Path) -> Store:
    from palate.feedback.store import Store

    return Store.open(path)


def _open_or_make(path: Path, task: str | None) -> Store:
    from palate.feedback.store import Store

    if not path.exists():
        return Store.create(path, _task(task))
    store = Store.open(path)
    if task is not None:
        store.set_task(_task(task))
    return store


def _task(where: str | None) -> Task:
    """A YAML file's task, or a template's."""
    from palate.feedback.task import task_of, template
    from palate.settings_tree import read_yaml

    if where is None or (not where.endswith((".yaml", ".yml")) and not Path(where).exists()):
        return template(where or "instructgpt")
    layer = read_yaml(where)
    return task_of(layer.values, layer.place_of)


def _take_tokens(store: Store, path: Path) -> None:
    """People and login tokens of a file that nobody else can read."""
    from palate.feedback import people

    try:
        if os.stat(path).st_mode & 0o077:
            raise ConfigError(f"{path}: others on this machine can read it. First: chmod 600 {path}")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    known = {person.name for person in people.people(store)}
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts or line.startswith("#"):
            continue
        if len(parts) != 3:
            raise ConfigError(f'{path}:{number}: {len(parts)} words; expected "name role token".')
        name, given_role, token = parts
        if name not in known:
            people.add_person(store, name, given_role)
        people.issue_link(store, name, token=token)


def _listen(socket: Any, host: str, port: int) -> Any:
    """A listening socket: the port is known before anybody is told."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # named TCP: asyncio turns Nagle's algorithm off for such sockets only, and with it each answer takes 40 ms more
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port.") from None
    return listening


def _say_link(name: str, pseudonym: str, token: str, url: str, as_json: bool) -> None:
    where = f"{url.rstrip('/')}/login#{token}"
    if as_json:
        _print({"name": name, "pseudonym": pseudonym, "token": token, "link": where})
    else:
        typer.echo(where)
        typer.echo(f"{name} ({pseudonym}) logs in with this link, once.", err=True)


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"this needs the package {package}, which is not installed. Install: pip install 'palate[label]'"
        )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"margins {text!r}: expected numbers with commas between them, e.g. 0.33,0.67,1.") from None


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
