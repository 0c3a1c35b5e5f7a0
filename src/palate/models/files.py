"""Files of a model: in its folder, or in the hub's cache."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from palate.errors import ModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def file_of(place: str | Path, name: str) -> Path | None:
    """A file of a folder or hub name, or None when it has none of that name."""
    if Path(place).is_dir():
        return Path(place, name) if Path(place, name).is_file() else None
    from transformers.utils import cached_file

    with contextlib.suppress(OSError):
        path = cached_file(str(place), name)
        return Path(path) if path else None
    return None


def weight_files(place: str | Path) -> list[Path]:
    """The safetensors files of a whole model, or none; one that only the index knows is named all the same.

    Raises:
        ModelError: the index cannot be read.
    """
    whole = file_of(place, WEIGHTS)
    if whole is not None:
        return [whole]
    index = file_of(place, INDEX)
    if index is None:
        return []
    shards = sorted(set(read_json(index)["weight_map"].values()))
    return [file_of(place, shard) or Path(place, shard) for shard in shards]


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ModelError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}). Save the model again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: one JSON object was expected. Save the model again.")
    return found
