"""``palate label``: collecting people's feedback. What the commands do is in ``palate.feedback`` and ``palate.server``."""

from __future__ import annotations

from collections.abc import Callable

import typer

from palate.cli.label import annotators, arena, export, filling, planning, serving, simulate, upkeep

label = typer.Typer(
    help="Collect people's feedback: a store, a page to answer on, records for training.", no_args_is_help=True
)
COMMANDS: dict[str, Callable[..., None]] = {
    "init": filling.init,
    "import": filling.import_,
    "templates": filling.templates,
    "serve": serving.serve,
    "status": upkeep.status,
    "verify": upkeep.verify,
    "backup": upkeep.backup,
    "merge": upkeep.merge,
    "export": export.export,
    "simulate": simulate.simulate,
    "plan": planning.plan,
    "next": planning.next_,
    "arena": arena.arena,
    "chat": arena.chat,
    "arena-table": arena.arena_table,
}
for name, command in COMMANDS.items():  # in the order of palate label --help
    label.command(name)(command)
label.add_typer(annotators.annotators, name="annotators")
