"""``palate label plan`` and ``next``: what more labels would buy, and which to ask for first."""

from __future__ import annotations

from typing import Annotated

import typer

from palate.cli.label.stores import StoreFile
from palate.cli.options import JsonFlag, RewardTokenizer, SameResult
from palate.cli.output import print_json, progress
from palate.errors import ConfigError


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
    tokenizer: RewardTokenizer = None,
    seed: SameResult = 0,
    as_json: JsonFlag = False,
) -> None:
    """How far people agree, what that allows a model, and with runs how much more labels would buy."""
    from palate.texts.planning import plan_labels

    found = plan_labels(
        store,
        runs=[_run(text) for text in run or ()],
        held_out=held_out,
        more=more or (),
        target=target,
        seed=seed,
        tokenizer=tokenizer,
        progress=progress("scoring"),
    )
    if as_json:
        print_json(found.to_dict())
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
    seed: SameResult = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say it, and change nothing.")] = False,
    tokenizer: RewardTokenizer = None,
    as_json: JsonFlag = False,
) -> None:
    """Put first what would tell most: by the answers so far, or by the disagreement of reward models."""
    from palate.texts.planning import set_next

    found = set_next(
        store,
        rewards=reward or (),
        count=count,
        random_share=random_share,
        seed=seed,
        dry_run=dry_run,
        tokenizer=tokenizer,
        progress=progress("scoring"),
    )
    if as_json:
        print_json(found)
        return
    done = "would come" if dry_run else "come"
    typer.echo(f"{found['items']} items {done} first, by {found['by']}; {found['random']} of them drawn at random")


def _run(text: str) -> tuple[int, str]:
    labels, _, folder = text.partition("=")
    if not labels.isdecimal() or not folder:
        raise ConfigError(f"run {text!r}: expected LABELS=FOLDER, e.g. 200=runs/reward-200/model.")
    return int(labels), folder
