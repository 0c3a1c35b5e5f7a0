"""What a device and a number format are called."""

from __future__ import annotations

import torch

from palate.errors import ConfigError
from palate.models.quiet import did_you_mean


def dtypes_of(dtype: str | torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
    """(of the weights, of the arithmetic when it differs)."""
    known = {
        "float32": (torch.float32, None),
        "bfloat16": (torch.bfloat16, None),
        "mixed": (torch.float32, torch.bfloat16),
    }
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ConfigError(f'dtype "{name}" is not known.{did_you_mean(name, known)} Choose from: {", ".join(known)}.')
    return known[name]


def device_of(device: str | torch.device) -> torch.device:
    """A device that is there."""
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f'device "{device}" is not known. Write "cpu", "cuda" or "cuda:0".') from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'device "{device}": this machine has no CUDA device that torch can use. Write "cpu".')
    return chosen
