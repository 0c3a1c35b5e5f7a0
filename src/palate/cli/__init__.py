"""The command line. Reads arguments, calls what does the work, prints; everything heavy is imported inside the commands.

Exit codes: 0 done, 1 failed, 2 the command or a setting is wrong, 130 interrupted, 143 terminated. Messages go to
standard error; what a program might read goes to standard output, as JSON with ``--json``.
"""

from __future__ import annotations

import signal
from typing import Annotated, Any

import typer

from palate.cli import convert, label, methods, sample, soup, sweep, texts, training
from palate.cli.failures import Commands, Terminated

app = typer.Typer(
    cls=Commands,
    help="Teach a language model people's taste: SFT, reward models, PPO, from your records to a plain model folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    training.train,
    sample.sample,
    texts.score,
    texts.chat,
    training.run,
    sweep.sweep,
    soup.soup,
    methods.explain,
    methods.methods,
    convert.convert,
    texts.check,
)
for command in COMMANDS:  # in the order of palate --help
    app.command()(command)
app.add_typer(label.label, name="label")


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


def main() -> None:
    """The ``palate`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="palate")


def _terminate(*_: Any) -> None:
    raise Terminated
