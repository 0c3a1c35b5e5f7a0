"""Tokenised records kept by content, so that the second start of a run over the same data begins at once.

An entry is one safetensors file, named by a hash of everything that encoding depends on: the records as they were read
(and so the files' contents), the tokenizer, the chat's settings, the lengths, the libraries, and palate's own code that
encodes. What is found is exactly what encoding would have given, with the report of what was cut and dropped. Records
are read every time, so faulty data is refused every time; what raised an error is never kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from palate.data.chat import Chat
from palate.data.collate import EncodeReport, Item, encode_records
from palate.data.packed_items import packed, unpacked
from palate.stage.user_cache import keep_within

LEAST = 1000  # records; fewer are tokenised in less time than one notices
MOST_BYTES = 2**30  # of all entries together; those used longest ago go first
# The modules whose code decides what an item is.
_CODE = (
    "chat",
    "encode",
    "items",
    "kinds",
    "packed_items",
    "ranking",
    "segments",
    "template",
    "tokenizing",
    "truncate",
)


class Broken(Exception):
    """An entry is not what was written; the message says why."""


def encode_or_recall(
    records: Sequence[Any], kind: str, chat: Chat, folder: Path | None, **lengths: Any
) -> tuple[list[Item], EncodeReport, str]:
    """``encode_records``, or what it said of the same records before.

    Args:
        folder: where entries are kept; None = nowhere.
        lengths: the other settings of ``encode_records``.
    Returns:
        (items, report, one line about the cache or "").
    Raises:
        whatever ``encode_records`` raises.
    """
    key = None if folder is None or len(records) < LEAST else entry_key(records, kind, chat, lengths)
    if folder is None or key is None:
        return *encode_records(records, kind, chat, **lengths), ""
    path, said = folder / f"{key[:40]}.safetensors", ""
    try:
        found = _read(path, key, records)
        if found is not None:
            return *found, f"tokens of {len(records):,} records taken from {path}"
    except Broken as error:
        said = f"{path}: {error}; the records are tokenised anew."
    items, report = encode_records(records, kind, chat, **lengths)
    try:
        _write(path, key, packed(items, report, records))
    except OSError as error:
        said = f"{path} cannot be written ({error}): the next run tokenises these records again."
    return items, report, said


def entry_key(records: Sequence[Any], kind: str, chat: Chat, lengths: dict[str, Any]) -> str | None:
    """A hash of all that the items depend on; None where that cannot be known.

    That is so for a tokenizer written in Python, whose code is anybody's, and for a template that writes the date.
    """
    tokenizer = chat.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    templates = [chat.template, chat.conversation_template]
    if backend is None or any("strftime_now" in (template or "") for template in templates):
        return None
    facts = {
        "code": _code(),
        "kind": kind,
        "lengths": lengths,
        "class": type(tokenizer).__qualname__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "splits": bool(getattr(tokenizer, "split_special_tokens", False)),  # the backend does not write it down
        "settings": [chat.system, chat.stop_token_ids, chat.template is None, *templates],
        "plain": chat._forced_plain,
    }
    found = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    found.update(hashlib.sha256(backend.to_str().encode()).digest())
    for record in records:
        found.update(repr(record).encode(errors="backslashreplace"))
    return found.hexdigest()


@cache
def _code() -> str:
    """A hash of palate's code that encodes, and the versions of the libraries under it."""
    found = hashlib.sha256()
    for name in _CODE:
        found.update(Path(importlib.import_module(f"palate.data.{name}").__file__ or "").read_bytes())
    for library in ("tokenizers", "transformers", "jinja2"):
        found.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    return found.hexdigest()


def _read(path: Path, key: str, records: Sequence[Any]) -> tuple[list[Item], EncodeReport] | None:
    """What an entry holds; None where there is none.

    Raises:
        Broken: it is damaged, or of another key.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            said = json.loads((file.metadata() or {})["palate"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # the file cannot be iterated
    except FileNotFoundError:  # another process just removed it
        return None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise Broken(f"it cannot be read ({error})") from error
    if said.get("key") != key:
        raise Broken("it is of other records")
    if said.get("checksum") != _checksum(arrays):
        raise Broken("it is not what was written (checksum)")
    with contextlib.suppress(OSError):  # a cache that can only be read serves as well
        os.utime(path)  # used now: the last to go
    return unpacked(arrays, records)


def _write(path: Path, key: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Keep an entry: written beside its place and renamed, so it is whole or not there.

    Raises:
        OSError: the folder cannot be made or written.
    """
    if sum(array.nbytes for array in arrays.values()) > MOST_BYTES:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    said = json.dumps({"key": key, "checksum": _checksum(arrays)})
    try:
        save_file(arrays, temporary, metadata={"palate": said})
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
    keep_within(path.parent, "*.safetensors", MOST_BYTES)


def _checksum(arrays: dict[str, np.ndarray[Any, Any]]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        found.update(arrays[name].tobytes())
    return found.hexdigest()
