"""``palate train`` and ``palate run``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from palate.cli.options import (
    DEVICE,
    DTYPE,
    METHOD,
    JsonFlag,
    Limit,
    Overrides,
    Tokenizer,
    Trained,
    Validation,
    method_and_settings,
)
from palate.cli.output import print_json


def train(
    method: Annotated[str | None, METHOD] = None,
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML settings file.")] = None,
    model: Trained = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Training records: file, folder, hub name, -.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="The run's folder.")] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", help='Folder, module:function, "{check: number}", .yaml file.')
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Frozen reference; default: MODEL itself.")
    ] = None,
    value: Annotated[str | None, typer.Option("--value", help="Start of the value model; default: REWARD.")] = None,
    validation: Validation = None,
    tokenizer: Tokenizer = None,
    lora: Annotated[bool | None, typer.Option("--lora/--no-lora", help="Train an adapter.", show_default=False)] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    device: Annotated[str | None, DEVICE] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    limit: Limit = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a model with one method; the same command on an unfinished run resumes it.

    palate train reward --model M --data D --out runs/reward training.learning_rate=1e-5

    Any setting can follow as section.key=value: palate explain METHOD --all
    lists them. What wins: override > flag > --config file > the method's
    defaults.
    """
    from palate.config import load_config
    from palate.stage import run_stage

    method, texts = method_and_settings(method, overrides)
    flags: dict[str, Any] = {"model": model, "data.train": data, "out": out, "reward": reward, "reference": reference}
    flags |= {"value": value, "data.validation": validation, "tokenizer": tokenizer, "lora": lora, "dtype": dtype}
    flags |= {"device": device, "seed": seed, "data.limit": limit}
    settings = load_config(method, file=config, flags=flags, overrides=texts)
    folder = run_stage(settings, quiet=quiet or as_json)
    if as_json:
        print_json({"out": str(folder), "model": str(folder / "model"), "metrics": _last_metrics(folder)})


def _last_metrics(folder: Path) -> dict[str, Any]:
    """The last line of each split of metrics.jsonl."""
    last: dict[str, Any] = {}
    with open(folder / "metrics.jsonl", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            last[record.get("split", "train")] = record
    return last


def run(
    pipeline: Annotated[str, typer.Argument(help="A pipeline's YAML file, or the name of a built-in one: quickstart.")],
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder of the whole run.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a pipeline, stage by stage; finished stages are kept, the same command resumes."""
    from palate import api

    result = api.run(pipeline, out=out, overrides=list(overrides or ()))
    if as_json:
        print_json(result)
