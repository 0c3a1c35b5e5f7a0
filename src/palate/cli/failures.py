"""What a person can repair, said in one message on standard error; anything else is a bug and shows where it is."""

from __future__ import annotations

import errno
import shlex
import sqlite3
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from palate.errors import ConfigError, PalateError

_RESUMABLE = ("train", "run", "sweep")
_WITH_A_STORE = ("label", "sample")
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # no bug of anybody's


class Terminated(KeyboardInterrupt):
    """SIGTERM: what a cluster sends before it takes a machine away."""


class Commands(TyperGroup):
    """A group whose commands fail with a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        warnings.showwarning = _said(warnings.showwarning)
        try:
            return super().invoke(ctx)
        except PalateError as error:
            typer.echo(f"palate: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
        except sqlite3.OperationalError as error:
            if ctx.invoked_subcommand not in _WITH_A_STORE or not _of_the_file(error):
                raise
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
            message = "\nTerminated." if isinstance(stopped, Terminated) else "\nInterrupted."
            if ctx.invoked_subcommand in _RESUMABLE or sys.argv[1:2] and sys.argv[1] in _RESUMABLE:
                message += f" The same command resumes where it stopped:\n    {shlex.join(['palate', *sys.argv[1:]])}"
            typer.echo(message, err=True)
            raise typer.Exit(143 if isinstance(stopped, Terminated) else 130) from None


def _of_the_file(error: sqlite3.OperationalError) -> bool:
    """Is it the file, its lock or its disk? SQL that SQLite does not take has the same class, and is a bug."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)  # its low byte; the others say more of the same
    return code & 0xFF != sqlite3.SQLITE_ERROR


def _said(otherwise: Any) -> Any:
    """``warnings.showwarning`` that says what is meant for the user as a sentence, without a line of source."""

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if category is UserWarning:
            typer.echo(f"palate: {message}", err=True)
        else:
            otherwise(message, category, *place, **more)

    return show
