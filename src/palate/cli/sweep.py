"""``palate sweep``: reads arguments, calls ``palate.pipelines.sweep``, prints; heavy things are imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from palate.cli.options import DEVICE, DTYPE, JsonFlag, Limit, Tokenizer, Trained, Validation, method_and_settings
from palate.cli.output import print_json
from palate.errors import ConfigError


def sweep(
    method: Annotated[str | None, typer.Argument(help="A method, or several: dpo,ipo,simpo.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="key=value,value ...; one value: the same in every run.", show_default=False),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML settings file of all runs.")] = None,
    model: Trained = None,
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
    validation: Validation = None,
    tokenizer: Tokenizer = None,
    lora: Annotated[bool | None, typer.Option("--lora/--no-lora", help="Train adapters.", show_default=False)] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    device: Annotated[str | None, DEVICE] = None,
    limit: Limit = None,
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
    as_json: JsonFlag = False,
) -> None:
    """Run a method with many settings, and draw what each earned for the distance it went.

    palate sweep dpo beta=0.05,0.1,0.5 --model M --data D --reward R

    Every combination is an ordinary run in OUT/NAME. The same command goes on
    where it stopped. Exit code 1 when a run failed; the others are done all the
    same.
    """
    from palate.pipelines.sweep.command import Request, run_command
    from palate.pipelines.sweep.run import Measuring

    method, texts = method_and_settings(method, settings)
    flags: dict[str, Any] = {"model": model, "data.train": data, "reference": reference, "value": value}
    flags |= {"data.validation": validation, "tokenizer": tokenizer, "lora": lora, "dtype": dtype, "device": device}
    flags |= {"data.limit": limit}
    if count < 2:
        raise ConfigError("--count 1: an interval over prompts needs two prompts at least.")
    measuring = Measuring(reward, gold, prompts, count, samples, seed, checkpoints)
    talks = verbose and not as_json
    request = Request(method, texts, config, flags, out, measuring, axes, jobs, verbose=talks, silent=as_json)
    result = run_command(request)
    if as_json:
        print_json(result)
    if any(run["state"] == "failed" for run in result["runs"]):
        raise typer.Exit(1)
