"""Whole models, mixed tensor by tensor, so that memory holds one tensor of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palate.errors import ModelError
from palate.models.files import WEIGHTS, weight_files
from palate.models.soup.weights import weighted_mean

ALIKE = 0.5  # cosine of two models' weights below which they cannot come from the same start


def mix_models(folders: Sequence[Path], weights: Sequence[float], target: Path) -> float:
    """Write the files of the first with the means in their places; returns the smallest cosine to the first."""
    with ExitStack() as stack:
        readers = [_Reader(folder, stack) for folder in folders]
        for reader in readers[1:]:
            readers[0].compare(reader)
        alike = _Alike(len(folders))
        for path in readers[0].files:
            _write_like(path, target / path.name, lambda name: _mean(readers, name, weights, alike))
    cosine, which = alike.least()
    if cosine < ALIKE:
        raise ModelError(
            f"{folders[0]} and {folders[which]} do not come from the same start: the cosine of their weights is {cosine:.2f} "
            f"(at least {ALIKE} was expected; about 1 is usual). A mean of unrelated networks computes nothing. Train each "
            "from the same model."
        )
    return cosine


def _mean(readers: Sequence[_Reader], name: str, weights: Sequence[float], alike: _Alike) -> Tensor:
    tensors = [reader.tensor(name) for reader in readers]
    alike.add(tensors)
    return weighted_mean(tensors, weights)


class _Reader:
    """The tensors of one model folder, by name, however many files they are in."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.where: dict[str, Any] = {}  # tensor -> the open file that has it
        self.files = weight_files(folder)
        if not self.files:
            raise ModelError(f"{folder}: no {WEIGHTS}. Only safetensors are read; save the model again in that form.")
        for path in self.files:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: cannot be read ({error}). Fetch or save it again.") from error
            self.where |= dict.fromkeys(file.keys(), file)

    def tensor(self, name: str) -> Tensor:
        found: Tensor = self.where[name].get_tensor(name)
        if not bool(found.isfinite().all()):
            raise ModelError(f"{self.folder}: {name} holds NaN or Inf. The run that saved it had diverged.")
        return found

    def compare(self, other: _Reader) -> None:
        """Refuse other names, shapes or dtypes."""
        missing = sorted(self.where.keys() ^ other.where.keys())
        if missing:
            raise ModelError(
                f"{self.folder} and {other.folder}: {len(missing)} tensor(s) are in one of them only, first {missing[0]}. "
                "Only models of one shape can be averaged."
            )
        for name, file in self.where.items():
            ours, theirs = file.get_slice(name), other.where[name].get_slice(name)
            for what, a, b in (
                ("shape", ours.get_shape(), theirs.get_shape()),
                ("dtype", ours.get_dtype(), theirs.get_dtype()),
            ):
                if a != b:
                    raise ModelError(
                        f"{self.folder} and {other.folder}: {name} has {what} {a} and {b}. Save both in the same way."
                    )


class _Alike:
    """Cosines between the first model's matrices and every other's, summed up tensor by tensor."""

    def __init__(self, models: int) -> None:
        self.dots = torch.zeros(models, 3, dtype=torch.float64)  # x.y, x.x, y.y

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Vectors are left out: norms' gains are near 1 in every network."""
        if tensors[0].ndim < 2 or not tensors[0].is_floating_point():
            return
        x = tensors[0].flatten().float()
        for i, tensor in enumerate(tensors):
            y = tensor.flatten().float()
            self.dots[i] += torch.stack([x @ y, x @ x, y @ y]).double()

    def least(self) -> tuple[float, int]:
        """The smallest cosine, and whose."""
        x_y, x_x, y_y = self.dots.unbind(1)
        cosines = x_y / (x_x * y_y).sqrt().clamp(min=1e-30)
        which = int(cosines.argmin())
        return float(cosines[which]), which


def _write_like(source: Path, target: Path, tensor: Callable[[str], Tensor]) -> None:
    """A safetensors file with the header of ``source`` and ``tensor(name)`` in each place.

    Layout: 8 bytes with the length of the header (little-endian), the header (JSON: name -> dtype, shape, data_offsets),
    then the tensors' bytes one after the other.
    """
    with open(source, "rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    with open(target, "wb") as file:
        file.write(size + header)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            data = tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy()
            start, end = entry["data_offsets"]
            assert len(data) == end - start
            file.write(data.data)
