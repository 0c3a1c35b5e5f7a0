"""Palate: teach a language model people's taste, from demonstrations and feedback to an aligned model.

    import palate
    run = palate.train("reward", model="models/sft", data="comparisons.jsonl", out="runs/reward")
    scores = palate.score(run / "model", ["How are you?"], ["Fine, thank you."])

Nothing heavy is imported before the first of these functions is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palate.api import check, explain, run, sample, score, train

__version__ = "0.1.0"
__all__ = ["__version__", "check", "explain", "run", "sample", "score", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("palate.api"), name)
    raise AttributeError(f"module 'palate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
