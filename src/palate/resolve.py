"""Filling in what depends on the model and the machine: learning rate, lengths, device, sampling temperature.

Every value that is filled in says from where it came, in the printed table and at the top of ``config.yaml``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from palate.config import RunConfig
from palate.defaults import default_learning_rate
from palate.errors import ConfigError
from palate.generation.engines import check_engine
from palate.models.adapters import adapter_config
from palate.training.settings import TrainingSettings, check_ahead

MOST_TOKENS = 1024  # of prompt and response where nobody says: longer rows cost memory that few laptops have


# Settings that are filled in here when nobody sets them.
FILLED = (
    "training.learning_rate",
    "device",
    "data.max_length",
    "data.max_prompt_length",
    "samples_per_prompt",
    "method.temperature",
    "sampling.temperature",
    "method.max_new_tokens",
    "sampling.max_new_tokens",
)


class Facts(NamedTuple):
    """What settings depend on of the model that is trained."""

    parameters: int
    context: int | None  # tokens; None = no limit known


def facts_of(model: Any) -> Facts:
    """Size and context of a loaded model; an adapter's own weights are counted too."""
    config = getattr(model, "get_base_model", lambda: model)().config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return Facts(sum(p.numel() for p in model.parameters()), getattr(text, "max_position_embeddings", None))


def with_device(config: RunConfig) -> RunConfig:
    """ "auto" as the device that it means here."""
    return config.fill("device", _best_device(), "this machine") if config.device == "auto" else config


def resolved(config: RunConfig, facts: Facts) -> RunConfig:
    """The settings with nothing left open; resolving twice changes nothing.

    Raises:
        ConfigError: a length does not fit the model, or two temperatures disagree.
    """
    method = config.method.settings
    if config.is_default("training.learning_rate"):
        rate = default_learning_rate(method.trains, method.reads, facts.parameters, lora=config.lora is not None)
        config = config.fill("training.learning_rate", rate.value, rate.source)
    if config.data.max_length is None:
        length = min(MOST_TOKENS, facts.context or MOST_TOKENS)
        source = "the model's context" if length == facts.context else f"default: {MOST_TOKENS}"
        config = config.fill("data.max_length", length, source)
    elif facts.context is not None and config.data.max_length > facts.context:
        raise ConfigError(
            f"data.max_length: found {config.data.max_length}, expected at most the {facts.context} tokens that the model "
            "can hold."
        )
    return _for_sampling(config) if method.reads == "prompts" else config


def require_all(config: RunConfig) -> None:
    """Refuse what cannot start, before anything is loaded.

    Raises:
        ConfigError: no data, no reward where the method needs one, or settings that cannot be had together.
    """
    method = config.method.settings
    if config.data.train is None:
        raise ConfigError(
            f'no data given: {config.method.name} reads {method.reads}. Give --data, or "data:" in the file.'
        )
    if "reward" in method.needs and "reward" not in method.trains and config.reward is None:
        raise ConfigError(
            f"{config.method.name} needs a reward. Give --reward: a reward model's folder (runs/reward/model), a classifier, "
            "or a Python function module:name."
        )
    group_size = getattr(method, "group_size", 1)
    if group_size > 1 and config.samples_per_prompt < 2 and not config.is_default("samples_per_prompt"):
        raise ConfigError(
            f"{config.method.name} compares the responses to one prompt with each other. samples_per_prompt: found "
            f"{config.samples_per_prompt}, expected 2 or more; {group_size} unless it is set."
        )
    if config.environment is not None and method.reads != "prompts":
        raise ConfigError(
            f"environment: {config.method.name} samples nothing, so there is nobody to answer. Leave it out, or take a method "
            "that reads prompts."
        )
    check_ahead(config.training, method, environment=config.environment is not None, filters=config.sampling.filters)
    _check_importance(config)
    _check_sharing(config)
    if config.engine == "vllm":
        _require_engine(config)
    if config.training.old_logprobs == "sampler" and (reason := _inexact(config)):
        raise ConfigError(f"training.old_logprobs=sampler: {reason}")
    if isinstance(config.model, dict) and config.tokenizer is None:
        raise ConfigError("a model from scratch has no tokenizer of its own. Give --tokenizer FOLDER.")


def _check_importance(config: RunConfig) -> None:
    """Importance weights are those of responses that an older policy drew; set for a run that has none, they say nothing.

    A run's own ``config.yaml`` names every setting, so the default written out is no sign that somebody wanted it.
    """
    for key in ("importance", "importance_max"):
        found = getattr(config.training, key)
        if not config.training.rollouts_ahead and found != getattr(TrainingSettings, key):
            raise ConfigError(
                f"{_at(config, f'training.{key}')}training.{key}: found {found}, but training.rollouts_ahead is 0: every "
                "response is the policy's own, and has no weight. Leave it out, or set training.rollouts_ahead=1."
            )


def _check_sharing(config: RunConfig) -> None:
    """What the settings alone say of roles on one trunk; whether the bases are the same is seen when they are loaded."""
    name, method, sharing = config.method.name, config.method.settings, config.sharing
    if sharing in ("separate", "reference") or len(method.needs) == 1:
        return
    found = f"{_at(config, 'sharing')}sharing={sharing}"
    if sharing == "value_head":
        if "value" not in method.needs:
            raise ConfigError(f"{found}: {name} has no value model. Take sharing=trunk, with --lora.")
        if getattr(method, "trust_region", None) is not None:
            raise ConfigError(
                f"{found}: {name} moves the policy by its surrogate alone, and a value loss on the same trunk would move it too. "
                "Take sharing=trunk."
            )
        if config.value is not None:
            raise ConfigError(
                f"{found}: the value is a new head on the policy; value={config.value} has no place. Leave value out, or take "
                "sharing=trunk."
            )
        return
    if config.lora is not None:
        return
    if not _is_adapter(config.model):
        raise ConfigError(
            f"{found} needs a trunk that training leaves alone, and model={config.model} is trained whole. Give --lora, or an "
            "adapter folder as the model; or take sharing=reference."
        )
    if "value" in method.needs and config.value is not None and not _is_adapter(config.value):
        raise ConfigError(
            f"{_at(config, 'value')}value={config.value}: found a whole model, expected with sharing=trunk an adapter with a "
            "head on the policy's base: there is nothing of it that could learn beside the trunk. Give the model/ folder of "
            "a reward trained with --lora from that base, or --lora for a new adapter, or take sharing=reference."
        )


def _is_adapter(model: object) -> bool:
    return isinstance(model, str) and adapter_config(str(Path(model).expanduser())) is not None


def _at(config: RunConfig, key: str) -> str:
    """Where a setting was written, to begin a message with."""
    return f"{place}: " if (place := config.place_of(key)) else ""


def _require_engine(config: RunConfig) -> None:
    """vLLM is there, and the method draws from the policy alone."""
    name, method = config.method.name, config.method.settings
    others = sorted({"reference", "mixture"}.intersection(getattr(method, "drawn_by", ())))
    if others:
        raise ConfigError(
            f'engine: {name} draws from a {" and a ".join(others)} too, and "vllm" samples the policy alone. Set '
            "engine=embedded."
        )
    if "policy" not in method.needs:
        raise ConfigError(f"engine: {name} trains no policy, so there is nobody to sample. Leave it out.")
    if config.training.rollouts_ahead:
        raise ConfigError(
            'engine: "vllm" draws while nothing else computes; training.rollouts_ahead = 1 needs the embedded sampler. Set '
            "training.rollouts_ahead=0 or engine=embedded."
        )
    check_engine(config.engine)


def may_keep_logprobs(config: RunConfig) -> bool:
    """With ``training.old_logprobs=auto``: do the settings allow it?"""
    return config.device == "cpu" and _inexact(config) is None


def _inexact(config: RunConfig) -> str | None:
    """Why what the sampler says of its tokens is not what the trainer would say, up to float32's rounding, or why no first
    look would find that out; None = it is, and is checked."""
    name, method = config.method.name, config.method.settings
    if method.reads != "prompts":
        return f"{name} samples nothing. Leave it out."
    advice = "Set training.old_logprobs=trainer."
    if config.dtype != "float32" or config.engine != "embedded":
        return (
            f"found dtype={config.dtype}, engine={config.engine}; the sampler agrees with the trainer to the last digits in "
            f"float32 with the embedded one only. {advice}"
        )
    others = {
        "training.rollouts_ahead": config.training.rollouts_ahead,
        "environment": config.environment is not None,
        "lora.dropout": config.lora is not None and config.lora.dropout,
    }
    if what := next((key for key, is_on in others.items() if is_on), None):
        return f"with {what} the log-probs of the draw are not those of the policy's rows. {advice}"
    look = "ratio" if getattr(method, "off_policy", "") == "weights" else getattr(method, "first_look", "")
    drawn_by = getattr(method, "drawn_by", ("policy",))
    if "policy" not in drawn_by or (len(drawn_by) > 1 and look != "ratio"):
        return f"{name} draws from others than the policy, too. {advice}"
    if not look:
        return f"{name} does not say what of its loss would check them. {advice}"
    if look == "pairs" and config.sampling.temperature != 1:
        return (
            f"found sampling.temperature={config.sampling.temperature:g}; {name} trains the policy at temperature 1, so its "
            f"loss cannot check what was drawn at another. {advice}"
        )
    return None


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# Settings that a method shares with the sampler, and why they cannot differ.
_SAME_IN_SAMPLING = {
    "temperature": "The log-probabilities must be those of the distribution that is sampled",
    "max_new_tokens": "The method counts a response's tokens against the most that can be sampled",
}


def _the_same(config: RunConfig, name: str, why: str) -> RunConfig:
    """One value of ``method.name`` and ``sampling.name``: whichever was set."""
    mine, sampled = getattr(config.method.settings, name), getattr(config.sampling, name)
    if mine == sampled:
        return config
    if config.is_default(f"method.{name}"):
        return config.fill(f"method.{name}", sampled, f"sampling.{name}")
    if config.is_default(f"sampling.{name}"):
        return config.fill(f"sampling.{name}", mine, f"method.{name}")
    raise ConfigError(
        f"method.{name} ({mine:g}) and sampling.{name} ({sampled:g}) differ. {why}: set sampling.{name} only."
    )


def _of_all_turns(config: RunConfig) -> RunConfig:
    """A method that counts tokens against the most that there can be: ``sampling.max_new_tokens`` is that of one turn."""
    assert config.environment is not None
    most = config.sampling.max_new_tokens * config.environment.max_turns
    mine = getattr(config.method.settings, "max_new_tokens", most)
    if mine == most:
        return config
    if config.is_default("method.max_new_tokens"):
        return config.fill("method.max_new_tokens", most, "sampling.max_new_tokens * environment.max_turns")
    raise ConfigError(
        f"method.max_new_tokens ({mine}) is not sampling.max_new_tokens * environment.max_turns ({most}), the most tokens of "
        "a conversation. Set the latter two only."
    )


def _for_sampling(config: RunConfig) -> RunConfig:
    """The method's temperature and length are the sampler's; the response's room is kept free in the prompt."""
    method = config.method.settings
    group_size = getattr(method, "group_size", 1)
    if config.is_default("samples_per_prompt") and config.samples_per_prompt != group_size:
        config = config.fill("samples_per_prompt", group_size, f"default: {config.method.name}")
    for name, why in _SAME_IN_SAMPLING.items():
        if name == "max_new_tokens" and config.environment is not None:
            config = _of_all_turns(config)
        elif hasattr(method, name):
            config = _the_same(config, name, why)
    length = config.data.max_length or 0
    if config.data.max_prompt_length is None:
        room = length - config.sampling.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"sampling.max_new_tokens ({config.sampling.max_new_tokens}) leaves no room for a prompt within data.max_length "
                f"({length}). Lower the first or raise the second."
            )
        config = config.fill("data.max_prompt_length", room, "data.max_length - sampling.max_new_tokens")
    return config
