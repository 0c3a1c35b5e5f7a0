"""A run's folder: made once, resumed by the same settings, never shared by two runs.

``config.yaml`` says whose folder it is. The folder of other settings is refused, with what differs. ``card.md`` is
written last, so a folder with a card is a finished run.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from palate.config import RunConfig
from palate.errors import RunError
from palate.settings_tree import flatten

State = Literal["new", "unfinished", "finished"]

# What may change between two starts of one run: it changes no number.
FREE = ("out", "name", "trackers", "training.keep_last")


def open_run(config: RunConfig, unresolved: Collection[str] = ()) -> State:
    """Look at ``config.out``, and make it where it is not there (only when nothing is unresolved).

    Args:
        config: resolved, so that the same command gives the same settings every time.
        unresolved: keys that are still to be filled in, and are not compared.
    Raises:
        RunError: the folder holds another run (the message lists what differs), or something that is no run.
    """
    folder = config.out
    settings = folder / "config.yaml"
    if settings.exists():
        found = differences(read_settings(settings), config.to_dict(), but=unresolved)
        if found:
            raise RunError(
                f"{folder}: this folder holds a run with other settings:\n  "
                + "\n  ".join(found)
                + "\nGive the settings it was started with to resume it, or another --out for a new run."
            )
        return "finished" if (folder / "card.md").exists() else "unfinished"
    if folder.exists() and (not folder.is_dir() or any(p.name != ".config.yaml.tmp" for p in folder.iterdir())):
        raise RunError(f"{folder}: exists, and is not the folder of a run (it has no config.yaml). Give another --out.")
    if unresolved:
        return "new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(settings, config.to_yaml())
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    return "new"


def read_settings(path: Path) -> dict[str, Any]:
    """A run's ``config.yaml`` as nested values."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise RunError(f"{path}: is not a run's settings. Move the folder away, or give another --out.")
    return values


def differences(there: Mapping[str, Any], here: Mapping[str, Any], but: Collection[str] = ()) -> list[str]:
    """One readable line for each setting that is not the same; those that change no number are left out."""
    old, new = flatten(there), flatten(here)
    lines = []
    for key in dict.fromkeys([*old, *new]):
        if key not in FREE and key not in but and old.get(key) != new.get(key):
            lines.append(f"{key}: {_shown(old, key)} there, {_shown(new, key)} here")
    return lines


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not set"


def write_text(path: Path, text: str) -> None:
    """Write a small file beside its place and rename it, so that it is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
