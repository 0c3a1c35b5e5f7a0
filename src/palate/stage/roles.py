"""Exactly the roles that a method needs, frozen where they are not trained, with the bill."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from palate.config import RunConfig
from palate.data.chat import Chat
from palate.errors import ConfigError, ModelError
from palate.models.load import load_policy, load_scalar, new_policy
from palate.models.precision import master_of, use_working_copies
from palate.models.rewards import load_reward, members
from palate.models.roles import AdapterOff, reference_of
from palate.types import Models


def trained_role(config: RunConfig) -> str:
    """The role that ``model`` plays: the policy, or for a method that only trains a reward, the reward."""
    return "policy" if "policy" in config.method.settings.needs else config.method.settings.trains[0]


def load_trained(config: RunConfig, tokenizer: Any) -> nn.Module:
    """The model that is trained, from ``config.model``.

    Raises:
        ModelError: it cannot play its role. ConfigError: a model from scratch as a reward.
    """
    role, seed = trained_role(config), config.training.seed
    if isinstance(config.model, dict):
        if role != "policy" or config.lora is not None:
            raise ConfigError("a model from scratch can only be a policy without LoRA. Train it with sft first.")
        return _placed(new_policy(config.model, tokenizer, seed), config)
    load = load_policy if role == "policy" else load_scalar
    return load(
        config.model, dtype=config.dtype, device=config.device, lora=config.lora, seed=seed, tokenizer=tokenizer
    )


def _placed(model: nn.Module, config: RunConfig) -> nn.Module:
    if config.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    elif config.dtype == "mixed" and torch.device(config.device).type == "cpu":
        use_working_copies(model)
    elif config.dtype == "mixed":
        model.compute_dtype = torch.bfloat16  # type: ignore[assignment]
    return model.to(config.device).train(False)


def where_from(config: RunConfig) -> str:
    """What becomes of ``config.model``, in words: "new llama policy (hidden 96, 2 layers)", "loading policy from ..."."""
    if not isinstance(config.model, dict):
        return f"loading {trained_role(config)} from {config.model}"
    fields = config.model
    hidden = fields.get("hidden_size", fields.get("n_embd", "as usual"))
    layers = fields.get("num_hidden_layers", fields.get("n_layer", "the usual"))
    return f"new {fields.get('architecture')} policy (hidden {hidden}, {layers} layer{'s' * (layers != 1)})"


def load_roles(config: RunConfig, trained: nn.Module, chat: Chat) -> Models:
    """The other roles beside the one that is trained.

    Raises:
        ModelError: a folder cannot play its role. ConfigError: a setting of a role is wrong.
    """
    needs = config.method.settings.needs
    models = Models(**{trained_role(config): trained})
    place: dict[str, Any] = {"dtype": config.dtype, "device": config.device}
    if "reference" in needs:
        models.reference = reference_of(trained, config.reference, tokenizer=chat.tokenizer, **place)
    if "reward" in needs and models.reward is None:
        assert config.reward is not None
        models.reward = load_reward(config.reward, chat, **place, measuring=True)
    if "value" in needs:
        where, why = value_source(config, models.reward)
        try:
            models.value = load_scalar(
                where, lora=config.lora, seed=config.training.seed + 1, tokenizer=chat.tokenizer, **place
            )
        except ModelError as error:
            raise ModelError(f"value model ({why}): {error}") from error
    for role in ("policy", "reference", "reward", "value"):
        model = getattr(models, role)
        shares = isinstance(model, AdapterOff)  # its weights are the policy's
        if isinstance(model, nn.Module) and not shares and role not in config.method.settings.trains:
            model.requires_grad_(False).eval()
    return models


def value_source(config: RunConfig, reward: Any) -> tuple[str, str]:
    """(folder, reason): the setting, else the reward model's folder (InstructGPT), else the policy's."""
    if config.value is not None:
        return config.value, "from value"
    # A reward that is a plain model was found to read the policy's own token ids.
    if isinstance(reward, nn.Module) and isinstance(config.reward, str):
        return config.reward, "from the reward model"
    if isinstance(config.model, dict):
        raise ConfigError("the value model has nothing to start from: the policy is new. Give --value FOLDER.")
    return config.model, "from the policy, with a new head"


class Role(NamedTuple):
    """A line of the bill."""

    role: str
    what: str
    parameters: int
    trained: int
    dtype: str
    weights: int  # bytes
    training: int  # bytes of gradients, AdamW's two moments, and the float32 masters of bf16 copies


def bill(models: Models, trains: tuple[str, ...]) -> list[Role]:
    """What each role holds in memory. A role that shares another's weights costs nothing."""
    lines = []
    for role in ("policy", "reference", "reward", "value"):
        model = getattr(models, role)
        if isinstance(model, AdapterOff):
            lines.append(Role(role, "policy, adapter off", 0, 0, "", 0, 0))
        elif isinstance(model, nn.Module):
            lines.append(_line(role, type(_inner(model)).__name__, model, role in trains))
        elif model is not None:
            name = f"{type(model).__name__} {getattr(model, 'name', '')}".strip()
            lines.append(_line(role, name, nn.ModuleList(_models_in(model)), False))
    return lines


def _models_in(reward: Any) -> list[nn.Module]:
    """The models that a reward asks: none of a function, its own of a classifier, those of its members of a sum."""
    inside = members(reward)
    if inside:
        return [model for part in inside.values() for model in _models_in(part)]
    model = reward if isinstance(reward, nn.Module) else getattr(reward, "model", None)
    return [model] if isinstance(model, nn.Module) else []


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _line(role: str, what: str, model: nn.Module, trains: bool) -> Role:
    parameters = list({id(p): p for p in model.parameters()}.values())
    learning = [p for p in parameters if trains and p.requires_grad]
    sizes: dict[str, int] = {}
    for p in parameters:
        sizes[str(p.dtype).removeprefix("torch.")] = sizes.get(str(p.dtype).removeprefix("torch."), 0) + p.numel()
    return Role(
        role,
        what,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in learning),
        max(sizes, key=lambda name: sizes[name]) if sizes else "",
        sum(p.numel() * p.element_size() for p in parameters),
        sum(_learning_bytes(p) for p in learning),
    )


def _learning_bytes(parameter: nn.Parameter) -> int:
    master = master_of(parameter)
    return (3 + (master is not parameter)) * master.numel() * master.element_size()
