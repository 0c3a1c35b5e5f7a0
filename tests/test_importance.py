"""Importance weights: by enumeration, that learning about pi from what mu drew is learning from what pi draws.

Every response of the tabular model is weighted with its probability under the policy that drew, so expectations are sums,
and the only error is that of float64.
"""

import math
from dataclasses import replace

import pytest
import torch

from enumerable import COUNT, EVERYTHING, TableReward, Tabular, distribution, response_numbers, rows_of
from palate.errors import DataError
from palate.functional.importance import effective_share, gradient_times, importance_weights
from palate.methods.dapo import DAPO
from palate.methods.dr_grpo import DrGRPO
from palate.methods.ppo import PPO
from palate.methods.reinforce import Reinforce
from palate.methods.rloo import RLOO
from palate.models.forward import token_logprobs
from palate.training import ahead
from palate.training.ahead import corrected
from palate.training.settings import TrainingSettings
from palate.types import Models, Scored

KL_COEF = 0.5
UNCUT = TrainingSettings(importance_max=math.inf)
PAIRS = [(p, i, j) for p in range(2) for i in range(COUNT) for j in range(COUNT)]


class WideReward(TableReward):
    """The table in float64."""

    def __call__(self, tokens):
        return Scored(self.table[tokens.ids[:, 0] - 1, response_numbers(tokens)], {})


def policy_pi():
    return Tabular(seed=8).double()


def policy_mu(size=0.5):
    """What pi was before a large update."""
    mu = policy_pi()
    noise = torch.randn(mu.base_model.table.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        mu.base_model.table += size * noise
    return mu.requires_grad_(False)


def table():
    return 0.8 * torch.randn(2, COUNT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def drawn_by(mu, paired):
    """Every response, or every pair of responses, to both prompts; and how probable each is that ``mu`` draws it."""
    p = distribution(mu)
    if not paired:
        rows, weight = rows_of(EVERYTHING), p.flatten()
    else:
        rows = rows_of([(x, r) for x, i, j in PAIRS for r in (i, j)])
        rows = replace(rows, group=torch.arange(len(PAIRS)).repeat_interleave(2))
        weight = torch.stack([p[x, i] * p[x, j] for x, i, j in PAIRS]).repeat_interleave(2)
    with torch.no_grad():
        return replace(rows, extras={**rows.extras, "sampler_logprobs": token_logprobs(mu, rows)}), weight


def expected_gradient(method, mu, settings=UNCUT, pi=None):
    """The sum over everything that ``mu`` can draw of its probability times the gradient that the method gets from it."""
    pi = pi or policy_pi()
    rows, weight = drawn_by(mu, paired=getattr(method, "group_size", 1) > 1)
    value = Tabular(seed=3, scale=0.5, scalar=True).double()
    models = Models(pi, Tabular(seed=1).double().requires_grad_(False), WideReward(table()), value)
    with torch.no_grad():
        batch = method.prepare(models, rows)
    batch = corrected(method, batch, settings)
    extras = batch.tokens.extras
    batch = replace(
        batch, tokens=replace(batch.tokens, extras={**extras, "importance": extras["importance"] * weight[:, None]})
    )
    loss = method.loss(models, batch)["loss"]
    (gradient,) = torch.autograd.grad(loss.total, pi.base_model.table)
    return gradient


def distance(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


EXACT = {
    "reinforce": Reinforce(kl_coef=KL_COEF, running_reward=0.7),
    "rloo": RLOO(kl_coef=KL_COEF),
    "rloo, two epochs": RLOO(kl_coef=KL_COEF, epochs=2),
    "ppo": PPO(kl_coef=KL_COEF, whiten_advantages=False, lam=0.9),
    "ppo with an entropy bonus": PPO(kl_coef=KL_COEF, whiten_advantages=False, entropy_coef=0.3),
    "dr_grpo, k1 in the reward": DrGRPO(kl_coef=KL_COEF, kl="reward", max_new_tokens=4),
    "dr_grpo, k3 in the loss": DrGRPO(kl_coef=KL_COEF, kl="loss", max_new_tokens=4),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_expected_gradient_from_an_older_policys_responses_is_that_of_the_policys_own(name):
    method, pi = EXACT[name], policy_pi()
    wanted = expected_gradient(method, pi)
    assert distance(expected_gradient(method, policy_mu()), wanted) < 1e-6


def test_the_expected_gradient_is_that_of_the_objective():
    """E[r] - kl_coef KL(pi || ref), differentiated by torch over all responses; REINFORCE's loss is minus that."""
    pi, rows = policy_pi(), rows_of(EVERYTHING)
    reference = distribution(Tabular(seed=1))
    logits = pi(rows.ids).logits.log_softmax(-1)[:, :-1]
    logp = (logits.gather(-1, rows.ids[:, 1:, None])[..., 0] * rows.response_mask[:, 1:]).sum(-1).reshape(2, COUNT)
    value = (logp.exp() * (table() - KL_COEF * (logp - reference.log()))).sum()
    (wanted,) = torch.autograd.grad(value, pi.base_model.table)
    assert distance(-expected_gradient(EXACT["reinforce"], policy_mu()), wanted) < 1e-6


def ones(logprobs, drawn, mask, **how):
    found = importance_weights(logprobs, drawn, mask, **how)
    return found._replace(used=mask.double())


def upside_down(logprobs, drawn, mask, **how):
    return importance_weights(drawn, logprobs, mask, **how)


def the_mean_for_the_sum(logprobs, drawn, mask, **how):
    length = mask.sum(-1, keepdim=True)
    return importance_weights(logprobs / length, drawn / length, mask, **how)


@pytest.mark.parametrize("bug", [ones, upside_down, the_mean_for_the_sum], ids=lambda bug: bug.__name__)
@pytest.mark.parametrize("name", EXACT)
def test_a_wrong_weight_is_seen(name, bug, monkeypatch):
    wanted = expected_gradient(EXACT[name], policy_pi())
    monkeypatch.setattr(ahead, "importance_weights", bug)
    assert distance(expected_gradient(EXACT[name], policy_mu()), wanted) > 0.05


def test_what_a_cut_costs_and_what_weights_of_single_tokens_leave(monkeypatch):
    """A cut costs something where a weight reaches it, and nothing elsewhere. Weights of single tokens correct what is
    chosen in a state, but not which states are seen nor what follows: what they leave is of first order in the update."""
    method = EXACT["reinforce"]
    wanted = expected_gradient(method, policy_pi())

    def off(size, **how):
        return distance(expected_gradient(method, policy_mu(size), TrainingSettings(**how)), wanted)

    cut, tokens = off(0.25), [off(size, importance="token") for size in (0.05, 0.1)]
    assert off(0.1) < 1e-6, "no weight reaches 2"
    assert tokens[0] > 0.01 and tokens[1] / tokens[0] == pytest.approx(2, rel=0.1)
    monkeypatch.setattr(ahead, "importance_weights", ones)
    assert 1e-3 < cut < off(0.25) / 5


def test_weights_are_products_of_ratios_and_padding_counts_nothing():
    logprobs = torch.tensor([[float("nan"), -1.0, -2.0, float("nan")], [0.0, -1.0, -1.0, -1.0]])
    drawn = torch.tensor([[9.0, -1.5, -1.0, float("inf")], [0.0, -1.0, -3.0, -1.0]])
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    e = math.e
    found = importance_weights(logprobs, drawn, mask, level="sequence", most=2.0)
    assert torch.allclose(found.raw, torch.tensor([[e**-0.5], [e**2]]))
    assert torch.allclose(found.used, torch.tensor([[0, e**-0.5, e**-0.5, 0], [0, 2, 2, 2]]))
    found = importance_weights(logprobs, drawn, mask, level="token", most=2.0)
    assert torch.allclose(found.used, torch.tensor([[0, e**0.5, e**-1, 0], [0, 1, 2, 1]]))
    empty = importance_weights(logprobs, drawn, mask & False, level="sequence", most=2.0)
    assert not empty.counts.any() and not empty.used.any()


def test_an_effective_sample_is_a_share():
    assert effective_share(torch.ones(7)) == 1
    assert effective_share(torch.tensor([1.0, 0, 0, 0])) == 0.25
    assert effective_share(torch.zeros(3)) == 0
    assert effective_share(torch.tensor([3.0, 1.0])) == pytest.approx(16 / 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weighted_gradient_leaves_values_as_they_are(dtype):
    x = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    weight = torch.rand(5, 3)
    values = gradient_times(x, weight)
    assert torch.equal(values, x)
    values.float().square().sum().backward()
    assert torch.allclose(
        x.grad.float(), (2 * x.detach().float() * weight), rtol=2e-2 if dtype != torch.float32 else 1e-6
    )


def test_what_the_weights_look_like_is_reported():
    rows, _ = drawn_by(policy_mu(), paired=True)
    models = Models(policy_pi(), Tabular(seed=1).double(), WideReward(table()))
    with torch.no_grad():
        prepared = RLOO().prepare(models, rows)
    found = corrected(RLOO(), prepared, TrainingSettings(importance_max=1.5))
    p, q = distribution(policy_pi()), distribution(policy_mu())
    weights = torch.stack([(p / q)[x, r] for x, i, j in PAIRS for r in (i, j)])
    cut = weights.clamp(max=1.5)
    wanted = {
        "importance/weight": cut.mean(),
        "importance/largest": weights.max(),
        "importance/truncated": (weights > 1.5).double().mean(),
        "importance/effective": cut.sum() ** 2 / (len(cut) * (cut**2).sum()),
    }
    for name, value in wanted.items():
        assert found.metrics[name].item() == pytest.approx(float(value), rel=1e-5), name
    assert corrected(RLOO(), prepared, UNCUT).metrics["importance/truncated"].item() == 0


def test_a_batch_without_rows_and_a_sampler_that_says_nothing():
    rows, _ = drawn_by(policy_mu(), paired=True)
    models = Models(policy_pi(), Tabular(seed=1).double(), WideReward(0 * table()))
    with torch.no_grad():
        empty = DAPO().prepare(models, rows)  # every group's scores are equal: all are left out
        assert len(empty) == 0 and corrected(DAPO(), empty, UNCUT) is empty
        silent = RLOO().prepare(models, replace(rows, extras={}))
    with pytest.raises(DataError, match="sampler_logprobs"):
        corrected(RLOO(), silent, UNCUT)
