"""What a run is trained on, as numbers that show a change: a resumed run must see the records it was started with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.data.collate import Item
from palate.errors import RunError
from palate.run_folder import write_text

FILE = "data.json"


def check_data(folder: Path, sides: Mapping[str, Sequence[Item]]) -> None:
    """Note the items of a new run in its folder; refuse those of an unfinished run that are not what they were.

    Args:
        folder: the run's.
        sides: "train", "validation", ... and their items, as they are trained on: another tokenizer or chat template
            shows too.
    Raises:
        RunError: an item was added, removed or changed since the run was started.
    """
    path = folder / FILE
    here = {name: {"items": len(items), "sha256": _digest(items)} for name, items in sides.items()}
    if not path.exists():
        write_text(path, json.dumps(here, indent=1) + "\n")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    changed = [_line(name, there.get(name), found) for name, found in here.items() if there.get(name) != found]
    if changed:
        raise RunError(
            f"{folder}: the data changed since this run was started:\n  "
            + "\n  ".join(changed)
            + "\nResumed with it, the run would be neither the old one nor a new one. Put the old records (and "
            "tokenizer) back, or give another --out for a new run."
        )


def _line(name: str, there: Mapping[str, Any] | None, here: Mapping[str, Any]) -> str:
    before = there["items"] if there else 0
    if before == here["items"]:
        return f"{name}: {before:,} prompts as before, but not the same tokens or fields"
    return f"{name}: {before:,} prompts then, {here['items']:,} now"


def _digest(items: Sequence[Item]) -> str:
    """A hash of everything that training reads of the items; where they were read from is not part of it."""
    found = hashlib.sha256()
    for item in items:
        for row in item.rows:
            for numbers in (row.ids, row.response_mask):
                found.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
        fields = getattr(item.record, "fields", None)
        found.update(repr((item.pairs, item.ranks, item.desirable)).encode())
        found.update(json.dumps(dict(fields or {}), sort_keys=True, default=repr).encode())
    return found.hexdigest()
