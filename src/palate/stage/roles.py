"""Exactly the roles that a method needs, frozen where they are not trained, with the bill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from palate.config import RunConfig
from palate.data.chat import Chat
from palate.errors import ConfigError, ModelError
from palate.models.adapters import adapter_config, adapter_has_head, is_adapted
from palate.models.load import load_policy, load_scalar, new_policy
from palate.models.precision import master_of, use_working_copies
from palate.models.rewards import load_reward, members
from palate.models.roles import AdapterOff, reference_of
from palate.models.sharing import stands_on, value_head_on
from palate.training.optimizer import state_bytes
from palate.types import Models

Say = Callable[[str], None]
ROLES = ("policy", "reference", "reward", "value")


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


def load_roles(config: RunConfig, trained: nn.Module, chat: Chat, say: Say = lambda text: None) -> Models:
    """The other roles beside the one that is trained, on as few weights as ``config.sharing`` allows.

    Args:
        say: is told of every role that cannot share what the setting asks for, and keeps weights of its own.
    Raises:
        ModelError: a folder cannot play its role, or has another base than the trunk. ConfigError: a setting of a role is
            wrong, or cannot be had with this sharing.
    """
    needs = config.method.settings.needs
    trunk = _trunk(config, trained, say)
    models = Models(**{trained_role(config): trained})
    place: dict[str, Any] = {"dtype": config.dtype, "device": config.device}
    if "reference" in needs:
        models.reference = reference_of(
            trained, config.reference, tokenizer=chat.tokenizer, sharing=config.sharing, **place
        )
    if "reward" in needs and models.reward is None:
        assert config.reward is not None
        models.reward = load_reward(config.reward, chat, **place, measuring=True, trunk=trunk)
    if "value" in needs:
        models.value = _value(config, models, chat, trunk)
    for role in ROLES:
        model = getattr(models, role)
        shares = isinstance(model, AdapterOff)  # its weights are the policy's
        if isinstance(model, nn.Module) and not shares and role not in config.method.settings.trains:
            model.requires_grad_(False).eval()
        if trunk is not None and model is not None and not shares:
            for name in _apart(model, trunk):
                say(
                    f"sharing={config.sharing}: the {role} ({name}) is no adapter on the policy's trunk and stays separate."
                )
    return models


def _trunk(config: RunConfig, trained: nn.Module, say: Say) -> nn.Module | None:
    """The model on whose frozen weights other roles are to stand, or None; ``resolve`` has refused what cannot be shared."""
    sharing, name, method = config.sharing, config.method.name, config.method.settings
    if sharing in ("separate", "reference"):
        return None
    if len(method.needs) == 1:
        say(f"sharing={sharing} changes nothing: {name} has one role.")
        return None
    if sharing == "value_head" and not is_adapted(trained):
        say("sharing=value_head: the policy has no adapter, so that reference and reward have weights of their own.")
        return None
    assert is_adapted(trained)
    return trained


def _value(config: RunConfig, models: Models, chat: Chat, trunk: nn.Module | None) -> nn.Module:
    """The value model: a head on the policy, an adapter and head on its trunk, or a model of its own."""
    seed, lora = config.training.seed + 1, config.lora
    if config.sharing == "value_head":
        assert models.policy is not None
        return value_head_on(models.policy, seed)
    reward: Any = models.reward
    if trunk is not None and not (isinstance(reward, nn.Module) and stands_on(reward, trunk)):
        reward = None  # another trunk's weights are no start for an adapter on this one
    where, why = value_source(config, reward)
    if trunk is not None and adapter_config(where) and adapter_has_head(where):
        lora = None  # merged into the base it would make another trunk: the adapter itself is trained on
    elif trunk is not None and lora is None:
        raise ConfigError(
            f"sharing=trunk: the value model ({why}) has no adapter of its own to train. Give value=FOLDER with an adapter and "
            "a head (a reward trained with LoRA), or --lora, or take sharing=value_head."
        )
    try:
        return load_scalar(
            where,
            dtype=config.dtype,
            device=config.device,
            lora=lora,
            seed=seed,
            tokenizer=chat.tokenizer,
            trunk=trunk,
        )
    except ModelError as error:
        raise ModelError(f"value model ({why}): {error}") from error


def _apart(model: Any, trunk: nn.Module) -> Iterator[str]:
    """Names of a role's parts that do not stand on the trunk."""
    if not isinstance(model, nn.Module) and (inside := members(model)):
        for name, part in inside.items():
            yield from (name for _ in _apart(part, trunk))
    elif not (isinstance(model, nn.Module) and (model is trunk or stands_on(model, trunk))):
        yield _name(model)


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
    """A line of the bill: what a role holds that no role above it holds already."""

    role: str
    what: str
    parameters: int
    trained: int
    dtype: str
    weights: int  # bytes
    training: int  # bytes of gradients, the optimizer's state, and the float32 masters of bf16 copies


def bill(models: Models, trains: tuple[str, ...], optimizer: str = "adamw", *, ahead: int = 0) -> list[Role]:
    """What each role holds in its device's memory. Weights that several roles use are counted once, for the first of them.

    Args:
        optimizer: ``training.optimizer``.
        ahead: ``training.rollouts_ahead``: 1 = a copy of what is trained of the policy draws in the background.
    """
    lines = []
    held: set[int] = set()
    for role in ROLES:
        model = getattr(models, role)
        if isinstance(model, AdapterOff):
            lines.append(Role(role, "policy, adapter off", 0, 0, "", 0, 0))
        elif model is not None:
            lines.append(_line(role, model, optimizer if role in trains else None, held))
    if ahead and models.policy is not None:
        moving = nn.ParameterList(p for p in models.policy.parameters() if p.requires_grad)
        lines.append(_line("sampler", moving, None, set())._replace(what="copy of the policy's trained weights"))
    return lines


def models_in(reward: Any) -> list[nn.Module]:
    """The models that a reward asks: none of a function, its own of a classifier, those of its members of a sum."""
    inside = members(reward)
    if inside:
        return [model for part in inside.values() for model in models_in(part)]
    model = reward if isinstance(reward, nn.Module) else getattr(reward, "model", None)
    return [model] if isinstance(model, nn.Module) else []


def _name(model: Any) -> str:
    if isinstance(model, nn.Module):
        return type(_inner(model)).__name__
    return f"{type(model).__name__} {getattr(model, 'name', '')}".strip()


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _line(role: str, model: Any, optimizer: str | None, held: set[int]) -> Role:
    """The role's line; None as ``optimizer``: nothing of it is trained. Where its weights stand in memory is added to ``held``."""
    weights = {p.untyped_storage().data_ptr() or id(p): p for p in nn.ModuleList(models_in(model)).parameters()}
    parameters = [p for place, p in weights.items() if place not in held]
    shares = len(parameters) < len(weights)
    held.update(weights)
    learning = [p for p in parameters if optimizer and p.requires_grad]
    sizes: dict[str, int] = {}
    for p in parameters:
        sizes[str(p.dtype).removeprefix("torch.")] = sizes.get(str(p.dtype).removeprefix("torch."), 0) + p.numel()
    return Role(
        role,
        _name(model) + (", on the weights above" if shares else ""),
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in learning),
        max(sizes, key=lambda name: sizes[name]) if sizes else "",
        sum(p.untyped_storage().nbytes() for p in parameters),
        sum(_learning_bytes(p, optimizer) for p in learning if optimizer),
    )


def _learning_bytes(parameter: nn.Parameter, optimizer: str) -> int:
    """Of what learns in its place: gradient, optimizer state, and itself where it is a master."""
    master = master_of(parameter)
    own = master.numel() * master.element_size()
    return own + state_bytes(master, optimizer) + (own if master is not parameter else 0)
