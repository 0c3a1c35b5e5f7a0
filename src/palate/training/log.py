"""Append-only JSONL files of a run, which can be cut back to where a checkpoint was made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palate.errors import RunError

FILES = ("metrics.jsonl", "samples.jsonl", "alarms.jsonl")


def append(folder: Path, name: str, *entries: Mapping[str, Any]) -> None:
    """One JSON object a line; handed to the operating system before returning.

    Raises:
        RunError: the disk is full or the folder not writable.
    """
    if entries:
        text = "".join(json.dumps(entry, ensure_ascii=False, allow_nan=True) + "\n" for entry in entries)
        try:
            with open(folder / name, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise RunError(
                f"{folder / name} cannot be written ({error}). Free some space and give the same command to go on from "
                "the last checkpoint."
            ) from error


def sizes(folder: Path) -> dict[str, int]:
    """Bytes written to each file so far."""
    return {name: (folder / name).stat().st_size if (folder / name).exists() else 0 for name in FILES}


def cut_back(folder: Path, wanted: Mapping[str, int]) -> None:
    """Forget what was written after ``wanted`` was taken: lines of a run that was killed between checkpoints."""
    for name, size in wanted.items():
        path = folder / name
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)


def keep_before(folder: Path, name: str, step: int) -> None:
    """Forget the entries from ``step`` on, and a last line that was cut short by a kill."""
    if (folder / name).exists():
        beside = folder / f".{name}.tmp"
        beside.write_text("", encoding="utf-8")
        append(folder, beside.name, *(entry for entry in read(folder, name) if entry["step"] < step))
        beside.replace(folder / name)


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """All entries; a last line that was cut short by a kill is left out."""
    path = folder / name
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            entries.append(json.loads(line))
    return entries
