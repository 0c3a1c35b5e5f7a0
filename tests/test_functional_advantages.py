"""Advantages against plain Python, and the identities that they must have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slow
from palate.functional.advantages import discounted_returns, gae, group_relative, leave_one_out

NAN = float("nan")


def responses(lengths, width=9, seed=0, left=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), width, generator=generator, dtype=torch.float64)
    place, length = torch.arange(width), torch.tensor(lengths)[:, None]
    return rewards, values, (place >= left) & (place < left + length)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("junk", [0.0, NAN, torch.inf])
def test_gae_is_the_double_sum_of_the_paper(gamma, lam, junk):
    """Ragged rows, one single token, one empty row; whatever masked slots hold."""
    rewards, values, mask = responses([6, 1, 0, 4], left=2)
    dirty = [torch.where(mask, x, junk) for x in (rewards, values)]
    advantages, returns = gae(*dirty, mask, gamma=gamma, lam=lam)
    for row in range(4):
        wanted = slow.gae(rewards[row][mask[row]].tolist(), values[row][mask[row]].tolist(), gamma, lam)
        assert advantages[row][mask[row]].tolist() == pytest.approx(wanted[0], abs=1e-10)
        assert returns[row][mask[row]].tolist() == pytest.approx(wanted[1], abs=1e-10)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_lambda_0_is_one_step_and_lambda_1_the_whole_return():
    rewards, values, mask = responses([5], width=5)
    r, v = rewards[0].tolist(), values[0].tolist()
    one_step = [r[t] + 0.9 * (v[t + 1] if t < 4 else 0) - v[t] for t in range(5)]
    assert gae(rewards, values, mask, gamma=0.9, lam=0.0)[0][0].tolist() == pytest.approx(one_step)
    whole = [sum(0.9 ** (s - t) * r[s] for s in range(t, 5)) for t in range(5)]
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    assert returns[0].tolist() == pytest.approx(whole)
    assert discounted_returns(rewards, mask, gamma=0.9)[0].tolist() == pytest.approx(whole)
    assert advantages[0].tolist() == pytest.approx([w - x for w, x in zip(whole, v, strict=True)])


def test_an_environments_turn_in_the_middle_is_stepped_over():
    rewards, values, _ = responses([6], width=6)
    mask = torch.tensor([[True, True, False, False, True, True]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    wanted = slow.gae(rewards[mask].tolist(), values[mask].tolist(), 0.9, 0.8)
    assert advantages[mask].tolist() == pytest.approx(wanted[0])
    assert returns[mask].tolist() == pytest.approx(wanted[1])


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_with_the_exact_value_the_expected_advantage_is_q_minus_v_for_every_lambda(gamma, lam):
    """Two steps of two actions each, all four sequences weighted by their probability.

    V(s1|a) = sum_b p(b|a) r2(a,b); V(s0) = sum_a p(a) [r1(a) + gamma V(s1|a)]; Q(s0,a) = r1(a) + gamma V(s1|a).
    """
    p0, p1 = [0.3, 0.7], [[0.6, 0.4], [0.1, 0.9]]
    r1, r2 = [0.5, -1.0], [[2.0, 0.0], [1.0, -3.0]]
    v1 = [sum(p1[a][b] * r2[a][b] for b in (0, 1)) for a in (0, 1)]
    q0 = [r1[a] + gamma * v1[a] for a in (0, 1)]
    v0 = sum(p0[a] * q0[a] for a in (0, 1))
    pairs = [(a, b) for a in (0, 1) for b in (0, 1)]
    rewards = torch.tensor([[r1[a], r2[a][b]] for a, b in pairs], dtype=torch.float64)
    values = torch.tensor([[v0, v1[a]] for a, _ in pairs], dtype=torch.float64)
    advantages, _ = gae(rewards, values, torch.ones(4, 2, dtype=torch.bool), gamma=gamma, lam=lam)
    for a in (0, 1):
        expected = sum(p1[a][b] * advantages[pairs.index((a, b)), 0].item() for b in (0, 1))
        assert expected == pytest.approx(q0[a] - v0)
    wrong = values + torch.tensor([0.5, 0.1])
    biased, _ = gae(rewards, wrong, torch.ones(4, 2, dtype=torch.bool), gamma=gamma, lam=lam)
    assert sum(p1[0][b] * biased[pairs.index((0, b)), 0].item() for b in (0, 1)) != pytest.approx(q0[0] - v0)


ODD_GROUPS = [7, 3, 7, -2, 3, 3, 9]  # any order, any numbers; one group of one, twice
SCORES = [1.0, 0.0, 4.0, 5.0, 2.5, -3.0, 8.0]


def others_of(i):
    return [s for j, s in enumerate(SCORES) if ODD_GROUPS[j] == ODD_GROUPS[i] and j != i]


def test_leave_one_out_is_the_score_minus_the_mean_of_the_others():
    found = leave_one_out(torch.tensor(SCORES), torch.tensor(ODD_GROUPS)).tolist()
    wanted = [SCORES[i] - slow.mean(others_of(i)) if others_of(i) else 0.0 for i in range(7)]
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", [True, False])
def test_group_relative_is_the_z_score_of_the_group(ddof, scale):
    found = group_relative(torch.tensor(SCORES), torch.tensor(ODD_GROUPS), scale=scale, ddof=ddof, eps=1e-3).tolist()
    for i, score in enumerate(SCORES):
        mine = [*others_of(i), score]
        deviation = score - slow.mean(mine)
        wanted = deviation / (slow.variance(mine, ddof) ** 0.5 + 1e-3) if scale else deviation
        assert found[i] == pytest.approx(wanted if len(mine) > 1 else 0.0, abs=1e-5)


@pytest.mark.parametrize("score", [0.1, 1000.1, -3e7, 0.0])
@pytest.mark.parametrize("function", [group_relative, leave_one_out])
def test_equal_scores_give_exactly_zero(function, score):
    """A computed mean of equal float32 numbers is often not that number; divided by a tiny std it would explode."""
    for size in (1, 2, 3, 7):
        assert (function(torch.full((size,), score), torch.zeros(size, dtype=torch.int64)) == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-100, 100)), min_size=1, max_size=12), st.randoms())
def test_group_statistics_do_not_depend_on_row_order(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    group, score = (torch.tensor(x) for x in zip(*rows, strict=True))
    for function in (group_relative, leave_one_out):
        straight = function(score.double(), group)
        assert torch.allclose(function(score.double()[order], group[order]), straight[order], atol=1e-9)
