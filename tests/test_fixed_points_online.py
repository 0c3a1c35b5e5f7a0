"""Where the methods end that sample and compare, on a model whose every sequence can be written down; by the real loop.

    online_dpo, soft labels       pi_ref exp(r / beta) / Z, whatever pairs are compared
    xpo                           the same as alpha goes to 0; with more, the zero of its own expected gradient (``explored``)
    nash_md                       pi ~ pi_ref exp( P(y preferred to pi_b) / kl_coef ), on a preference that is no order
    best_of_n, from_reference     P(y) = ref(y)/ref(r = r(y)) (F(r)^n - F(r-)^n)

and that an implementation with one of the field's usual bugs ends elsewhere. Exact points are found in float64 over all 15
responses, with no code of the methods.
"""

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from enumerable import (
    COUNT,
    EVERYTHING,
    TableReward,
    Tabular,
    TabularRollout,
    distribution,
    response_numbers,
    rows_of,
    total_variation,
)
from palate.errors import ModelError
from palate.functional import best_of_n as exact
from palate.functional.divergences import k1
from palate.methods import best_of_n, dpo, nash_md, online_dpo, xpo
from palate.methods.best_of_n import BestOfN
from palate.methods.nash_md import NashMD
from palate.methods.online_dpo import OnlineDPO
from palate.methods.xpo import XPO
from palate.training.loop import Run, train
from palate.training.rollouts import Rollout
from palate.types import Models
from test_fixed_points import KL_COEF, settings, table
from test_fixed_points_groups import conditionals, of_tokens, reference, tilted


class TabularDrawing(Rollout):
    """``Rollout`` with a sampler for tabular models, token by token from whoever draws."""

    def _drawn(self, who, items, seed, progress):
        model = self._mixed if who == "mixture" else {"policy": self.policy, "reference": self.reference}[who]
        return TabularRollout(model, self.samples_per_prompt)(items, *seed)

    def _mixed(self, ids):
        one, other = (model(ids).logits.log_softmax(-1) for model in (self.policy, self.reference))
        return SimpleNamespace(logits=(1 - self.mixture) * one + self.mixture * other)

    texts = TabularRollout.texts


def trained(folder, method, reward=None, steps=90, samples=2, prompts=64, learning_rate=0.08, guarded=True):
    """What the loop ends at, from the reference, and its metrics; ``prompts`` groups for each of the two prompts."""
    policy, frozen = Tabular(seed=1), Tabular(seed=1).requires_grad_(False)
    whose = getattr(method, "drawn_by", ("policy",))
    rollout = TabularDrawing(policy, None, None, samples, whose, frozen, getattr(method, "mixture", 0.0))
    needed = frozen if "reference" in method.needs else None
    run = Run(
        folder=folder,
        method=method,
        models=Models(policy=policy, reference=needed, reward=TableReward(table()) if reward is None else reward),
        settings=settings(learning_rate=learning_rate, max_steps=steps, batch_size=2 * prompts),
        items=[i % 2 for i in range(2 * prompts)],
        rollout=rollout,
        starts_at_reference=guarded and needed is not None,
    )
    metrics = list(train(run))
    assert metrics[0].get("kl/reference", 0.0) == 0
    return distribution(policy), metrics


# --- the reward's own optimum -----------------------------------------------------------------------------------------

SAME = {
    "online_dpo": (OnlineDPO(beta=KL_COEF), {}),
    "online_dpo, all of 4": (OnlineDPO(beta=KL_COEF), {"samples": 4, "prompts": 24}),
    "online_dpo, extremes of 4": (OnlineDPO(beta=KL_COEF, pairs="extremes"), {"samples": 4, "prompts": 48}),
    "xpo": (XPO(beta=KL_COEF), {"samples": 1, "prompts": 96}),
    "xpo, 3 of each": (XPO(beta=KL_COEF), {"samples": 3, "prompts": 32}),
}


@pytest.mark.parametrize("name", SAME)
def test_with_soft_labels_the_exact_optimum_is_reached(name, tmp_path):
    method, how = SAME[name]
    found, metrics = trained(tmp_path, method, **how)
    assert total_variation(reference(), tilted(reference())) > 0.4
    assert total_variation(found, tilted(reference())) < 0.03
    assert metrics[0]["loss/preference"] == pytest.approx(math.log(2)) and metrics[-1]["loss/preference"] < 0.69


def test_hard_labels_pull_further_than_soft_ones(tmp_path):
    """No finite lead has sigmoid(beta d) = 1: the optimum of soft labels is passed on the way to the best response."""
    found, metrics = trained(tmp_path, OnlineDPO(beta=KL_COEF, labels="hard"))
    mean = lambda p: (p * table()).sum(-1)
    assert (mean(found) > mean(tilted(reference())) + 0.1).all() and metrics[-1]["kl/reference"] > 1.2


def test_a_reward_that_compares_gives_the_same_where_its_preference_is_bradley_terry(tmp_path):
    lead = table()[:, :, None] - table()[:, None]
    found, metrics = trained(tmp_path, OnlineDPO(beta=KL_COEF), TablePreference(lead.sigmoid()))
    assert total_variation(found, tilted(reference())) < 0.03
    assert metrics[-1]["score"] == pytest.approx(0.5), "wins and losses of the policy against itself"


ALPHA = 0.02  # with far more than beta times the chance of a win, the rarest responses have no stationary point


@functools.cache
def explored(alpha, steps=2000):
    """Follow the exact expected gradient of XPO, y ~ pi and y' ~ ref held fixed, to where it is zero."""
    ref = conditionals(reference()).log()
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(1e-5, (1 - k / steps) ** 2))
    p, q = (table()[:, :, None] - table()[:, None]).sigmoid(), reference()
    for _ in range(steps):
        logp = of_tokens(logits.log_softmax(-1)).sum(-1)
        h = KL_COEF * (logp - q.log())
        lead = h[:, :, None] - h[:, None]
        each = -p * torch.nn.functional.logsigmoid(lead) - (1 - p) * torch.nn.functional.logsigmoid(-lead)
        weight = logp.exp().detach()[:, :, None] * q[:, None]
        loss = (weight * each).sum() + alpha * (q * logp).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    assert logits.grad.abs().max() < 1e-5, "not settled"
    return of_tokens(logits.detach().log_softmax(-1)).sum(-1).exp()


def test_optimism_moves_the_policy_away_from_what_the_reference_writes(tmp_path):
    assert total_variation(explored(1e-5), tilted(reference())) < 0.001
    assert total_variation(explored(ALPHA), tilted(reference())) > 0.06
    likelihood = [(reference() * p.log()).sum(-1) for p in (explored(ALPHA), tilted(reference()))]
    assert (likelihood[0] < likelihood[1]).all()
    found, _ = trained(tmp_path, XPO(beta=KL_COEF, alpha=ALPHA))
    assert total_variation(found, explored(ALPHA)) < 0.03


# --- a preference that is no order ------------------------------------------------------------------------------------

TAU = 0.2


class TablePreference:
    """P(y preferred to y') from a table [2, 15, 15]."""

    def __init__(self, wins):
        self.wins = wins

    def compare(self, tokens, first, second):
        number = response_numbers(tokens)
        return self.wins[tokens.ids[first, 0] - 1, number[first], number[second]].float()


def going_round():
    """Every response beats those after it in a circle and loses to those before it; and some are liked a little more."""
    step = torch.arange(COUNT)[None] - torch.arange(COUNT)[:, None]
    circle = 2.5 * torch.sin(2 * math.pi * step / COUNT).double()
    lead = 0.4 * (table()[:, :, None] - table()[:, None])
    return (circle + lead).sigmoid()


def mixed_with_reference(p, b):
    """The mixture of p and the reference, normalised at every token, [2, 15]."""
    one, other = conditionals(p).log(), conditionals(reference()).log()
    return of_tokens(((1 - b) * one + b * other).log_softmax(-1)).sum(-1).exp()


def answer_to(p, b):
    """pi_ref exp( P(y preferred to p's mixture) / tau ) / Z: at the fixed point it is p itself."""
    wins = (going_round() * mixed_with_reference(p, b)[:, None]).sum(-1)
    wanted = reference() * (wins / TAU).exp()
    return wanted / wanted.sum(-1, keepdim=True)


@functools.cache
def equilibrium(b):
    """The fixed point, by small steps towards the answer, in the logarithm."""
    p = reference()
    while total_variation(p, answer_to(p, b)) > 1e-9:
        p = (0.8 * p.log() + 0.2 * answer_to(p, b).log()).softmax(-1)
    return p


def nash_residual(folder, b, steps=240):
    """How far the trained policy is from its own answer, and from the equilibrium."""
    method = NashMD(kl_coef=TAU, mixture=b)
    # A game goes round its equilibrium before it comes to rest: small steps, and many.
    how = {"samples": 4, "prompts": 40, "steps": steps, "learning_rate": 0.02}
    found, metrics = trained(folder, method, TablePreference(going_round()), **how)
    return total_variation(found, answer_to(found, b)), total_variation(found, equilibrium(b)), metrics


def test_the_preference_is_no_order_and_the_equilibria_differ():
    """Three responses in a circle; the points that the tests below tell apart are apart."""
    wins = going_round()[0]
    assert torch.allclose(wins + wins.T, torch.ones(COUNT, COUNT, dtype=torch.float64))
    beats = wins > 0.55
    circles = [(i, j, k) for i in range(COUNT) for j in range(COUNT) for k in range(COUNT)]
    assert any(beats[i, j] and beats[j, k] and beats[k, i] for i, j, k in circles)
    points = [equilibrium(0.0), equilibrium(0.5), equilibrium(1.0), reference()]
    assert min(total_variation(p, q) for i, p in enumerate(points) for q in points[:i]) > 0.06
    assert 0.005 < total_variation(equilibrium(0.0), equilibrium(0.125)) < 0.03, "the default mixture is near self-play"


@pytest.mark.parametrize("b", [0.0, 0.5])
def test_nash_md_ends_at_the_equilibrium(b, tmp_path):
    """With b = 0 the regularised Nash equilibrium; there the policy wins half of the time against itself."""
    residual, distance, metrics = nash_residual(tmp_path, b)
    assert residual < 0.03 and distance < 0.03
    assert total_variation(reference(), answer_to(reference(), b)) > 0.15
    if b == 0:
        assert metrics[-1]["preference/mixture"] == pytest.approx(0.5, abs=0.03)


def test_nash_md_on_scores_uses_the_probability_that_they_mean(tmp_path):
    lead = table()[:, :, None] - table()[:, None]
    found, _ = trained(tmp_path, NashMD(kl_coef=TAU, mixture=0.0), samples=4, prompts=40)
    wanted = reference() * ((lead.sigmoid() * found[:, None]).sum(-1) / TAU).exp()
    assert total_variation(found, wanted / wanted.sum(-1, keepdim=True)) < 0.03


# --- the best of n ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, ties", [(2, False), (4, False), (8, True)])
def test_best_of_n_of_the_reference_ends_at_the_law_of_the_best(n, ties, tmp_path):
    """With ties (scores rounded to halves: 15 responses, some 6 scores) the equally good share as the reference does."""
    scores = (table() * 2).round() / 2 if ties else table()
    method = BestOfN(from_reference=True, epochs=2)
    found, metrics = trained(tmp_path, method, TableReward(scores), samples=n, prompts=320 // n)
    law = exact.best_of_n_law(reference(), scores, n)
    assert total_variation(found, law) < 0.03 and total_variation(reference(), law) > 0.1
    kl = (found * (found / reference()).log()).sum(-1)
    assert torch.allclose(kl, exact.best_of_n_kl(reference(), scores, n), atol=0.05)
    bound = math.log(n) - (n - 1) / n
    assert (kl < bound + 0.02).all() and metrics[0]["kl/best_of_n_bound"] == pytest.approx(bound)


def test_best_of_n_of_its_own_samples_goes_on_to_the_best_response(tmp_path):
    """RAFT: one round is the law of the best of n; of that again the best of n; nothing holds it."""
    found, metrics = trained(tmp_path, BestOfN(), samples=8, prompts=12)
    assert (found.argmax(-1) == table().argmax(-1)).all() and (found.max(-1).values > 0.9).all()
    assert metrics[-1]["score"] > metrics[0]["score/best"] > metrics[0]["score"]


# --- planted bugs end elsewhere ---------------------------------------------------------------------------------------


def other_way_round(first, second, probability, labels, right=online_dpo.labelled):
    chosen, rejected, sure = right(first, second, probability, labels)
    return rejected, chosen, sure


def per_token(tokens, found, rewards, advantages, kl_coef, right=nash_md.trajectories):
    """sum_t (A - kl_coef log-ratio_t) log pi_t: each token is charged for itself alone."""
    charge = k1(found.logprobs, found.reference_logprobs)
    return right(tokens, found, rewards, advantages[:, None] - TAU * charge, kl_coef)


def worst(scores, group, keep=1, right=best_of_n.best_weights):
    return right(-scores, group, keep)


def charged_with_gradient(logprobs, advantages, mask, right=nash_md.reinforce_loss):
    """The KL charge not detached: k1 as a term of the loss, whose own gradient is zero on average (the reference's part
    is a constant)."""
    return right(logprobs, advantages, mask) + TAU * torch.where(mask, logprobs, 0).sum(-1)


@pytest.mark.parametrize(
    "name, module, attribute, wrong",
    [
        ("online_dpo", online_dpo, "labelled", other_way_round),
        ("xpo", xpo, "labelled", other_way_round),
        ("online_dpo", dpo, "expected_loss", lambda loss, lead, p: p * loss(-lead) + (1 - p) * loss(lead)),
    ],
    ids=["labels swapped, online_dpo", "labels swapped, xpo", "wrong sign of the lead"],
)
def test_a_planted_bug_in_the_pairs_ends_elsewhere(name, module, attribute, wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(module, attribute, wrong)
    method, how = SAME[name]
    assert total_variation(trained(tmp_path, method, **how, guarded=False)[0], tilted(reference())) > 0.2


def test_pessimism_in_place_of_optimism_ends_elsewhere(monkeypatch, tmp_path):
    right = xpo.xpo_loss
    monkeypatch.setattr(xpo, "xpo_loss", lambda c, r, e, beta, alpha, p: right(c, r, e, beta, -alpha, p))
    found, _ = trained(tmp_path, XPO(beta=KL_COEF, alpha=ALPHA), guarded=False)
    assert total_variation(found, explored(ALPHA)) > 0.06
    with pytest.raises(ModelError, match="loss/preference"):  # a real run does not even begin
        trained(tmp_path / "guarded", XPO(beta=KL_COEF, alpha=ALPHA))


def test_the_kl_in_the_loss_with_its_gradient_ends_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(nash_md, "sequence_rewards", lambda found, scores, mask, kl_coef: scores)
    monkeypatch.setattr(nash_md, "reinforce_loss", charged_with_gradient)
    residual, distance, _ = nash_residual(tmp_path, 0.0, steps=90)
    assert min(residual, distance) > 0.2


def bias_of_nash_md():
    """How far the expected gradient of two samples is from the exact one, of E[w(y)] - kl_coef KL(pi || ref): w(y) is how
    often y is preferred to the mixture. The loss is linear in the advantage while the ratio is 1: weights go there."""
    policy = Tabular(seed=8)
    p = distribution(policy)
    wins = (going_round() * mixed_with_reference(p, 0.5)[:, None]).sum(-1)
    pairs = [(x, i, j) for x in range(2) for i in range(COUNT) for j in range(COUNT)]
    rows = rows_of([(x, r) for x, i, j in pairs for r in (i, j, 0)])
    whose = {**rows.extras, "drawn_by": ["policy", "policy", "mixture"] * len(pairs)}
    rows = replace(rows, group=torch.arange(len(pairs)).repeat_interleave(3), extras=whose)
    weight = torch.tensor([float(p[x, i] * p[x, j]) for x, i, j in pairs]).repeat_interleave(2)
    against_all = TablePreference(wins[:, :, None].expand(2, COUNT, COUNT))
    models = Models(policy=policy, reference=Tabular(seed=1), reward=against_all)
    method = NashMD(kl_coef=TAU, mixture=0.5)
    with torch.no_grad():
        batch = method.prepare(models, rows)
    loss = method.loss(models, replace(batch, advantages=batch.advantages * weight[:, None]))["loss"]
    (found,) = torch.autograd.grad(-loss.total / 4, policy.base_model.table)  # two prompts, two responses
    every = rows_of(EVERYTHING)
    logits = policy(every.ids).logits.double().log_softmax(-1)[:, :-1]
    logp = (logits.gather(-1, every.ids[:, 1:, None])[..., 0] * every.response_mask[:, 1:]).sum(-1).reshape(2, COUNT)
    value = (logp.exp() * (wins - TAU * (logp - reference().log()))).sum(-1).mean()
    (wanted,) = torch.autograd.grad(value, policy.base_model.table)
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_nash_mds_expected_gradient_is_the_exact_one():
    assert bias_of_nash_md() < 1e-5


@pytest.mark.parametrize("bug", ["per-token product", "wrong sign of the preference", "KL with the wrong sign"])
def test_a_planted_bug_is_seen_in_nash_mds_expected_gradient(bug, monkeypatch):
    rewards, means = nash_md.sequence_rewards, nash_md.mean_of_rows
    if bug == "per-token product":
        monkeypatch.setattr(nash_md, "sequence_rewards", lambda found, scores, mask, kl_coef: scores)
        monkeypatch.setattr(nash_md, "trajectories", per_token)
    elif bug == "wrong sign of the preference":
        monkeypatch.setattr(nash_md, "mean_of_rows", lambda p, rows, count: means(1 - p, rows, count))
    else:
        monkeypatch.setattr(nash_md, "sequence_rewards", lambda f, s, m, kl_coef: rewards(f, s, m, -kl_coef))
    assert bias_of_nash_md() > 0.05


@pytest.mark.parametrize(
    "attribute, wrong",
    [
        ("best_weights", worst),
        ("best_weights", lambda scores, group, keep: torch.ones_like(scores)),
        ("sft_loss", lambda logprobs: logprobs.detach() * logprobs / 3),
    ],
    ids=["the worst for the best", "all for the best", "another loss"],
)
def test_a_planted_bug_in_best_of_n_ends_elsewhere(attribute, wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(best_of_n, attribute, wrong)
    found, _ = trained(tmp_path, BestOfN(from_reference=True, epochs=2), samples=4, prompts=40)
    assert total_variation(found, exact.best_of_n_law(reference(), table(), 4)) > 0.1
