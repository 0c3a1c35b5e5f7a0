"""Rotary angles that depend on how long a row is: transformers goes by the longest row of a call, so company matters."""

from __future__ import annotations

import math
from typing import Any

_FIXED = ("default", "linear", "llama3", "yarn")


def has_fixed_angles(trunk: Any) -> bool:
    """Is the angle of a position the same in every row?"""
    return str(trunk.rotary_emb.rope_type) in _FIXED


def turning_length(model: Any) -> float:
    """Tokens above which LongRoPE turns all of a row by its other set of angles; infinite for models without it.

    Dynamic scaling changes nothing up to ``max_position_embeddings``, and longer rows are refused before they get here.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    parameters = getattr(config, "rope_parameters", None) or {}
    # Some models have one kind a layer type.
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    turning = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    limits: list[float] = [kind["original_max_position_embeddings"] for kind in turning]
    return min(limits, default=math.inf)
