"""Where DDPO ends, on a model whose every sequence can be written down; reached by the real loop.

The data are all pairs with Bradley-Terry's shares of labels for a table of rewards r, so at the optimum the weighted
log-ratio of every response is h(y) = r(y) / beta + k(x). Let exactly the first token of every response be changed. With
a_1, a_2, ... the log-ratios of a response's tokens,

    h(y) = gamma a_1 + a_2 + a_3 + ...                       a weighted sum (normalise = false)
    h(y) = (gamma a_1 + a_2 + ...) / (|y| - 1 + gamma)       a weighted mean

so the tokens after the first have the log-ratio g(y) - gamma a_1(y_1), g = r / beta + k for the sum and that times
|y| - 1 + gamma for the mean. What follows a first token has probability 1 in all, which gives a_1, and all first tokens
have probability 1, which gives k by bisection:

    exp(gamma a_1) = Z(y_1) = sum_(y that begin with y_1) ref(y | y_1) exp(g(y))
    pi(y) = ref(y_1) Z(y_1)^(1 / gamma) * ref(y | y_1) exp(g(y)) / Z(y_1)

For the sum this is the policy of DPO with its choice of a first token tempered by 1 / gamma.
"""

from dataclasses import replace

import pytest
import torch

from enumerable import RESPONSES, Tabular, all_pairs, distribution, total_variation
from palate.methods import ddpo as ddpo_module
from palate.methods.ddpo import DDPO
from test_fixed_points import table
from test_fixed_points_preferences import LENGTH, REFERENCE, both_ways, law, trained

FIRST = torch.tensor([response[0] for response in RESPONSES])
SUM, MEAN = DDPO(beta=0.5, gamma=3.0, normalise=False), DDPO(beta=2.0, gamma=3.0)


def wanted(method):
    low, high = torch.full((2, 1), -50.0, dtype=torch.float64), torch.full((2, 1), 50.0, dtype=torch.float64)
    for _ in range(100):
        k = (low + high) / 2
        above = with_constant(method, k).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, low, k), torch.where(above, k, high)
    return with_constant(method, k)


def with_constant(method, k):
    g = (table() / method.beta + k) * ((LENGTH - 1 + method.gamma) if method.normalise else 1)
    found = torch.zeros_like(REFERENCE)
    for token in (0, 1, 2):
        begins = FIRST == token
        first = REFERENCE[:, begins].sum(-1, keepdim=True)  # ref(y_1)
        after = REFERENCE[:, begins] / first * g[:, begins].exp()  # ref(y | y_1) exp(g)
        z = after.sum(-1, keepdim=True)
        found[:, begins] = first * z ** (1 / method.gamma) * after / z
    return found


def marked():
    """Every pair both ways round, weighing its share of the labels; the first token of every response is changed."""
    batch = both_ways(all_pairs(table()))
    changed = torch.zeros_like(batch.tokens.response_mask)
    changed[:, 1] = True
    extras = {**batch.tokens.extras, "changed": changed}
    return replace(batch, tokens=replace(batch.tokens, extras=extras))


def test_the_law_of_gamma_1_is_that_of_dpo():
    assert torch.allclose(wanted(replace(SUM, gamma=1.0)), law(table() / 0.5))
    assert total_variation(wanted(SUM), law(table() / 0.5)) > 0.1  # and gamma = 3 is another policy


@pytest.mark.parametrize("method", [SUM, MEAN], ids=["sum", "mean"])
def test_ddpo_reaches_its_fixed_point(method, tmp_path):
    goal = wanted(method)
    assert torch.allclose(goal.sum(-1), torch.ones(2, dtype=torch.float64))
    start = total_variation(distribution(Tabular(seed=1)), goal)
    end = total_variation(trained(tmp_path, method, marked(), steps=120), goal)
    print(f"{method}: TV {start:.3f} -> {end:.5f}")
    assert end < 0.02 and start > 0.15


_segment = ddpo_module.segment_logprobs
BUGS = {
    "the other tokens weigh more": lambda p, mask, changed, *more: _segment(p, mask, ~changed, *more),
    "one token late": lambda p, mask, changed, *more: _segment(p, mask, changed.roll(1, -1), *more),
    "divided by the length": lambda p, mask, changed, gamma, _: _segment(p, mask, changed, gamma, False) / mask.sum(-1),
}


@pytest.mark.parametrize("bug", BUGS)
def test_ddpo_with_a_bug_ends_elsewhere(bug, tmp_path, monkeypatch):
    monkeypatch.setattr(ddpo_module, "segment_logprobs", BUGS[bug])
    end = total_variation(trained(tmp_path, MEAN, marked(), steps=120), wanted(MEAN))
    print(f"{bug}: TV {end:.3f}")
    assert end > 0.05
