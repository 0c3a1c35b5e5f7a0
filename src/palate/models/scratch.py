"""Models from scratch, with random weights: what the demo, tests and experiments begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from palate.errors import ConfigError, PalateError
from palate.models.attention import needed_attention
from palate.models.checks import check_tokenizer
from palate.models.dropout import without_dropout, without_dropout_config
from palate.models.quiet import did_you_mean, first_line, quiet


def new_policy(config: Mapping[str, Any], tokenizer: Any, seed: int) -> nn.Module:
    """A causal language model from scratch, with random weights, in float32 on the CPU.

    Args:
        config: {"architecture": "llama", "hidden_size": 64, ...}: a model type of transformers and fields of its
            config. ``vocab_size`` is the tokenizer's when not given; the special tokens' ids are the tokenizer's.
        tokenizer: of the model.
        seed: same seed, same weights; torch's global generators are left as they were.
    Raises:
        ConfigError: unknown architecture or field, or sizes that contradict each other.
        ModelError: ``vocab_size`` is smaller than the tokenizer's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    architecture = str(fields.pop("architecture", ""))
    known = _known_fields(architecture)
    for key in fields:
        if key not in known:
            raise ConfigError(f'model: unknown field "{key}" of architecture {architecture}.{did_you_mean(key, known)}')
    fields.setdefault("vocab_size", max(tokenizer.get_vocab().values()) + 1)
    # The pad id waits until the weights are drawn: its embedding would be zeroed, and it may be the end of text.
    fields |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    try:
        settings = without_dropout_config(AutoConfig.for_model(architecture, **fields))
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, **needed_attention(settings))
    except PalateError:
        raise
    except Exception as error:  # transformers' validators raise many kinds; all speak about the given fields
        raise ConfigError(f"model: no {architecture} can be built from {fields}. {first_line(error)}") from error
    model.config.pad_token_id = tokenizer.pad_token_id
    check_tokenizer(model, tokenizer, f"new {architecture}")
    model.get_input_embeddings().padding_idx = None  # as load_policy does: masks make it needless
    return without_dropout(model).eval()


def _known_fields(architecture: str) -> set[str]:
    """The names of a model type's config fields.

    Raises:
        ConfigError: no such model type.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if architecture not in CONFIG_MAPPING:
        hint = did_you_mean(architecture, CONFIG_MAPPING.keys())
        raise ConfigError(
            f'model: unknown architecture "{architecture}".{hint} Write a model type of transformers, e.g. llama.'
        )
    default = AutoConfig.for_model(architecture)
    return (set(default.to_dict()) | set(vars(default)) | set(default.attribute_map)) - {
        "model_type",
        "transformers_version",
    }
