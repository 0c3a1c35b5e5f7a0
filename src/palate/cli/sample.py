"""``palate sample``: responses, or with ``--k`` different ones for people to judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate.cli.label.stores import task_of
from palate.cli.options import DEVICE, DTYPE, Format, JsonFlag, Limit, Out, Overwrite, Seed, Template, numbers
from palate.cli.output import print_json, progress
from palate.errors import ConfigError

if TYPE_CHECKING:
    from palate.texts.candidates import Plan

Different = Annotated[
    int | None, typer.Option("--k", min=1, max=9, help="Different responses for each prompt, to be judged.")
]
IntoStore = Annotated[Path | None, typer.Option("--store", help="With --k: put them into this store of feedback.")]
Task = Annotated[str | None, typer.Option("--task", "-t", help="Of a store that is made: YAML file or template.")]


def sample(
    model: Annotated[list[str], typer.Option("--model", "-m", help="Folder or hub name; with --k may be repeated.")],
    data: Annotated[str | None, typer.Option("--data", "-d", help="Prompts: file, hub name, or - for stdin.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    out: Out = "-",
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Responses for each prompt.")] = 1,
    k: Different = None,
    store: IntoStore = None,
    task: Task = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    min_new_tokens: Annotated[int, typer.Option(min=0)] = 0,
    temperature: Annotated[str, typer.Option(help="0 = greedy. With --k several: 0.7,1.0.")] = "1.0",
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 = all tokens.")] = 0,
    seed: Seed = 0,
    limit: Limit = None,
    format: Format = "auto",
    chat_template: Template = None,
    dtype: Annotated[str, DTYPE] = "float32",
    device: Annotated[str, DEVICE] = "auto",
    engine: Annotated[str, typer.Option("--engine", help="embedded, or vllm (optional package).")] = "embedded",
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Sample responses: one JSON line {"prompt", "response", "finished"} for each, in the order of the prompts.

    With --k: so many different responses to each prompt, from one model or
    several, each with its origin, for people to judge: {"prompt", "responses",
    "sources"} lines, or items of a --store. The same command resumes.
    """
    from palate.texts import check_target, read_prompts, sample_records, write_lines

    if (data is None) == (not prompt):
        raise ConfigError("give prompts by --data FILE (or -) or by --prompt TEXT, and not both.")
    if store is None:
        check_target(out, overwrite=overwrite)
    prompts: list[Any] = list(prompt or ()) or read_prompts(str(data), format=format, limit=limit)
    decoding: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    decoding |= {"top_p": top_p, "top_k": top_k}
    loading: dict[str, Any] = {"seed": seed, "chat_template": chat_template, "dtype": dtype, "device": device}
    if k is not None or store is not None:
        from palate.texts.candidates import Plan

        _check_different(samples, engine, out, store, as_json)
        plan = Plan(model, _temperatures(temperature), 4 if k is None else k, decoding, **loading)
        _sample_different(plan, prompts, out, store=store, task=task, overwrite=overwrite, as_json=as_json)
        return
    if len(model) != 1 or "," in temperature or as_json or task is not None:
        raise ConfigError("several models or temperatures, --task and --json go with --k.")
    records = sample_records(
        model[0],
        prompts,
        decoding=decoding | {"temperature": _temperature(temperature)},
        samples_per_prompt=samples,
        engine=engine,
        progress=progress("sampling"),
        **loading,
    )
    write_lines(out, records, overwrite=overwrite)


def _check_different(samples: int, engine: str, out: str, store: Path | None, as_json: bool) -> None:
    """What does not go with --k."""
    if samples != 1:
        raise ConfigError("--samples counts every response, --k different ones. Give one of them.")
    if engine != "embedded":
        raise ConfigError("--k draws with the embedded sampler. Leave --engine out.")
    if store is not None and out != "-":
        raise ConfigError("responses go to --store or to --out, not to both.")
    if as_json and store is None and out == "-":
        raise ConfigError("--json prints counts on standard output, where the responses go. Name a file with --out.")


def _sample_different(
    plan: Plan, prompts: list[Any], out: str, *, store: Path | None, task: str | None, overwrite: bool, as_json: bool
) -> None:
    """Different responses to each prompt, into a file or a store."""
    from dataclasses import asdict

    from palate.feedback.store import Store
    from palate.texts.candidates import sample_to_file, sample_to_store

    if store is not None:
        made = sample_to_store(
            store, plan, prompts, make=lambda: Store.create(store, task_of(task)), progress=progress("sampling")
        )
    else:
        made = sample_to_file(out, plan, prompts, overwrite=overwrite, progress=progress("sampling"))
    where = str(store or out)
    if as_json:
        print_json({"out": where, **asdict(made)})
    else:
        typer.echo(f"{where}: {made}", err=True)


def _temperature(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"temperature {text!r}: expected a number >= 0.") from None


def _temperatures(text: str) -> list[float]:
    return numbers(text, f"temperature {text!r}: expected numbers with commas between them, e.g. 0.7,1.0.")
