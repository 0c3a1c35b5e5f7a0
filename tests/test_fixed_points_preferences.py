"""Where methods on preferences end, on a model whose every sequence can be written down; reached by the real loop.

The data are all pairs of responses with the share of labels that Bradley-Terry gives them for a table of rewards r, or
(``chain``) only neighbours in a list of the responses, so that every pair reaches its own optimum.

    DPO, robust DPO    ref exp(r / beta) / Z
    IPO                ref exp(P(y beats mu) / tau) / Z
    IPO on means       ref exp(|y| (P(y beats mu) / tau + k))
    SimPO, gamma = 0   exp(|y| (r / beta + k))
    CPO without NLL    exp(r / beta) / Z
    LN-DPO             ref exp(|y| (r / beta + k))
    R-DPO              ref exp((r - alpha |y|) / beta) / Z
    EXO                ref exp(r / beta) / Z with soft labels, up to the label smoothing
    KTO                nothing on what most judge undesirable
    ORPO               no closed form: the same from every start

k makes the probabilities of a prompt add up to 1.
"""

from dataclasses import replace

import pytest
import torch

from enumerable import COUNT, EVERYTHING, RESPONSES, Tabular, all_pairs, distribution, rows_of, total_variation
from palate.methods import dpo as dpo_module
from palate.methods.cpo import CPO
from palate.methods.dpo import DPO
from palate.methods.exo import EXO
from palate.methods.ipo import IPO
from palate.methods.ipo_mean import IPOMean
from palate.methods.kto import KTO
from palate.methods.ln_dpo import LNDPO
from palate.methods.orpo import ORPO
from palate.methods.r_dpo import RDPO
from palate.methods.robust_dpo import RobustDPO
from palate.methods.simpo import SimPO
from palate.methods.slic import SLiC
from palate.training.loop import Run, train
from palate.types import Comparisons, Judgements, Models, groups
from test_fixed_points import settings, table

BETA = 0.5
LENGTH = torch.tensor([len(response) for response in RESPONSES], dtype=torch.float64)
REFERENCE = distribution(Tabular(seed=1))


def law(g):
    """ref exp(g) / Z."""
    p = REFERENCE * g.exp()
    return p / p.sum(-1, keepdim=True)


def uniform_law(g):
    """exp(g) / Z."""
    return g.softmax(-1)


def law_by_length(g, base):
    """base exp(|y| (g + k)), with k for each prompt by bisection."""
    low, high = torch.full((2, 1), -50.0, dtype=torch.float64), torch.full((2, 1), 50.0, dtype=torch.float64)
    for _ in range(100):
        k = (low + high) / 2
        above = (base * (LENGTH * (g + k)).exp()).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, low, k), torch.where(above, k, high)
    return base * (LENGTH * (g + k)).exp()


def beats_the_average():
    """P(y beats y') with y' uniform, [2, 15]."""
    return (table()[:, :, None] - table()[:, None, :]).sigmoid().mean(-1)


def chain():
    """Each response against the next in the list; the first of the two is chosen with Bradley-Terry's probability."""
    pairs = all_pairs(table())
    return select(pairs, pairs.chosen == pairs.rejected + 1)


def clear(pairs):
    """Three of four for the side that had most labels: the hinge asks for the same lead, and gets there sooner."""
    return replace(pairs, probability=torch.where(pairs.probability > 0.5, 0.75, 0.25))


def select(pairs, kept):
    return replace(pairs, chosen=pairs.chosen[kept], rejected=pairs.rejected[kept], probability=pairs.probability[kept])


def along(lead):
    """g [2, 15] whose differences along the chain are ``lead`` [2, 14]."""
    return torch.cat([torch.zeros(2, 1, dtype=torch.float64), lead.cumsum(-1)], -1)


def share():
    """The probability that a response beats the one before it in the list, [2, 14]."""
    return (table()[:, 1:] - table()[:, :-1]).sigmoid()


def both_ways(pairs):
    """Hard labels: every pair both ways round, each weighing its share of the labels."""
    chosen, rejected = torch.cat([pairs.chosen, pairs.rejected]), torch.cat([pairs.rejected, pairs.chosen])
    weight = torch.cat([pairs.probability, 1 - pairs.probability])
    return Comparisons(pairs.tokens, chosen, rejected, weight=weight)


def trained(folder, method, batch, steps=250, seed=1, rate=0.1):
    """The policy's distribution after training on all of ``batch`` at every step."""
    policy, parts = Tabular(seed=seed), groups(batch)
    run = Run(
        folder=folder,
        method=method,
        models=Models(policy=policy, reference=Tabular(seed=1).requires_grad_(False)),
        settings=settings(learning_rate=rate, max_steps=steps, batch_size=len(parts), tokens_per_microbatch=100),
        items=range(len(parts)),
        collate=lambda items: batch.select(torch.cat([parts[i] for i in items])),
        starts_at_reference=seed == 1,
    )
    list(train(run))
    return distribution(policy)


def flipped(pairs, rate):
    return replace(pairs, probability=(1 - rate) * pairs.probability + rate * (1 - pairs.probability))


def smoothed(p, e):
    return (1 - e) * p + e * (1 - p)


FIXED_POINTS = {
    "dpo": lambda: (DPO(beta=BETA), all_pairs(table()), law(table() / BETA)),
    "dpo, hard labels": lambda: (DPO(beta=BETA), both_ways(all_pairs(table())), law(table() / BETA)),
    "cdpo": lambda: (DPO(beta=BETA, label_smoothing=0.2), chain(), law(along(smoothed(share(), 0.2).logit() / BETA))),
    "robust_dpo": lambda: (
        RobustDPO(beta=BETA, flip_rate=0.25),
        flipped(all_pairs(table()), 0.25),
        law(table() / BETA),
    ),
    "robust_dpo, hard labels": lambda: (
        RobustDPO(beta=BETA, flip_rate=0.25),
        both_ways(flipped(all_pairs(table()), 0.25)),
        law(table() / BETA),
    ),
    "ipo": lambda: (IPO(tau=0.25), all_pairs(table()), law(beats_the_average() / 0.25)),
    "ipo_mean": lambda: (IPOMean(tau=0.5), all_pairs(table()), law_by_length(beats_the_average() / 0.5, REFERENCE)),
    "slic": lambda: (SLiC(beta=1.0), clear(chain()), law(along((share() - 0.5).sign()))),
    "cpo": lambda: (CPO(beta=BETA, nll_coef=0.0), both_ways(all_pairs(table())), uniform_law(table() / BETA)),
    "ln_dpo": lambda: (LNDPO(beta=2.0), all_pairs(table()), law_by_length(table() / 2.0, REFERENCE)),
    "r_dpo": lambda: (RDPO(beta=BETA, alpha=0.4), all_pairs(table()), law((table() - 0.4 * LENGTH) / BETA)),
    "exo": lambda: (EXO(beta=BETA), all_pairs(table()), law(table() / BETA)),
    "simpo": lambda: (
        SimPO(beta=2.0, gamma=0.0),
        both_ways(all_pairs(table())),
        law_by_length(table() / 2.0, torch.ones(2, COUNT, dtype=torch.float64)),
    ),
    "simpo, gamma": lambda: (
        SimPO(beta=2.0, gamma=0.5),
        chain(),
        law_by_length(along(simpo_lead(share(), 0.5) / 2.0), torch.ones(2, COUNT, dtype=torch.float64)),
    ),
}


def simpo_lead(p, gamma):
    """beta times the lead at which p / (1 + u e^-gamma) = (1 - p) u / (u + e^-gamma): its closed form, log u."""
    g = torch.tensor(gamma, dtype=torch.float64).exp()
    return ((g * (2 * p - 1) + (g**2 * (2 * p - 1) ** 2 + 4 * p * (1 - p)).sqrt()) / (2 * (1 - p))).log()


@pytest.mark.parametrize("name", FIXED_POINTS)
def test_a_method_reaches_its_fixed_point(name, tmp_path):
    method, batch, wanted = FIXED_POINTS[name]()
    assert torch.allclose(wanted.sum(-1), torch.ones(2, dtype=torch.float64))
    start = total_variation(distribution(Tabular(seed=1)), wanted)
    end = total_variation(trained(tmp_path, method, batch, steps=600 if name == "slic" else 250), wanted)
    print(f"{name}: TV {start:.3f} -> {end:.5f}")
    assert end < 0.02 and start > 0.15


def test_flipped_labels_move_dpo_but_not_robust_dpo(tmp_path):
    found = trained(tmp_path, DPO(beta=BETA), flipped(all_pairs(table()), 0.25))
    assert total_variation(found, law(table() / BETA)) > 0.1


def test_means_and_sums_of_ipo_are_different_policies():
    assert total_variation(law(beats_the_average() / 0.5), law_by_length(beats_the_average() / 0.5, REFERENCE)) > 0.05


def test_kto_leaves_nothing_on_what_most_judge_undesirable(tmp_path):
    """Each response is judged three times: twice desirable where its reward is above 0, else once."""
    rows = rows_of([pair for pair in EVERYTHING for _ in range(3)])
    good = table().flatten() > 0
    desirable = torch.stack([torch.ones(30, dtype=torch.bool), good, torch.zeros(30, dtype=torch.bool)], -1).flatten()
    found = trained(tmp_path, KTO(beta=BETA), Judgements(rows, desirable))
    before, after = (float(p.flatten()[~good].sum() / 2) for p in (REFERENCE, found))
    print(f"kto: mass {before:.3f} -> {after:.6f}")
    assert after < 0.01 and before > 0.25
    assert total_variation(found, law(table() / BETA)) > 0.1


def test_orpo_ends_at_the_same_place_from_every_start(tmp_path):
    batch = both_ways(all_pairs(table()))
    ends = [trained(tmp_path / str(seed), ORPO(lam=0.5), batch, seed=seed) for seed in (1, 2)]
    starts = [distribution(Tabular(seed=seed)) for seed in (1, 2)]
    print(f"orpo: TV {total_variation(*starts):.3f} -> {total_variation(*ends):.5f}")
    assert total_variation(*ends) < 0.02 and total_variation(*starts) > 0.2
    likely = trained(tmp_path / "sft", ORPO(lam=1e-6), batch)
    assert total_variation(likely, ends[0]) > 0.02  # the odds ratio does something


# --- bugs ---------------------------------------------------------------------------------------------------------

_loss, _logprobs = dpo_module.dpo_loss, dpo_module.response_logprobs


def without_end(tokens):
    mask = tokens.response_mask & ((tokens.ids != 0) | (tokens.response_mask.sum(-1, keepdim=True) == 1))
    return replace(tokens, response_mask=mask)


def shifted(tokens):
    """Every token but the response's last, and the prompt's last in their place, which here nothing comes before."""
    mask = tokens.response_mask & tokens.response_mask.roll(-1, -1)
    mask[:, -1] = False
    return replace(
        tokens, response_mask=mask | (tokens.response_mask & (tokens.response_mask.sum(-1, keepdim=True) == 1))
    )


BUGS = {
    "wrong sign": ("dpo_loss", lambda w, r, *more: _loss(r, w, *more)),
    "half beta": ("dpo_loss", lambda w, r, beta, *more: _loss(w, r, beta / 2, *more)),
    "labels ignored": ("dpo_loss", lambda w, r, beta, *more: _loss(w, r, beta)),
    "no reference": ("with_reference", lambda models, b: replace(b, reference_logprobs=torch.zeros(len(b)))),
    "no end of text in the mask": ("response_logprobs", lambda model, tokens: _logprobs(model, without_end(tokens))),
    "mask one token early": ("response_logprobs", lambda model, tokens: _logprobs(model, shifted(tokens))),
    "mean for sum": (
        "response_logprobs",
        lambda model, tokens: _logprobs(model, tokens) / tokens.response_mask.sum(-1),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_dpo_with_a_bug_ends_elsewhere(bug, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_module, *BUGS[bug])
    monkeypatch.setattr(DPO, "at_reference", lambda self: {})  # "no reference" would not get past the first step
    end = total_variation(trained(tmp_path, DPO(beta=BETA), all_pairs(table())), law(table() / BETA))
    print(f"{bug}: TV {end:.3f}")
    assert end > 0.05
