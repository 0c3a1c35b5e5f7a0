"""vLLM behind the sampler's call, really run: the contract of ``sampler.sample``, and weights that change under it.

A process may hold several engines; making one takes seconds, so most tests share one. Models have heads of 32, the
smallest that vLLM's attention on a CPU knows.

Tolerances: vLLM multiplies in another order and with other kernels. On these models a float32 log-prob differs by some
1e-6 nats; 1e-4 is allowed, as between the embedded sampler and an uncached forward. In bfloat16 a log-prob has 8 bits.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from typer.testing import CliRunner

from drawing import PROMPTS, STOP, check_rows, draw, same
from palate.cli import app
from palate.errors import ConfigError, DataError, ModelError
from palate.generation.sampler import SamplingSettings, sample
from palate.models.forward import token_logprobs
from palate.models.load import save_model
from palate.types import Tokens
from tiny import tiny, tokenizer_of

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: see docs/engines.md", allow_module_level=True)

from palate.generation.vllm import VllmSampler

VOCABULARY = 61
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "eos_token_id": 5,  # not among the stop tokens below: what the model's folder says must not matter
    "initializer_range": 0.15,
}
LLAMA = LlamaConfig(**_SMALL, num_key_value_heads=1)
OTHERS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_positions=96, initializer_range=0.3),
    "qwen2_tied": Qwen2Config(**_SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    # Without the soft cap of its attention, which transformers leaves out with SDPA and vLLM does not.
    "gemma2_tied_without_a_head": Gemma2Config(
        **_SMALL, num_key_value_heads=1, head_dim=32, attn_logit_softcapping=None
    ),
    "mistral_window": MistralConfig(**_SMALL, num_key_value_heads=2, sliding_window=7),
    "gemma3_mixed_windows": Gemma3TextConfig(
        **_SMALL,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def build(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with other weights in the same tensors, as a step of training leaves it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model


@pytest.fixture(scope="module")
def engine() -> VllmSampler:
    return VllmSampler()


@pytest.fixture
def model() -> nn.Module:
    return build(LLAMA)


def check_logprobs(model: nn.Module, tokens: Tokens, temperature: float = 1.0, tolerance: float = 1e-4) -> None:
    """Those of the trainer, at every response token and nowhere else."""
    with torch.no_grad():
        expected = token_logprobs(model, tokens, temperature=temperature)
    torch.testing.assert_close(tokens.extras["sampler_logprobs"], expected, atol=tolerance, rtol=0)


# --- the contract of sampler.sample -----------------------------------------------------------------------------------


def test_rows_are_ordered_padded_and_masked(engine: VllmSampler, model: nn.Module) -> None:
    tokens = draw(engine, model, samples_per_prompt=3, records=list("abcde"))
    check_rows(tokens)
    assert (tokens.ids[tokens.response_mask] == 5).any(), "the model's own end of text ends nothing here"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_p": 0.8, "top_k": 7, "min_new_tokens": 6}], ids=str
)
def test_logprobs_are_of_the_whole_softmax_at_the_temperature(
    temperature: float, filters: dict[str, Any], engine: VllmSampler, model: nn.Module
) -> None:
    tokens = draw(engine, model, temperature=temperature, samples_per_prompt=4, **filters)
    check_logprobs(model, tokens, temperature)


def test_greedy_equals_the_embedded_sampler(engine: VllmSampler, model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    options: dict[str, Any] = {"stop_token_ids": STOP, "generator": generator, "samples_per_prompt": 2}
    tokens = engine(model, PROMPTS, SamplingSettings(20, temperature=0.0), **options)
    assert same(tokens, draw(sample, model, temperature=0.0, samples_per_prompt=2))
    assert torch.equal(before, generator.get_state())
    check_logprobs(model, tokens)


def test_samples_follow_the_models_exact_distribution(engine: VllmSampler, model: nn.Module) -> None:
    """Pearson's statistic of n one-token responses at temperature 0.7 over m merged cells: mean m - 1, standard
    deviation sqrt(2 (m - 1)); five deviations are allowed, and the seed is fixed."""
    n = 3000
    tokens = draw(engine, model, [[5, 9, 11]], temperature=0.7, max_new_tokens=1, samples_per_prompt=n)
    with torch.no_grad():
        exact = n * (model(torch.tensor([[5, 9, 11]])).logits[0, -1] / 0.7).softmax(-1).double()
    seen = torch.bincount(tokens.ids[:, 3], minlength=VOCABULARY).double()
    common = exact >= 5
    seen, exact = (
        torch.cat([seen[common], seen[~common].sum()[None]]),
        torch.cat([exact[common], exact[~common].sum()[None]]),
    )
    assert len(seen) > 15
    freedom = len(seen) - 1
    assert float(((seen - exact) ** 2 / exact).sum()) < freedom + 5 * (2 * freedom) ** 0.5


def test_top_k_and_top_p_draw_from_the_same_tokens_as_the_embedded_sampler(
    engine: VllmSampler, model: nn.Module
) -> None:
    for filters in ({"top_k": 4}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.6}):
        drawn = [
            draw(each, model, [[8, 8]], temperature=0.7, max_new_tokens=1, samples_per_prompt=400, **filters).ids[:, 2]
            for each in (engine, sample)
        ]
        assert set(drawn[0].tolist()) == set(drawn[1].tolist()) and 1 < len(set(drawn[0].tolist())) < 30


def test_min_new_tokens_holds_back_the_stop_tokens_and_no_other(engine: VllmSampler, model: nn.Module) -> None:
    tokens = draw(engine, model, samples_per_prompt=8, min_new_tokens=6)
    first = torch.stack([tokens.ids[row][tokens.response_mask[row]][:6] for row in range(len(tokens))])
    assert not torch.isin(first, torch.tensor(STOP)).any()
    assert (first == 5).any() and tokens.extras["finished"].any()


def test_without_stop_tokens_every_response_is_full(engine: VllmSampler, model: nn.Module) -> None:
    tokens = draw(engine, model, stop_token_ids=[])
    assert (tokens.response_mask.sum(-1) == 20).all() and not tokens.extras["finished"].any()


def test_a_row_is_cut_at_the_end_of_the_context_and_at_max_length(engine: VllmSampler, model: nn.Module) -> None:
    prompts = [[5] * 90, [6], [7] * 95]
    tokens = draw(engine, model, prompts, stop_token_ids=[], samples_per_prompt=2)
    assert tokens.response_mask.sum(-1).tolist() == [6, 6, 20, 20, 1, 1]
    check_logprobs(model, tokens)
    tokens = draw(engine, model, [[5] * 9, [6]], stop_token_ids=[], max_length=12)
    assert tokens.response_mask.sum(-1).tolist() == [3, 11]


def test_same_seed_same_samples_and_the_generator_moves_on_by_one_draw(engine: VllmSampler, model: nn.Module) -> None:
    assert same(draw(engine, model), draw(engine, model)) and not same(draw(engine, model), draw(engine, model, seed=1))
    states = []
    for each in (engine, sample):
        generator = torch.Generator().manual_seed(0)
        settings = SamplingSettings(max_new_tokens=3)
        options: dict[str, Any] = {"samples_per_prompt": 2, "stop_token_ids": STOP, "generator": generator}
        first = each(model, PROMPTS, settings, **options)
        states.append(generator.get_state())
        assert not same(first, each(model, PROMPTS, settings, **options))
    assert torch.equal(*states)


def test_a_samples_seed_is_of_its_prompt_and_number_alone(engine: VllmSampler, model: nn.Module) -> None:
    """True in fp32 for these seeds; where rounding tips a draw, a row goes another way."""
    whole = draw(engine, model, samples_per_prompt=4)
    fewer = draw(engine, model, PROMPTS[:2], samples_per_prompt=2)
    assert same(fewer, whole.select(torch.tensor([0, 1, 4, 5])))
    placed = draw(engine, model, [PROMPTS[1], PROMPTS[1]], numbers=[(1, 3), (1, 0)])
    for row, of in enumerate((7, 4)):
        assert placed.ids[row][placed.response_mask[row]].tolist() == whole.ids[of][whole.response_mask[of]].tolist()


def test_no_prompts_no_rows(engine: VllmSampler, model: nn.Module) -> None:
    assert len(draw(engine, model, [])) == 0


def test_progress_counts_every_row(engine: VllmSampler, model: nn.Module) -> None:
    seen: list[tuple[int, int]] = []
    draw(engine, model, samples_per_prompt=3, progress=lambda done, rows: seen.append((done, rows)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and seen[-1] == (15, 15)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_next_call_samples_with_the_weights_of_then(engine: VllmSampler, model: nn.Module) -> None:
    """The same engine, no restart: other samples, and log-probs that agree with the new weights and not with the old."""
    old, before = copy.deepcopy(model), draw(engine, model)
    running = engine._engine
    after = draw(engine, moved(model))
    assert engine._engine is running is not None
    assert not same(before, after)
    check_logprobs(model, after)
    with torch.no_grad():
        apart = (after.extras["sampler_logprobs"] - token_logprobs(old, after))[after.response_mask].abs().mean()
    assert apart > 0.1
    again = draw(engine, old)
    assert same(before, again)
    torch.testing.assert_close(before.extras["sampler_logprobs"], again.extras["sampler_logprobs"], atol=0, rtol=0)


def test_calls_from_two_threads_each_sample_their_own_weights(engine: VllmSampler) -> None:
    models = [build(LLAMA), moved(build(LLAMA))]
    alone = [draw(engine, model) for model in models]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda n: draw(engine, models[n % 2]), range(6)))
    assert all(same(tokens, alone[n % 2]) for n, tokens in enumerate(together))


def test_what_was_cached_of_older_weights_is_forgotten() -> None:
    """A prompt of more than one block of the cache, whose keys and values would be read again."""
    engine, model = (
        VllmSampler(),
        build(LlamaConfig(**(_SMALL | {"max_position_embeddings": 400}), num_key_value_heads=1)),
    )
    prompt = [[3 + i % 50 for i in range(300)]]
    check_logprobs(model, draw(engine, model, prompt, samples_per_prompt=2))
    check_logprobs(moved(model), draw(engine, model, prompt, samples_per_prompt=2))


def test_an_adapter_is_served_merged_and_left_alone(engine: VllmSampler, model: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    before = draw(engine, model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    weights = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    tokens = draw(engine, adapted)
    assert not same(before, tokens)
    check_logprobs(adapted, tokens)
    assert all(torch.equal(weight, weights[name]) for name, weight in adapted.state_dict().items())
    check_logprobs(moved(adapted), draw(engine, adapted))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_agree_before_and_after_an_update(name: str) -> None:
    engine, model = VllmSampler(), build(OTHERS[name])
    check_logprobs(model, draw(engine, model, temperature=0.7, samples_per_prompt=2), 0.7)
    check_logprobs(moved(model), draw(engine, model, temperature=0.7, samples_per_prompt=2), 0.7)
    assert same(draw(engine, model, temperature=0.0), draw(sample, model, temperature=0.0))


@pytest.mark.slow
@pytest.mark.parametrize("masters", [False, True], ids=["bfloat16", "mixed"])
def test_bfloat16_is_near_the_trainer(masters: bool) -> None:
    """Weights in bfloat16, or float32 masters whose products are made in bfloat16."""
    model = build(LLAMA)
    if masters:
        model.compute_dtype = torch.bfloat16  # type: ignore[assignment]
    else:
        model = model.to(torch.bfloat16)
    engine = VllmSampler()
    tokens = draw(engine, model, samples_per_prompt=4)
    assert tokens.extras["sampler_logprobs"].dtype == torch.float32
    check_logprobs(model, tokens, tolerance=0.3)
    check_logprobs(moved(model), draw(engine, model, samples_per_prompt=4), tolerance=0.3)


# --- what is refused, and what is left as it was ----------------------------------------------------------------------


def test_a_second_voice_is_refused(engine: VllmSampler, model: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    from palate.models.roles import AdapterOff

    for mixture in (0.3, 1.0):
        with pytest.raises(ConfigError, match="samples the policy alone"):
            draw(engine, model, other=build(LLAMA, seed=1), mixture=mixture)
    assert same(draw(engine, model), draw(engine, model, other=build(LLAMA, seed=1), mixture=0.0))
    adapted = get_peft_model(build(LLAMA), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ConfigError, match="samples the policy alone"):
        draw(engine, AdapterOff(adapted))


def test_bad_requests_are_refused_in_the_samplers_words(engine: VllmSampler, model: nn.Module) -> None:
    for prompts, options in (
        ([[]], {}),
        ([[61]], {}),
        ([[5] * 96], {}),
        ([[5]], {"stop_token_ids": [61]}),
        ([[5]], {"samples_per_prompt": 0}),
        ([[5]], {"records": []}),
    ):
        said = []
        for each in (engine, sample):
            with pytest.raises((ConfigError, DataError)) as error:
                draw(each, model, prompts, **options)
            said.append(str(error.value))
        assert said[0] == said[1]


def test_weights_that_are_not_numbers_are_an_error(engine: VllmSampler, model: nn.Module) -> None:
    draw(engine, model)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ModelError, match="logits are NaN"):
        draw(engine, model)
    draw(engine, build(LLAMA))


def test_another_architecture_is_refused_by_an_engine_that_runs(engine: VllmSampler, model: nn.Module) -> None:
    draw(engine, model)
    with pytest.raises(
        ModelError, match="made for LlamaForCausalLM in float32 and is given Qwen2ForCausalLM in float32"
    ):
        draw(engine, build(OTHERS["qwen2_tied"]))


def test_weights_that_vllm_did_not_take_are_found_at_the_first_look(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palate.generation.vllm.served_weights", lambda *of: build(LLAMA, seed=7).state_dict())
    with pytest.raises(ModelError, match="nats a token from the trainer's, expected at most 0.01 in float32"):
        draw(VllmSampler(), model)


def test_an_interrupted_call_leaves_nothing_for_the_next(engine: VllmSampler, model: nn.Module) -> None:
    def interrupt(done: int, rows: int) -> None:
        raise KeyboardInterrupt

    before = draw(engine, model)
    with pytest.raises(KeyboardInterrupt):
        draw(engine, model, progress=interrupt, stop_token_ids=STOP)
    assert same(before, draw(engine, model))


def test_the_process_and_the_model_are_left_as_they_were(model: nn.Module) -> None:
    """Threads, random numbers, environment; the policy's own mode and weights."""
    model.train()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    others = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    draw(VllmSampler(), model)
    assert torch.set_num_threads is set_num_threads and torch.get_num_threads() == threads
    assert torch.equal(numbers[0], torch.get_rng_state())
    assert numbers[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert others == {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    assert model.training and all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("models") / "base", tokenizer_of()
    size = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
    save_model(tiny("llama", tokenizer, **size), tokenizer, folder, stop_token_ids=[2])
    return folder


@pytest.mark.parametrize("lora", [False, True])
def test_grpo_trains_for_two_steps_on_what_vllm_samples(lora: bool, base: Path, tmp_path: Path) -> None:
    """The learning rate is such that weights which were not handed over would show in ``kl/sampler``."""
    (tmp_path / "mine.py").write_text(
        "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    with open(tmp_path / "prompts.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": f"a {word}"}) + "\n" for word in "bcdefghijklm")
    arguments: list[Any] = ["train", "grpo", "--model", base, "--data", tmp_path / "prompts.jsonl"]
    arguments += ["--reward", f"{tmp_path / 'mine.py'}:length", "--out", tmp_path / "run", "engine=vllm"]
    arguments += ["sampling.max_new_tokens=8", "sampling.temperature=0.7", "samples_per_prompt=4", f"lora={lora}"]
    arguments += ["training.max_steps=2", "training.batch_size=8", "training.learning_rate=0.02", "training.warmup=0"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, f"{done.stderr}\n{done.exception}"
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if line["split"] == "train"] == [1, 2]
    assert all(0 <= line["kl/sampler"] < 1e-6 for line in metrics)
    assert metrics[-1]["kl/reference_k3"] > 1e-3, "the policy should have moved"
    assert "engine: vllm" in (tmp_path / "run" / "config.yaml").read_text()


def test_palate_sample_with_vllm(base: Path) -> None:
    arguments = ["sample", "-m", str(base), "-p", "a b", "-p", "c", "-n", "2", "--max-new-tokens", "6"]
    answers = []
    for _ in range(2):
        done = CliRunner().invoke(app, [*arguments, "--engine", "vllm"])
        assert done.exit_code == 0, f"{done.stderr}\n{done.exception}"
        answers.append([json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")])
    assert [line["prompt"] for line in answers[0]] == ["a b", "a b", "c", "c"] and answers[0] == answers[1]
