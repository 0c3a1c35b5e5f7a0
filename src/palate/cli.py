"""The command line. Reads arguments, calls ``palate.api``, prints; everything heavy is imported inside the commands.

Exit codes: 0 done, 1 failed, 2 the command or a setting is wrong, 130 interrupted, 143 terminated. Messages go to
standard error; what a program might read goes to standard output, as JSON with ``--json``.
"""

from __future__ import annotations

import errno
import json
import shlex
import signal
import sqlite3
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from palate.cli_arena import register as register_arena
from palate.cli_feedback import register, sample_candidates
from palate.cli_label import label
from palate.cli_soup import soup
from palate.cli_sweep import sweep
from palate.errors import ConfigError, PalateError

_RESUMABLE = ("train", "run", "sweep")
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # no bug of anybody's


class _Commands(TyperGroup):
    """Turns what a user can repair into one message on standard error."""

    def invoke(self, ctx: Any) -> Any:
        warnings.showwarning = _said(warnings.showwarning)
        try:
            return super().invoke(ctx)
        except PalateError as error:
            typer.echo(f"palate: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
        except sqlite3.OperationalError as error:
            from palate.feedback.store import file_trouble

            typer.echo(f"palate: the store of feedback: {file_trouble(error)}", err=True)
            raise typer.Exit(1) from None
        except OSError as error:
            if error.errno not in _OF_THE_MACHINE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            typer.echo(
                f"palate: {where}{error.strerror}. Free some space or choose another place, then try again.", err=True
            )
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stopped:
            message = "\nTerminated." if isinstance(stopped, _Terminated) else "\nInterrupted."
            if ctx.invoked_subcommand in _RESUMABLE or sys.argv[1:2] and sys.argv[1] in _RESUMABLE:
                message += f" The same command resumes where it stopped:\n    {shlex.join(['palate', *sys.argv[1:]])}"
            typer.echo(message, err=True)
            raise typer.Exit(143 if isinstance(stopped, _Terminated) else 130) from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what a cluster sends before it takes a machine away."""


def _terminate(*_: Any) -> None:
    raise _Terminated


def _said(otherwise: Any) -> Any:
    """``warnings.showwarning`` that says what is meant for the user as a sentence, without a line of source."""

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if category is UserWarning:
            typer.echo(f"palate: {message}", err=True)
        else:
            otherwise(message, category, *place, **more)

    return show


app = typer.Typer(
    cls=_Commands,
    help="Teach a language model people's taste: SFT, reward models, PPO, from your records to a plain model folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option("--model", "-m", help="Folder or hub name.")]
DTYPE = typer.Option("--dtype", help="float32, bfloat16, or mixed.")
DEVICE = typer.Option("--device", help='"cpu", "cuda", or "auto".')
Template = Annotated[
    str | None, typer.Option("--chat-template", help='"none", "default", Jinja text or a file; else the model\'s own.')
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Format = Annotated[str, typer.Option("--format", help="Shape of the records; found out by itself unless named.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Read at most so many records.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same samples.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)]
Force = Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")]


def _version(value: bool) -> None:
    if value:
        from palate import __version__

        typer.echo(f"palate {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    method: Annotated[str | None, typer.Argument(help="reward, ppo, my_package.my_method; see: palate methods")] = None,
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML settings file.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="What is trained: folder or hub name.")] = None,
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
    validation: Annotated[str | None, typer.Option("--validation", help="Held-out records; default: a share.")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Folder or hub name; default: MODEL's.")] = None,
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

    texts = list(overrides or ())
    if method is not None and "=" in method:  # METHOD comes from the file, and this is the first override
        texts.insert(0, method)
        method = None
    flags: dict[str, Any] = {
        "model": model,
        "data.train": data,
        "out": out,
        "reward": reward,
        "reference": reference,
        "value": value,
    }
    flags |= {"data.validation": validation, "tokenizer": tokenizer, "lora": lora, "dtype": dtype, "device": device}
    flags |= {"seed": seed, "data.limit": limit}
    settings = load_config(method, file=config, flags=flags, overrides=texts)
    folder = run_stage(settings, quiet=quiet or as_json)
    if as_json:
        _print_json({"out": str(folder), "model": str(folder / "model"), "metrics": _last_metrics(folder)})


def _last_metrics(folder: Path) -> dict[str, Any]:
    """The last line of each split of metrics.jsonl."""
    last: dict[str, Any] = {}
    with open(folder / "metrics.jsonl", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            last[record.get("split", "train")] = record
    return last


@app.command()
def sample(
    model: Annotated[list[str], typer.Option("--model", "-m", help="Folder or hub name; with --k may be repeated.")],
    data: Annotated[str | None, typer.Option("--data", "-d", help="Prompts: file, hub name, or - for stdin.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="JSONL file, or - for standard output.")] = "-",
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Responses for each prompt.")] = 1,
    k: Annotated[
        int | None, typer.Option("--k", min=1, max=9, help="Different responses for each prompt, to be judged.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="With --k: put them into this store of feedback.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Of a store that is made: YAML file or template.")
    ] = None,
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
    overwrite: Force = False,
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
    if k is not None or store is not None:
        if samples != 1:
            raise ConfigError("--samples counts every response, --k different ones. Give one of them.")
        if engine != "embedded":
            raise ConfigError("--k draws with the embedded sampler. Leave --engine out.")
        sample_candidates(
            model,
            prompts,
            out,
            store=store,
            task=task,
            k=4 if k is None else k,
            temperatures=temperature,
            decoding=decoding,
            seed=seed,
            chat_template=chat_template,
            dtype=dtype,
            device=device,
            overwrite=overwrite,
            as_json=as_json,
        )
        return
    if len(model) != 1 or "," in temperature or as_json or task is not None:
        raise ConfigError("several models or temperatures, --task and --json go with --k.")
    records = sample_records(
        model[0],
        prompts,
        decoding=decoding | {"temperature": _number(temperature)},
        samples_per_prompt=samples,
        seed=seed,
        chat_template=chat_template,
        dtype=dtype,
        device=device,
        engine=engine,
        progress=_progress("sampling"),
    )
    write_lines(out, records, overwrite=overwrite)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"temperature {text!r}: expected a number >= 0.") from None


@app.command()
def score(
    reward: Annotated[
        str,
        typer.Option(
            "--model", "-m", "--reward", help='Reward folder, module:function, "{check: number}", .yaml file.'
        ),
    ],
    data: Annotated[str, typer.Option("--data", "-d", help="prompt+response, comparisons, rankings, or -.")] = "-",
    out: Annotated[str, typer.Option("--out", "-o", help="JSONL file, or - for standard output.")] = "-",
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="For rewards that have none of their own.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and response.")] = None,
    limit: Limit = None,
    format: Format = "auto",
    chat_template: Template = None,
    dtype: Annotated[str, DTYPE] = "float32",
    device: Annotated[str, DEVICE] = "auto",
    overwrite: Force = False,
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
        progress=_progress("scoring"),
    )
    write_lines(out, scored.lines, overwrite=overwrite)
    if scored.accuracy is not None:
        typer.echo(f"accuracy {scored.accuracy:.4f} over {scored.pairs} pairs (ties count 1/2)", err=True)


@app.command()
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


@app.command()
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
        _print_json(result)


app.command()(sweep)
app.command()(soup)


@app.command()
def explain(
    method: Annotated[str, typer.Argument(help="reward, ppo, my_package.my_method; see: palate methods")],
    every: Annotated[bool, typer.Option("--all", help="Also the settings that all methods share.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Explain a method: the paper's equations, its roles and data, and every setting with its default."""
    from palate.api import explain as explanation_of

    found = explanation_of(method)
    shared = _shared_settings() if every else {}
    if as_json:
        listed = {section: [setting.to_dict() for setting in settings] for section, settings in shared.items()}
        _print_json(found.to_dict() | ({"shared": listed} if every else {}))
    else:
        from palate.console import print_explanation

        print_explanation(found, shared)


def _shared_settings() -> dict[str, Any]:
    from palate.config import shared_settings

    return shared_settings()


@app.command()
def methods(
    reads: Annotated[str | None, typer.Option("--reads", help="Only those that read this kind of records.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Only those that can read this file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the methods: paper, roles, data. To choose one: docs/choose.md."""
    from palate.api import explain as explanation_of
    from palate.lookup import method_names

    kinds = _kinds(reads, data)
    found = [each for each in map(explanation_of, method_names()) if kinds is None or each.reads in kinds]
    if data is not None:
        names = ", ".join(kinds or ()) or "no kind of records that palate knows"
        typer.echo(f"{data} can be read as {names}", err=True)
    if as_json:
        _print_json([{k: v for k, v in each.to_dict().items() if k not in ("text", "settings")} for each in found])
    else:
        from palate.console import print_methods

        print_methods(found)


def _kinds(reads: str | None, data: str | None) -> list[str] | None:
    """The kinds of records that were asked for; None = all."""
    if reads is None and data is None:
        return None
    from palate.data.formats.detect import check_kind
    from palate.stage.records import kinds_of

    if reads is not None:
        check_kind(reads)
    found = [reads] if reads is not None else []
    return found if data is None else [kind for kind in kinds_of(data) if reads in (None, kind)]


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Records in a public shape: file, or - for standard input.")],
    target: Annotated[str, typer.Argument(help="palate's own JSONL: file, or - for standard output.")] = "-",
    from_format: Annotated[
        str, typer.Option("--from", help="trl, openai, sharegpt, alpaca, hh_rlhf, ...; ratings; or auto.")
    ] = "auto",
    kind: Annotated[
        str,
        typer.Option(
            "--kind", "-k", help="demonstrations, prompts, comparisons, corrections, rankings, or judgements."
        ),
    ] = "demonstrations",
    top: Annotated[int, typer.Option(min=1, help="Rankings to judgements: the best so many are desirable.")] = 1,
    bottom: Annotated[int, typer.Option(min=1, help="And the worst so many are undesirable.")] = 1,
    good: Annotated[float | None, typer.Option(help="Ratings to judgements: desirable from here up.")] = None,
    bad: Annotated[float | None, typer.Option(help="And undesirable from here down.")] = None,
) -> None:
    """Convert records of a public shape to palate's own JSONL, or records of one kind to another.

    palate convert d.json demonstrations.jsonl --from sharegpt --kind demonstrations

    Rankings and comparisons become judgements by --kind judgements (best and
    worst); ratings ({"prompt", "response", "rating"}) rankings by --from
    ratings --kind rankings, judgements by --from ratings --kind judgements
    --good 4 --bad 2.
    """
    if from_format == "ratings":
        from palate.data.ratings import convert_ratings

        report = convert_ratings(source, target, kind, good=good, bad=bad)
    elif good is not None or bad is not None:
        raise ConfigError("--good and --bad are for ratings. Give --from ratings.")
    else:
        from palate.data.derive import convert_between

        report = convert_between(source, target, from_format, kind, top=top, bottom=bottom)
    typer.echo(str(report), err=True)


@app.command()
def check(
    model: Model,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Records to look at.")] = None,
    kind: Annotated[str, typer.Option("--kind", "-k", help="What the records are.")] = "demonstrations",
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Records to show token by token.")] = 3,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and response.")] = None,
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
        _print_json(found.to_dict())
    else:
        from palate.console import print_check

        print_check(found)
    if found.findings:
        raise typer.Exit(1)


register(label)
register_arena(label)
app.add_typer(label, name="label")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, default=str))


def _progress(what: str) -> Any:
    """A line on standard error with rate and ETA, where somebody looks at it."""
    if not sys.stderr.isatty():
        return None
    from palate.console import progress_line

    return progress_line(what)


def main() -> None:
    """The ``palate`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="palate")
