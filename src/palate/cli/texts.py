"""``palate score``, ``chat`` and ``check``: trained models at work on texts."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from palate.cli.options import (
    DEVICE,
    DTYPE,
    Format,
    JsonFlag,
    Limit,
    MaxLength,
    Model,
    Out,
    Overwrite,
    RewardTokenizer,
    Seed,
    Template,
)
from palate.cli.output import print_json, progress


def score(
    reward: Annotated[
        str,
        typer.Option(
            "--model", "-m", "--reward", help='Reward folder, module:function, "{check: number}", .yaml file.'
        ),
    ],
    data: Annotated[str, typer.Option("--data", "-d", help="prompt+response, comparisons, rankings, or -.")] = "-",
    out: Out = "-",
    tokenizer: RewardTokenizer = None,
    max_length: MaxLength = None,
    limit: Limit = None,
    format: Format = "auto",
    chat_template: Template = None,
    dtype: Annotated[str, DTYPE] = "float32",
    device: Annotated[str, DEVICE] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Score responses with the number that training saw: {"prompt", "response", "score"} a line.

    Comparisons get "chosen_score" and "rejected_score", rankings "scores"; their accuracy is said on standard error.
    """
    from palate.texts import check_target, read_scorable, score_records, write_lines

    check_target(out, overwrite=overwrite)
    records = read_scorable(data, format=format, limit=limit)
    scored = score_records(
        reward,
        records,
        tokenizer=tokenizer,
        max_length=max_length,
        chat_template=chat_template,
        dtype=dtype,
        device=device,
        progress=progress("scoring"),
    )
    write_lines(out, scored.lines, overwrite=overwrite)
    if scored.accuracy is not None:
        typer.echo(f"accuracy {scored.accuracy:.4f} over {scored.pairs} pairs (ties count 1/2)", err=True)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Seed = 0,
    chat_template: Template = None,
    dtype: Annotated[str, DTYPE] = "float32",
    device: Annotated[str, DEVICE] = "auto",
) -> None:
    """Talk to a model. /new starts again, /quit (or Ctrl-D) ends; a model without chat template continues your text."""
    from palate.texts import Conversation

    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    talk = Conversation(
        model, decoding, seed=seed, system=system, chat_template=chat_template, dtype=dtype, device=device
    )
    typer.echo("/new starts again, /quit ends.", err=True)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/new":
            talk.restart()
        elif text:
            typer.echo(talk.say(text))


def check(
    model: Model,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Records to look at.")] = None,
    kind: Annotated[str, typer.Option("--kind", "-k", help="What the records are.")] = "demonstrations",
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Records to show token by token.")] = 3,
    max_length: MaxLength = None,
    limit: Limit = None,
    format: Format = "auto",
    chat_template: Template = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what is trained and what is masked, token by token, and what is wrong with the chat template.

    Exit code 1 when something was found.
    """
    from palate.texts import check_tokens

    found = check_tokens(
        model,
        data,
        kind=kind,
        count=count,
        max_length=max_length,
        limit=limit,
        format=format,
        chat_template=chat_template,
    )
    if as_json:
        print_json(found.to_dict())
    else:
        from palate.console import print_check

        print_check(found)
    if found.findings:
        raise typer.Exit(1)
