"""Where the rest of the preference family ends, on the model whose every sequence can be written down.

Every policy pi = ref exp(h) can be reached, so a loss that is a function of h alone ends where its slope against h(y) is
lambda pi(y), with one number lambda a prompt that makes the probabilities add up to 1. Let s(y) be the share of comparisons
that y wins, r its reward, W = s and L = 1 - s.

    PL-DPO        ref exp(r / beta) / Z, with the r that make the given rankings likeliest
    f-DPO         ref u with beta f'(u) = r + c
    SPPO          2 (h - (s - 1/2) / beta)                                       = lambda pi
    NCA           beta [ (s + 1/2) sigmoid(beta h) - s ]                         = lambda pi
    APO-zero      beta (L - W) sigmoid'(beta h)                                  = lambda pi  where s > 1/2; 0 elsewhere
    APO-down      beta [ W sigmoid'(beta h) - sum_j (P(y beats j) - P(j beats y)) sigmoid'(beta (h - h_j)) ] = lambda pi
    BCO           beta [ sigmoid(beta h - delta) - P(desirable) ]                = lambda pi, delta from the rewards themselves
    TDPO, TDPO1   no closed form: where the gradient, written down independently, is 0

The equations are solved by Newton's method in float64, with nothing of the code under test.
"""

import pytest
import torch

from enumerable import COUNT, EVERYTHING, LONGEST, RESPONSES, VOCABULARY, Tabular, all_pairs, distribution, rows_of
from enumerable import total_variation as distance
from palate.methods import tdpo as tdpo_module
from palate.methods.apo_down import APODown
from palate.methods.apo_zero import APOZero
from palate.methods.bco import BCO
from palate.methods.dpo import DPO
from palate.methods.fdpo import FDPO
from palate.methods.nca import NCA
from palate.methods.pl_dpo import PLDPO
from palate.methods.sppo import SPPO
from palate.methods.tdpo import TDPO
from palate.methods.tdpo1 import TDPO1
from palate.training.loop import Run, train
from palate.types import Judgements, Models, Rankings, groups
from test_fixed_points import settings, table
from test_fixed_points_preferences import BETA, REFERENCE, both_ways, law, trained

ELSE = ~torch.eye(COUNT, dtype=torch.bool)
BEATS = (table()[:, :, None] - table()[:, None, :]).sigmoid() * ELSE  # P(y beats y'), [2, 15, 15]
SHARE = BEATS.sum(-1) / (COUNT - 1)


def solved(slope, start, reference):
    """h [n] and lambda with slope(h) = lambda reference exp(h) and probabilities that add up to 1: Newton, halved steps."""

    def equations(x):
        pi = reference * x[:-1].exp()
        return torch.cat([slope(x[:-1]) - x[-1] * pi, pi.sum()[None] - 1])

    pi = reference * start.exp()
    x = torch.cat([start - pi.sum().log(), (slope(start) @ pi / (pi @ pi))[None]])
    for _ in range(200):
        wrong = equations(x)
        if wrong.abs().max() < 1e-12:
            break
        step, size = torch.linalg.solve(torch.func.jacrev(equations)(x), wrong), 1.0
        while equations(x - size * step).norm() > wrong.norm() and size > 1e-6:
            size /= 2
        x = x - size * step
    assert equations(x).abs().max() < 1e-11
    return x[:-1]


def solved_law(slope, start):
    """pi [2, 15] of the equations, ``slope(h, prompt)`` and ``start(prompt)`` for each prompt."""
    return torch.stack(
        [REFERENCE[x] * solved(lambda h, x=x: slope(h, x), start(x), REFERENCE[x]).exp() for x in range(2)]
    )


def run_on(folder, method, batch, steps=250):
    """The real loop from the reference, on all of ``batch`` at every step; the run once it is done."""
    parts = groups(batch)
    run = Run(
        folder=folder,
        method=method,
        models=Models(policy=Tabular(seed=1), reference=Tabular(seed=1).requires_grad_(False)),
        settings=settings(learning_rate=0.1, max_steps=steps, batch_size=len(parts)),
        items=range(len(parts)),
        collate=lambda items: batch.select(torch.cat([parts[i] for i in items])),
        starts_at_reference=True,
    )
    list(train(run))
    return run


def curve(x):
    """sigmoid'."""
    return x.sigmoid() * (-x).sigmoid()


def sppo_law():
    target = (SHARE - 0.5) / BETA
    return solved_law(lambda h, x: 2 * (h - target[x]), lambda x: target[x])


def nca_law():
    start = (2 * SHARE).log() / BETA  # where the slope itself is 0
    return solved_law(lambda h, x: BETA * ((SHARE[x] + 0.5) * (BETA * h).sigmoid() - SHARE[x]), lambda x: start[x])


def apo_zero_law():
    """Nobody below one half keeps anything: their slope is positive, lambda negative. Of the rest, Newton from h = 0."""
    found = torch.zeros(2, COUNT, dtype=torch.float64)
    for x in range(2):
        wins = SHARE[x] > 0.5
        lead = 2 * SHARE[x][wins] - 1
        h = solved(lambda h, lead=lead: -BETA * lead * curve(BETA * h), torch.zeros_like(lead), REFERENCE[x][wins])
        found[x, wins] = REFERENCE[x][wins] * h.exp()
    return found


SEPARATE = {
    "sppo": (SPPO(beta=BETA), sppo_law),
    "nca": (NCA(beta=BETA), nca_law),
    "apo_zero": (APOZero(beta=BETA), apo_zero_law),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_a_loss_on_each_response_ends_where_its_slope_is_the_price_of_probability(name, tmp_path):
    method, law_of = SEPARATE[name]
    wanted = law_of()
    assert torch.allclose(wanted.sum(-1), torch.ones(2, dtype=torch.float64))
    end = distance(trained(tmp_path, method, both_ways(all_pairs(table()))), wanted)
    print(f"{name}: TV {distance(REFERENCE, wanted):.3f} -> {end:.5f}")
    assert end < 0.02 and distance(REFERENCE, wanted) > 0.1
    assert distance(wanted, law(table() / BETA)) > 0.05  # not where DPO ends


def apo_down_slope(h):
    """[2, 15]; each pair in both directions, with the share of its labels."""
    lead = curve(BETA * (h[:, :, None] - h[:, None, :]))
    return BETA * (BEATS.sum(-1) * curve(BETA * h) - ((BEATS - BEATS.mT) * lead).sum(-1))


def left_of(slope, pi):
    """Length of what the slope pulls at the logits of each response: 0 at a stationary point."""
    return float((slope - pi * slope.sum(-1, keepdim=True)).norm())


def test_apo_down_ends_where_nothing_pulls(tmp_path):
    found = trained(tmp_path, APODown(beta=BETA), both_ways(all_pairs(table())), steps=600)
    before = left_of(apo_down_slope(torch.zeros_like(found)), REFERENCE)
    after = left_of(apo_down_slope((found / REFERENCE).log()), found)
    print(f"apo_down: {before:.4f} -> {after:.6f}, TV to the reference {distance(found, REFERENCE):.3f}")
    assert after < 0.01 * before and distance(found, REFERENCE) > 0.1


# --- f-DPO ------------------------------------------------------------------------------------------------------------

RATIO = {  # u of f'(u) = s, and the s at which it becomes infinite
    "js": (lambda s: s.exp() / (2 - s.exp()), torch.tensor(2.0).double().log()),
    "forward_kl": (lambda s: 1 / (1 - s), torch.tensor(1.0).double()),
    "alpha": (lambda s: (1 - 0.4 * s) ** (-1 / 0.4), torch.tensor(1 / 0.4).double()),
}


def f_law(divergence):
    """ref u with f'(u) = (r + c) / beta; c for each prompt by bisection, below where the best one's u is infinite."""
    ratio, limit = RATIO[divergence]
    high = BETA * limit - table().amax(-1, keepdim=True)
    low = high - 50
    for _ in range(200):
        c = (low + high) / 2
        above = (REFERENCE * ratio((table() + c) / BETA)).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, low, c), torch.where(above, c, high)
    return REFERENCE * ratio((table() + low) / BETA)


@pytest.mark.parametrize("divergence", RATIO)
def test_fdpo_reaches_the_optimum_of_its_divergence(divergence, tmp_path):
    wanted = f_law(divergence)
    assert torch.allclose(wanted.sum(-1), torch.ones(2, dtype=torch.float64))
    method = FDPO(beta=BETA, divergence=divergence, alpha=0.4 if divergence == "alpha" else None)
    end = distance(trained(tmp_path, method, all_pairs(table())), wanted)
    print(
        f"fdpo {divergence}: TV {distance(REFERENCE, wanted):.3f} -> {end:.5f}, to DPO {distance(wanted, law(table() / BETA)):.3f}"
    )
    assert end < 0.02 and distance(REFERENCE, wanted) > 0.15
    assert distance(wanted, law(table() / BETA)) > 0.04


# --- Plackett-Luce ----------------------------------------------------------------------------------------------------

RANKED, LISTS = 5, 40  # responses in a list, lists a prompt


def drawn_lists(count=LISTS):
    """Which responses each list has, best first, [2, count, RANKED]: drawn at random, ordered by score + Gumbel noise."""
    generator = torch.Generator().manual_seed(3)
    noise = -torch.rand(2, count, COUNT, generator=generator, dtype=torch.float64).log().neg().log()
    some = torch.rand(2, count, COUNT, generator=generator).argsort(-1)[..., :RANKED]
    order = (table()[:, None] + noise).gather(-1, some).argsort(-1, descending=True)
    return some.gather(-1, order)


def likeliest(lists):
    """exp of the scores that make the lists likeliest, [15]: Hunter 2004, the minorisation of Plackett-Luce."""
    strength = torch.ones(COUNT, dtype=torch.float64)
    chosen = torch.bincount(lists[:, :-1].flatten(), minlength=COUNT).double()  # the last one is not chosen from any
    for _ in range(1000):
        left = strength[lists].flip(-1).cumsum(-1).flip(-1)[:, :-1]  # [n, K - 1], what each is chosen from
        sums = (1 / left).cumsum(-1)  # an item has been there at all stages up to its own
        share = torch.cat([sums, sums[:, -1:]], -1)
        strength = chosen / torch.zeros_like(strength).index_add_(0, lists.flatten(), share.flatten())
        strength = strength / strength.sum()
    return strength


def test_pl_dpo_reaches_the_tilt_by_the_likeliest_scores(tmp_path):
    lists = drawn_lists()
    strength = torch.stack([likeliest(lists[x]) for x in range(2)])
    assert (strength > 1e-4).all()  # else some response never won, and its likeliest score is -infinity
    wanted = law(strength.log() / BETA)
    rows = rows_of([(x, int(y)) for x in range(2) for y in lists[x].flatten()])
    rows = type(rows)(rows.ids, rows.attention_mask, rows.response_mask, torch.arange(len(rows)) // RANKED, rows.extras)
    batch = Rankings(rows, torch.arange(1, RANKED + 1).repeat(2 * LISTS))
    end = distance(distribution(run_on(tmp_path, PLDPO(beta=BETA), batch, steps=150).models.policy), wanted)
    print(f"pl_dpo: TV {distance(REFERENCE, wanted):.3f} -> {end:.5f}")
    assert end < 0.02 and distance(REFERENCE, wanted) > 0.3


def test_with_more_lists_the_likeliest_scores_become_the_true_ones():
    """An error of 1/sqrt(lists): a seventh with 50 times as many; at most a third is asked for."""
    few, many = (
        distance(law(torch.stack([likeliest(x) for x in drawn_lists(n)]).log() / BETA), law(table() / BETA))
        for n in (LISTS, 50 * LISTS)
    )
    print(f"TV to pi*: {few:.3f} -> {many:.3f}")
    assert many < few / 3


# --- BCO --------------------------------------------------------------------------------------------------------------


def test_bco_ends_where_the_classifier_is_as_right_as_probabilities_let_it(tmp_path):
    """Each response is judged four times, desirable once, twice or three times by its reward.

    The classifier alone would end at beta h - delta = log-odds; here the rewards have to be those of probabilities, and
    delta has to be what it is made of: found by going round.
    """
    good = 1 + (table() > -0.4).long() + (table() > 0.4).long()  # of four, [2, 15]
    p = good / 4
    wanted, delta = REFERENCE, 0.0
    for _ in range(100):
        wanted = solved_law(
            lambda h, x, delta=delta: BETA * ((BETA * h - delta).sigmoid() - p[x]),
            lambda x, wanted=wanted: (wanted[x] / REFERENCE[x]).log(),
        )
        r = BETA * (wanted / REFERENCE).log()
        new = float((p * r).sum() / p.sum() + ((1 - p) * r).sum() / (1 - p).sum()) / 2
        delta, moved = new, abs(new - delta)
        if moved < 1e-8:
            break
    assert moved < 1e-8
    rows = rows_of([pair for pair in EVERYTHING for _ in range(4)])
    desirable = (torch.arange(4) < good.flatten()[:, None]).flatten()
    run = run_on(tmp_path, BCO(beta=BETA), Judgements(rows, desirable))
    found = distribution(run.models.policy)
    print(
        f"bco: TV {distance(REFERENCE, wanted):.3f} -> {distance(found, wanted):.5f}; delta {run.method.shift:.4f}, {delta:.4f}"
    )
    assert distance(found, wanted) < 0.02 and distance(REFERENCE, wanted) > 0.2
    assert run.method.shift == pytest.approx(delta, abs=0.01) and abs(delta) > 0.03
    odds = (BETA * (found / REFERENCE).log() - delta).sigmoid()  # what the classifier says
    for few, many in ((1, 2), (2, 3)):
        assert odds[good == few].mean() < odds[good == many].mean() - 0.1


# --- token-level DPO --------------------------------------------------------------------------------------------------


def states_of(logits):
    """Log-probabilities at every prefix of every response, from [prefixes, 3] logits: float64 log p and KL by response.

    ``logits`` maps (prompt, *words) to three numbers; the result is two lists of [2, 15] sums over a response's tokens.
    """
    h, kl = [], []
    for prompt, response in EVERYTHING:
        words, seen = RESPONSES[response], (prompt + 1,)
        steps = []
        for word in words:
            steps.append((seen, word))
            seen = (*seen, word)
        assert len(steps) <= LONGEST
        policy = torch.stack([logits[prefix].log_softmax(-1) for prefix, _ in steps])
        reference = torch.stack([REFERENCE_LOGITS[prefix].log_softmax(-1) for prefix, _ in steps])
        chosen = torch.tensor([word for _, word in steps])
        h.append((policy - reference).gather(-1, chosen[:, None]).sum())
        kl.append((reference.exp() * (reference - policy)).sum())
    return torch.stack(h).reshape(2, COUNT), torch.stack(kl).reshape(2, COUNT)


def logits_of(model):
    """The table's rows for every prefix that a response has, float64 leaves."""
    prefixes = {(p + 1, *RESPONSES[r][:n]) for p, r in EVERYTHING for n in range(len(RESPONSES[r]))}
    with torch.no_grad():
        return {
            prefix: model(torch.tensor([prefix])).logits[0, -1].double().requires_grad_() for prefix in sorted(prefixes)
        }


REFERENCE_LOGITS = {prefix: row.detach() for prefix, row in logits_of(Tabular(seed=1)).items()}


def pull(model, alpha, stops):
    """Length of the gradient on the table, of every pair in both directions with its share of the labels."""
    logits = logits_of(model)
    assert all(len(row) == VOCABULARY for row in logits.values())
    h, kl = states_of(logits)
    chosen_kl = kl.detach() if stops else kl
    charge = kl[:, None, :] - chosen_kl[:, :, None]  # [2, chosen, rejected]
    lead = BETA * (h[:, :, None] - h[:, None, :] - alpha * charge)
    loss = -(BEATS * torch.nn.functional.logsigmoid(lead)).sum() / BEATS.sum()
    return float(torch.cat(torch.autograd.grad(loss, list(logits.values()))).norm())


TOKEN_LEVEL = {"tdpo": (TDPO(beta=BETA, alpha=0.5), 0.5, True), "tdpo1": (TDPO1(beta=BETA), 1.0, False)}


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_token_level_dpo_ends_where_its_gradient_is_nothing(name, tmp_path):
    method, alpha, stops = TOKEN_LEVEL[name]
    policy = run_on(tmp_path, method, both_ways(all_pairs(table()))).models.policy
    before, after = pull(Tabular(seed=1), alpha, stops), pull(policy, alpha, stops)
    other = pull(policy, alpha, not stops)
    away = distance(distribution(policy), law(table() / BETA))
    print(f"{name}: gradient {before:.4f} -> {after:.6f}, of the other loss there {other:.4f}; TV to DPO's {away:.3f}")
    assert after < 0.01 * before < other and away > 0.03


def test_tdpo_without_its_charge_ends_where_dpo_does(tmp_path):
    pairs = both_ways(all_pairs(table()))
    found = distribution(run_on(tmp_path / "a", TDPO(beta=BETA, alpha=0.0), pairs).models.policy)
    assert distance(found, law(table() / BETA)) < 0.02
    assert distance(found, trained(tmp_path / "b", DPO(beta=BETA), pairs)) < 1e-3


def test_tdpo_with_the_kl_the_other_way_round_ends_elsewhere(tmp_path, monkeypatch):
    right = tdpo_module.log_ratios_and_kl

    def wrong(models, batch):
        logprobs, ratio, kl = right(models, batch)
        return logprobs, ratio, -kl

    monkeypatch.setattr(tdpo_module, "log_ratios_and_kl", wrong)
    monkeypatch.setattr(TDPO, "at_reference", lambda self: {})
    policy = run_on(tmp_path, TDPO(beta=BETA, alpha=0.5), both_ways(all_pairs(table())), steps=150).models.policy
    assert pull(policy, 0.5, True) > 0.1 * pull(Tabular(seed=1), 0.5, True)
