"""Checks of the methods that sample against slow definitions in float64, in unusual cases.

Nothing is shared with the library but the rows that go in: probabilities come from the model's own forward, row by row,
and every sum is written out.
"""

import copy
import json
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from batches import scalar_of
from palate.errors import ConfigError
from palate.functional.advantages import group_relative, leave_one_out
from palate.functional.best_of_n import best_of_n_kl_bound, best_of_n_law, best_weights
from palate.functional.policy_gradient import clipped_surrogate, is_clipped
from palate.generation.settings import SamplingSettings
from palate.methods.best_of_n import BestOfN
from palate.methods.dapo import DAPO, overlong_penalty
from palate.methods.dr_grpo import DrGRPO
from palate.methods.grpo import GRPO
from palate.methods.gspo import GSPO
from palate.methods.nash_md import NashMD
from palate.methods.online_dpo import OnlineDPO
from palate.methods.ppo_lagrangian import PPOLagrangian
from palate.methods.reinforce import Reinforce
from palate.methods.reinforce_pp import ReinforcePP
from palate.methods.rloo import RLOO
from palate.methods.trpo import TRPO
from palate.methods.xpo import XPO
from palate.models.curvature import fisher_product, flat, put
from palate.models.forward import token_logprobs
from palate.models.load import load_policy
from palate.models.rewards import WeightedReward
from palate.models.rewards.answers import answer_in
from palate.models.roles import AdapterOff
from palate.models.save import save_model
from palate.training.checkpoint import method_state, restored_method
from palate.training.rollouts import Rollout
from palate.training.trust_region import trust_region_step
from palate.types import Mean, Models, Scored, Tokens, Trajectories, microbatches
from tiny import LORA, tiny, tokenizer_of, trained

HEAT = 0.7
SIZES = (3, 1, 2, 4)  # responses to each prompt
SCORES = [0.3, -1.0, 2.0, 0.5, 0.1 + 0.2, 0.3, 1.0, -2.0, 1.0, 0.25]


def batch(sizes=SIZES):
    """Groups of unlike size; row 2 has a hole in its response, row 4 no response token; rows 1 and 8 were cut."""
    rows = sum(sizes)
    generator = torch.Generator().manual_seed(3)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    length = torch.tensor([6, 4, 8, 3, 5, 7, 9, 4, 6, 5] * 2)[:rows, None]
    place = torch.arange(9)
    ids = torch.randint(4, 20, (rows, 9), generator=generator)
    prompts = torch.randint(4, 20, (len(sizes), 2), generator=generator)
    ids[:, :2] = prompts[group]
    real = place < length
    response = real & (place >= 2)
    if rows == 10:
        response[2, 4:6], response[4] = False, False
    finished = torch.ones(rows, dtype=torch.bool)
    finished[[1, rows - 2]] = False
    return Tokens(ids * real, real, response, group, {"finished": finished})


class Given:
    """A reward that says what it was told, by what the first six ids of a row are."""

    def __init__(self, tokens, scores):
        self.said = {tuple(row.tolist()): score for row, score in zip(tokens.ids[:, :6], scores, strict=True)}

    def __call__(self, tokens):
        return Scored(torch.tensor([self.said[tuple(row.tolist())] for row in tokens.ids[:, :6]]), {})


def models_of(rows, scores):
    policy, reference = tiny(seed=1), tiny(seed=2).requires_grad_(False)
    return Models(policy=policy, reference=reference, reward=Given(rows, scores))


def slow_logprobs(model, rows, heat=1.0):
    """{row: [log p of each of its response tokens]}, with a gradient, in float64."""
    wide = {}
    for i in range(len(rows)):
        ids = rows.ids[i][rows.attention_mask[i]]
        log_p = (model(input_ids=ids[None]).logits[0].double() / heat).log_softmax(-1)
        wide[i] = [log_p[t - 1, ids[t]] for t in range(len(ids)) if rows.response_mask[i, t]]
    return wide


def moved(model):
    """The model a little away from itself, as after some updates."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.08 * torch.randn(p.shape, generator=generator))
    return other


def members(rows):
    return [[i for i in range(len(rows)) if rows.group[i] == g] for g in sorted(set(rows.group.tolist()))]


def mean(values):
    return sum(values) / len(values)


def std(values):
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def clip_loss(rho, a, low, high):
    """- min(rho A, clip(rho) A), written out by cases."""
    if a > 0:
        return -a * (1 + high) if rho > 1 + high else -a * rho
    return -a * (1 - low) if rho < 1 - low else -a * rho


def k3(new, reference):
    return (reference - new).exp() - (reference - new) - 1


def k1_sums(old, reference):
    return {i: sum(float(a - b) for a, b in zip(old[i], reference[i], strict=True)) for i in old}


def z(rewards, rows, eps=1e-4, scale=True):
    found = {}
    for group in members(rows):
        values = [rewards[i] for i in group]
        for i in group:
            found[i] = (rewards[i] - mean(values)) / ((std(values) + eps) if scale else 1.0)
            if max(values) == min(values):
                found[i] = 0.0
    return found


def definition(name, rows, new, old, reference):
    """The mean loss of a batch, a float64 scalar with a gradient in ``new``."""
    scores = [torch.tensor(s).double().item() for s in SCORES]
    k1 = k1_sums(old, reference)
    answered = [i for i in range(len(rows)) if new[i]]
    ended = rows.extras["finished"].tolist()
    rho = {i: [(a - b.detach()).exp() for a, b in zip(new[i], old[i], strict=True)] for i in new}
    tokens = [(i, t) for i in answered for t in range(len(new[i]))]
    if name == "grpo":
        a = z({i: s if ended[i] else -1.0 for i, s in enumerate(scores)}, rows)
        rows_ = [
            mean([clip_loss(r, a[i], 0.2, 0.2) + 0.04 * k3(n, q) for r, n, q in zip(rho[i], new[i], reference[i])])
            for i in answered
        ]
        return mean(rows_)
    if name == "dr_grpo":
        a = z({i: scores[i] - 0.3 * k1[i] - 0.5 * (not ended[i]) for i in k1}, rows, scale=False)
        return mean([sum(clip_loss(r, a[i], 0.2, 0.2) for r in rho[i]) / 64 for i in answered])
    if name == "dapo":
        limit, buffer = 7, 3
        lengths = {i: len(new[i]) for i in new}
        charge = {i: 0.0 if n <= limit - buffer else (limit - buffer - n) / buffer for i, n in lengths.items()}
        a = z({i: scores[i] + charge[i] for i in charge}, rows)
        kept = {i for g in members(rows) if len({scores[i] for i in g}) > 1 for i in g}
        return mean([clip_loss(rho[i][t], a[i], 0.2, 0.28) for i, t in tokens if i in kept])
    if name == "gspo":
        a = z(dict(enumerate(scores)), rows)
        s = {i: mean([n - o.detach() for n, o in zip(new[i], old[i])]).exp() for i in answered}
        return mean([clip_loss(s[i], a[i], 0.02, 0.03) for i in answered])
    if name == "rloo":
        total = {i: scores[i] - 0.05 * k1[i] for i in k1}
        a = {}
        for group in members(rows):
            for i in group:
                others = [total[j] for j in group if j != i]
                a[i] = total[i] - mean(others) if others else 0.0
        whole = {i: sum(n - o.detach() for n, o in zip(new[i], old[i])).exp() for i in answered}
        return mean([clip_loss(whole[i], a[i], 0.2, 0.2) for i in answered])
    if name == "reinforce":
        total = {i: scores[i] - 0.05 * k1[i] for i in k1}
        return mean([-(total[i] - 0.125) * sum(new[i]) for i in answered])
    if name == "reinforce_pp":
        a = z({i: s if ended[i] else -3.0 for i, s in enumerate(scores)}, rows, scale=False)
        g = {
            (i, t): a[i] - 0.2 * sum(float(old[i][s] - reference[i][s]) for s in range(t, len(new[i])))
            for i, t in tokens
        }
        middle = mean(list(g.values()))
        spread = math.sqrt(mean([(v - middle) ** 2 for v in g.values()]) + 1e-8)
        return mean([clip_loss(rho[i][t], (g[i, t] - middle) / spread, 0.2, 0.2) for i, t in tokens])
    raise AssertionError(name)


METHODS = {
    "grpo": GRPO(missing_eos_score=-1.0, temperature=HEAT),
    "dr_grpo": DrGRPO(kl_coef=0.3, kl="reward", missing_eos_penalty=0.5, temperature=HEAT),
    "dapo": DAPO(max_new_tokens=7, overlong_buffer=3, temperature=HEAT),
    "gspo": GSPO(clip_low=0.02, clip_high=0.03, temperature=HEAT),
    "rloo": RLOO(epochs=2, temperature=HEAT),
    "reinforce": Reinforce(running_reward=0.125, temperature=HEAT),
    "reinforce_pp": ReinforcePP(kl_coef=0.2, baseline="group", missing_eos_score=-3.0, temperature=HEAT),
}


def looked_at(method, models, rows, max_tokens=1):
    """Mean loss and its gradient once the policy has moved, from microbatches of at most ``max_tokens`` tokens."""
    with torch.no_grad():
        made = method.prepare(models, rows)
    later = replace(models, policy=moved(models.policy))
    total = None
    for part in microbatches(made, max_tokens):
        loss = method.loss(later, part)["loss"]
        total = loss if total is None else total + loss
    (total.total / total.count).backward()
    return total.item(), gradient_of(later.policy)


def gradient_of(model):
    return flat([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_the_definition_over_ragged_groups_holes_and_an_empty_row(name):
    rows = batch()
    models = models_of(rows, SCORES)
    later = moved(models.policy)
    with torch.no_grad():
        old, reference = (slow_logprobs(m, rows, HEAT) for m in (models.policy, models.reference))
    expected = definition(name, rows, slow_logprobs(later, rows, HEAT), old, reference)
    expected.backward()
    wanted = gradient_of(later)
    assert float(wanted.abs().max()) > 1e-4
    for max_tokens in (1, 10**6):  # group by group, and at once
        value, gradient = looked_at(METHODS[name], models, rows, max_tokens)
        assert value == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
        assert torch.allclose(gradient, wanted, rtol=1e-3, atol=2e-5 * float(wanted.abs().max()) + 1e-7)


# -- pieces ----------------------------------------------------------------------------------------------------------


def test_groups_out_of_order_of_one_and_of_equal_scores_have_exact_advantages():
    group = torch.tensor([7, 2, 7, 5, 2, 7, 9, 9, 9])
    scores = torch.tensor([1e8, 0.1, 3.0, 4.0, 0.5, -1e8, *[0.1 + 0.2] * 3], dtype=torch.float64)
    loo, z_scores = leave_one_out(scores, group), group_relative(scores, group)
    for i, number in enumerate(group.tolist()):
        mine = [s for s, g in zip(scores.tolist(), group.tolist(), strict=True) if g == number]
        others = [
            s for j, (s, g) in enumerate(zip(scores.tolist(), group.tolist(), strict=True)) if g == number and j != i
        ]
        wanted = scores[i].item() - mean(others) if others else 0.0
        assert loo[i].item() == pytest.approx(wanted, rel=1e-12, abs=1e-7)
        assert z_scores[i].item() == pytest.approx((scores[i].item() - mean(mine)) / (std(mine) + 1e-4), abs=1e-9)
    for exact in (loo, z_scores):
        assert exact[[3, 6, 7, 8]].tolist() == [0.0] * 4
    pair = torch.tensor([0.25, 1.0])
    assert leave_one_out(pair, torch.tensor([0, 0])).tolist() == [-0.75, 0.75]


def test_a_ratio_on_the_border_has_its_gradient_and_one_beyond_it_on_the_costly_side_has_none():
    low, high = 0.25, 0.5  # exact in binary
    for ratio, advantage, slope in [
        (1.5, 2.0, -2.0),
        (1.5 + 1e-9, 2.0, 0.0),
        (1.5 + 1e-9, -2.0, 2.0),
        (0.75, -2.0, 2.0),
        (0.75 - 1e-9, -2.0, 0.0),
        (0.75 - 1e-9, 2.0, -2.0),
        (1e17, -2.0, 2.0),
        (0.0, 2.0, -2.0),
        (3.0, 0.0, 0.0),
    ]:
        rho = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
        a = torch.tensor(advantage, dtype=torch.float64)
        clipped_surrogate(rho, a, low, high).backward()
        assert rho.grad == slope, (ratio, advantage)
        assert bool(is_clipped(rho, a, low, high)) == (slope == 0 and advantage != 0)


def test_the_overlong_penalty_begins_after_the_buffer_and_is_one_at_the_limit():
    lengths = torch.tensor([0, 11, 12, 13, 15, 16, 17])
    assert overlong_penalty(lengths, 16, 4).tolist() == [0, 0, 0, -0.25, -0.75, -1, -1]
    assert overlong_penalty(lengths, 16, 1).tolist() == [0, 0, 0, 0, 0, -1, -1]
    assert overlong_penalty(lengths, 16, 16).tolist() == [0, *(-n / 16 for n in (11, 12, 13, 15, 16)), -1]
    assert overlong_penalty(lengths, 16, 0).tolist() == [0] * 7


@pytest.mark.parametrize("keep", [1, 2])
def test_kept_weights_over_all_draws_with_ties_are_the_best_of_n_law(keep):
    """Four outcomes, two of which are equally good; every triple of draws with its probability."""
    p, r = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0, -1.0]).double()
    found = torch.zeros(4, dtype=torch.float64)
    for draws in product(range(4), repeat=3):
        weights = best_weights(r[list(draws)], torch.zeros(3, dtype=torch.long), keep)
        assert float(weights.sum()) == pytest.approx(keep)
        for outcome, weight in zip(draws, weights, strict=True):
            found[outcome] += p[list(draws)].prod() * weight
    if keep == 1:
        assert torch.allclose(found, best_of_n_law(p, r, 3), atol=1e-12)
    else:  # two of three = all three less the worst
        worst = best_of_n_law(p, -r, 3)
        assert torch.allclose(found, 3 * p - worst, atol=1e-12)


def test_best_of_n_is_the_token_mean_over_what_is_kept_by_half_where_two_are_equal():
    rows = replace(batch((3, 2, 4)), extras={})
    scores = [1.0, 1.0, 0.0, 0.5, -0.5, 2.0, 3.0, 3.0, 3.0]
    models = models_of(rows, scores)
    value, _ = looked_at(BestOfN(), models, rows)
    weight = [0.5, 0.5, 0, 1, 0, 0, 1 / 3, 1 / 3, 1 / 3]
    with torch.no_grad():
        new = slow_logprobs(moved(models.policy), rows)
    total = sum(w * len(new[i]) for i, w in enumerate(weight))
    assert value == pytest.approx(-sum(w * float(sum(new[i])) for i, w in enumerate(weight)) / total, rel=1e-5)


def test_the_bound_of_many_kept_of_many_is_a_number():
    """Of 128 the better 64: the limit for large n is a uniform law on the upper half, log 2; keeping n/2 blurs its edge."""
    assert best_of_n_kl_bound(8, 2) == pytest.approx(0.8318674, abs=1e-6)  # numeric integral with exact binomials
    assert 0.55 < best_of_n_kl_bound(100, 50) < best_of_n_kl_bound(160, 80) < math.log(2)


# -- pairs -----------------------------------------------------------------------------------------------------------


def pair_loss(d, p):
    return -p * math.log(1 / (1 + math.exp(-d))) - (1 - p) * math.log(1 / (1 + math.exp(d)))


@pytest.mark.parametrize("labels", ["soft", "hard"])
@pytest.mark.parametrize("pairs", ["all", "extremes"])
def test_online_dpo_is_the_mean_over_prompts_of_the_mean_over_their_pairs_ties_by_half(labels, pairs):
    rows = replace(batch((3, 1, 2, 3)), extras={})
    scores = [1.0, 1.0, -0.5, 4.0, 0.5, 0.5, 2.0, 0.0, 1.0]
    models = models_of(rows, scores)
    value, _ = looked_at(OnlineDPO(beta=0.3, labels=labels, pairs=pairs, temperature=HEAT), models, rows)
    with torch.no_grad():
        new, reference = slow_logprobs(moved(models.policy), rows), slow_logprobs(models.reference, rows)
    h = [float(sum(new[i]) - sum(reference[i])) for i in range(9)]
    means = []
    for group in members(rows):
        both = [(i, j) for i in group for j in group if i < j]
        if pairs == "extremes":
            both = [
                (i, j)
                for i in group
                for j in group
                if scores[i] == max(scores[k] for k in group) > min(scores[k] for k in group) == scores[j]
            ][:1]
        each = []
        for i, j in both:
            d = scores[i] - scores[j]
            p = 1 / (1 + math.exp(-d)) if labels == "soft" else 0.5 + 0.5 * ((d > 0) - (d < 0))
            each.append(pair_loss(0.3 * (h[i] - h[j]), p))
        means += [mean(each)] if each else []
    assert value == pytest.approx(mean(means), rel=1e-5)


def test_xpo_adds_alpha_times_the_log_probability_of_the_reference_samples():
    rows = batch((4, 3))
    rows = replace(
        rows, extras={"drawn_by": ["policy", "policy", "reference", "reference", "policy", "reference", "policy"]}
    )
    scores = [1.0, 0.0, 0.5, 0.5, -1.0, 2.0, 2.0]
    models = models_of(rows, scores)
    value, _ = looked_at(XPO(beta=0.2, alpha=0.01, labels="hard", temperature=HEAT), models, rows)
    with torch.no_grad():
        new, reference = slow_logprobs(moved(models.policy), rows), slow_logprobs(models.reference, rows)
    s = [float(sum(new[i])) for i in range(7)]
    h = [s[i] - float(sum(reference[i])) for i in range(7)]
    means = []
    for mine, its in (((0, 1), (2, 3)), ((4, 6), (5,))):
        each = [
            pair_loss(0.2 * (h[i] - h[j]), 0.5 + 0.5 * ((scores[i] > scores[j]) - (scores[i] < scores[j])))
            + 0.01 * s[j]
            for i in mine
            for j in its
        ]
        means.append(mean(each))
    assert value == pytest.approx(mean(means), rel=1e-5)


def test_nash_md_pays_the_mean_win_over_all_opponents_less_the_kl_of_the_whole_response():
    rows = batch((4, 3))
    rows = replace(rows, extras={"drawn_by": ["policy", "policy", "mixture", "mixture", "policy", "mixture", "policy"]})
    scores = [1.0, 0.0, 0.5, 0.5, -1.0, 2.0, 2.0]
    models = models_of(rows, scores)
    value, _ = looked_at(NashMD(kl_coef=0.1, temperature=HEAT), models, rows)
    with torch.no_grad():
        new, old, reference = (
            slow_logprobs(m, rows, HEAT) for m in (moved(models.policy), models.policy, models.reference)
        )
    k1, losses = k1_sums(old, reference), []
    for mine, its in (((0, 1), (2, 3)), ((4, 6), (5,))):
        total = {i: mean([1 / (1 + math.exp(scores[j] - scores[i])) for j in its]) - 0.1 * k1[i] for i in mine}
        a, b = mine
        losses += [-(total[a] - total[b]) * float(sum(new[a])), -(total[b] - total[a]) * float(sum(new[b]))]
    assert value == pytest.approx(mean(losses), rel=1e-4, abs=1e-6)


# -- who samples -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")

    save_model(tiny(), tokenizer_of(), folder / "m")
    return trained(load_policy(folder / "m", lora=LORA))


def test_reference_and_mixture_are_drawn_with_the_adapter_off_at_the_sampling_temperature(adapted):
    reference = AdapterOff(adapted)
    chat = SimpleNamespace(stop_token_ids=[2])
    rollout = Rollout(
        adapted,
        chat,
        SamplingSettings(max_new_tokens=6, temperature=HEAT),
        samples_per_prompt=3,
        drawn_by=("policy", "mixture", "reference"),
        reference=reference,
        mixture=0.25,
    )
    items = [SimpleNamespace(prompt_ids=[5, 6, 7], record=None), SimpleNamespace(prompt_ids=[9], record=None)]
    import palate.training.rollouts as module

    before, module.prompt_ids = module.prompt_ids, lambda items: [i.prompt_ids for i in items]
    try:
        rows = rollout(items, 1)
    finally:
        module.prompt_ids = before
    with torch.no_grad():
        for i, who in enumerate(rows.extras["drawn_by"]):
            ids = rows.ids[i][rows.attention_mask[i]]
            own = adapted(input_ids=ids[None]).logits[0].double()
            with adapted.disable_adapter():
                base = adapted(input_ids=ids[None]).logits[0].double()
            assert (own - base).abs().max() > 0.05
            share = {"policy": 0.0, "mixture": 0.25, "reference": 1.0}[who]
            both = (1 - share) * (own / HEAT).log_softmax(-1) + share * (base / HEAT).log_softmax(-1)
            log_p = both - both.logsumexp(-1, keepdim=True)  # normalised at every token
            for t in rows.response_mask[i].nonzero()[:, 0].tolist():
                assert rows.extras["sampler_logprobs"][i, t] == pytest.approx(float(log_p[t - 1, ids[t]]), abs=1e-4)
    assert torch.allclose(
        token_logprobs(reference, rows, temperature=HEAT)[[6, 7, 8]],
        torch.where(rows.response_mask, rows.extras["sampler_logprobs"], 0)[[6, 7, 8]],
        atol=1e-4,
    )


# -- TRPO ------------------------------------------------------------------------------------------------------------


def test_a_trust_region_step_of_an_adapter_is_the_dense_one_at_the_temperature(adapted):
    """F from the Jacobian of the logits, state by state; the step from a dense solve; frozen weights never move."""
    policy = copy.deepcopy(adapted)
    rows = batch((2, 1))
    names = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    chosen = [p for n, p in names if "layers.1.self_attn.q_proj" in n]
    for _, p in names:
        p.requires_grad_(any(p is c for c in chosen))
    fisher, size, states = 0.0, sum(p.numel() for p in chosen), 0
    for i in range(len(rows)):
        ids = rows.ids[i][rows.attention_mask[i]]
        log_p = (policy(input_ids=ids[None]).logits[0] / HEAT).log_softmax(-1)
        for t in range(len(ids)):
            if rows.response_mask[i, t]:
                jacobian = torch.stack(
                    [flat(torch.autograd.grad(v, chosen, retain_graph=True)).double() for v in log_p[t - 1]]
                )
                fisher = fisher + jacobian.T @ (log_p[t - 1].detach().exp().double()[:, None] * jacobian)
                states += 1
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0))
    found = fisher_product(policy, rows, chosen, vector, temperature=HEAT)
    assert torch.allclose(found.double(), fisher @ vector.double(), rtol=1e-3, atol=1e-4 * float(found.abs().max()))

    method = TRPO(temperature=HEAT, iterations=60, delta=1e-4)

    class Surrogate:
        temperature = HEAT

        def loss(self, models, part):
            rho = (token_logprobs(models.policy, part.tokens, temperature=HEAT) - part.logprobs).exp()

            return {"loss/policy": Mean.of(-rho * part.advantages, part.tokens.response_mask)}

    advantages = torch.randn(rows.ids.shape, generator=torch.Generator().manual_seed(1))
    old = token_logprobs(policy, rows, temperature=HEAT).detach()
    made = Trajectories(rows, old, None, torch.where(rows.response_mask, advantages, 0), torch.zeros(len(rows)))
    start = flat(chosen)
    loss = Surrogate().loss(Models(policy=policy), made)["loss/policy"]
    (loss.total / loss.count).backward()
    gradient = flat([p.grad for p in chosen]).double()
    frozen = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    run = SimpleNamespace(
        dtype="float32",
        device=torch.device("cpu"),
        method=Surrogate(),
        models=Models(policy=policy),
        settings=SimpleNamespace(microbatch_tokens=lambda device: 1),
    )
    metrics = trust_region_step(run, made, chosen, method.trust_region)
    dense = fisher / states + 0.1 * torch.eye(size, dtype=torch.float64)
    x = torch.linalg.solve(dense, -gradient)
    step = math.sqrt(2 * 1e-4 / float(x @ dense @ x)) * x * 0.8 ** metrics["trust_region/backtracks"]
    assert metrics["trust_region/accepted"] == 1 and metrics["trust_region/kl"] <= 1e-4
    assert torch.allclose((flat(chosen) - start).double(), step, rtol=0.02, atol=0.02 * float(step.abs().max()))
    assert all(torch.equal(p, frozen[n]) for n, p in policy.named_parameters() if n in frozen)
    put(chosen, start)


# -- the Lagrangian --------------------------------------------------------------------------------------------------


def lagrangian_models(rows, weight=0.0):
    policy = tiny(seed=1)
    reward = WeightedReward(
        {"helpful": (Given(rows, SCORES), 1.0), "cost": (Given(rows, [0.5 * i for i in range(len(rows))]), weight)}
    )

    return Models(policy, tiny(seed=2).requires_grad_(False), reward, scalar_of(tiny(seed=1)))


def test_the_multiplier_goes_on_after_a_checkpoint_as_if_there_had_been_none():
    rows = batch()
    models = lagrangian_models(rows)
    method = PPOLagrangian(cost_limit=1.0, multiplier=0.7, cost_window=14)
    straight, resumed = method, method
    wanted, recent = 0.7, []
    for _ in range(3):
        with torch.no_grad():
            straight = straight.adapt(straight.prepare(models, rows))
            resumed = restored_method(method, json.loads(json.dumps(method_state(resumed))))
            resumed = resumed.adapt(resumed.prepare(models, rows))
        recent = [*recent, *(0.5 * i for i in range(10))][-14:]
        wanted *= math.exp(0.05 * wanted * (mean(recent) - 1.0))
    assert straight == resumed
    assert straight.multiplier == pytest.approx(wanted, rel=1e-9)


def test_the_price_of_a_missing_end_does_not_grow_with_the_multiplier():
    """(r - penalty - lambda c - kl_coef k1) / (1 + lambda): all that is paid is divided alike."""
    rows = batch()
    models = lagrangian_models(rows)
    for multiplier in (0.5, 9.0):
        method = PPOLagrangian(multiplier=multiplier, missing_eos_penalty=2.0, kl_coef=0.3, temperature=HEAT)
        with torch.no_grad():
            made = method.prepare(models, rows)
            k1 = k1_sums(*(slow_logprobs(m, rows, HEAT) for m in (models.policy, models.reference)))
        costs, ended = [0.5 * i for i in range(10)], rows.extras["finished"].tolist()
        paid = [
            (SCORES[i] - 2.0 * (not ended[i]) - multiplier * costs[i] - 0.3 * k1[i]) / (1 + multiplier) if n else 0.0
            for i, n in enumerate(rows.response_mask.sum(-1).tolist())
        ]
        assert made.metrics["reward/total"].item() == pytest.approx(mean(paid), rel=1e-4)


def test_a_cost_with_a_weight_of_its_own_is_refused():
    rows = batch()
    with pytest.raises(ConfigError, match='"cost" has weight -1; expected 0'):
        PPOLagrangian().prepare(lagrangian_models(rows, weight=-1.0), rows)


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "The answer is \u221a72",
        "The area is 3\u03c0",
        "#### 3\u03c0",
        "x = \u00b15",
        "x \u2265 72",
        "sqrt(72)",
        "The total is 1 000 000",
        "The total is 1'234",
        "A profit of 3 million - 1 million",
        "3 + 5 million",
        "The answer is negative 5.",
        "7 minus 5",
        "#### 5 k",
        "$5 M",
        "5 squared",
        "10\u201112",
        "5 million million million",
    ],
)
def test_what_is_still_to_be_computed_or_could_be_two_numbers_is_none(text):
    assert answer_in(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 1/2 million", 2_500_000),
        ("#### 5 hundred", 500),
        ("5 hundred thousand", 500_000),
        ("\u20115", -5),
        ("The answer is 2\u215d", 2.625),
        ("#### 7\u200b2", 72),
        ("I have 1 apple\n100\n200", 200),
        ("in 2, 300 m", 300),
    ],
)
def test_a_number_is_read_whole(text, value):
    assert answer_in(text) == value
