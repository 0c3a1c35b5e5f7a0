"""Models out: a folder that plain transformers (or peft) loads, written beside its place and then renamed into it.

A crash or a full disk leaves what was there before; a half-written folder never carries the final name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from palate.errors import PalateError, RunError
from palate.models import adapters
from palate.models.heads import HEAD_NAMES, base_of, normalisation
from palate.models.precision import exact_weights
from palate.models.quiet import quiet


def save_model(
    model: nn.Module,
    tokenizer: Any,
    folder: str | Path,
    *,
    overwrite: bool = False,
    merge_adapter: bool = False,
    stop_token_ids: Sequence[int] = (),
) -> None:
    """Write model and tokenizer, with chat template, as one folder.

    A plain model becomes a Hugging Face folder; its generation config names the ids that end a text. A peft model
    becomes a PEFT adapter folder (a scalar model's with head and normalisation), unless its base is nowhere on disk
    (made from scratch, or with an earlier adapter merged into it) or ``merge_adapter`` is set: then the sum of base and
    adapter is written as a whole Hugging Face folder. So is a value head on an adapted policy.

    A scalar model's config gets a pad id that is no stop token, because plain ``AutoModelForSequenceClassification``
    reads "the last token that is not padding"; where the tokenizer has none to spare it gets none, and transformers then
    refuses padded batches instead of scoring the token before the end.

    The weights are written in the type that they are held in; those with a float32 master (``precision.py``) as it.

    Args:
        folder: written to ``.<name>.saving`` beside it and renamed.
        overwrite: replace an earlier model folder; any other existing folder is refused.
        stop_token_ids: ids that end a response (``chat.stop_token_ids``), besides the model's own and the tokenizer's.
    Raises:
        RunError: the folder exists, or cannot be written (disk full); what was there is untouched.
    """
    folder = Path(folder)
    is_model = any((folder / name).exists() for name in ("config.json", adapters.ADAPTER_CONFIG))
    if overwrite and folder.exists() and not is_model and any(folder.iterdir()):
        raise RunError(f"{folder}: holds something that is not a model; it is not overwritten. Choose another folder.")
    inner = base_of(model)
    scalar = any(isinstance(getattr(inner, name, None), nn.Module) for name in HEAD_NAMES)
    stops = _stop_ids(inner, tokenizer, stop_token_ids)
    if scalar:
        inner.config.pad_token_id = _spare_pad_id(tokenizer, stops)
        inner.config.eos_token_id = (
            (stops if len(stops) > 1 else stops[0]) if stops else None
        )  # it has no generation config
    elif stops and getattr(inner, "generation_config", None) is not None:
        inner.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
        _make_savable(inner.generation_config)
    with new_folder(folder, overwrite=overwrite) as target, quiet(), exact_weights(model):
        _write(model, target, scalar=scalar, merge=merge_adapter)
        tokenizer.save_pretrained(target)


def _make_savable(generation_config: Any) -> None:
    """Published configs often name a temperature without ``do_sample``; once changed, transformers refuses to save them."""
    try:
        generation_config.validate(strict=True)
    except ValueError:
        generation_config.do_sample = True


def _write(model: Any, target: Path, *, scalar: bool, merge: bool) -> None:
    inner = base_of(model)
    if inner is model and adapters.stands_on_adapted(model):
        model.save_pretrained(target, state_dict=adapters.merged_weights(model))
    elif inner is model:
        model.save_pretrained(target)
    elif merge or not adapters.base_folder(model):
        inner.save_pretrained(target, state_dict=adapters.merged_weights(model))
    else:
        model.save_pretrained(target, save_embedding_layers=False)
        (target / "README.md").unlink(missing_ok=True)  # peft's empty form
        if scalar:
            mean, std = normalisation(model)
            (target / adapters.SCORE_FILE).write_text(
                json.dumps({"score_mean": mean, "score_std": std}) + "\n", "utf-8"
            )
        else:
            inner.generation_config.save_pretrained(target)


def _stop_ids(model: Any, tokenizer: Any, more: Sequence[int]) -> list[int]:
    """What ends a text: the given ids (the first is the one that is trained), the model's own, the tokenizer's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if own is None:
        own = model.config.eos_token_id
    own = [own] if isinstance(own, int) else list(own or ())
    last = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return list(dict.fromkeys([*map(int, more), *own, *last]))


def _spare_pad_id(tokenizer: Any, stops: Sequence[int]) -> int | None:
    """An id that pads without hiding a token that may end a text."""
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        if candidate is not None and candidate not in stops:
            return int(candidate)
    return None


@contextlib.contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears complete or not at all: write into the path handed out, it is renamed at the end.

    Left-overs of an earlier crash (``.<name>.saving``, ``.<name>.replaced``) are cleaned up.

    Raises:
        RunError: the folder exists and is not empty (without ``overwrite``), or it cannot be written.
    """
    from safetensors import SafetensorError

    folder = Path(folder).absolute()
    saving, replaced = (folder.with_name(f".{folder.name}.{what}") for what in ("saving", "replaced"))
    _put_back(replaced, folder)  # after a crash between the two renames below
    if folder.exists() and not overwrite and (folder.is_file() or any(folder.iterdir())):
        raise RunError(f"{folder}: exists already and is not overwritten. Choose another folder or remove this one.")
    try:
        shutil.rmtree(saving, ignore_errors=True)
        saving.mkdir(parents=True)
        yield saving
        with_usual_modes(saving)
        _to_disk(saving)
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        saving.rename(folder)
        sync_path(folder.parent)
    except PalateError:
        raise
    except (OSError, SafetensorError) as error:
        _put_back(replaced, folder)
        raise RunError(_cannot_write(folder, error)) from error
    finally:
        _put_back(replaced, folder)
        shutil.rmtree(saving, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def with_usual_modes(folder: Path) -> None:
    """Every file as readable as the umask allows: safetensors writes files that nobody but their owner can read."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _put_back(replaced: Path, folder: Path) -> None:
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)


def _to_disk(folder: Path) -> None:
    """Wait until everything in a folder is really on disk, so that a power cut after the rename loses nothing."""
    for path in sorted(folder.rglob("*")):
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(folder: Path, error: BaseException) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    kept = f" What {folder} held before is untouched." if folder.exists() else " Nothing was left behind."
    if not full:
        return f"{folder}: cannot be written: {error}.{kept} Check the folder and its permissions."
    parent = next(p for p in folder.parents if p.exists())
    free = shutil.disk_usage(parent).free / 1e9
    return (
        f"{folder}: cannot be saved: no space left on device ({free:.2f} GB free).{kept} Free some space or choose a folder "
        "on another disk, then run the same command again."
    )
