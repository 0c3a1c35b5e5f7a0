"""What the commands print: JSON on standard output, progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import typer


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, default=str))


def progress(what: str) -> Callable[[int, int], None] | None:
    """A line on standard error with rate and time left, where somebody looks at it."""
    if not sys.stderr.isatty():
        return None
    from palate.console import progress_line

    return progress_line(what)
