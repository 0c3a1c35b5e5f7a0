"""Masked moments against plain Python, with junk in every slot that does not count."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slow
from palate.functional.masked import Moments, masked_mean, masked_variance, whiten
from palate.types import Mean

JUNK = (float("nan"), float("inf"), -float("inf"), 1e30)


def some(seed=0, shape=(4, 7), share=0.6):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    mask = torch.rand(shape, generator=generator) < share
    return values, mask


def with_junk(values, mask, junk):
    return torch.where(mask, values, junk)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("ddof", [0, 1])
def test_mean_and_variance_are_those_of_the_true_slots(junk, ddof):
    values, mask = some()
    kept = values[mask].tolist()
    dirty = with_junk(values, mask, junk)
    assert masked_mean(dirty, mask).item() == pytest.approx(slow.mean(kept), rel=1e-12)
    assert masked_variance(dirty, mask, ddof=ddof).item() == pytest.approx(slow.variance(kept, ddof), rel=1e-12)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_equals_the_definition_and_masked_slots_are_zero(junk, ddof, shift_mean):
    values, mask = some(seed=3)
    out = whiten(with_junk(values, mask, junk), mask, shift_mean=shift_mean, ddof=ddof)
    expected = slow.whiten(values[mask].tolist(), shift_mean, ddof)
    assert out[mask].tolist() == pytest.approx(expected, rel=1e-10)
    assert (out[~mask] == 0).all()


def test_whitened_values_have_variance_one_by_the_same_ddof():
    values, mask = some(shape=(3, 5), share=0.9)
    for ddof in (0, 1):
        out = whiten(values, mask, ddof=ddof)
        assert slow.variance(out[mask].tolist(), ddof) == pytest.approx(1, abs=1e-6)
        assert slow.mean(out[mask].tolist()) == pytest.approx(0, abs=1e-12)
    kept_mean = whiten(values, mask, shift_mean=False)
    assert masked_mean(kept_mean, mask).item() == pytest.approx(masked_mean(values, mask).item())


def test_eps_stands_inside_the_square_root():
    values, mask = torch.tensor([0.0, 2.0], dtype=torch.float64), torch.ones(2, dtype=torch.bool)  # variance 1
    assert whiten(values, mask, eps=3.0).tolist() == pytest.approx([-0.5, 0.5])


def test_nothing_to_count_gives_zeros():
    values, nothing = torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(values, nothing) == 0
    assert masked_variance(values, nothing) == 0
    assert (whiten(values, nothing) == 0).all()
    one = torch.tensor([[True, False, False], [False] * 3])
    assert masked_variance(torch.ones(2, 3), one, ddof=1) == 0
    assert whiten(torch.ones(2, 3), one).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("value", [0.1, 7.3, 1000.1, -54321.9])
def test_equal_values_whiten_to_zero_not_to_amplified_rounding(value):
    mask = torch.ones(1, 7, dtype=torch.bool)
    assert whiten(torch.full((1, 7), value), mask).abs().max() < 1e-2


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize(
    "function",
    [masked_mean, masked_variance, whiten, lambda v, m: Mean.of(v, m).total, lambda v, m: Mean.of(v, m.double()).total],
)
def test_the_gradient_does_not_see_junk(function, junk):
    values, mask = some(seed=5)
    grads = []
    for filled in (with_junk(values, mask, junk), values):
        leaf = filled.clone().requires_grad_()
        (function(leaf, mask) * torch.linspace(1, 2, 7, dtype=torch.float64)).sum().backward()
        grads.append(leaf.grad)
    assert (grads[0][~mask] == 0).all()
    assert torch.allclose(grads[0][mask], grads[1][mask], rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4), max_size=6), max_size=5))
def test_running_moments_equal_those_of_everything_at_once(parts):
    moments = Moments()
    for part in parts:
        moments = moments.including(torch.tensor(part, dtype=torch.float64))
    everything = [x for part in parts for x in part]
    assert moments.count == len(everything)
    if everything:
        assert moments.mean == pytest.approx(slow.mean(everything), abs=1e-8)
    if len(everything) > 1 and slow.variance(everything, 1) > 1e-6:
        assert moments.std == pytest.approx(math.sqrt(slow.variance(everything, 1)), rel=1e-6)


def test_moments_without_spread_divide_by_one_and_survive_json():
    assert Moments().std == 1
    assert Moments().including(torch.tensor([5.0])).std == 1
    assert Moments().including(torch.tensor([5.0, 5.0])).std == 1
    moments = Moments().including(torch.tensor([0.1, 0.7, -3.3]))
    assert Moments(*json.loads(json.dumps(moments))) == moments


def test_a_mean_adds_up_over_any_cut():
    values, mask = some(seed=9)
    whole = Mean.of(values, mask)
    cut = Mean.of(values[:1], mask[:1]) + Mean.of(values[1:], mask[1:])
    assert whole.item() == pytest.approx(slow.mean(values[mask].tolist()))
    assert cut.item() == pytest.approx(whole.item(), rel=1e-12)
    assert (whole * 3).item() == pytest.approx(3 * whole.item())
    assert Mean.of(torch.ones(0)).item() == 0


def test_a_mean_of_bf16_values_counts_in_float32():
    found = Mean.of(torch.full((1001,), 1.0, dtype=torch.bfloat16))
    assert (float(found.total), float(found.count)) == (1001, 1001)
