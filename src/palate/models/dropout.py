"""Dropout off: with it on, the same weights give two log-probs for one token, and PPO's first ratio is not 1."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def without_dropout_config(config: Any) -> Any:
    """Every dropout probability of a config, and of the configs inside it, set to 0 (in place)."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            without_dropout_config(value)
        elif ("dropout" in name or "pdrop" in name) and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, name, 0.0)
    return config


def without_dropout(model: M) -> M:
    """Every ``nn.Dropout`` of a model set to 0 (in place): also those that a config does not speak of."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
