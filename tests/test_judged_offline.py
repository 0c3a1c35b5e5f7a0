"""The offline methods and their surroundings against definitions written a second time, from the papers alone.

Rows here have padding on both sides with junk in it, a hole in the response (another's turn), single tokens and nothing at
all to answer for; pairs have weights, soft labels (0 and 1/2 among them) and a group with three pairs.
"""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import softplus

from palate.data.chat import Chat
from palate.data.kinds import SegmentedComparison
from palate.data.segments import changed_spans
from palate.evaluation.frontier import less_is_better
from palate.health.alarm import History
from palate.health.preferences import length_drift
from palate.lookup import find_method
from palate.methods.bco import BCO
from palate.methods.fdpo import fdpo_loss
from palate.methods.kto import KTO, mismatched
from palate.models.adapters import add_lora
from palate.models.roles import AdapterOff
from palate.pipelines.sweep import run as sweep_run
from palate.stage.reference_store import reference_key
from palate.training.checkpoint import method_state, restored_method
from palate.types import Comparisons, Judgements, Models, Rankings, Tokens, microbatches
from tiny import LORA, rows, tiny, tokenizer_of, trained

VOCABULARY = 20
PAIRS = [(0, 1), (2, 3), (4, 2), (3, 4), (5, 6), (7, 8), (9, 7), (10, 8)]
WEIGHTS = [0.5, 1 / 3, 1 / 3, 1 / 3, 2.0, 1.0, 0.25, 3.0]
PROBABILITIES = [1.0, 0.8, 0.3, 0.5, 1.0, 0.9, 0.0, 0.6]
RANKS = [1, 1, 2, 1, 2, 1, 2, 3, 1, 1, 2, 1]  # ties among all, among the best, and a group of one
DESIRABLE = [i * 7 % 3 == 0 for i in range(12)]
B = 0.37


def strange_rows(seed=1):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    found = []
    for group, size in enumerate((2, 3, 2, 4, 1)):
        prompt = draw(1, 5)
        found += [(group, prompt, (1, 3, 6, 0, 2)[(j + group) % 5], draw(0, 4)) for j in range(size)]
    width = max(sum(row[1:]) for row in found) + 2
    ids = torch.randint(0, VOCABULARY, (len(found), width), generator=generator)  # junk where nothing is
    real, response = torch.zeros(2, *ids.shape, dtype=torch.bool)
    for i, (_, prompt, answer, left) in enumerate(found):
        real[i, left : left + prompt + answer] = True
        response[i, left + prompt : left + prompt + answer] = True
        if answer == 6:
            response[i, left + prompt + 2] = False
    changed = torch.rand(ids.shape, generator=generator) < 0.5  # junk outside the response, too
    return Tokens(ids, real, response, torch.tensor([row[0] for row in found]), {"changed": changed})


def each_token(model, tokens, row):
    """(log-probs of the whole vocabulary, token, column) at each response token; one row through the model alone."""
    place = tokens.attention_mask[row].nonzero()[:, 0]
    found = model(input_ids=tokens.ids[row, place][None]).logits[0].log_softmax(-1)
    counted = [k for k in range(len(place)) if tokens.response_mask[row, place[k]]]
    return [(found[k - 1], int(tokens.ids[row, place[k]]), int(place[k])) for k in counted]


def ls(x):
    """log sigmoid"""
    return -softplus(-x)


class Slow:
    """Sums, log-ratios, lengths and SeqKL of every row in float64, with a gradient in the policy."""

    def __init__(self, policy, reference, tokens):
        self.tokens, self.zero = tokens, torch.zeros((), dtype=torch.float64)
        self.p = [each_token(policy, tokens, i) for i in range(len(tokens))]
        with torch.no_grad():
            self.r = [each_token(reference, tokens, i) for i in range(len(tokens))]
        self.n = [len(row) for row in self.p]
        self.s = [sum((p[y] for p, y, _ in row), self.zero) for row in self.p]
        self.h = [s - sum((q[y] for q, y, _ in row), self.zero) for s, row in zip(self.s, self.r, strict=True)]
        self.kl = [
            sum(((q[0].exp() * (q[0] - p[0])).sum() for p, q in zip(*both, strict=True)), self.zero)
            for both in zip(self.p, self.r, strict=True)
        ]

    def mean(self, values, row):
        return values[row] / self.n[row]

    def weighted(self, side, row, gamma, normalise):
        weights = [gamma if self.tokens.extras["changed"][row, c] else 1.0 for _, _, c in side[row]]
        total = sum((w * p[y] for w, (p, y, _) in zip(weights, side[row], strict=True)), self.zero)
        return total / sum(weights) if normalise else total

    def pairs(self, loss, soft):
        """Weighted mean over the pairs whose sides both say something; ``loss(w, l)`` or, of p too, ``loss(w, l, p)``."""
        total, count = self.zero, 0.0
        for (w, r), weight, p in zip(PAIRS, WEIGHTS, PROBABILITIES, strict=True):
            if self.n[w] and self.n[r]:
                total = total + weight * (p * loss(w, r) + (1 - p) * loss(r, w) if soft else loss(w, r))
                count += weight
        return total / count

    def rankings(self):
        losses = []
        for group in range(5):
            members = [i for i in range(12) if self.tokens.group[i] == group and self.n[i]]
            if len({RANKS[i] for i in members}) > 1:
                below = [[i, *(j for j in members if RANKS[j] > RANKS[i])] for i in members]
                losses.append(
                    sum(torch.logsumexp(torch.stack([B * self.h[j] for j in b]), 0) - B * self.h[b[0]] for b in below)
                )
        return sum(losses) / len(losses)

    def judgements(self, loss):
        answered = [i for i in range(12) if self.n[i]]
        return sum(loss(self.h[i], DESIRABLE[i]) for i in answered) / len(answered)


def definitions(x):
    """(method, settings, are soft labels used, loss): METHODS of the papers, in terms of ``Slow``."""
    h, s, m, kl = x.h, x.s, x.mean, x.kl

    def odds(row):
        a = m(s, row)
        return torch.log(a.exp() / (1 - a.exp()))

    def ddpo(gamma, normalise):
        def h(row):
            return x.weighted(x.p, row, gamma, normalise) - x.weighted(x.r, row, gamma, normalise)

        return lambda w, r: -ls(B * (h(w) - h(r))) - 0.2 * m(s, w)

    slope = {
        "reverse_kl": lambda u: u.log(),
        "js": lambda u: (2 * u / (1 + u)).log(),
        "forward_kl": lambda u: -1 / u,
        "alpha": lambda u: (1 - u**-0.3) / 0.3,
    }
    yield "dpo", {"beta": B}, True, lambda w, r: -ls(B * (h[w] - h[r]))
    yield (
        "robust_dpo",
        {"beta": B, "flip_rate": 0.2},
        True,
        lambda w, r: (-0.8 * ls(B * (h[w] - h[r])) + 0.2 * ls(B * (h[r] - h[w]))) / 0.6,
    )
    yield "r_dpo", {"beta": B, "alpha": 0.3}, True, lambda w, r: -ls(B * (h[w] - h[r]) + 0.3 * (x.n[w] - x.n[r]))
    yield "ln_dpo", {"beta": 3.0}, True, lambda w, r: -ls(3 * (m(h, w) - m(h, r)))
    yield "ipo", {"tau": 0.2}, True, lambda w, r: (h[w] - h[r] - 2.5) ** 2
    yield "ipo_mean", {"tau": 0.2}, True, lambda w, r: (m(h, w) - m(h, r) - 2.5) ** 2
    yield "simpo", {"beta": 2.0, "gamma": 0.7}, True, lambda w, r: -ls(2 * (m(s, w) - m(s, r)) - 0.7)
    yield "orpo", {"lam": 0.4}, False, lambda w, r: -m(s, w) - 0.4 * ls(odds(w) - odds(r))
    yield "nca", {"beta": B}, False, lambda w, r: -ls(B * h[w]) - 0.5 * ls(-B * h[w]) - 0.5 * ls(-B * h[r])
    yield "sppo", {"beta": B}, False, lambda w, r: (h[w] - 0.5 / B) ** 2 + (h[r] + 0.5 / B) ** 2
    yield "apo_zero", {"beta": B}, False, lambda w, r: 1 - (B * h[w]).sigmoid() + (B * h[r]).sigmoid()
    yield "apo_down", {"beta": B}, False, lambda w, r: (B * h[w]).sigmoid() + 1 - (B * (h[w] - h[r])).sigmoid()
    yield "tdpo", {"beta": B, "alpha": 0.6}, False, lambda w, r: -ls(B * (h[w] - h[r] - 0.6 * (kl[r] - kl[w].detach())))
    yield "tdpo1", {"beta": B}, False, lambda w, r: -ls(B * (h[w] - h[r] - (kl[r] - kl[w])))
    for name, f in slope.items():
        settings = {"beta": B, "divergence": name} | ({"alpha": 0.3} if name == "alpha" else {})
        yield "fdpo", settings, True, lambda w, r, f=f: -ls(B * (f(h[w].exp()) - f(h[r].exp())))
    for gamma, normalise in ((5.0, True), (0.5, False)):
        settings = {"beta": B, "gamma": gamma, "normalise": normalise, "anchor": 0.2}
        yield "ddpo", settings, False, ddpo(gamma, normalise)


@pytest.fixture(scope="module")
def models():
    policy, reference = (trained(tiny("gpt2", seed=seed), seed).double() for seed in (3, 4))
    return Models(policy=policy, reference=reference.requires_grad_(False))


def gradient_of(method, models, batch, wanted, cut):
    """Of the method's mean loss, taken in parts; its value is checked on the way."""
    parameters = list(models.policy.parameters())
    with torch.no_grad():
        batch = method.prepare(models, batch)
    total, count = 0.0, 0.0
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for part in microbatches(batch, cut):
        mean = method.loss(models, part)["loss"]
        if mean.total.requires_grad:
            mean.total.backward()
        total, count = total + float(mean.total.detach()), count + float(mean.count)
    assert total / count == pytest.approx(float(wanted.detach()), rel=1e-5), method
    return [p.grad / count for p in parameters]


def test_methods_are_their_papers_losses_on_strange_rows_however_they_are_cut(models):
    """Every value by itself; the gradients together, each method's times a number of its own."""
    tokens = strange_rows()
    slow = Slow(models.policy, models.reference, tokens)
    chosen, rejected = torch.tensor(PAIRS).T
    hard = Comparisons(tokens, chosen, rejected, weight=torch.tensor(WEIGHTS))
    soft = replace(hard, probability=torch.tensor(PROBABILITIES))
    cases = [
        (find_method(name).METHOD(**settings), soft if is_soft else hard, slow.pairs(loss, is_soft))
        for name, settings, is_soft, loss in definitions(slow)
    ]
    judged = slow.judgements(lambda h, good: -ls((B * h - 0.21) * (1 if good else -1)))
    bco = BCO(beta=B, desirable_reward=0.5, undesirable_reward=-0.08)
    cases.append((bco, Judgements(tokens, torch.tensor(DESIRABLE)), judged))
    cases.append((find_method("pl_dpo").METHOD(beta=B), Rankings(tokens, torch.tensor(RANKS)), slow.rankings()))
    factors = [1 + 0.37 * k for k in range(len(cases))]
    whole = sum(f * wanted for f, (_, _, wanted) in zip(factors, cases, strict=True))
    wanted = torch.autograd.grad(whole, list(models.policy.parameters()))
    found = [torch.zeros_like(g) for g in wanted]
    for k, (factor, (method, batch, value)) in enumerate(zip(factors, cases, strict=True)):
        for sum_, g in zip(found, gradient_of(method, models, batch, value, (1, 40, 10**9)[k % 3]), strict=True):
            sum_ += factor * g
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js", "forward_kl", "alpha"])
def test_fdpo_points_the_right_way_a_thousand_nats_away(divergence):
    """Down for chosen and up for rejected, with finite numbers; js has no slope left only where the ratio is huge."""
    for chosen, rejected in ((-1e3, 0.0), (-1e3, 1e3), (-40.0, -35.0)):
        w, r = (torch.tensor([x], requires_grad=True) for x in (chosen, rejected))
        loss = fdpo_loss(w, r, 0.1, divergence, 0.4 if divergence == "alpha" else None)
        loss.sum().backward()
        assert all(math.isfinite(float(x)) for x in (loss.detach(), w.grad, r.grad))
        assert w.grad < 0 and r.grad >= 0


def test_bco_goes_on_with_its_delta_after_a_resume():
    """0.5 a batch; the third batch has nothing undesirable. By hand: desirable 1, 1.5, 2.25; undesirable -2, -1, -1."""
    tokens = rows(4, 4)
    batches = [([1.0, -2.0], [True, False]), ([2.0, 0.0], [True, False]), ([2.0, 4.0], [True, True])]
    method = BCO(shift_decay=0.5)
    for rewards, desirable in batches:
        batch = Judgements(tokens, torch.tensor(desirable), rewards=torch.tensor(rewards))
        method = restored_method(BCO(shift_decay=0.5), json.loads(json.dumps(method_state(method)))).adapt(batch)
    assert (method.desirable_reward, method.undesirable_reward) == (2.25, -1.0)
    assert method.shift == 0.625


def test_kto_estimates_its_kl_within_the_models_positions():
    """A long prompt before another's long response does not fit a model with 16 positions; it did when each had its own."""
    policy, reference = (tiny("gpt2", seed=seed, n_positions=16) for seed in (1, 2))
    whole = rows(16, 16)
    place = torch.arange(16)
    tokens = replace(whole, response_mask=torch.stack([place >= 14, place >= 2]))
    with torch.no_grad():
        batch = KTO().prepare(
            Models(policy=policy, reference=reference), Judgements(tokens, torch.tensor([True, False]))
        )
    assert batch.kl.isfinite().all()
    short, long = mismatched(tokens, 16).ids
    assert long.tolist() == [*whole.ids[0, 12:14].tolist(), *whole.ids[1, 2:].tolist()]  # the prompt's end is kept
    assert short[:4].tolist() == [*whole.ids[1, :2].tolist(), *whole.ids[0, 14:].tolist()]
    assert mismatched(tokens).ids.shape == (2, 28)


def test_the_reference_behind_an_adapter_is_the_base_however_far_the_adapter_went():
    base, device = tiny("llama", seed=1), torch.device("cpu")
    policy = add_lora(copy.deepcopy(base), LORA, seed=0, scalar=False)
    assert reference_key(AdapterOff(trained(policy)), device) == reference_key(base, device)
    assert reference_key(policy, device).weights != reference_key(base, device).weights


# --- found and mended -------------------------------------------------------------------------------------------------


def test_a_held_out_loss_is_a_price():
    """A sweep of judgements without a reward draws it; its ring was once put on the highest."""
    names = ("held_out/loss", "held_out/loss/preference", "held_out/kl/mismatched", "held_out/length/chosen")
    assert all(map(less_is_better, names))
    assert not less_is_better("held_out/reward/accuracy")


def test_batches_without_a_pair_of_unlike_length_say_nothing_of_length():
    """Their shares are written as 0. The reward is no worse for the longer one than a coin: no alarm may say so."""
    some = {"reward/longer": 0.5, "length/longer_preferred": 0.9, "reward/length_slope": 1e-3}
    none = dict.fromkeys(some, 0.0)
    history = History(20, {}, [{"step": i, **(none if i % 5 < 2 else some)} for i in range(20)])
    alarm = length_drift(history)
    assert alarm is None or alarm.numbers["reward_longer"] == 0.5
    drifting = {"reward/longer": 0.9, "length/longer_preferred": 0.6, "reward/length_slope": 0.02}
    lines = [{"step": i, **(none if i % 2 else {**drifting, "reward/longer": 0.9 + i / 1000})} for i in range(20)]
    alarm = length_drift(History(20, {}, lines))
    assert alarm is not None and alarm.numbers["reward_longer"] == pytest.approx(0.9, abs=0.02)
    assert length_drift(History(20, {}, [{"step": i, **none} for i in range(20)])) is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "seam", "span"),
    [
        # The texts part at "red"; ", red" was said to be missing, with the seam at a comma that both have there.
        ("Pens, green, blue pens.", "Pens, red, green, blue pens.", "green", " red,"),
        ("She saw the dog.", "She saw the cat and the dog.", "dog", " cat and the"),
        # Of repeated words the longest equal stretch is not at its place.
        ("red red red", "red zebra red red", "red", " zebra"),
    ],
)
def test_the_seam_is_where_the_texts_part(chosen, rejected, seam, span):
    (here,), (there,) = changed_spans(chosen, rejected)
    assert here[0] == here[1] and chosen[here[0] :].split()[0].strip(",.") == seam
    assert rejected[slice(*there)] == span
    assert chosen[: here[0]] == rejected[: there[0]]


def test_a_sweep_asks_the_policy_about_held_out_corrections_too(monkeypatch):
    chat, reference = Chat(tokenizer_of()), tiny("llama", seed=1)
    records = [SegmentedComparison("a", "b c d", "b d"), SegmentedComparison("c", "e f", "e g f")]
    monkeypatch.setattr(sweep_run, "run_policy", lambda *_: reference)
    tape = sweep_run._Tape(SimpleNamespace(keys=()), sweep_run.Measuring())
    tape.stick = SimpleNamespace(measure=lambda _: {}, reward=None, reference=reference, chat=chat)
    tape.key = how = {"way": False}
    method = SimpleNamespace(settings=SimpleNamespace(reads="corrections"))
    config = SimpleNamespace(out=None, method=method, data=SimpleNamespace(max_length=32), device="cpu")
    measured, _ = tape._now(config, records, [], how)
    assert measured["accuracy"][0] == 0.5 and measured["margin"][0] == 0.0  # the reference itself
