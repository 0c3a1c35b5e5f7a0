"""Log-probs of frozen references on disk, by content: which weights said what of which tokens.

One safetensors file a reference, ``<its key>.safetensors``, 20 bytes a response: ``rows`` uint8 [n, 16], a hash of a
response's ids and mask, in ascending order, and ``logprobs`` float32 [n]; the same log-probs are the same bytes. A file is written beside its place and renamed, so it is whole or not
there; when two runs write one at once the later stays, and what only the other knew is computed again some day.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from palate.data.items import Row
from palate.models.roles import AdapterOff

FORMAT = "1"  # raise it when the forward room gives other log-probs for the same weights and tokens
# What a model's settings say that no log-prob depends on, and that differs between two copies of one model.
_NAMES = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
}

Known = dict[bytes, float]  # row key -> log p(response | prompt), nats


class ReferenceKey(NamedTuple):
    """Which reference: its weights alone, and everything that its log-probs depend on. Hexadecimal."""

    weights: str
    all: str


class Unreadable(Exception):
    """A file of log-probs that is not what was written; the message says why."""


def reference_key(reference: nn.Module, device: torch.device) -> ReferenceKey:
    """A hash of a reference's parameters and buffers, and one of these with its settings, its arithmetic and the device's type.

    A policy with its adapter off is its base: the adapter's weights are left out, and it has the key of the base alone.
    """
    off = isinstance(reference, AdapterOff)
    model, inner = _unwrapped(reference)
    weights = hashlib.sha256()
    tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in inner.state_dict().items()}
    for name, tensor in sorted(tensors.items()):
        if not (off and ".lora_" in name):
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            weights.update(memoryview(_bytes(tensor)))
    adapters = {} if off else {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    facts = {
        "format": FORMAT,
        "weights": weights.hexdigest(),
        "class": type(inner).__name__,
        "settings": _settings(inner),
        "adapters": {name: _without(config, {"base_model_name_or_path"}) for name, config in adapters.items()},
        "compute": _compute_dtype(reference),
        "device": device.type,
    }
    text = json.dumps(facts, sort_keys=True, default=_plain)
    return ReferenceKey(weights.hexdigest(), hashlib.sha256(text.encode()).hexdigest())


def computes_in_float32(reference: nn.Module) -> bool:
    """Neither weights nor products in fewer bits?"""
    return _compute_dtype(reference) == "None" and all(
        p.dtype == torch.float32 for p in _unwrapped(reference)[1].parameters()
    )


def _unwrapped(reference: nn.Module) -> tuple[Any, Any]:
    """(the model around which there may be an adapter, the Hugging Face model in it)."""
    model: Any = reference.policy if isinstance(reference, AdapterOff) else reference
    return model, (model.get_base_model() if hasattr(model, "get_base_model") else model)


def _compute_dtype(reference: nn.Module) -> str:
    model, inner = _unwrapped(reference)
    return str(getattr(inner, "compute_dtype", None) or getattr(model, "compute_dtype", None))


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _settings(model: Any) -> dict[str, Any]:
    return _without(model.config.to_dict(), _NAMES)


def _without(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def row_key(row: Row) -> bytes:
    """A hash of what a response's log-prob depends on besides the weights: ids and mask. Template and truncation are in them."""
    found = hashlib.blake2b(len(row.ids).to_bytes(8, "little"), digest_size=16)
    found.update(row.ids.astype("<i4").tobytes())
    found.update(row.response_mask.astype("?").tobytes())
    return found.digest()


def read_store(path: Path, key: ReferenceKey) -> Known:
    """What a file knows of this reference; nothing where there is no file.

    Raises:
        Unreadable: it is damaged, or of another reference or format.
    """
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})["palate"])
            rows, logprobs = file.get_tensor("rows"), file.get_tensor("logprobs")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise Unreadable(f"it cannot be read ({error})") from error
    if said.get("format") != FORMAT or said.get("key") != key.all:
        raise Unreadable("it is of another reference")
    if said.get("sha256") != _checksum(rows, logprobs):
        raise Unreadable("it is not what was written (checksum)")
    keys = rows.numpy().tobytes()
    return {keys[16 * i : 16 * i + 16]: value for i, value in enumerate(logprobs.tolist())}


def weights_of_store(path: Path) -> str | None:
    """The hash of the weights that a file is of; None where it is not there, damaged, or of another format."""
    try:
        with safe_open(path, framework="pt") as file:
            said: dict[str, str] = json.loads((file.metadata() or {})["palate"])
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    return said.get("weights") if said.get("format") == FORMAT else None


def write_store(path: Path, key: ReferenceKey, known: Known) -> None:
    """Replace the file by what is known now.

    Raises:
        OSError: the folder cannot be made or written.
    """
    keys = sorted(known)
    rows = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16)
    logprobs = torch.tensor([known[row] for row in keys], dtype=torch.float32)
    said = {"format": FORMAT, "key": key.all, "weights": key.weights, "sha256": _checksum(rows, logprobs)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"rows": rows, "logprobs": logprobs}, temporary, metadata={"palate": json.dumps(said)})
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(rows: Tensor, logprobs: Tensor) -> str:
    found = hashlib.sha256(_bytes(rows).tobytes())
    found.update(_bytes(logprobs).tobytes())
    return found.hexdigest()
