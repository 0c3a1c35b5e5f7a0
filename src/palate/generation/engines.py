"""Which program draws the responses: palate's embedded sampler, or vLLM. Both are called as ``sampler.sample``."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

from palate.errors import ConfigError

if TYPE_CHECKING:
    from palate.types import Tokens

EngineName = Literal["embedded", "vllm"]
Engine = Callable[..., "Tokens"]  # the arguments and the result of ``sampler.sample``


def engine_of(name: str, *, max_length: int | None = None) -> Engine:
    """What to call instead of ``sampler.sample``.

    Args:
        name: "embedded" or "vllm".
        max_length: tokens of prompt and response together at most; what vLLM keeps room for. None = the model's context.
    Raises:
        ConfigError: there is no such engine, or vLLM is not installed.
    """
    check_engine(name)
    if name == "embedded":
        from palate.generation.sampler import sample

        return sample
    from palate.generation.vllm import VllmSampler

    return VllmSampler(max_length)


def check_engine(name: str) -> None:
    """Can it be used here? Nothing is loaded.

    Raises:
        ConfigError: there is no such engine, or vLLM is not installed.
    """
    if name not in get_args(EngineName):
        raise ConfigError(f'engine: found {name!r}, expected "embedded" or "vllm".')
    if name == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            'engine: "vllm" needs the package of that name, which is not installed. On a GPU: pip install "palate[vllm]". '
            'On a CPU: see "Installing vLLM" in docs/engines.md. Or set engine=embedded.'
        )
