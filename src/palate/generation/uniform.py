"""Random numbers that are a function of where they are used, not of what was drawn before them.

Each number is a hash of (seed, prompt, sample, step). So a sample does not change with the other rows of its batch, the
size of the batch, the number of prompts after it, the number of samples of a prompt, or ``max_new_tokens``; nor with
the device, for these are integers. The idea is Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit number; products wrap around


def uniforms(seed: int, prompt: Tensor, sample: Tensor, steps: int) -> Tensor:
    """Uniform numbers in [0, 1 - 2^-52], float64 [R, steps].

    Args:
        seed: any 63-bit number.
        prompt, sample: int64 [R], the prompt's number and the sample's number within its prompt.
        steps: how many tokens a row draws at most.
    """
    state = _mix(torch.full_like(prompt, seed))
    state = _mix(state + _GOLDEN * (prompt + 1))
    state = _mix(state + _GOLDEN * (sample + 1))
    step = torch.arange(1, steps + 1, device=prompt.device)
    bits = _mix(state[:, None] + _GOLDEN * step)
    return _shift_right(bits, 12).to(torch.float64) * 2.0**-52


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every bit of the result depends on every bit of z."""
    z = (z ^ _shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shift_right(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """A shift that brings in zeros; torch's own brings in the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
