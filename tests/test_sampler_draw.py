"""Drawing one token: top-k and top-p against slow definitions, the inverse distribution function, the random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from palate.errors import ConfigError
from palate.generation.draw import draw, inverse_cdf, truncate
from palate.generation.settings import SamplingSettings
from palate.generation.uniform import uniforms


def slow_truncate(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """The definition, one row [V] in float64, token by token: probabilities [V]."""
    order = sorted(range(len(logprobs)), key=lambda i: -float(logprobs[i]))
    order = order[:top_k] if top_k else order
    probabilities, kept, before = logprobs[order].softmax(-1), torch.zeros_like(logprobs), 0.0
    for i, probability in zip(order, probabilities.tolist(), strict=True):
        if before < top_p:
            kept[i] = probability
        before += probability
    return kept / kept.sum()


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 40, 5000])
@pytest.mark.parametrize(("size", "spread"), [(5, 1.0), (70, 6.0), (700, 0.1), (700, 2.0)])
def test_top_k_and_top_p_equal_their_definition(size: int, spread: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size)) * spread
    probabilities, ids = truncate(logits.log_softmax(-1), top_k=top_k, top_p=top_p)
    ours = probabilities if ids is None else torch.zeros_like(logits).scatter_(-1, ids, probabilities)
    expected = torch.stack([slow_truncate(row, top_k, top_p) for row in logits.double()]).float()
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), expected, atol=1e-6, rtol=1e-4)


def test_top_p_equals_transformers_for_plain_rows() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(16, 300, generator=torch.Generator().manual_seed(1)) * 3
    expected = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(50), TopPLogitsWarper(0.8)):
        expected = warper(None, expected)
    probabilities, ids = truncate((logits / 0.7).log_softmax(-1), top_k=50, top_p=0.8)
    ours = torch.zeros_like(logits).scatter_(-1, ids, probabilities)
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), expected.softmax(-1))


def test_inverse_cdf_takes_each_column_for_its_share_of_the_interval() -> None:
    """Weights 1, 0, 2, 1 of 4: [0, 1/4) -> 0, [1/4, 3/4) -> 2, [3/4, 1) -> 3; a weight of 0 never, not at borders."""
    weights = torch.tensor([[1.0, 0, 2, 1]])
    for uniform, column in [(0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (1 - 2.0**-52, 3)]:
        assert inverse_cdf(weights, torch.tensor([uniform], dtype=torch.float64)).item() == column
    assert inverse_cdf(torch.tensor([[0.0, 3, 0]]), torch.tensor([1 - 2.0**-52], dtype=torch.float64)).item() == 1


def test_a_rare_token_of_a_large_vocabulary_keeps_its_probability() -> None:
    """The last of 100,000 tokens has 2^-27, less than a float32 running sum near 1 can hold."""
    weights = torch.full((1, 100_000), (1 - 2.0**-27) / 99_999)
    weights[0, -1] = 2.0**-27
    share = 2.0**-27 / weights.double().sum().item()
    for inside, uniform in ((True, 1 - share / 2), (False, 1 - share * 2)):
        chosen = inverse_cdf(weights, torch.tensor([uniform], dtype=torch.float64)).item()
        assert (chosen == 99_999) == inside


def test_forbidden_tokens_are_not_drawn_but_count_in_the_logprob() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]]).repeat(50, 1)
    uniform = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    for settings in (SamplingSettings(), SamplingSettings(temperature=0.0), SamplingSettings(top_p=0.9)):
        tokens, logprobs = draw(logits, uniform, settings, forbidden=torch.tensor([0]))
        assert (tokens != 0).all()
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected)


def test_uniforms_depend_on_seed_prompt_sample_and_step_only() -> None:
    prompt, sample = torch.tensor([0, 0, 1, 7]), torch.tensor([0, 1, 0, 3])
    whole = uniforms(42, prompt, sample, 9)
    assert torch.equal(whole[2:, :4], uniforms(42, prompt[2:], sample[2:], 4))
    others = [uniforms(43, prompt, sample, 9), uniforms(42, prompt + 1, sample, 9), uniforms(42, prompt, sample + 1, 9)]
    assert not any(torch.isclose(whole, other).any() for other in others)
    assert whole.unique().numel() == whole.numel()


def test_uniforms_are_uniform_and_unrelated() -> None:
    """200,000 numbers: mean and variance within five standard errors, 100 cells by Pearson, no lag-1 correlation."""
    n = 200_000
    prompt = torch.arange(100).repeat_interleave(20)
    u = uniforms(1, prompt, torch.arange(20).repeat(100), 100)
    assert u.min() >= 0 and u.max() <= 1 - 2.0**-52
    assert abs(float(u.mean()) - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    cells = torch.histc(u.flatten(), bins=100, min=0, max=1)
    assert float(((cells - n / 100) ** 2 / (n / 100)).sum()) < 99 + 5 * (2 * 99) ** 0.5
    v = u - 1 / 2
    cube = v.view(100, 20, 100)
    for a, b in ((v[:, 1:], v[:, :-1]), (cube[:, 1:], cube[:, :-1]), (cube[1:], cube[:-1])):
        assert abs(float((a * b).mean()) * 12) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("min_new_tokens", 65),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingSettings(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 8192])
def test_block_sums_find_the_column_of_the_whole_running_sum(size: int) -> None:
    """Also with zeros, and for the largest and smallest random numbers."""
    generator = torch.Generator().manual_seed(size)
    weights = torch.randn(40, size, generator=generator).mul(4).softmax(-1)
    weights[:20] *= torch.rand(20, size, generator=generator) < 0.5
    weights[:, 0] += 1e-3
    uniform = torch.rand(40, dtype=torch.float64, generator=generator)
    uniform[0], uniform[1] = 0, 1 - 2.0**-52
    running = weights.cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(running, uniform[:, None] * running[:, -1:], right=True)[:, 0]
    found = inverse_cdf(weights, uniform)
    assert torch.equal(found[2:], expected[2:]) and found[0] == expected[0]
    assert weights[1, found[1]] > 0 and not weights[1, found[1] + 1 :].any()


def test_the_logprob_of_a_token_that_underflows_is_exact() -> None:
    """The only allowed token has probability e^-200, less than a float32 can hold."""
    logits = torch.tensor([[0.0, -200.0]])
    token, logprob = draw(logits, torch.zeros(1, dtype=torch.float64), SamplingSettings(), torch.tensor([0]))
    assert token.item() == 1 and logprob.item() == -200
