"""Where palate keeps for later runs what is dear to compute, and how much of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

_ABANDONED = 3600.0  # seconds after which a file that was begun belongs to a process that was killed


def cache_folder(setting: str, room: str) -> Path | None:
    """The folder of one kind of thing, or None for "off".

    Args:
        setting: a folder, "off", or "auto" = ``$PALATE_CACHE/ROOM``, else ``$XDG_CACHE_HOME/palate/ROOM``, else
            ``~/.cache/palate/ROOM``.
        room: the kind's name: "reference", "tokens".
    """
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting).expanduser()
    own, shared = os.environ.get("PALATE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    base = Path(own) if own else Path(shared or "~/.cache") / "palate"
    return base.expanduser() / room


def keep_within(folder: Path, pattern: str, most_bytes: int) -> None:
    """Remove the files that were used longest ago until the rest is within bounds; another process may do so too."""
    found = []
    for path in folder.glob(pattern):
        try:
            about = path.stat()
        except OSError:  # another process removed it
            continue
        found.append((about.st_mtime, about.st_size, path))
    held = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if held <= most_bytes:
            break
        path.unlink(missing_ok=True)
        held -= size
    for path in folder.glob(f".{pattern}.*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)
        except OSError:
            continue
