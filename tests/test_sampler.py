"""The sampler against slow definitions: uncached forwards, an enumerable model, transformers' greedy decoding."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

import drawing
from drawing import PROMPTS, STOP, check_rows, same
from palate.generation.sampler import SamplingSettings, sample
from palate.types import Tokens

VOCABULARY = 61
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # far from uniform, so that a wrong column or position shows
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SMALL, num_key_value_heads=4),
    "llama_gqa": LlamaConfig(**_SMALL, num_key_value_heads=2),
    "qwen2": Qwen2Config(**_SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "gemma": GemmaConfig(**_SMALL, num_key_value_heads=1, head_dim=12),
    "gemma3_mixed_windows": Gemma3TextConfig(
        **_SMALL,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral_window": MistralConfig(**_SMALL, num_key_value_heads=2, sliding_window=7),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3),
}


def build(name: str, attention: str = "sdpa", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).eval()


draw = partial(drawing.draw, sample)


@torch.no_grad()
def uncached_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits [T, V] of one row alone, without cache, mask or padding."""
    return model(input_ids=ids[None], use_cache=False).logits[0].float()


def check_logprobs(model: nn.Module, tokens: Tokens, temperature: float, tolerance: float = 1e-4) -> None:
    """Every response token's log-prob is log-softmax(logits / temperature) of a forward of that row alone."""
    for row in range(len(tokens)):
        ids = tokens.ids[row][tokens.attention_mask[row]]
        logprobs = (uncached_logits(model, ids) / temperature).log_softmax(-1)
        expected = torch.zeros(tokens.ids.shape[1])
        expected[1 : len(ids)] = logprobs[:-1].gather(-1, ids[1:, None])[:, 0]
        expected[~tokens.response_mask[row]] = 0
        torch.testing.assert_close(tokens.extras["sampler_logprobs"][row], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("temperature", "copies"), [(1.0, 1), (0.7, 8)])
def test_logprobs_equal_an_uncached_forward_of_the_row_alone(name: str, temperature: float, copies: int) -> None:
    model = build(name)
    tokens = draw(model, temperature=temperature, samples_per_prompt=copies)
    assert len(tokens) == len(PROMPTS) * copies
    check_logprobs(model, tokens, temperature)


@pytest.mark.parametrize("name", ["llama_gqa", "mistral_window", "gpt2"])
def test_logprobs_are_right_with_eager_attention(name: str) -> None:
    model = build(name, attention="eager")
    check_logprobs(model, draw(model, samples_per_prompt=3), 1.0)


def test_logprobs_are_right_when_no_row_needs_padding() -> None:
    model = build("llama_gqa")
    check_logprobs(model, draw(model, [[5, 9, 11], [7, 7, 7]], samples_per_prompt=2), 1.0)


def test_logprobs_are_right_when_prompts_are_read_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palate.generation.plain._PROMPT_TOKENS_AT_ONCE", {"cpu": 8})
    model = build("mistral_window")
    tokens = draw(model, samples_per_prompt=2)
    check_logprobs(model, tokens, 1.0)


def test_bfloat16_is_near_float32() -> None:
    """bf16 carries 8 bits: logits of size ~10 are right to about 0.05, a log-prob to a few times that."""
    model = build("llama_gqa").to(torch.bfloat16)
    tokens = draw(model, samples_per_prompt=4)
    assert tokens.extras["sampler_logprobs"].dtype == torch.float32
    check_logprobs(model, tokens, 1.0, tolerance=0.3)


def test_an_adapter_is_sampled_with_and_left_alone() -> None:
    from peft import LoraConfig, get_peft_model

    base = build("llama_gqa")
    before = draw(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tokens = draw(model)
    assert not same(before, tokens)
    check_logprobs(model.eval(), tokens, 1.0)
    with model.disable_adapter():
        assert same(before, draw(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers_generate(name: str) -> None:
    model = build(name)
    tokens = draw(model, temperature=0.0)
    for row, prompt in enumerate(PROMPTS):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=STOP,
            pad_token_id=0,
        )[0]
        assert tokens.ids[row][tokens.attention_mask[row]].tolist() == expected.tolist()
        assert bool(tokens.extras["finished"][row]) == (expected[-1].item() in STOP)
    check_logprobs(model, tokens, 1.0)


def test_rows_are_ordered_padded_and_masked() -> None:
    check_rows(draw(build("llama"), samples_per_prompt=3, records=list("abcde")))


def test_min_new_tokens_holds_stop_tokens_back() -> None:
    model = build("llama")
    tokens = draw(model, samples_per_prompt=8, min_new_tokens=6)
    for row in range(len(tokens)):
        drawn = tokens.ids[row][tokens.response_mask[row]]
        assert not torch.isin(drawn[:6], torch.tensor(STOP)).any()
    assert tokens.extras["finished"].any()
    check_logprobs(model, tokens, 1.0)  # of the model's distribution, not of the one without stop tokens


def test_without_stop_tokens_every_response_is_full() -> None:
    tokens = draw(build("llama"), stop_token_ids=[])
    assert (tokens.response_mask.sum(-1) == 20).all() and not tokens.extras["finished"].any()


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_a_row_is_cut_at_the_end_of_the_context(name: str) -> None:
    model = build(name)
    tokens = draw(model, [[5] * 90, [6], [7] * 95], stop_token_ids=[], samples_per_prompt=2)
    assert tokens.response_mask.sum(-1).tolist() == [6, 6, 20, 20, 1, 1]
    assert not tokens.extras["finished"].any()
    check_logprobs(model, tokens, 1.0)


def test_same_seed_same_samples_and_the_generator_moves_on_by_one_draw() -> None:
    model = build("llama")
    assert same(draw(model), draw(model)) and not same(draw(model), draw(model, seed=1))
    states = []
    for copies, new in ((1, 3), (4, 20)):
        generator = torch.Generator().manual_seed(0)
        settings = SamplingSettings(max_new_tokens=new)
        options: dict[str, Any] = {"samples_per_prompt": copies, "stop_token_ids": STOP, "generator": generator}
        first = sample(model, PROMPTS, settings, **options)
        states.append(generator.get_state())
        assert not same(first, sample(model, PROMPTS, settings, **options))
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["llama_gqa", "mistral_window", "gpt2"])
def test_batching_never_changes_a_sample(name: str) -> None:
    """True in fp32 for these seeds; a draw that falls between two roundings of a sum would differ (one in ~10^6)."""
    model = build(name)
    together = draw(model, samples_per_prompt=4, max_batch_rows=64)
    for rows in (1, 3, 9):
        other = draw(model, samples_per_prompt=4, max_batch_rows=rows)
        assert same(together, other)
        torch.testing.assert_close(
            together.extras["sampler_logprobs"], other.extras["sampler_logprobs"], atol=1e-4, rtol=0
        )


def test_a_sample_does_not_depend_on_the_other_prompts_samples_or_limits() -> None:
    model = build("llama")
    whole = draw(model, samples_per_prompt=4)
    fewer = draw(model, PROMPTS[:2], samples_per_prompt=2)
    assert same(fewer, whole.select(torch.tensor([0, 1, 4, 5])))
    short = draw(model, samples_per_prompt=4, max_new_tokens=5)
    for row in range(len(whole)):
        drawn = whole.ids[row][whole.response_mask[row]][:5]
        assert short.ids[row][short.response_mask[row]].tolist() == drawn.tolist()


def test_samples_follow_the_models_exact_distribution() -> None:
    """6 tokens, 3 steps, one of them stops: 1 + 5 + 25 + 125 - ... outcomes, each with its exact probability.

    Pearson's statistic of n = 20,000 samples over m merged cells has mean m - 1 and standard deviation sqrt(2 (m - 1));
    five deviations are allowed, and the seed is fixed. Temperature 0.8, so that the temperature is in the test.
    """
    torch.manual_seed(3)
    config = LlamaConfig(**(_SMALL | {"vocab_size": 6, "hidden_size": 16, "num_hidden_layers": 1}))
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt, stop, steps, n = [1, 3], 2, 3, 20_000
    exact: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(6), repeat=steps):
        ids = torch.tensor([*prompt, *path])
        logprobs = (uncached_logits(model, ids) / 0.8).log_softmax(-1)
        length = next((i + 1 for i, token in enumerate(path) if token == stop), steps)
        exact[path[:length]] = math.exp(sum(float(logprobs[1 + i, path[i]]) for i in range(length)))
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    tokens = draw(
        model,
        [prompt],
        temperature=0.8,
        max_new_tokens=3,
        samples_per_prompt=n,
        stop_token_ids=[2],
        max_batch_rows=5000,
    )
    counts = Counter(tuple(tokens.ids[row][tokens.response_mask[row]].tolist()) for row in range(n))
    assert counts.keys() <= exact.keys()
    cells = [(counts[path], n * p) for path, p in exact.items() if n * p >= 5]
    cells.append((n - sum(seen for seen, _ in cells), n - sum(expected for _, expected in cells)))
    statistic = sum((seen - expected) ** 2 / max(expected, 1) for seen, expected in cells)
    assert len(cells) > 30
    assert statistic < len(cells) - 1 + 5 * math.sqrt(2 * (len(cells) - 1))


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama_gqa")
    model.train()
    model.model.layers[1].eval()  # type: ignore[union-attr, index, operator]
    modes = [module.training for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    tokens = draw(model)
    assert [module.training for module in model.modules()] == modes
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert model.config.to_dict() == config  # type: ignore[union-attr, operator]
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    # What comes back may be used in training: no inference tensors, and neither does the model hold any.
    assert not any(tensor.is_inference() for tensor in (tokens.ids, tokens.extras["sampler_logprobs"]))
    assert not any(buffer.is_inference() for buffer in model.buffers())
    loss = model(input_ids=tokens.ids, labels=tokens.ids).loss
    loss.backward()


def test_the_model_is_left_as_it_was_when_sampling_fails() -> None:
    model = build("llama_gqa").train()
    with pytest.raises(ZeroDivisionError):
        draw(model, progress=lambda done, total: 1 / 0)
    assert model.training and model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_dropout_is_off() -> None:
    torch.manual_seed(0)
    config = GPT2Config(**(CONFIGS["gpt2"].to_diff_dict() | {"resid_pdrop": 0.5, "embd_pdrop": 0.5}))
    model = AutoModelForCausalLM.from_config(config).train()
    tokens = draw(model)
    check_logprobs(model.eval(), tokens, 1.0)


def test_progress_counts_every_row_once() -> None:
    seen: list[tuple[int, int]] = []
    draw(
        build("llama"), samples_per_prompt=4, max_batch_rows=6, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (20, 20) and {total for _, total in seen} == {20}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_logprobs_and_samples_equal_the_cpus() -> None:
    model = build("llama_gqa")
    on_cpu = draw(model, samples_per_prompt=4)
    on_cuda = draw(model.cuda(), samples_per_prompt=4)
    assert on_cuda.ids.is_cuda and torch.equal(on_cpu.ids, on_cuda.ids.cpu())
    torch.testing.assert_close(
        on_cpu.extras["sampler_logprobs"], on_cuda.extras["sampler_logprobs"].cpu(), atol=1e-3, rtol=0
    )
