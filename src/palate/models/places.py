"""Where a model is, a folder or a hub name, and what is said when it is not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from palate.errors import ModelError
from palate.models.adapters import ADAPTER_CONFIG
from palate.models.quiet import first_line, quiet


def place_of(where: str | Path) -> str:
    """An absolute folder, or a hub name as it is."""
    path = Path(where).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_file():
        raise ModelError(f"{where}: this is a file; the folder of a model was expected: {path.parent}")
    text = str(where)
    if text.startswith(("/", ".", "~")) or text.count("/") > 1 or not text:
        raise ModelError(f"{where}: there is no such folder. Expected: a model folder or a hub name (owner/name).")
    return text


def adapter_base(place: str, adapter: Mapping[str, Any]) -> str:
    """Where the base of an adapter is."""
    base = adapter.get("base_model_name_or_path") or ""
    if not base:
        raise ModelError(
            f'{place}: its {ADAPTER_CONFIG} names no base model. Write the base\'s folder into "base_model_name_or_path".'
        )
    try:
        return place_of(base)
    except ModelError as error:
        raise ModelError(
            f"{place}: the base of this adapter, {base}, is not there. If it was moved, write its new place into "
            f'"base_model_name_or_path" of {ADAPTER_CONFIG}.'
        ) from error


def config_of(place: str) -> Any:
    """The config of a model, as transformers reads it."""
    from transformers import AutoConfig

    folder = Path(place)
    if folder.is_dir() and not (folder / "config.json").exists():
        refuse_run_folder(place)
        raise ModelError(
            f"{place}: not a model folder: it has no config.json. Found: {listing(place)}. Expected a folder saved by "
            "save_pretrained."
        )
    try:
        with quiet():
            return AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{place}: its config cannot be read. {first_line(error)}{hub_hint(place)}") from error


def refuse_run_folder(place: str) -> None:
    """A folder without a model, in which there is the folder of one."""
    for name in ("model", "checkpoint"):
        if any((Path(place) / name / file).exists() for file in ("config.json", ADAPTER_CONFIG)):
            raise ModelError(f"{place}: not a model folder, but it holds one. Did you mean {Path(place) / name}?")


def is_classifier(architectures: Iterable[str] | None) -> bool:
    """Do a config's architectures say that it is a reward model or another classifier?"""
    return any(str(name).endswith("ForSequenceClassification") for name in architectures or ())


def listing(place: str) -> str:
    """What a folder holds, for an error."""
    names = sorted(p.name for p in Path(place).iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def hub_hint(place: str) -> str:
    """What else may be wrong with a name that is no folder."""
    if Path(place).is_dir():
        return ""
    return f" There is no folder {place} here, so it was looked for on the model hub: check the name and the network."
