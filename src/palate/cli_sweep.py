"""``palate sweep``: reads arguments, calls ``palate.pipelines.sweep``, prints; heavy things are imported inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from palate.errors import ConfigError


def sweep(
    method: Annotated[str | None, typer.Argument(help="A method, or several: dpo,ipo,simpo.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="key=value,value ...; one value: the same in every run.", show_default=False),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML settings file of all runs.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="What is trained: folder or hub name.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Training records.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder of all runs; default: runs/sweep-METHOD.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option("--reward", help="What scores the answers; a method that needs a reward learns from it."),
    ] = None,
    gold: Annotated[
        str | None, typer.Option("--gold", help="A reward that nothing is trained on, measured beside it.")
    ] = None,
    reference: Annotated[str | None, typer.Option("--reference", help="Frozen reference; default: MODEL.")] = None,
    value: Annotated[str | None, typer.Option("--value", help="Start of the value model.")] = None,
    validation: Annotated[str | None, typer.Option("--validation", help="Held-out records; default: a share.")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Folder or hub name; default: MODEL's.")] = None,
    lora: Annotated[bool | None, typer.Option("--lora/--no-lora", help="Train adapters.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, or mixed.")] = None,
    device: Annotated[str | None, typer.Option("--device", help='"cpu", "cuda", or "auto".')] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Read at most so many records.")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Prompts to measure on; default: those held out.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="At most so many of these prompts.")] = 128,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers to each of them.")] = 2,
    seed: Annotated[int, typer.Option("--seed", help="Of the answers; seed=0,1,2 sweeps that of training.")] = 0,
    axes: Annotated[
        str | None, typer.Option("--axes", help="What is drawn: kl,score or score/helpful,score/harmless, ...")
    ] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Also measure the checkpoints kept.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at a time, each a process.")] = 1,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the progress of every run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Run a method with many settings, and draw what each earned for the distance it went.

    palate sweep dpo beta=0.05,0.1,0.5 --model M --data D --reward R

    Every combination is an ordinary run in OUT/NAME. The same command goes on
    where it stopped. Exit code 1 when a run failed; the others are done all the
    same.
    """
    from palate.pipelines.sweep.command import Request, run_command

    texts = list(settings or ())
    if method is not None and "=" in method:  # the methods are named in the file
        texts.insert(0, method)
        method = None
    flags: dict[str, Any] = {"model": model, "data.train": data, "reference": reference, "value": value}
    flags |= {"data.validation": validation, "tokenizer": tokenizer, "lora": lora, "dtype": dtype, "device": device}
    flags |= {"data.limit": limit}
    if count < 2:
        raise ConfigError("--count 1: an interval over prompts needs two prompts at least.")
    result = run_command(
        Request(
            method,
            texts,
            config,
            flags,
            out,
            reward,
            gold,
            prompts,
            count,
            samples,
            seed,
            axes,
            checkpoints,
            jobs,
            verbose and not as_json,
            as_json,
        )
    )
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, default=str))
    if any(run["state"] == "failed" for run in result["runs"]):
        raise typer.Exit(1)
