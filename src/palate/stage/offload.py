"""``offload``: frozen roles that rest in the computer's memory while nothing is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from palate.config import RunConfig
from palate.errors import ConfigError
from palate.models.resting import Resting, rest
from palate.models.roles import AdapterOff
from palate.stage.roles import models_in
from palate.types import Models


def check_offload(config: RunConfig) -> None:
    """Refuse what cannot rest, before anything is loaded.

    Raises:
        ConfigError: a role that the method trains or does not have.
    """
    method = config.method.settings
    for role in config.offload:
        if role in method.trains:
            frozen = [name for name in method.needs if name not in method.trains]
            raise ConfigError(
                f"offload: {config.method.name} trains its {role}, which has to stay on the device. Frozen here: "
                f"{', '.join(frozen) or 'no role'}."
            )
        if role not in method.needs:
            raise ConfigError(f"offload: {config.method.name} has no {role}. It needs: {', '.join(method.needs)}.")


def resting_roles(config: RunConfig, models: Models) -> dict[str, str]:
    """Of each role in ``offload``, why it stays where it is, or "" if it rests."""
    return {role: _stays(config, models, role) for role in config.offload}


def _stays(config: RunConfig, models: Models, role: str) -> str:
    method, model = config.method.settings, getattr(models, role)
    trained = {id(p) for name in method.trains for p in getattr(models, name).parameters()}
    drawn = {"reference", "mixture"} & set(getattr(method, "drawn_by", ()))
    if torch.device(config.device).type == "cpu":
        return "everything is in the CPU's memory anyway"
    if model is None:
        return "it is let go before the first step"
    if isinstance(model, AdapterOff):
        return "it is the policy with its adapter off, and has no weights of its own"
    if role == "reference" and drawn:
        return f"{config.method.name} samples from it, too"
    if role == "reference" and getattr(method, "asks_reference", "rows") != "rows":
        return f"{config.method.name} asks it for more than log-probs of the batch, in the update too"
    if not models_in(model):
        return "it has no weights"
    if any(id(p) in trained for part in models_in(model) for p in part.parameters()):
        return "it shares weights with a role that is trained"
    return ""


def put_to_rest(config: RunConfig, models: Models, say: Callable[[Any], None]) -> Resting | None:
    """Send the roles in ``offload`` to rest; those that stay are said, with the reason. None when none rests."""
    found = resting_roles(config, models)
    for role, reason in found.items():
        if reason:
            say(f"offload: the {role} stays on {config.device}: {reason}.")
    resting: list[nn.Module] = [
        part for role, reason in found.items() if not reason for part in models_in(getattr(models, role))
    ]
    return rest(resting, torch.device(config.device)) if resting else None
