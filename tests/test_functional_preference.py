"""Preference losses against plain Python, and how they contain each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slow
from palate.functional.preference import bradley_terry_loss, infonce_loss, pad_groups, plackett_luce_loss

SCORE = st.floats(-1e3, 1e3)
NAN = float("nan")


def double(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


@settings(max_examples=80, deadline=None)
@given(SCORE, SCORE, st.floats(0, 5), st.floats(0, 1), st.floats(0, 0.49))
def test_bradley_terry_equals_the_definition_and_its_gradient_is_p_minus_sigmoid(w, r, margin, probability, smoothing):
    chosen, rejected = double(w, grad=True), double(r, grad=True)
    loss = bradley_terry_loss(chosen, rejected, margin=margin, probability=probability, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(slow.bradley_terry(w, r, margin, probability, smoothing), rel=1e-9, abs=1e-9)
    loss.backward()
    p = (1 - smoothing) * probability + smoothing * (1 - probability)
    gradient = math.exp(slow.sigmoid_log(w - r - margin)) - p
    assert chosen.grad.item() == pytest.approx(gradient, abs=1e-9)
    assert rejected.grad.item() == pytest.approx(-gradient, abs=1e-9)


def test_bradley_terry_of_equal_scores_is_log_2_and_the_margin_raises_it():
    assert bradley_terry_loss(double(3.0), double(3.0)).item() == pytest.approx(math.log(2))
    with_margin = bradley_terry_loss(double(3.0), double(3.0), margin=double(1.0)).item()
    assert with_margin == pytest.approx(math.log(1 + math.e))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [1e3, -1e3])
def test_extreme_scores_stay_finite(lead, dtype):
    chosen = torch.tensor([lead], dtype=dtype, requires_grad=True)
    for loss in (
        bradley_terry_loss(chosen, -chosen.detach(), probability=0.7, label_smoothing=0.1),
        infonce_loss(chosen, -chosen.detach()[:, None]),
        plackett_luce_loss(torch.stack([chosen, -chosen], -1), torch.tensor([[2, 1]]), torch.ones(1, 2, dtype=bool)),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), chosen)
        assert loss.isfinite().all() and gradient.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(SCORE, st.lists(SCORE, max_size=5))
def test_infonce_is_one_against_all_others(positive, negatives):
    found = infonce_loss(double(positive), torch.tensor([negatives], dtype=torch.float64)).item()
    assert found == pytest.approx(slow.infonce(positive, negatives), rel=1e-9, abs=1e-9)
    if not negatives:
        assert found == 0
    if len(negatives) == 1:
        assert found == pytest.approx(slow.bradley_terry(positive, negatives[0]), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("junk", [NAN, torch.inf, 1e30])
def test_masked_negatives_do_not_exist_in_value_or_gradient(junk):
    mask = torch.tensor([[True, False, True], [False, False, False]])
    negatives = torch.where(mask, torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]]), junk).double().requires_grad_()
    positive = double(0.5, 9.0, grad=True)
    loss = infonce_loss(positive, negatives, mask)
    assert loss.tolist() == pytest.approx([slow.infonce(0.5, [1.0, -2.0]), 0.0])
    loss.sum().backward()
    assert (negatives.grad[~mask] == 0).all() and negatives.grad.isfinite().all()
    assert positive.grad[1] == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SCORE, st.integers(1, 4)), min_size=1, max_size=5), st.integers(0, 2))
def test_plackett_luce_equals_the_definition_with_ties_and_padding(items, padding):
    scores, ranks = zip(*items, strict=True)
    padded = torch.tensor([[*scores, *[NAN] * padding]], dtype=torch.float64, requires_grad=True)
    rank = torch.tensor([[*ranks, *[0] * padding]])
    mask = torch.tensor([[True] * len(items) + [False] * padding])
    loss = plackett_luce_loss(padded, rank, mask)
    assert loss.item() == pytest.approx(slow.plackett_luce(scores, ranks), rel=1e-9, abs=1e-9)
    loss.sum().backward()
    assert padded.grad.isfinite().all() and (padded.grad[~mask] == 0).all()


def test_plackett_luce_is_a_distribution_over_orders_and_not_the_average_of_pairs():
    """The probabilities of the six orders of three sum to 1; two items are Bradley-Terry."""
    from itertools import permutations

    scores = (0.3, -1.2, 2.0)
    all_true = torch.ones(1, 3, dtype=torch.bool)
    losses = [
        plackett_luce_loss(torch.tensor([scores]).double(), torch.tensor([order]), all_true).item()
        for order in permutations((1, 2, 3))
    ]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1)
    two = plackett_luce_loss(torch.tensor([scores[:2]]).double(), torch.tensor([[2, 1]]), all_true[:, :2]).item()
    assert two == pytest.approx(slow.bradley_terry(scores[1], scores[0]))
    pairs = [(0, 1), (0, 2), (1, 2)]  # of the order 1, 2, 3
    assert losses[0] != pytest.approx(sum(slow.bradley_terry(scores[a], scores[b]) for a, b in pairs) / 3, rel=0.05)


def test_all_tied_carries_nothing():
    scores = double(1.0, 5.0, -2.0)[None].requires_grad_()
    loss = plackett_luce_loss(scores, torch.full((1, 3), 2), torch.ones(1, 3, dtype=torch.bool))
    loss.sum().backward()
    assert loss.item() == 0 and (scores.grad == 0).all()


def test_groups_of_any_size_in_any_order_become_rows():
    group = torch.tensor([9, 4, 9, 2, 4, 9])
    values = torch.arange(6.0).requires_grad_()
    padded, mask = pad_groups(values, group)
    assert [padded[g][mask[g]].tolist() for g in range(3)] == [[3.0], [1.0, 4.0], [0.0, 2.0, 5.0]]
    assert mask.sum(-1).tolist() == [1, 2, 3]
    (padded * torch.where(mask, 2.0, NAN)).where(mask, 0).sum().backward()
    assert values.grad.tolist() == [2.0] * 6
