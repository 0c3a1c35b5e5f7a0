"""A run's folder: made once, resumed by the same settings, never shared by two runs, and never written by two processes at once.

``config.yaml`` says whose folder it is. The folder of other settings is refused, with what differs. ``card.md`` is
written last, so a folder with a card is a finished run.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

import yaml

from palate.config import RunConfig
from palate.errors import RunError
from palate.settings_tree import flatten

State = Literal["new", "unfinished", "finished"]

# What may change between two starts of one run: it changes no number.
FREE = ("out", "name", "trackers", "training.keep_last", "data.cache", "offload")
LOCK = ".lock"


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
                + (
                    ""
                    if _begun(folder)
                    else f" It has no checkpoint yet: nothing is lost with it if you remove {folder}."
                )
            )
        return "finished" if (folder / "card.md").exists() else "unfinished"
    if folder.exists() and (
        not folder.is_dir() or any(p.name not in (".config.yaml.tmp", LOCK) for p in folder.iterdir())
    ):
        raise RunError(f"{folder}: exists, and is not the folder of a run (it has no config.yaml). Give another --out.")
    if unresolved:
        return "new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made: {error.strerror or error}. Give another --out.") from error
    write_text(settings, config.to_yaml())
    return "new"


def _begun(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a run's folder for this process; the kernel lets go of it when the process ends, however it ends.

    Raises:
        RunError: another process is training in this folder (the message has its number).
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: two processes at once are the user's care there
        yield
        return
    path = folder / LOCK
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = path.read_text(encoding="utf-8").strip() or "unknown"
            raise RunError(
                f"{folder}: another process (number {number}) is training in this folder. Wait for it or stop it, then "
                "give the same command to resume; or give another --out."
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _opened(path: Path) -> TextIO:
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}.") from error


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
    """Write a small file beside its place and rename it, so that it is whole or not there.

    Raises:
        RunError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}.") from error
