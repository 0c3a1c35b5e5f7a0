"""Models in: a policy, a scalar model or a tokenizer from a Hugging Face folder, a PEFT adapter folder or a hub name.

What comes back is the plain Hugging Face model (or peft's model around it), checked: weights finite and complete, read
from left to right, vocabulary as large as the tokenizer's, dropout 0, a scalar head in float32 as the file has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from palate.errors import ModelError
from palate.models import adapters
from palate.models.adapters import LoraSettings
from palate.models.checks import check_left_to_right, check_tokenizer, check_weights, refuse_missing, same_vocabulary
from palate.models.devices import device_of
from palate.models.dropout import without_dropout
from palate.models.heads import base_of, normalisation
from palate.models.places import adapter_base, config_of, is_classifier, place_of
from palate.models.precision import use_working_copies
from palate.models.pretrained import pretrained, read_score_file, scalar_from_folder
from palate.models.save import save_model
from palate.models.scratch import new_policy
from palate.models.sharing import stand_on
from palate.models.tokenizer import load_tokenizer

__all__ = [
    "LoraSettings",
    "check_tokenizer",
    "load_policy",
    "load_scalar",
    "load_tokenizer",
    "new_policy",
    "same_vocabulary",
    "save_model",
]


def load_policy(
    where: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    lora: LoraSettings | None = None,
    trainable: bool = True,
    seed: int = 0,
    keep_dropout: bool = False,
    tokenizer: Any = None,
    trunk: nn.Module | None = None,
) -> nn.Module:
    """A causal language model as policy or reference.

    Args:
        where: a model folder, an adapter folder, or a hub name. Only safetensors are read. An adapter folder gives base
            and adapter as one peft model whose adapter is trained on; with ``lora`` the adapter is merged into the base
            first, so that the new adapter switched off is the model of the folder (the SFT model, say) and serves as
            the reference for nothing.
        dtype: "float32"; "bfloat16" (weights and arithmetic; adapters and scalar heads stay in float32); "mixed" (bf16
            products, but the weights that learn are float32: full fine-tuning with small learning rates needs it,
            because an update of less than 1/512 of a weight is lost in bf16). How mixed is done depends on the device:
            on a GPU by autocast; on a CPU the model's parameters are bf16 copies of float32 masters, which
            ``training.optimizer`` steps (``models/precision.py``), and what does not learn is bf16.
        device: "cpu", "cuda", "cuda:1", ...
        lora: a new adapter, the only thing that is trained.
        trainable: False freezes every weight.
        seed: of the new adapter.
        keep_dropout: dropouts as the model's config has them. Otherwise all are 0, as preference learning and PPO need.
        tokenizer: to check the vocabulary against; None = the folder's own.
        trunk: an adapted model of the same base, whose frozen weights this one is to use instead of its own copies.
    Raises:
        ModelError: not a causal language model, no tokenizer, weights missing, NaN or Inf, vocabulary too small; another
            base than the trunk's.
        ConfigError: a dtype, device or LoRA setting that does not exist.
    """
    place = place_of(where)
    adapter = adapters.adapter_config(place)
    base = adapter_base(place, adapter) if adapter else place
    config = config_of(base)
    if is_classifier(config.architectures):
        raise ModelError(
            f"{where}: this is a {config.architectures[0]} (a reward model or classifier), not a language model. Give the "
            "folder of a language model as policy, and this one as reward."
        )
    model, missing = pretrained("AutoModelForCausalLM", base, config, dtype, keep_dropout)
    refuse_missing(where, missing)
    check_tokenizer(model, tokenizer or load_tokenizer(where), where)
    if adapter:
        model = adapters.attach_adapter(model, place, trainable=trainable, scalar=False)
        model = adapters.merge_adapter(model) if lora else model
    model = _placed(model, where, device, trunk, trained_whole=trainable and lora is None)
    return _ready(model, lora, trainable=trainable, seed=seed, keep_dropout=keep_dropout, scalar=False)


def load_scalar(
    where: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    lora: LoraSettings | None = None,
    trainable: bool = True,
    seed: int = 0,
    keep_dropout: bool = False,
    tokenizer: Any = None,
    new_head: bool = True,
    trunk: nn.Module | None = None,
) -> nn.Module:
    """A reward or value model: one number a token, read off the hidden state by a float32 head.

    Args:
        where: a reward folder or hub name (any decoder with a one-label ``AutoModelForSequenceClassification`` head): its
            head and normalisation are taken, so a value model made from it says, at the last response token, what the
            reward says. A causal language model: a new head is drawn, N(0, 1 / (hidden + 1)). An adapter folder of a
            reward model: base, adapter and head, as one peft model; of a language model (SFT with LoRA): merged, and a
            new head drawn. With ``lora`` any old adapter is merged into the base first.
        dtype, device, lora, trainable, keep_dropout, tokenizer, trunk: as in ``load_policy``; the head is trained with the
            adapter and saved in its folder.
        seed: of the new head and the new adapter.
        new_head: False refuses what would need a new head: a reward to be used must have been trained.
    Raises:
        ModelError: several labels, no score head where one should be, an encoder (reads its first token), and what
            ``load_policy`` raises.
    """
    place = place_of(where)
    adapter = adapters.adapter_config(place)
    base = adapter_base(place, adapter) if adapter else place
    may_draw = new_head or (adapter is not None and adapters.adapter_has_head(place))
    model = scalar_from_folder(
        base, dtype, keep_dropout, seed, where=where, may_lack_head=adapter is not None, may_draw=may_draw
    )
    check_tokenizer(model, tokenizer or load_tokenizer(where), where)
    if adapter:
        own_head = adapters.adapter_has_head(place)
        if adapter.get("task_type") == "SEQ_CLS" and not own_head and not is_classifier(config_of(base).architectures):
            raise ModelError(
                f"{where}: this adapter of a classifier was saved without its score head, and its base {base} has none. "
                'The trained head is lost; train again with modules_to_save=["score"] (load_scalar does so).'
            )
        model = adapters.attach_adapter(model, place, trainable=trainable, scalar=True)
        read_score_file(model, place)
        model = model if own_head and not lora else adapters.merge_adapter(model)
    normalisation(model)  # raises on nonsense
    model = _placed(model, where, device, trunk, trained_whole=trainable and lora is None)
    return _ready(model, lora, trainable=trainable, seed=seed, keep_dropout=keep_dropout, scalar=True)


def _placed(
    model: nn.Module, where: str | Path, device: str | torch.device, trunk: nn.Module | None, *, trained_whole: bool
) -> nn.Module:
    """The model, checked, on its device, and on the trunk's weights if there is a trunk."""
    check_weights(model, where)
    if trunk is not None:
        assert adapters.is_adapted(model) or not trained_whole, "weights that are shared are never trained: give lora"
        if _is_mixed_on_cpu(base_of(model), device):
            use_working_copies(model, masters=False)  # as the trunk is held
        stand_on(model, trunk, where)
    _align(model)
    model = model.to(device_of(device))
    check_left_to_right(model, where)
    return model


def _align(model: nn.Module) -> None:
    """Weights in memory of their own, aligned as torch allocates it.

    They come as views into the mapped file, at any address, and matrix products round differently there: the same weights
    would then give last digits that depend on whether they were loaded, trained or copied.
    """
    for weight in model.parameters():
        if weight.data_ptr() % 64:
            weight.data = weight.data.clone()


def _ready(
    model: Any, lora: LoraSettings | None, *, trainable: bool, seed: int, keep_dropout: bool, scalar: bool
) -> Any:
    """Last touches: the new adapter, dropouts, what is trained."""
    inner = base_of(model)
    # An embedding never learns at its padding_idx, and the pad token may be the end of text. Masks make it needless.
    inner.get_input_embeddings().padding_idx = None
    if not adapters.is_adapted(model):
        model.requires_grad_(trainable)
    if not keep_dropout:
        without_dropout(model)
    if lora is not None:
        model = adapters.add_lora(model, lora, seed=seed, scalar=scalar)
    if not trainable:
        model.requires_grad_(False)
    if _is_mixed_on_cpu(inner, inner.device):
        del inner.compute_dtype
        use_working_copies(model)
    # Training mode only matters to dropout here; without it, evaluation mode keeps every other kind of noise off too.
    model.train(trainable and (keep_dropout or (lora is not None and lora.dropout > 0)))
    return model


def _is_mixed_on_cpu(inner: nn.Module, device: str | torch.device) -> bool:
    return getattr(inner, "compute_dtype", None) is not None and torch.device(device).type == "cpu"
