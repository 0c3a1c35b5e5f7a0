"""Losses on preferences against plain Python, one pair at a time, with gradients by central differences; then every
method's own glue: which log-probabilities go into them, and how pairs and rows are averaged."""

import math
from dataclasses import replace

import pytest
import torch

import slow
from batches import batch_for, means_and_gradient, models_for, run_of
from palate.errors import ConfigError, DataError, ModelError
from palate.methods.apo_down import APODown, apo_down_loss
from palate.methods.apo_zero import APOZero, apo_zero_loss
from palate.methods.cpo import CPO, cpo_loss
from palate.methods.dpo import DPO, dpo_loss
from palate.methods.exo import EXO, exo_loss
from palate.methods.ipo import IPO, ipo_loss
from palate.methods.ipo_mean import IPOMean
from palate.methods.kto import KTO, kto_loss, mismatched
from palate.methods.ln_dpo import LNDPO
from palate.methods.nca import NCA, nca_loss
from palate.methods.orpo import NEAREST, ORPO, log_odds, orpo_loss
from palate.methods.r_dpo import RDPO, r_dpo_loss
from palate.methods.robust_dpo import RobustDPO, robust_dpo_loss
from palate.methods.simpo import SimPO, simpo_loss
from palate.methods.slic import SLiC, slic_loss
from palate.methods.sppo import SPPO, sppo_loss
from palate.training.loop import train
from palate.types import Comparisons, Tokens

RATIOS = [(0.0, 0.0), (0.3, -1.2), (-4.0, 2.5), (1e3, -1e3), (-1e3, 1e3), (1e3, 1e3), (-700.3, 300.2)]
SHARES = [0.0, 0.25, 0.5, 0.9, 1.0]
PAIR_LOSSES = {
    "dpo": (lambda w, r, p: dpo_loss(w, r, 0.3, 0.0, p), lambda w, r, p: slow.dpo(w, r, 0.3, 0.0, p)),
    "cdpo": (lambda w, r, p: dpo_loss(w, r, 0.3, 0.2, p), lambda w, r, p: slow.dpo(w, r, 0.3, 0.2, p)),
    "robust_dpo": (lambda w, r, p: robust_dpo_loss(w, r, 0.3, 0.2, p), lambda w, r, p: slow.robust_dpo(w, r, 0.3, 0.2, p)),
    "ipo": (lambda w, r, p: ipo_loss(w, r, 0.2, p), lambda w, r, p: slow.ipo(w, r, 0.2, p)),
    "slic": (lambda w, r, p: slic_loss(w, r, 0.3, p), lambda w, r, p: slow.slic(w, r, 0.3, p)),
    "simpo": (lambda w, r, p: simpo_loss(w, r, 2.0, 0.7, p), lambda w, r, p: slow.simpo(w, r, 2.0, 0.7, p)),
    "cpo": (lambda w, r, p: cpo_loss(w, r, 0.3), lambda w, r, p: slow.dpo(w, r, 0.3)),
    "r_dpo": (lambda w, r, p: r_dpo_loss(w, r, torch.tensor(7.0, dtype=torch.float64), 0.3, 0.2, p), lambda w, r, p: slow.r_dpo(w, r, 7, 0.3, 0.2, p)),
    "apo_zero": (lambda w, r, p: apo_zero_loss(w, r, 0.3), lambda w, r, p: slow.apo_zero(w, r, 0.3)),
    "apo_down": (lambda w, r, p: apo_down_loss(w, r, 0.3), lambda w, r, p: slow.apo_down(w, r, 0.3)),
    "exo": (lambda w, r, p: exo_loss(w, r, 0.3, 0.01, p), lambda w, r, p: slow.exo(w, r, 0.3, 0.01, p)),
    "nca": (lambda w, r, p: nca_loss(w, r, 0.3), lambda w, r, p: slow.nca(w, r, 0.3)),
    "sppo": (lambda w, r, p: sppo_loss(w, r, 0.3, p), lambda w, r, p: slow.sppo(w, r, 0.3, p)),
}  # fmt: skip


def assert_loss_and_gradient(found, inputs, definition, values, step=1e-4):
    """``found`` [P] was made of ``inputs``; ``values`` are their numbers, a tuple for each pair."""
    gradients = torch.autograd.grad(found.sum(), inputs)
    for i, pair in enumerate(values):
        wanted = definition(*pair)
        assert found[i].item() == pytest.approx(wanted, rel=1e-9, abs=1e-9), pair
        slopes = slow.difference_gradient(lambda v: definition(*v), list(pair), step=step)
        for gradient, slope in zip(gradients, slopes, strict=True):
            assert gradient[i].item() == pytest.approx(slope, rel=2e-5, abs=2e-6), pair


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_pair_loss_is_its_definition_also_a_thousand_nats_apart(name, share):
    fast, definition = PAIR_LOSSES[name]
    w, r = (torch.tensor(side, dtype=torch.float64, requires_grad=True) for side in zip(*RATIOS, strict=True))
    found = fast(w, r, torch.tensor(share, dtype=torch.float64))
    assert found.shape == w.shape
    assert_loss_and_gradient(found, (w, r), lambda a, b: definition(a, b, share), RATIOS)


@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("kl", [0.0, 2.5, 400.0])
def test_kto_is_its_definition_also_a_thousand_nats_away(desirable, kl):
    ratios = [(0.0,), (3.0,), (-2.0,), (1e3,), (-1e3,), (kl,)]
    h = torch.tensor([h for (h,) in ratios], dtype=torch.float64, requires_grad=True)
    found = kto_loss(h, kl, torch.tensor([desirable] * 6), 0.4, 1.3, 0.7)
    assert_loss_and_gradient(found, (h,), lambda h: slow.kto(h, kl, desirable, 0.4, 1.3, 0.7), ratios)
    assert (found >= 0).all() and (found <= 1.3).all()


def test_orpo_is_its_definition_also_where_tokens_are_all_but_certain():
    means = [(-0.5, -2.0), (-3.0, -0.01), (-math.log(2), -1e-3), (-1e-3, -40.0), (-1000.0, -0.7), (-900.0, -1000.0)]
    w, r = (torch.tensor(side, dtype=torch.float64, requires_grad=True) for side in zip(*means, strict=True))
    assert_loss_and_gradient(orpo_loss(w, r), (w, r), slow.orpo, means, step=1e-6)
    for a in (-1e-7, -1e-5, -1e-2, -0.69, -0.7, -20.0, -5000.0):
        assert log_odds(torch.tensor(a, dtype=torch.float64)).item() == pytest.approx(slow.log_odds(a), rel=1e-12)
        if abs(slow.log_odds(a)) > 0.1:  # elsewhere rounding of a itself is more
            assert log_odds(torch.tensor(a)).item() == pytest.approx(slow.log_odds(a), rel=3e-6)


@pytest.mark.parametrize("a", [0.0, -0.0, -1e-30, -NEAREST / 2, 1e-7])
def test_the_odds_of_a_certain_response_are_finite(a):
    a = torch.tensor([a, -1.0], requires_grad=True)
    loss = orpo_loss(a[:1], a[1:])
    (gradient,) = torch.autograd.grad(loss.sum(), a)
    assert log_odds(a.detach())[0].item() == pytest.approx(24 * math.log(2), rel=1e-5)
    assert loss.isfinite().all() and gradient.isfinite().all() and gradient[0] == 0


# --- glue -------------------------------------------------------------------------------------------------------------


def own_logprobs(model, rows):
    """What the model itself says of each row's response, row by row without padding, [N] float64; differentiable."""
    found = []
    for i in range(len(rows)):
        ids, mask = rows.ids[i][rows.attention_mask[i]], rows.response_mask[i][rows.attention_mask[i]]
        logp = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        found.append(sum(logp[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]))
    return torch.stack(found)


def assert_equals_slow(method, batch, definition):
    """``definition(s, s_ref, lengths) -> float`` of lists: summed log-probabilities of every row, response tokens."""
    models = models_for(method)
    means, gradient = means_and_gradient(method, models, batch, max_tokens=40)
    policy = own_logprobs(models.policy, batch.tokens)
    with torch.no_grad():
        reference = own_logprobs(models.reference, batch.tokens).tolist() if models.reference else None
    values, lengths = policy.detach().tolist(), batch.tokens.response_mask.sum(-1).tolist()
    assert means["loss"] == pytest.approx(definition(values, reference, lengths), rel=3e-5)
    slopes = slow.difference_gradient(lambda s: definition(s, reference, lengths), values)
    named = dict(models.policy.named_parameters())
    wanted = torch.autograd.grad(policy, list(named.values()), torch.tensor(slopes, dtype=torch.float64))
    for name, g in zip(named, wanted, strict=True):
        assert torch.allclose(gradient[f"policy.{name}"], g, atol=3e-5 * max(1.0, float(g.abs().max()))), name
    return means


def over_pairs(batch, loss):
    """The weighted mean over pairs of loss(row, row, probability)."""

    def fact(values, i, missing):
        return missing if values is None else values[i].item()

    total = count = 0.0
    for i, (w, r) in enumerate(zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)):
        weight = fact(batch.weight, i, 1.0)
        total += weight * loss(w, r, fact(batch.probability, i, 1.0))
        count += weight
    return total / count


def ratios(s, q, lengths):
    return [a - b for a, b in zip(s, q, strict=True)]


def sums(s, q, lengths):
    return s


def means(s, q, lengths):
    return [a / n for a, n in zip(s, lengths, strict=True)]


def mean_ratios(s, q, lengths):
    return [(a - b) / n for a, b, n in zip(s, q, lengths, strict=True)]


GLUE = {
    "dpo": (DPO(beta=0.3), ratios, lambda w, r, p: slow.dpo(w, r, 0.3, 0.0, p)),
    "cdpo": (DPO(label_smoothing=0.2), ratios, lambda w, r, p: slow.dpo(w, r, 0.1, 0.2, p)),
    "robust_dpo": (RobustDPO(flip_rate=0.2), ratios, lambda w, r, p: slow.robust_dpo(w, r, 0.1, 0.2, p)),
    "ipo": (IPO(tau=0.2), ratios, lambda w, r, p: slow.ipo(w, r, 0.2, p)),
    "ipo_mean": (IPOMean(tau=0.2), mean_ratios, lambda w, r, p: slow.ipo(w, r, 0.2, p)),
    "slic": (SLiC(beta=0.3), ratios, lambda w, r, p: slow.slic(w, r, 0.3, p)),
    "simpo": (SimPO(), means, lambda w, r, p: slow.simpo(w, r, 2.0, 1.0, p)),
    "cpo": (CPO(nll_coef=0.0), sums, lambda w, r, p: slow.dpo(w, r, 0.1)),
    "ln_dpo": (LNDPO(), mean_ratios, lambda w, r, p: slow.dpo(w, r, 5.0, 0.0, p)),
    "apo_zero": (APOZero(beta=0.3), ratios, lambda w, r, p: slow.apo_zero(w, r, 0.3)),
    "apo_down": (APODown(beta=0.3), ratios, lambda w, r, p: slow.apo_down(w, r, 0.3)),
    "exo": (EXO(beta=0.3, label_smoothing=0.01), ratios, lambda w, r, p: slow.exo(w, r, 0.3, 0.01, p)),
    "nca": (NCA(beta=0.3), ratios, lambda w, r, p: slow.nca(w, r, 0.3)),
    "sppo": (SPPO(beta=0.3), ratios, lambda w, r, p: slow.sppo(w, r, 0.3, p)),
}


@pytest.mark.parametrize("without", [(), ("weight", "probability")])
@pytest.mark.parametrize("name", GLUE)
def test_a_method_on_pairs_is_the_weighted_mean_of_its_losses(name, without):
    method, of_rows, loss = GLUE[name]
    batch = replace(batch_for(method), **dict.fromkeys(without))

    def definition(*facts):
        x = of_rows(*facts)
        return over_pairs(batch, lambda w, r, p: loss(x[w], x[r], p))

    found = assert_equals_slow(method, batch, definition)
    assert found["reward/margin"] == pytest.approx(found["reward/chosen"] - found["reward/rejected"], abs=1e-5)


def test_the_anchor_is_the_chosen_responses_loss_a_token():
    batch = batch_for(DPO())

    def definition(s, q, lengths):
        h = ratios(s, q, lengths)
        return over_pairs(batch, lambda w, r, p: slow.dpo(h[w], h[r], 0.1, 0.0, p) - 0.7 * s[w] / lengths[w])

    found = assert_equals_slow(DPO(anchor=0.7), batch, definition)
    assert found["loss/preference"] < found["loss"]


def test_r_dpo_pays_for_the_extra_tokens():
    batch = batch_for(RDPO())

    def definition(s, q, n):
        h = ratios(s, q, n)
        return over_pairs(batch, lambda w, r, p: slow.r_dpo(h[w], h[r], n[w] - n[r], 0.1, 0.3, p))

    assert_equals_slow(RDPO(alpha=0.3), batch, definition)


def test_cpo_adds_the_likelihood_of_the_chosen_response():
    batch = batch_for(CPO())

    def definition(s, q, n):
        return over_pairs(batch, lambda w, r, _: slow.dpo(s[w], s[r], 0.1) - 0.5 * s[w] / n[w])

    found = assert_equals_slow(CPO(nll_coef=0.5), batch, definition)
    assert found["loss"] == pytest.approx(found["loss/preference"] + 0.5 * found["loss/chosen_nll"], abs=1e-5)


def test_orpo_adds_the_likelihood_of_the_chosen_response():
    batch = batch_for(ORPO())

    def definition(s, q, lengths):
        a = means(s, q, lengths)
        return over_pairs(batch, lambda w, r, _: -a[w] + 0.5 * slow.orpo(a[w], a[r]))

    found = assert_equals_slow(ORPO(lam=0.5), batch, definition)
    assert found["loss"] == pytest.approx(found["loss/chosen_nll"] + 0.5 * found["loss/preference"], abs=1e-5)


@torch.no_grad()
def slow_kl(models, rows):
    """max(0, mean over rows of the log-ratio of the response after the prompt of the group before)."""
    found = []
    prompts = {}
    for i in range(len(rows)):
        ids, mask = rows.ids[i][rows.attention_mask[i]], rows.response_mask[i][rows.attention_mask[i]]
        prompts[rows.group[i].item()] = ids[~mask]
    for i in range(len(rows)):
        prompt, answer = prompts[(rows.group[i].item() - 1) % 4], rows.ids[i][rows.response_mask[i]]
        ids = torch.cat([prompt, answer])[None]
        logp = [m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (models.policy, models.reference)]
        places = range(len(prompt), ids.shape[1])
        found.append(sum(float(logp[0][t - 1, ids[0, t]] - logp[1][t - 1, ids[0, t]]) for t in places))
    return max(0.0, slow.mean(found))


def test_kto_is_the_mean_over_responses_with_the_divergence_of_mismatched_pairs():
    """The divergence is the same number for every row, has no gradient, and is neither clipped per row nor scaled."""
    method = KTO(beta=0.4, desirable_weight=1.3, undesirable_weight=0.6)
    batch, models = batch_for(method), models_for(method)
    models.policy, models.reference = models.reference.requires_grad_(), models.policy.requires_grad_(False)
    kl = [slow_kl(models, batch.tokens)]
    models = models_for(method)
    kl.append(slow_kl(models, batch.tokens))
    assert max(kl) > 0.1  # at least one way round there is something to see
    with torch.no_grad():
        prepared = method.prepare(models, batch)
    assert prepared.kl.tolist() == pytest.approx([kl[1]] * 12, abs=1e-4)

    def definition(s, q, lengths):
        h = ratios(s, q, lengths)
        judged = batch.desirable.tolist()
        return slow.mean([slow.kto(h[i], kl[1], judged[i], 0.4, 1.3, 0.6) for i in range(12)])

    found = assert_equals_slow(method, batch, definition)
    assert found["kl/mismatched"] == pytest.approx(kl[1], abs=1e-4)


@pytest.mark.parametrize("swap", [False, True])
def test_the_divergence_is_right_with_the_roles_either_way_round(swap):
    models = models_for(KTO())
    if swap:
        models.policy, models.reference = models.reference, models.policy
    with torch.no_grad():
        assert KTO().prepare(models, batch_for(KTO())).kl[0].item() == pytest.approx(
            slow_kl(models, batch_for(KTO()).tokens), abs=1e-4
        )


def test_mismatched_rows_are_prompt_i_with_response_i_plus_1():
    ids = torch.tensor([[7, 8, 1, 2, 0], [9, 3, 0, 0, 0], [4, 5, 6, 11, 12]])
    real = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    answer = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    found = mismatched(Tokens(ids, real, answer, torch.tensor([0, 1, 2])))
    rows = [row[mask].tolist() for row, mask in zip(found.ids, found.attention_mask, strict=True)]
    assert rows == [[4, 5, 6, 1, 2], [7, 8, 3], [9, 11, 12]]
    assert [m.nonzero()[:, 0].tolist() for m in found.response_mask] == [[3, 4], [2], [1, 2]]


def test_kto_needs_two_prompts():
    batch = batch_for(KTO())
    with pytest.raises(DataError, match="training.batch_size to 2"):
        KTO().prepare(models_for(KTO()), batch.select(torch.arange(3)))


def test_a_single_item_left_over_in_evaluation_joins_the_batch_before(tmp_path):
    """Three validation prompts, two a batch: the third alone would have nobody to be mismatched with."""
    run = run_of(KTO(), models_for(KTO()), tmp_path, validation=range(3), max_steps=1)
    assert [m["split"] for m in train(run)] == ["validation", "train", "validation"]


# --- what is checked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [DPO(), DPO(anchor=0.5), DPO(label_smoothing=0.2), RobustDPO(), IPO(), IPOMean(), SLiC(), KTO()]
    + [LNDPO(), RDPO(), APOZero(), APODown(), EXO(), NCA(), SPPO()],
    ids=repr,
)
def test_the_first_loss_is_known_and_another_reference_is_an_error(method, tmp_path):
    """log 2 for DPO, whatever its settings and labels."""
    models = models_for(method)
    models.reference.load_state_dict(models.policy.state_dict())
    run = run_of(method, models, tmp_path / "same")
    run.starts_at_reference = True
    first = next(iter(train(run)))
    if isinstance(method, DPO):
        assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    run = run_of(method, models_for(method), tmp_path / "other")
    run.starts_at_reference = True
    with pytest.raises(ModelError, match="Before the first step"):
        list(train(run))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: DPO(beta=0.0),
        lambda: DPO(label_smoothing=0.5),
        lambda: DPO(anchor=-1.0),
        lambda: RobustDPO(flip_rate=0.5),
        lambda: IPO(tau=-1.0),
        lambda: IPOMean(tau=0.0),
        lambda: SLiC(beta=float("nan")),
        lambda: KTO(desirable_weight=0.0),
        lambda: ORPO(lam=0.0),
        lambda: SimPO(gamma=-0.1),
        lambda: CPO(nll_coef=-1.0),
        lambda: RDPO(alpha=-0.1),
        lambda: EXO(label_smoothing=0.0),
        lambda: LNDPO(beta=0.0),
        lambda: APOZero(beta=0.0),
        lambda: APODown(beta=0.0),
        lambda: NCA(beta=0.0),
        lambda: SPPO(beta=0.0),
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        wrong()


def test_a_margin_of_zero_and_a_certain_label_are_no_facts():
    batch = batch_for(ORPO())
    plain = replace(batch, margin=torch.zeros(6), probability=torch.ones(6))
    assert isinstance(ORPO().prepare(models_for(ORPO()), plain), Comparisons)


def test_accuracy_counts_ties_as_one_half_and_agrees_with_the_likelier_side():
    models = models_for(DPO())
    models.reference.load_state_dict(models.policy.state_dict())
    found, _ = means_and_gradient(DPO(), models, batch_for(DPO()))
    assert found["reward/accuracy"] == 0.5
    models, batch = models_for(DPO()), batch_for(DPO())
    one, _ = means_and_gradient(DPO(), models, replace(batch, probability=torch.full((6,), 0.9)))
    other, _ = means_and_gradient(DPO(), models, replace(batch, probability=torch.full((6,), 0.1)))
    assert one["reward/accuracy"] == pytest.approx(1 - other["reward/accuracy"], abs=1e-6)
