"""vLLM in another's process: what it changes there is put back, and what it finds wrong is said."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from palate.errors import ConfigError, ModelError
from palate.models.quiet import first_line

# What the environment has to say while the engine is made. In one process: its weights are to be reached by assignment.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Kept when somebody set them: threads stay where the trainer has them; what goes wrong is raised, not logged; nothing is
# reported to anybody.
_PREFERRED = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_NO_USAGE_STATS": "1"}


@contextmanager
def as_before() -> Iterator[None]:
    """What vLLM changes of the process while it starts is put back: threads, random numbers, the environment."""
    environment, set_num_threads, threads = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    os.environ |= _PREFERRED | environment | _ENVIRONMENT
    try:
        with random_numbers_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, to vLLM
            yield
    finally:
        torch.set_num_threads = set_num_threads  # a CPU's worker puts a function there that does nothing
        torch.set_num_threads(threads)
        kept = {key: value for key, value in os.environ.items() if key.startswith("VLLM_")}  # read again later
        os.environ.clear()
        os.environ |= environment | kept


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """vLLM seeds every global generator when it starts, and draws from torch's beside the generators of its requests."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@contextmanager
def vllm_errors(what: str) -> Iterator[None]:
    """vLLM's own findings, as a person can use them."""
    try:
        yield
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if isinstance(error, (ConfigError, ModelError)):
            raise
        raise ModelError(f'engine: "vllm" {what}: {first_line(error)} Set engine=embedded.') from error
