"""Checkpoints: trained weights, optimizer state, and a few numbers; written beside, then renamed.

``checkpoints/step-N`` holds ``weights.safetensors``, ``optimizer.safetensors`` and ``state.json``, with a checksum of
each; where batches are drawn ahead, ``rollout.safetensors`` has the one that was not trained on yet. Data order
and sampling are functions of (seed, step), so no random state is kept. A folder is complete or it is not there: a kill
while writing leaves a ``.tmp-`` folder that the next start removes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from palate.errors import RunError
from palate.models.precision import round_to_working
from palate.models.save import sync_path, with_usual_modes
from palate.types import Method

Parameters = Mapping[str, Mapping[str, nn.Parameter]]
_ROLLOUT = "rollout.safetensors"


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    rollout: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``folder/step-N`` and return it.

    Args:
        rollout: the batch that was drawn and not trained on, if there is one.

    Raises:
        RunError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target, temporary = folder / f"step-{step}", folder / f".tmp-step-{step}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(_weights(parameters), temporary / "weights.safetensors")
        save_file(_optimizer_tensors(parameters, optimizer), temporary / "optimizer.safetensors")
        if rollout is not None:
            save_file(dict(rollout), temporary / _ROLLOUT)
        checksums = {file.name: _checksum(file) for file in sorted(temporary.iterdir())}
        said = {"step": step, **state, "checksums": checksums}
        text = json.dumps({**said, "checksum": _checksum_of(said)}, indent=1)
        (temporary / "state.json").write_text(text, encoding="utf-8")
        with_usual_modes(temporary)
        for file in temporary.iterdir():
            sync_path(file)
        if target.exists():  # it could not be read, or the run would not be here again
            shutil.rmtree(target)
        temporary.rename(target)
        sync_path(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"{target}: the checkpoint could not be written ({error}). Earlier checkpoints are intact. "
            "Free some space (or lower training.keep_last) and give the same command to go on from the last one."
        ) from error
    return target


def load_newest(folder: Path, parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Load the newest readable checkpoint in place; its state, or None when there is none.

    A folder that cannot be read is passed over for the one before it, and said so in the state's ``"skipped"``. A batch
    that was kept is in its ``"tensors"``.
    """
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    skipped = []
    for path in reversed(list_checkpoints(folder)):
        try:
            state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
            _check_whole(path, state)
            tensors = load_file(path / "optimizer.safetensors")
            kept = load_file(path / _ROLLOUT) if _ROLLOUT in state["checksums"] else {}
            load_weights(path, parameters)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            skipped.append(f"{path}: {error}")
            continue
        _load_optimizer(parameters, optimizer, tensors)
        return {**state, "skipped": skipped, "tensors": kept}
    if skipped:
        found = "\n  ".join(skipped)
        raise RunError(
            f"No checkpoint could be read:\n  {found}\nRemove {folder} to start this run from its beginning."
        )
    return None


def load_weights(path: Path, parameters: Parameters) -> None:
    """Put a checkpoint's trained weights in place."""
    saved = load_file(path / "weights.safetensors")
    wanted = {f"{role}.{name}": p for role, named in parameters.items() for name, p in named.items()}
    if saved.keys() != wanted.keys() or any(saved[name].shape != wanted[name].shape for name in wanted):
        raise RunError(f"{path}: these weights belong to another model than the one that is being trained.")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved[name])
    round_to_working(wanted.values())


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    numbered = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("step-")))


def remove_old(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Keep the newest ``keep_last`` (at least one) and the best."""
    for path in list_checkpoints(folder)[: -max(1, keep_last)]:
        if path.name != f"step-{best_step}":
            shutil.rmtree(path)


def method_state(method: Method) -> dict[str, Any]:
    """The method's fields, some of which change over a run."""
    return dataclasses.asdict(method)  # type: ignore[call-overload,no-any-return]


def restored_method(method: Method, state: Mapping[str, Any]) -> Method:
    """The method with the fields of a checkpoint; a tuple that JSON made a list becomes the type it was."""
    values = {}
    for name, value in state.items():
        current = getattr(method, name)
        if isinstance(current, tuple):
            value = type(current)(*value) if hasattr(current, "_fields") else tuple(value)
        values[name] = value
    return dataclasses.replace(method, **values)  # type: ignore[type-var]


def _weights(parameters: Parameters) -> dict[str, Tensor]:
    return {
        f"{role}.{name}": p.detach().contiguous() for role, named in parameters.items() for name, p in named.items()
    }


def _optimizer_tensors(parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{role}.{name}.{key}": _tensor(key, value)
        for role, named in parameters.items()
        for name, p in named.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def _tensor(key: str, value: Any) -> Tensor:
    """A part of an optimizer's state as a file can hold it: some count steps in a plain number, some share their tables."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.int64)
    return value.detach().clone() if key.startswith("qmap") else value.detach().contiguous()


def _load_optimizer(parameters: Parameters, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    optimizer.state.clear()
    saved: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(".")
        saved.setdefault(name, {})[key] = tensor
    for role, named in parameters.items():
        for name, p in named.items():
            for key, tensor in saved.get(f"{role}.{name}", {}).items():
                plain = tensor.dtype == torch.int64
                place = p.device if key == "step" else getattr(optimizer, "state_device", p.device)
                optimizer.state[p][key] = int(tensor) if plain else tensor.to(place)


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _checksum_of(said: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(said).encode())


def _check_whole(path: Path, state: Mapping[str, Any]) -> None:
    """Every file is there, byte for byte, and the state says all that a run goes on from, as it was written."""
    for key in ("step", "method", "best", "stopped", "sizes"):
        state[key]
    said = {key: value for key, value in state.items() if key != "checksum"}
    if "checksum" in state and state["checksum"] != _checksum_of(said):  # checkpoints of earlier versions have none
        raise ValueError("state.json is not what was written")
    for name, wanted in state["checksums"].items():
        if _checksum(path / name) != wanted:
            raise ValueError(f"{name} is not what was written")
