"""BCO, token-level DPO, DPO on rankings and f-DPO against plain Python, one pair, response or prompt at a time, with
gradients by central differences; then each method's own glue."""

import math
from dataclasses import replace

import pytest
import torch

import slow
from batches import batch_for, means_and_gradient, models_for, run_of
from palate.errors import ConfigError, ModelError
from palate.methods.bco import BCO, bco_loss, running_mean
from palate.methods.dpo import DPO
from palate.methods.fdpo import FDPO, LARGEST, divergence_slope, fdpo_loss
from palate.methods.pl_dpo import PLDPO, all_pairs, pl_dpo_loss
from palate.methods.tdpo import TDPO, tdpo_loss
from palate.methods.tdpo1 import TDPO1, tdpo1_loss
from palate.training.loop import train
from palate.types import Comparisons, Rankings
from test_methods_preferences import (
    RATIOS,
    SHARES,
    assert_equals_slow,
    assert_loss_and_gradient,
    over_pairs,
    own_logprobs,
    ratios,
)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


# --- f-DPO ------------------------------------------------------------------------------------------------------------

DIVERGENCES = {"reverse_kl": (), "js": (), "forward_kl": (), "alpha": (0.4,)}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fdpo_is_its_definition_also_a_thousand_nats_apart(divergence, share):
    pairs = [*RATIOS, (-35.0, -31.0), (-29.0, -31.0), (-40.0, 40.0)]
    w, r = (float64(side).requires_grad_() for side in zip(*pairs, strict=True))
    alpha = DIVERGENCES[divergence]
    found = fdpo_loss(w, r, 0.3, divergence, *alpha, probability=float64(share))
    assert found.shape == w.shape
    assert_loss_and_gradient(
        found, (w, r), lambda a, b: slow.fdpo(a, b, 0.3, divergence, *alpha, probability=share), pairs
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fdpo_stays_finite_and_points_the_right_way_in_every_type(divergence, dtype):
    """A chosen response a thousand nats below the reference still rises, also where both sides are there."""
    w, r = (torch.tensor(side, dtype=dtype, requires_grad=True) for side in ([-1e3, -1e3, 1e3], [1e3, -990.0, -1e3]))
    loss = fdpo_loss(w, r, 0.3, divergence, *DIVERGENCES[divergence])
    up, down = torch.autograd.grad(loss.sum(), (w, r))
    assert all(x.isfinite().all() for x in (loss, up, down))
    assert (up[:2] < 0).all() and (up <= 0).all() and (down >= 0).all()
    assert sum(float(x.float().square().sum()) for x in (up, down)) < 1e30  # the norm is a float32 number too


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_slope_is_that_of_the_divergence(divergence):
    """By differences of f itself: u log u; u log u - (u + 1) log((u + 1)/2); -log u; the paper's alpha-divergence."""
    a = 0.4
    f = {
        "reverse_kl": lambda u: u * math.log(u),
        "js": lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
        "forward_kl": lambda u: -math.log(u),
        "alpha": lambda u: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
    }[divergence]
    constant = {"reverse_kl": 1.0, "js": 0.0, "forward_kl": -1.0, "alpha": 0.0}[divergence]
    for u in (0.2, 1.0, 3.0):
        found = divergence_slope(float64(u).log(), divergence, *DIVERGENCES[divergence]).item()
        assert found + constant == pytest.approx((f(u + 1e-6) - f(u - 1e-6)) / 2e-6, abs=1e-7)


def test_the_ends_of_alpha_are_the_two_kl_and_reverse_kl_is_dpo():
    h = float64([-5.0, -1.0, 0.0, 2.0, 20.0])
    assert torch.allclose(divergence_slope(h, "alpha", 1e-7), divergence_slope(h, "reverse_kl"), atol=1e-4)
    assert torch.allclose(divergence_slope(h, "alpha", 1 - 1e-9), divergence_slope(h, "forward_kl"), atol=1e-4)
    batch = batch_for(DPO())
    found, gradient = means_and_gradient(FDPO(divergence="reverse_kl"), models_for(DPO()), batch)
    wanted, other = means_and_gradient(DPO(), models_for(DPO()), batch)
    assert found["loss"] == wanted["loss"] and found["reward/margin"] == wanted["reward/margin"]
    assert all(torch.equal(gradient[name], other[name]) for name in other)


def test_small_log_ratios_keep_their_digits():
    """By expm1: (1 - exp(-x)) loses all of x = 1e-9 in float32."""
    h = torch.tensor([1e-9, -3e-8])
    for divergence in ("forward_kl", "alpha"):
        assert torch.allclose(divergence_slope(h, divergence, 0.4), h, rtol=1e-5, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fdpo_glue(divergence):
    alpha = DIVERGENCES[divergence]
    method = FDPO(beta=0.3, divergence=divergence, alpha=alpha[0] if alpha else None)
    batch = batch_for(method)

    def definition(*facts):
        h = ratios(*facts)
        return over_pairs(batch, lambda w, r, p: slow.fdpo(h[w], h[r], 0.3, divergence, *alpha, probability=p))

    found = assert_equals_slow(method, batch, definition)
    assert found["reward/margin"] == pytest.approx(found["reward/chosen"] - found["reward/rejected"], abs=1e-5)


# --- Plackett-Luce ----------------------------------------------------------------------------------------------------


def test_pl_dpo_is_its_definition_also_a_thousand_nats_apart():
    """Two prompts of four: no ties and far apart; ties for the best, a last one that is not there (junk, NaN)."""
    h = float64([[2.0, -1e3, 1e3, 0.5], [-3.0, 1.0, 0.2, float("nan")]]).requires_grad_()
    rank, mask = torch.tensor([[2, 4, 1, 3], [1, 2, 1, -7]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    found = pl_dpo_loss(h, rank, mask, 0.3)
    (gradient,) = torch.autograd.grad(found.sum(), h)
    for g, count in ((0, 4), (1, 3)):
        scores, ranks = h[g, :count].tolist(), rank[g, :count].tolist()

        def definition(values, ranks=ranks):
            return slow.plackett_luce([0.3 * x for x in values], ranks)

        assert found[g].item() == pytest.approx(definition(scores), rel=1e-9)
        slopes = slow.difference_gradient(definition, scores, step=1e-4)
        assert gradient[g, :count].tolist() == pytest.approx(slopes, rel=2e-5, abs=2e-6)
    assert gradient[1, 3] == 0


def test_pl_dpo_of_one_worse_response_is_dpo_whatever_the_signs():
    h = float64([[1.0, -2.0], [-1e3, 1e3], [0.3, 0.3]])
    found = pl_dpo_loss(h, torch.tensor([[1, 2], [1, 2], [2, 1]]), torch.ones(3, 2, dtype=torch.bool), 0.4)
    assert found.tolist() == pytest.approx([slow.dpo(1, -2, 0.4), slow.dpo(-1e3, 1e3, 0.4), slow.dpo(0.3, 0.3, 0.4)])


def rankings_of(h, batch, beta):
    """The mean over prompts that rank anything of the slow definition on log-ratios h of the rows."""
    losses = []
    for group in range(4):
        rows = [i for i in range(12) if batch.tokens.group[i] == group and batch.tokens.response_mask[i].any()]
        ranks = [batch.rank[i].item() for i in rows]
        if len(set(ranks)) > 1:
            losses.append(slow.plackett_luce([beta * h[i] for i in rows], ranks))
    return slow.mean(losses)


@pytest.mark.parametrize("empty", [None, 3, 7])
def test_pl_dpo_glue_also_with_a_response_without_a_token(empty):
    """A response without a token is not in its ranking; a prompt in which nothing is ranked weighs nothing.

    Row 3 is the only best of its prompt, whose others are tied; row 7 shares the best rank with another.
    """
    method = PLDPO(beta=0.3)
    batch = batch_for(method)
    if empty is not None:
        mask = batch.tokens.response_mask.clone()
        mask[empty] = False
        batch = replace(batch, tokens=replace(batch.tokens, response_mask=mask))
    models = models_for(method)
    means, gradient = means_and_gradient(method, models, batch, max_tokens=40)
    answered = batch.tokens.response_mask.any(-1)
    rows = batch.tokens.select(answered.nonzero()[:, 0])
    policy = own_logprobs(models.policy, rows)
    with torch.no_grad():
        reference = own_logprobs(models.reference, rows).tolist()
    where = answered.nonzero()[:, 0].tolist()

    def definition(s):
        h = {i: a - b for i, a, b in zip(where, s, reference, strict=True)}
        return rankings_of(h, batch, 0.3)

    values = policy.detach().tolist()
    assert means["loss"] == pytest.approx(definition(values), rel=3e-5)
    slopes = float64(slow.difference_gradient(definition, values))
    named = dict(models.policy.named_parameters())
    for name, g in zip(named, torch.autograd.grad(policy, list(named.values()), slopes), strict=True):
        assert torch.allclose(gradient[f"policy.{name}"], g, atol=3e-5 * max(1.0, float(g.abs().max()))), name


def test_on_rankings_of_two_pl_dpo_is_dpo():
    batch = batch_for(DPO()).tokens.select(torch.tensor([0, 2, 3, 4, 6, 7, 9, 11]))
    rankings = Rankings(batch, torch.tensor([1, 2, 2, 1, 1, 2, 2, 1]))
    chosen, rejected = torch.tensor([0, 3, 4, 7]), torch.tensor([1, 2, 5, 6])
    found, gradient = means_and_gradient(PLDPO(), models_for(DPO()), rankings)
    wanted, other = means_and_gradient(DPO(), models_for(DPO()), Comparisons(batch, chosen, rejected))
    for name, value in found.items():
        assert value == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name
    assert all(torch.allclose(gradient[name], other[name], atol=1e-6) for name in other)


def test_the_pairs_of_a_ranking_weigh_one_together():
    """No ties: three pairs; ties below the best: two; ties for the best: two; all tied: none."""
    pairs = all_pairs(batch_for(PLDPO()))
    found = sorted(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.weight.tolist(), strict=True))
    third, half = pytest.approx(1 / 3), 0.5
    assert found == [
        *((1, 0, third), (1, 2, third), (2, 0, third), (3, 4, half), (3, 5, half), (6, 8, half), (7, 8, half))
    ]


# --- token-level DPO --------------------------------------------------------------------------------------------------

FOURS = [(0.3, -1.2, 2.0, 0.1), (-4.0, 2.5, 0.0, 30.0), (1e3, -1e3, 0.0, 1e3), (-1e3, 1e3, 500.0, 2.0), (0, 0, 0, 0)]


def test_tdpo_is_its_definition_and_the_chosen_kl_has_no_gradient():
    for w, r, kw, kr in FOURS:
        sides = [float64([side]).requires_grad_() for side in (w, r, kr)]
        fixed = float64([kw]).requires_grad_()
        found = tdpo_loss(sides[0], sides[1], fixed, sides[2], 0.3, 0.5)
        assert torch.autograd.grad(found.sum(), fixed, allow_unused=True, retain_graph=True) == (None,)
        assert_loss_and_gradient(found, sides, lambda w, r, kr, kw=kw: slow.tdpo(w, r, kw, kr, 0.3, 0.5), [(w, r, kr)])


def test_tdpo1_is_its_definition_with_a_gradient_on_both_sides():
    sides = [float64(side).requires_grad_() for side in zip(*FOURS, strict=True)]
    assert_loss_and_gradient(
        tdpo1_loss(*sides, 0.3), sides, lambda w, r, kw, kr: slow.tdpo(w, r, kw, kr, 0.3, 1.0), FOURS
    )


def own_logprobs_and_kl(models, rows):
    """Row by row without padding, from both models' own logits: sums over the response of log p and of KL(ref || p)."""
    logprobs, divergences = [], []
    for i in range(len(rows)):
        ids, mask = rows.ids[i][rows.attention_mask[i]], rows.response_mask[i][rows.attention_mask[i]]
        logp = models.policy(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        with torch.no_grad():
            logq = models.reference(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        where = [t for t in range(1, len(ids)) if mask[t]]
        logprobs.append(sum(logp[t - 1, ids[t]] - logq[t - 1, ids[t]] for t in where))
        divergences.append(sum((logq[t - 1].exp() * (logq[t - 1] - logp[t - 1])).sum() for t in where))
    return torch.stack(logprobs), torch.stack(divergences)


@pytest.mark.parametrize("method", [TDPO(beta=0.3), TDPO(beta=0.3, alpha=2.0), TDPO1(beta=0.3)], ids=repr)
def test_token_level_dpo_glue(method):
    """The gradient by central differences of the slow definition; the stopped one is left out of it."""
    batch, models = batch_for(method), models_for(method)
    stops, alpha = (True, method.alpha) if isinstance(method, TDPO) else (False, 1.0)
    found, gradient = means_and_gradient(method, models, batch, max_tokens=40)
    h, kl = own_logprobs_and_kl(models, batch.tokens)
    values, fixed = [*h.tolist(), *kl.tolist()], kl.tolist()

    def definition(values):
        h, kl = values[:12], values[12:]
        return over_pairs(batch, lambda w, r, _: slow.tdpo(h[w], h[r], fixed[w] if stops else kl[w], kl[r], 0.3, alpha))

    assert found["loss"] == pytest.approx(definition(values), rel=3e-5)
    assert found["kl/chosen"] == pytest.approx(over_pairs(batch, lambda w, r, _: fixed[w]), rel=1e-4)
    assert found["kl/rejected"] == pytest.approx(over_pairs(batch, lambda w, r, _: fixed[r]), rel=1e-4)
    assert found["reward/margin"] == pytest.approx(
        over_pairs(batch, lambda w, r, _: 0.3 * (values[w] - values[r] + alpha * (fixed[w] - fixed[r]))), abs=1e-4
    )
    slopes = float64(slow.difference_gradient(definition, values))
    named = dict(models.policy.named_parameters())
    wanted = torch.autograd.grad([h, kl], list(named.values()), [slopes[:12], slopes[12:]])
    for name, g in zip(named, wanted, strict=True):
        assert torch.allclose(gradient[f"policy.{name}"], g, atol=3e-5 * max(1.0, float(g.abs().max()))), name


def test_tdpo_without_its_charge_is_dpo():
    batch = batch_for(TDPO())
    found, gradient = means_and_gradient(TDPO(alpha=0.0), models_for(DPO()), batch)
    wanted, other = means_and_gradient(DPO(), models_for(DPO()), batch)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert all(torch.allclose(gradient[name], other[name], atol=1e-6) for name in other)


# --- BCO --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("shift", [0.0, -2.5, 40.0])
def test_bco_is_its_definition_also_a_thousand_nats_away(desirable, shift):
    values = [(0.0,), (3.0,), (-2.0,), (1e3,), (-1e3,), (shift / 0.4,)]
    h = float64([h for (h,) in values]).requires_grad_()
    found = bco_loss(h, shift, torch.tensor([desirable] * 6), 0.4)
    assert_loss_and_gradient(found, (h,), lambda h: slow.bco(h, shift, desirable, 0.4), values)


@pytest.mark.parametrize(
    "state", [{}, {"desirable_reward": 0.7}, {"desirable_reward": 0.7, "undesirable_reward": -0.1}]
)
def test_bco_is_the_mean_over_responses_with_the_shift_of_the_run(state):
    method = BCO(beta=0.4, **state)
    shift = {0: 0.0, 1: 0.7, 2: 0.3}[len(state)]
    batch = batch_for(method)

    def definition(s, q, lengths):
        h, judged = ratios(s, q, lengths), batch.desirable.tolist()
        return slow.mean([slow.bco(h[i], shift, judged[i], 0.4) for i in range(12)])

    found = assert_equals_slow(method, batch, definition)
    assert found["reward/shift"] == pytest.approx(shift)


@pytest.mark.parametrize("empty", [False, True])
def test_the_shift_follows_the_mean_reward_of_each_class_however_many_it_has(empty):
    """Four desirable and eight undesirable rows: the means of the classes, not of the rows; rows without a token apart."""
    method, models = BCO(beta=0.4, shift_decay=0.75), models_for(BCO())
    batch = batch_for(method)
    if empty:
        mask = batch.tokens.response_mask.clone()
        mask[[3, 5]] = False
        batch = replace(batch, tokens=replace(batch.tokens, response_mask=mask))
    kept = [i for i in range(12) if not (empty and i in (3, 5))]
    rows = batch.tokens.select(torch.tensor(kept))
    with torch.no_grad():
        h = own_logprobs(models.policy, rows) - own_logprobs(models.reference, rows)
        rewards = dict(zip(kept, (0.4 * h).tolist(), strict=True))
        means = [slow.mean([rewards[i] for i in kept if bool(batch.desirable[i]) == good]) for good in (True, False)]
        once = method.adapt(method.prepare(models, batch))
        assert once.shift == pytest.approx(sum(means) / 2, abs=1e-4)
        again = replace(once, desirable_reward=10.0, undesirable_reward=20.0)
        again = again.adapt(again.prepare(models, batch))
    assert again.shift == pytest.approx((7.5 + 0.25 * means[0] + 15 + 0.25 * means[1]) / 2, abs=1e-4)
    assert abs(slow.mean(list(rewards.values())) - sum(means) / 2) > 0.002  # the mean over rows is another number
    assert method.shift == 0.0


def test_a_class_that_a_batch_does_not_have_keeps_its_mean():
    assert running_mean(3.0, torch.tensor([1.0, float("nan")]), torch.tensor([False, False]), 0.9) == 3.0
    assert running_mean(None, torch.tensor([1.0, float("nan")]), torch.tensor([True, False]), 0.9) == 1.0
    assert running_mean(3.0, torch.tensor([1.0, float("nan")]), torch.tensor([True, False]), 0.9) == pytest.approx(2.8)


def test_the_shift_is_kept_by_the_run_and_survives_a_checkpoint(tmp_path):
    whole = run_of(BCO(), models_for(BCO()), tmp_path / "whole", max_steps=4)
    metrics = list(train(whole))
    shifts = [m["reward/shift"] for m in metrics]
    assert shifts[0] == 0 and len(set(shifts)) == 4
    first = run_of(BCO(), models_for(BCO()), tmp_path / "cut", max_steps=4, save_every=2)
    for m in train(first):
        if m["step"] == 3:
            break
    second = run_of(BCO(), models_for(BCO()), tmp_path / "cut", max_steps=4, save_every=2)
    assert [m["reward/shift"] for m in train(second)] == shifts[2:]
    assert second.method == whole.method != BCO()


def test_an_evaluation_does_not_move_the_shift(tmp_path):
    with_it = run_of(BCO(), models_for(BCO()), tmp_path / "a", validation=range(3), eval_every=1)
    without = run_of(BCO(), models_for(BCO()), tmp_path / "b")
    metrics = [m for m in train(with_it) if m["split"] == "train"]
    assert [m["loss"] for m in metrics] == [m["loss"] for m in train(without)]
    assert with_it.method == without.method


# --- what is checked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [BCO(), TDPO(), TDPO1(), PLDPO(), FDPO(), FDPO(divergence="alpha", alpha=0.4)], ids=repr
)
def test_the_first_metrics_are_known_and_another_reference_is_an_error(method, tmp_path):
    models = models_for(method)
    models.reference.load_state_dict(models.policy.state_dict())
    run = run_of(method, models, tmp_path / "same")
    run.starts_at_reference = True
    next(iter(train(run)))
    run = run_of(method, models_for(method), tmp_path / "other")
    run.starts_at_reference = True
    with pytest.raises(ModelError, match="Before the first step"):
        list(train(run))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: BCO(beta=0.0),
        lambda: BCO(shift_decay=1.0),
        lambda: BCO(shift_decay=-0.1),
        lambda: TDPO(beta=-1.0),
        lambda: TDPO(alpha=-0.1),
        lambda: TDPO(alpha=float("nan")),
        lambda: TDPO1(beta=float("inf")),
        lambda: PLDPO(beta=0.0),
        lambda: FDPO(beta=0.0),
        lambda: FDPO(divergence="jensen"),
        lambda: FDPO(divergence="alpha"),
        lambda: FDPO(divergence="alpha", alpha=1.0),
        lambda: FDPO(divergence="js", alpha=0.5),
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        wrong()


def test_the_exponential_is_its_tangent_where_the_docstring_says():
    h = float64([-LARGEST - 1, -LARGEST, -LARGEST + 1])
    found = divergence_slope(h, "forward_kl")
    assert found[2].item() == pytest.approx(1 - math.exp(29)) and found[1].item() == pytest.approx(1 - math.exp(30))
    assert found[0].item() == pytest.approx(1 - 2 * math.exp(30))
