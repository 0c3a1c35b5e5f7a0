"""``palate label arena``, ``chat`` and ``arena-table``: people talk to models, and say what they think of the answers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from palate.cli.label.serving import PACKAGES, Host, Port, PublicUrl, Serving, TokenFile, need, run_server
from palate.cli.label.stores import StoreFile, open_or_make, open_store
from palate.cli.options import JsonFlag
from palate.cli.output import print_json
from palate.errors import ConfigError

NewStoreFile = Annotated[Path, typer.Argument(help="The store, e.g. feedback.db; made where it is not there.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, max=4096, help="Of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 = the most probable token.")]
TopP = Annotated[float, typer.Option("--top-p", help="In (0, 1].")]
System = Annotated[str | None, typer.Option("--system", help="A system message for every conversation.")]
Template = Annotated[str | None, typer.Option("--chat-template", help='File, Jinja, "default" or "none".')]
Dtype = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, ...")]
Rate = Annotated[float, typer.Option("--rate", min=0.1, help="Requests a second of one person.")]


def arena(
    store: NewStoreFile,
    model: Annotated[
        list[str], typer.Option("--model", "-m", help="Folder, or NAME=FOLDER; two or more, each with its own --model.")
    ],
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Tell the names after the vote, which then ends the battle.")
    ] = False,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    public_url: PublicUrl = None,
    token_file: TokenFile = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    system: System = None,
    chat_template: Template = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    rate: Rate = 5.0,
    as_json: JsonFlag = False,
) -> None:
    """Serve a page on which two models of unknown name answer side by side, and people vote after each turn."""
    if len(model) < 2:
        raise ConfigError("a battle needs two models. Give --model twice or more; for one model: palate label chat.")
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    loading = {"system": system, "chat_template": chat_template, "dtype": dtype, "device": device}
    how = Serving(host, port, public_url, token_file, rate, as_json)
    _serve(store, model, decoding, loading, how, reveal=reveal)


def chat(
    store: NewStoreFile,
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, or NAME=FOLDER.")],
    host: Host = "127.0.0.1",
    port: Port = 8765,
    public_url: PublicUrl = None,
    token_file: TokenFile = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    system: System = None,
    chat_template: Template = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    rate: Rate = 5.0,
    as_json: JsonFlag = False,
) -> None:
    """Serve a page on which people talk to one model, thumbs up or down; what they copy or ask anew is kept too."""
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    loading = {"system": system, "chat_template": chat_template, "dtype": dtype, "device": device}
    _serve(store, [model], decoding, loading, Serving(host, port, public_url, token_file, rate, as_json))


def _serve(
    store: Path,
    models: list[str],
    decoding: dict[str, Any],
    loading: dict[str, Any],
    how: Serving,
    *,
    reveal: bool = False,
) -> None:
    from palate.generation.settings import SamplingSettings

    need(*PACKAGES)
    settings = SamplingSettings(**decoding)
    from palate.server.arena import Arena
    from palate.server.served import load_models

    loaded = load_models(models, settings, **loading)
    # a new store needs some task; these ask what the page asks
    template = None if store.exists() else ("compare" if len(models) > 1 else "thumbs")
    with open_or_make(store, template) as opened:
        names = ", ".join(str(each.about["name"]) for each in loaded)
        title = f"Battles of {names}" if len(loaded) > 1 else f"Chat with {names}"
        run_server(opened, how, title=title, arena=Arena(opened, loaded, reveal=reveal))


def arena_table(
    store: StoreFile,
    by: Annotated[
        str, typer.Option("--by", help="What is resampled whole: conversation, or annotator (with many people).")
    ] = "conversation",
    confidence: Annotated[float, typer.Option("--confidence", min=0.5, max=0.999)] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """The models in order of the votes on their battles, with intervals; no rank where the votes do not settle it."""
    from palate.feedback.columns import padded, wide
    from palate.feedback.conversations import conversations
    from palate.feedback.leaderboard import battles_of, leaderboard

    if by not in ("conversation", "annotator"):
        raise ConfigError(f'--by is "{by}". Expected "conversation" or "annotator".')
    cluster: Literal["conversation", "annotator"] = "annotator" if by == "annotator" else "conversation"
    with open_store(store) as opened:
        found = leaderboard(battles_of(conversations(opened), by=cluster), confidence=confidence, seed=seed)
    if as_json:
        print_json(asdict(found) | {"ranked": found.ranked})
        return
    width = max(len("model"), *(wide(each.name) for each in found.standings))
    percent = f"{100 * confidence:g} %"
    typer.echo(f"{'rank':<6} {'model':<{width}} {'score':>6}  {percent + ' interval':<16} wins ties losses")
    for each in found.standings:
        rank = str(each.best) if each.best == each.worst else f"{each.best}-{each.worst}"
        interval = f"{each.low:.0f} to {each.high:.0f}"
        counts = f"{each.wins:>4} {each.ties:>4} {each.losses:>6}"
        typer.echo(f"{rank:<6} {padded(each.name, width)} {each.score:>6.0f}  {interval:<16} {counts}")
    typer.echo(
        f"{_counted(found.votes, 'vote')} in {_counted(found.clusters, by)}; between equal models the left side wins {found.left_share:.0%} "
        f"of what is no tie, and {found.tie_share:.0%} are ties."
    )
    if not found.ranked:
        typer.echo("Ranks like 1-2 are not settled: these votes do not separate the models. More battles would.")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
