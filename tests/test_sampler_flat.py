"""The flat decoding step: the numbers of the model's own modules, whoever shares a bunch with whom, and never for another build."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from palate.generation import voices
from palate.generation.bunch import Bunch, Shape
from palate.generation.flat import FlatSteps
from palate.generation.flat_weights import serves, weights_of
from palate.models.forward import token_logprobs
from palate.models.precision import use_working_copies
from palate.models.roles import AdapterOff
from palate.types import Tokens
from test_sampler import _SMALL, CONFIGS, PROMPTS, build, check_logprobs, draw, same

FLAT = ["llama", "llama_gqa", "qwen2"]
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def flat_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Rows and bunches of every flat step that is made."""
    seen: list[tuple[int, int]] = []
    step = FlatSteps.step

    def counted(self: FlatSteps, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        seen.append((len(tokens), len(self.bunches)))
        return step(self, tokens, position)

    monkeypatch.setattr(FlatSteps, "step", counted)
    yield seen


def plainly(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> Tokens:
    """``draw`` through the model's own modules."""
    with monkeypatch.context() as patch:
        patch.setattr(voices, "_flat_steps", lambda *_: None)
        return draw(*arguments, **options)


def moved(model: nn.Module) -> nn.Module:
    """Norm gains and biases away from one and zero, so that leaving one out shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "bias" in name else 0.2))
    return model


def equal(ours: Tokens, expected: Tokens) -> None:
    assert same(ours, expected)
    torch.testing.assert_close(
        ours.extras["sampler_logprobs"], expected.extras["sampler_logprobs"], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("copies", [1, 5])
def test_it_draws_what_the_models_own_modules_draw(
    name: str, copies: int, monkeypatch: pytest.MonkeyPatch, flat_steps: list[Any]
) -> None:
    monkeypatch.setattr("palate.generation.bunch._GROWTH", 8)  # so that memory grows on the way
    model = moved(build(name))
    for options in ({}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"min_new_tokens": 7}, {"temperature": 0.0}):
        expected = plainly(monkeypatch, model, samples_per_prompt=copies, **options)
        flat_steps.clear()
        equal(draw(model, samples_per_prompt=copies, **options), expected)
        assert flat_steps


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("copies", [1, 6])
def test_logprobs_are_the_trainers(name: str, copies: int, flat_steps: list[Any]) -> None:
    model = moved(build(name))
    tokens = draw(model, samples_per_prompt=copies)
    assert flat_steps
    with torch.no_grad():
        expected = token_logprobs(model, tokens)
    torch.testing.assert_close(tokens.extras["sampler_logprobs"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(FLAT)))
def test_other_builds_run_through_their_own_modules(name: str, flat_steps: list[Any]) -> None:
    check_logprobs(build(name), draw(build(name)), 1.0)
    assert not flat_steps


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("way", ["bf16 units", "no such units", "adapter"])
def test_in_bf16_logprobs_are_as_near_the_trainers_as_those_of_the_models_own_modules(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch, flat_steps: list[Any]
) -> None:
    """Both round, each in its own places; the mean distance of some hundred log-probs may be half as large again. A gain,
    a bias or an adapter left out is ten times that."""
    monkeypatch.setattr("palate.generation.flat_weights.has_bf16_units", lambda: way != "no such units")
    model = moved(build(name))
    if way == "adapter":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()  # type: ignore[arg-type]
    use_working_copies(model)
    weights = weights_of(model, 4, 96)
    assert (weights.head.dtype, weights.layers[0].down.dtype) == ((BF16, BF16) if way == "bf16 units" else (F32, F32))
    options = {"samples_per_prompt": 8, "stop_token_ids": []}
    plain = distance(model, plainly(monkeypatch, model, **options))
    flat_steps.clear()
    ours = distance(model, draw(model, **options))
    assert flat_steps
    assert ours <= 1.5 * plain


@torch.no_grad()
def distance(model: nn.Module, tokens: Tokens) -> float:
    """The mean of |sampler's log-prob - trainer's| over response tokens."""
    apart = tokens.extras["sampler_logprobs"] - token_logprobs(model, tokens)
    return float(apart[tokens.response_mask].abs().mean())


def test_hooks_and_other_logits_run_through_their_own_modules(flat_steps: list[Any]) -> None:
    """A module that somebody watches or changes; a model whose class makes something else of its logits."""

    class Doubled(LlamaForCausalLM):
        @functools.wraps(LlamaForCausalLM.forward)
        def forward(self, *arguments: Any, **options: Any) -> Any:
            out = super().forward(*arguments, **options)
            out.logits = out.logits * 2
            return out

    hooked = build("llama")
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * 0.5)  # type: ignore[union-attr, index, operator]
    torch.manual_seed(0)
    doubled = Doubled(LlamaConfig(**_SMALL)).eval()
    torch.manual_seed(0)
    doubled_low = Doubled(LlamaConfig(**_SMALL)).eval().bfloat16()
    for model, tolerance in ((hooked, 1e-4), (doubled, 1e-4), (doubled_low, 0.3)):
        flat_steps.clear()
        check_logprobs(model, draw(model), 1.0, tolerance)
        assert len(flat_steps) == (model is not hooked), "one step for the trial"


def test_rotary_angles_that_grow_with_the_row_are_left_to_the_model() -> None:
    config = LlamaConfig(**_SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert not serves(AutoModelForCausalLM.from_config(config))
    assert serves(build("llama"))


def test_to_ask_whether_it_serves_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a packed weight nor a low-rank update multiplied out."""
    policy = get_peft_model(build("llama_gqa"), LoraConfig(r=4, target_modules="all-linear"))  # type: ignore[arg-type]
    made: list[Any] = []
    monkeypatch.setattr("palate.generation.flat_weights.Packed", lambda *given, **more: made.append(given))
    monkeypatch.setattr("peft.tuners.lora.Linear.get_delta_weight", lambda *given: made.append(given))
    assert serves(policy) and serves(policy.get_base_model()) and not made


@pytest.mark.parametrize("change", ["half", "base", "adapter", "merged", "dora", "bias", "too many"])
def test_what_it_does_not_serve(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(change, {})
    policy = get_peft_model(build("llama_gqa"), LoraConfig(r=4, target_modules="all-linear", **more))  # type: ignore[arg-type]
    if change == "half":
        policy = build("llama_gqa").half()
    elif change in ("base", "adapter"):
        name = {"base": "base_layer", "adapter": "lora_A"}[change]
        for key, parameter in policy.named_parameters():
            parameter.data = parameter.data.half() if name in key else parameter.data
    elif change == "merged":
        policy.merge_adapter()
    elif change == "too many":
        size = sum(p.numel() for p in policy.get_base_model().parameters())
        monkeypatch.setattr("palate.generation.flat_weights.MOST_WEIGHTS", size // 2)
    assert not serves(policy)
    if change in ("adapter", "dora", "bias"):  # switched off, what is wrong with it does not matter
        with policy.disable_adapter():
            assert serves(policy)


def test_an_adapter_is_added_and_switched_off(monkeypatch: pytest.MonkeyPatch, flat_steps: list[Any]) -> None:
    base = moved(build("llama_gqa"))
    without = draw(base, samples_per_prompt=2)
    policy = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))  # type: ignore[arg-type]
    policy.eval()
    flat_steps.clear()
    ours = draw(policy, samples_per_prompt=2)
    assert flat_steps
    equal(ours, plainly(monkeypatch, policy, samples_per_prompt=2))
    check_logprobs(policy, ours, 1.0)
    equal(draw(AdapterOff(policy), samples_per_prompt=2), without)
    mixed = {"other": AdapterOff(policy), "mixture": 0.3, "samples_per_prompt": 2}
    flat_steps.clear()
    ours = draw(policy, **mixed)
    assert flat_steps and not same(ours, without)
    equal(ours, plainly(monkeypatch, policy, **mixed))


def test_a_dora_adapter_runs_through_its_own_modules(flat_steps: list[Any]) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True)
    policy = get_peft_model(build("llama"), config).eval()  # type: ignore[arg-type]
    check_logprobs(policy, draw(policy), 1.0)
    assert not flat_steps


@pytest.mark.parametrize("copies", [1, 3])
def test_rows_that_take_the_places_of_others_change_no_sample(
    copies: int, monkeypatch: pytest.MonkeyPatch, flat_steps: list[Any]
) -> None:
    """At most ``max_batch_rows`` at once, and never far fewer while others wait."""
    monkeypatch.setattr("palate.generation.sampler._TOGETHER", 2)
    model, prompts = build("llama_gqa"), [prompt[: 1 + i] for i in range(4) for prompt in PROMPTS]
    together = draw(model, prompts, samples_per_prompt=copies, max_batch_rows=64)
    flat_steps.clear()
    equal(draw(model, prompts, samples_per_prompt=copies, max_batch_rows=7), together)
    rows = [rows for rows, _ in flat_steps]
    assert max(rows) <= 7 and any(after > before for before, after in itertools.pairwise(rows))
    assert sum(rows) == int(together.response_mask.sum()) - len(together)  # nothing is computed for rows that ended


def test_samples_that_share_a_prompt_equal_those_of_separate_prompts(flat_steps: list[Any]) -> None:
    model = build("llama_gqa")
    shared = draw(model, samples_per_prompt=6)
    separate = draw(
        model,
        [prompt for prompt in PROMPTS for _ in range(6)],
        numbers=[(p, s) for p in range(len(PROMPTS)) for s in range(6)],
    )
    assert flat_steps
    equal(shared, separate)


@pytest.mark.parametrize(("copies", "serves"), [(1, 1), (1, 3), (4, 1), (4, 3)])
def test_attention_of_a_bunch_equals_its_definition_while_rows_end(
    copies: int, serves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """softmax(q K^T) V over each row's own columns, in float64, held in lists; rows end in every pattern."""
    monkeypatch.setattr("palate.generation.bunch._GROWTH", 3)
    generator = torch.Generator().manual_seed(copies * 10 + serves)
    heads, size, lengths, steps = 2, 6, [2, 5, 5], 7
    bunch = Bunch(Shape(1, heads, size), lengths, copies, steps)
    held: list[torch.Tensor] = []  # of each row [n, 2, heads, D]
    for number, length in enumerate(lengths):
        key_values = torch.randn(length, 2, heads, size, generator=generator)
        bunch.write_prompt(0, number, key_values)
        held += [key_values] * copies
    for _ in range(steps):
        queries = torch.randn(len(held), heads, serves, size, generator=generator)
        key_values = torch.randn(len(held), 2, heads, size, generator=generator)
        held = [torch.cat([old, new[None]]) for old, new in zip(held, key_values, strict=True)]
        bunch.begin_token()
        ours = bunch.attend(0, queries, key_values)
        for row, each in enumerate(held):
            keys, values = each.double().permute(1, 2, 0, 3)
            weights = (queries[row].double() @ keys.transpose(-1, -2)).softmax(-1)
            torch.testing.assert_close(ours[row].double(), (weights @ values).flatten(), atol=1e-5, rtol=1e-5)
        done = torch.rand(len(held), generator=generator) < 0.3
        done[0] &= len(held) > 1 and not bool(done.all())
        if done.any() and not done.all():
            held = [held[i] for i in bunch.drop(done).tolist()]
        # Rows that ended give their memory back; so do prompts.
        grid = bunch.own.shape[2] * bunch.own.shape[4]
        assert len(held) <= grid and bunch.own.shape[-2] <= bunch.filled + 3
        assert copies > 1 or bunch.memory.shape[-1] < 2 * len(held) * bunch.most * heads * size
    assert len(held) <= len(lengths) * copies // 2
    assert bunch.own.shape[2] * bunch.own.shape[4] <= len(lengths) * copies // 2
    assert copies == 1 or bunch.prompt.shape[2] < len(lengths)


def test_nothing_is_left_of_a_sampling() -> None:
    """No reference cycle holds the keys and values or the packed weights until the garbage collector comes."""
    import gc
    import weakref

    model, held = build("llama"), []
    init = Bunch.__init__

    def noted(self: Bunch, *arguments: Any) -> None:
        init(self, *arguments)
        held.append(weakref.ref(self))

    Bunch.__init__ = noted  # type: ignore[method-assign]
    gc.disable()
    try:
        draw(model, samples_per_prompt=2)
        assert held and not any(each() for each in held)
    finally:
        gc.enable()
        Bunch.__init__ = init  # type: ignore[method-assign]
