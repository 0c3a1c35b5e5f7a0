"""LoRA through peft: new adapters, adapter folders in, and an adapter's sum with its base.

Low-rank adaptation, Hu et al. 2021, arXiv:2106.09685: W x + (alpha / rank) B A x with B = 0 at the start, so that a new
adapter changes nothing and the base stays the reference.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from palate.errors import ConfigError, ModelError
from palate.models.files import file_of
from palate.models.heads import HEAD_NAMES, base_of
from palate.models.quiet import first_line

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCORE_FILE = "score.json"  # an adapter folder has no config.json: the normalisation stands here


@dataclass(frozen=True)
class LoraSettings:
    """A new LoRA adapter.

    Attributes:
        rank: of the update, >= 1; 8 to 64 are usual.
        alpha: > 0; the update is multiplied by alpha / rank.
        dropout: in [0, 1), on the adapter's input. Anything but 0 makes PPO's first ratio differ from 1.
        target_modules: "all-linear" (every linear layer but the head) or names of layers, as peft takes them.
        init: of A: "kaiming" (peft's default) or "gaussian". B is 0 in both.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}; a whole number of at least 1 was expected.")
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha is {self.alpha}; a positive number was expected.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}; a number in [0, 1) was expected.")
        if self.init not in ("kaiming", "gaussian"):
            raise ConfigError(f'lora.init is "{self.init}"; "kaiming" or "gaussian" was expected.')


def is_adapted(model: nn.Module) -> bool:
    """Is it a peft model?"""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def add_lora(model: nn.Module, settings: LoraSettings, *, seed: int, scalar: bool) -> nn.Module:
    """The model in a new, trainable adapter. Its own weights are frozen; a scalar head is trained and saved along.

    Args:
        model: a plain Hugging Face model; it is changed in place.
        settings: of the adapter.
        seed: of A's draw; torch's global generators are left as they were.
        scalar: a reward or value model.
    Raises:
        ConfigError: ``target_modules`` names no layer of the model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft declares int and computes with floats
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        init_lora_weights=True if settings.init == "kaiming" else "gaussian",
        task_type=TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM,
        modules_to_save=[name for name in HEAD_NAMES if hasattr(model, name)] if scalar else None,
    )
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            _ignore_pefts_own()
            torch.manual_seed(seed)
            return get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        layers = sorted(
            {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2}
        )
        raise ConfigError(
            f"lora.target_modules {targets!r} names no layer of {type(model).__name__}. "
            f'Found: {", ".join(layers)}. Or take "all-linear".'
        ) from error


def adapter_config(where: str) -> dict[str, Any] | None:
    """The adapter's own description, or None when ``where`` is not an adapter folder (or hub name)."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        path = find_adapter_config_file(where)
    except OSError:  # not there or no network: loading it as a model gives the error with the right words
        return None
    return json.loads(Path(path).read_text("utf-8")) if path else None


def adapter_has_head(where: str) -> bool:
    """Does the adapter bring a scalar head of its own?"""
    from safetensors import safe_open

    path = file_of(where, ADAPTER_WEIGHTS)
    if path is None:
        raise ModelError(f"{where}: an {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}. Save the adapter again.")
    with safe_open(path, framework="pt") as file:
        return any(part in HEAD_NAMES for key in list(file.keys()) for part in key.split("."))


def attach_adapter(model: nn.Module, where: str, *, trainable: bool, scalar: bool) -> nn.Module:
    """The model in the adapter of a folder or hub name.

    Raises:
        ModelError: the adapter does not belong to this base, or lacks weights.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(where)
    if scalar and str(config.task_type) != "SEQ_CLS":
        config.task_type = None  # an SFT adapter under a scalar head: only its layers matter
    config.inference_mode = not trainable
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            _ignore_pefts_own()
            return PeftModel.from_pretrained(model, where, config=config, is_trainable=trainable)  # type: ignore[arg-type]
    except (ValueError, RuntimeError, KeyError, UserWarning) as error:
        raise ModelError(
            f"{where}: this adapter does not fit its base {config.base_model_name_or_path} ({type(model).__name__}): "
            f"{first_line(error)} Load it with the base that it was trained on."
        ) from error


def _ignore_pefts_own() -> None:
    """Warnings that nobody can act on: GPT-2's Conv1D, which peft corrects itself, and a name of transformers."""
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def merge_adapter(model: nn.Module) -> nn.Module:
    """The plain model with the adapter added into its weights, in their dtype (bf16 rounds the sum).

    The result has no place on disk any more; ``save_model`` then writes whole models, not adapters.
    """
    merged = model.merge_and_unload()  # type: ignore[operator]
    merged.name_or_path = merged.config._name_or_path = ""
    return merged


def base_folder(model: nn.Module) -> str:
    """Folder or hub name of an adapter's base; "" when the base exists in memory only."""
    return next(iter(model.peft_config.values())).base_model_name_or_path or ""  # type: ignore[operator,union-attr]


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def adds_nothing(model: nn.Module) -> bool:
    """Is the adapter exactly zero, as a new LoRA is: the same function with it on and off?"""
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = model.get_base_model()  # type: ignore[operator]
    if any(config.peft_type != "LORA" for config in model.peft_config.values()):  # type: ignore[operator,union-attr]
        return False
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in inner.modules()):
        return False  # whole layers are trained along: they may differ from the base's
    weights = [w for layer in _lora_layers(inner).values() for w in _second_factors(layer)]
    return bool(weights) and not any(bool(w.any()) for w in weights)


def _second_factors(layer: Any) -> list[Tensor]:
    return [module.weight for module in layer.lora_B.values()] + list(layer.lora_embedding_B.values())


def stands_on_adapted(model: nn.Module) -> bool:
    """Is it a plain model whose trunk is in somebody's adapter: a value head on the policy?"""
    return not is_adapted(model) and any(hasattr(module, "base_layer") for module in model.modules())


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Base plus adapter under the plain model's names, for saving; the model itself stays as it is.

    Args:
        model: a peft model, or a plain one of which ``stands_on_adapted``.
    Raises:
        ModelError: the adapter is not a LoRA.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner, loras = base_of(model), _lora_layers(base_of(model))
    layers = {name: module for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}
    configs = model.peft_config.values() if is_adapted(model) else ()  # type: ignore[operator,union-attr]
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in configs} - {"LORA"}
    kinds |= {type(layer).__name__ for name, layer in layers.items() if name not in loras}
    kinds |= {"DoRA" for layer in loras.values() if any((getattr(layer, "use_dora", None) or {}).values())}
    if kinds:
        raise ModelError(
            f"only plain LoRA adapters can be merged while saving; this one is {', '.join(sorted(kinds))}."
        )
    active = dict.fromkeys(adapter for layer in layers.values() for adapter in layer.active_adapters)
    weights: dict[str, Tensor] = {}
    for name, tensor in inner.state_dict().items():
        if ".lora_" in name or ".original_module." in name:
            continue
        for adapter in active:
            name = name.replace(f".modules_to_save.{adapter}", "")
        weights[name.replace(".base_layer", "")] = tensor
    for name, layer in loras.items():
        key = f"{name}.weight"
        delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        weights[key] = (weights[key] + delta.to(weights[key].dtype)).cpu()
    return weights
