"""What the sampler refuses, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from palate.errors import ConfigError, DataError, ModelError
from palate.generation.sampler import SamplingSettings, sample


@dataclass
class Record:
    source: str


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    return AutoModelForCausalLM.from_config(config)


def run(model: Any, prompts: Any, **options: Any) -> Any:
    options = {"stop_token_ids": [2], "generator": torch.Generator().manual_seed(0)} | options
    return sample(model, prompts, SamplingSettings(max_new_tokens=4), **options)


def test_a_prompt_that_leaves_no_room_is_named(model: Any) -> None:
    with pytest.raises(DataError, match=r"prompt 1 has 12 tokens .* context is 12 tokens"):
        run(model, [[3], [4] * 12])
    with pytest.raises(DataError, match=r"^prompts.jsonl:7: prompt 1 has 12 tokens"):
        run(model, [[3], [4] * 12], records=[Record("prompts.jsonl:6"), Record("prompts.jsonl:7")])
    assert run(model, [[3], [4] * 11]).response_mask.sum(-1)[1] == 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[3], []], "prompt 1 has no tokens"),
        ([[20]], "prompt 0 holds token 20, but .* 20 tokens"),
        ([[1, -100, 2]], "prompt 0 holds token -100"),
    ],
)
def test_a_prompt_that_is_none_is_named(model: Any, prompts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(model, prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt = 0"),
        ({"max_batch_rows": 0}, "max_batch_rows = 0"),
        ({"stop_token_ids": [2, 20]}, "stop token 20"),
        ({"records": []}, "0 records for 1 prompts"),
    ],
)
def test_requests_out_of_range_are_named(model: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(model, [[3]], **options)


def test_nan_weights_are_an_error_and_not_a_sample(model: Any) -> None:
    broken = AutoModelForCausalLM.from_config(model.config)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match="logits are NaN for 2 of 2 samples, first for prompt 0"):
        run(broken, [[3], [4]])


def test_a_model_without_keys_and_values_is_refused() -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(ModelError, match="MambaForCausalLM|layers keep a state"):
        run(AutoModelForCausalLM.from_config(config), [[3]])


def test_no_prompts_give_no_rows(model: Any) -> None:
    tokens = run(model, [])
    assert len(tokens) == 0 and tokens.extras["finished"].shape == (0,)
