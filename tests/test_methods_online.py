"""The methods that sample and compare against plain Python: pairs, labels, weights, losses, gradients; who draws; preferences."""

import itertools
import json
import math

import pytest
import torch

import slow
from batches import batch_for, models_for, run_of, tokens
from palate.config import load_config, load_settings
from palate.data.chat import Chat
from palate.data.encode import encode_records
from palate.data.kinds import Prompt
from palate.errors import ConfigError, DataError, ModelError
from palate.functional import best_of_n as exact
from palate.functional.pairs import extremes, group_shares, labelled, pairs_between, pairs_within
from palate.generation.sampler import SamplingSettings, sample
from palate.methods import best_of_n, nash_md, online_dpo, xpo
from palate.methods._sampled import rows_drawn_by
from palate.methods.best_of_n import BestOfN
from palate.methods.nash_md import NashMD
from palate.methods.online_dpo import OnlineDPO
from palate.methods.xpo import XPO
from palate.models.adapters import add_lora
from palate.models.forward import token_logprobs
from palate.models.preferences import compare_responses, compares
from palate.models.rewards import FunctionReward, PreferenceFunction, load_reward
from palate.models.roles import AdapterOff
from palate.resolve import Facts, require_all, resolved
from palate.training.loop import train
from palate.training.rollouts import Rollout
from palate.types import Scored
from resuming import stopped_and_resumed
from test_methods_groups import GROUPS, SCORES, assert_loss_is, lists, scored
from tiny import LORA, tiny, tokenizer_of, trained

# --- each loss, from its paper: new, old, ref are lists of log-probabilities, one list a response ---------------------


def preferred(a, b, labels):
    p = slow.sigmoid(a - b)
    return p if labels == "soft" else 1.0 if a > b else 0.0 if a < b else 0.5


def ratios(new, ref):
    return [sum(p) - sum(q) for p, q in zip(new, ref, strict=True)]


def slow_online_dpo(labels, new, ref, scores=SCORES):
    h, losses = ratios(new, ref), []
    for rows in GROUPS:
        pairs = list(itertools.combinations(rows, 2))
        losses.append(
            slow.mean(
                [slow.dpo(h[i], h[j], 0.3, probability=preferred(scores[i], scores[j], labels)) for i, j in pairs]
            )
        )
    return slow.mean(losses)


def slow_extremes(new, old, ref):
    """The second group's scores are all equal: it is left out."""
    h, losses = ratios(new, ref), []
    for rows in GROUPS:
        best, worst = max(rows, key=lambda i: SCORES[i]), min(rows, key=lambda i: SCORES[i])
        if SCORES[best] != SCORES[worst]:
            losses.append(slow.dpo(h[best], h[worst], 0.3, probability=preferred(SCORES[best], SCORES[worst], "soft")))
    return slow.mean(losses)


def slow_missing_end(new, old, ref):
    return slow_online_dpo("soft", new, ref, [s - 2.0 * (i in (2, 9)) for i, s in enumerate(SCORES)])


def slow_xpo(labels, new, ref):
    """Rows 0 and 1 of a group are the policy's, row 2 is the reference's."""
    h, losses = ratios(new, ref), []
    for a, b, its in GROUPS:
        for mine in (a, b):
            p = preferred(SCORES[mine], SCORES[its], labels)
            losses.append(slow.dpo(h[mine], h[its], 0.3, probability=p) + 0.02 * sum(new[its]))
    return slow.mean(losses)


def slow_nash_md(new, old, ref):
    losses = []
    for a, b, its in GROUPS:
        rewards = [
            slow.sigmoid(SCORES[i] - SCORES[its]) - 0.3 * sum(p - q for p, q in zip(old[i], ref[i], strict=True))
            for i in (a, b)
        ]
        losses += [-x * sum(new[i]) for x, i in zip(slow.leave_one_out(rewards), (a, b), strict=True)]
    return slow.mean(losses)


def slow_best_of_n(keep, new, old, ref):
    """Sorted by score; equal ones at the border share what is left."""
    total, count = 0.0, 0.0
    for rows in GROUPS:
        for i in rows:
            above = sum(SCORES[j] > SCORES[i] for j in rows)
            equal = sum(SCORES[j] == SCORES[i] for j in rows)
            weight = min(1.0, max(0.0, (keep - above) / equal))
            total -= weight * sum(new[i])
            count += weight * len(new[i])
    return total / count


DEFINITIONS = {
    "online_dpo": (OnlineDPO(beta=0.3), lambda new, old, ref: slow_online_dpo("soft", new, ref)),
    "online_dpo, warm": (OnlineDPO(beta=0.3, temperature=0.7), lambda new, old, ref: slow_online_dpo("soft", new, ref)),
    "online_dpo, hard": (OnlineDPO(beta=0.3, labels="hard"), lambda new, old, ref: slow_online_dpo("hard", new, ref)),
    "online_dpo, extremes": (OnlineDPO(beta=0.3, pairs="extremes"), slow_extremes),
    "online_dpo, missing end": (OnlineDPO(beta=0.3, missing_eos_penalty=2.0), slow_missing_end),
    "xpo": (XPO(beta=0.3, alpha=0.02), lambda new, old, ref: slow_xpo("soft", new, ref)),
    "xpo, hard": (XPO(beta=0.3, alpha=0.02, labels="hard"), lambda new, old, ref: slow_xpo("hard", new, ref)),
    "nash_md": (NashMD(kl_coef=0.3), slow_nash_md),
    "nash_md, warm": (NashMD(kl_coef=0.3, temperature=0.7), slow_nash_md),
    "best_of_n": (BestOfN(), lambda *x: slow_best_of_n(1, *x)),
    "best_of_n, two": (BestOfN(keep=2), lambda *x: slow_best_of_n(2, *x)),
}


def assert_equals_slow(method, definition):
    """Loss and gradient in microbatches, away from the policy that sampled, with the slow definition; the gradient by
    central differences with respect to every token's log-probability, and from there by autograd. The trained
    distribution is that of temperature 1, but for nash_md."""
    models, rows = models_for(method), batch_for(method)
    models.reward = scored(SCORES)
    mask, heat = rows.response_mask, method.temperature if isinstance(method, NashMD) else 1.0
    with torch.no_grad():
        batch = method.prepare(models, rows)
        old = lists(token_logprobs(models.policy, rows, temperature=heat), mask)
        ref = old if models.reference is None else lists(token_logprobs(models.reference, rows, temperature=heat), mask)
    trained(models.policy, seed=1)
    assert_loss_is(lambda new: definition(new, old, ref), method, models, batch, rows, heat)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_loss_and_gradient_equal_the_definitions(name):
    assert_equals_slow(*DEFINITIONS[name])


def swapped(first, second, probability, labels):
    chosen, rejected, sure = labelled(first, second, probability, labels)
    return rejected, chosen, sure


_rewards, _weights, _loss = nash_md.sequence_rewards, exact.best_weights, xpo.xpo_loss

BUGS = {
    "labels swapped": ("online_dpo", online_dpo, "labelled", swapped),
    "labels swapped, xpo": ("xpo", xpo, "labelled", swapped),
    "a tie is a win": (
        "online_dpo, hard",
        online_dpo,
        "labelled",
        lambda first, second, p, labels: (*labelled(first, second, p, "soft")[:2], torch.ones_like(p)),
    ),
    "every pair weighs 1": ("online_dpo, extremes", online_dpo, "extremes", lambda scores, group: pairs_within(group)),
    "pessimism": ("xpo", xpo, "xpo_loss", lambda c, r, e, beta, alpha, p: _loss(c, r, e, beta, -alpha, p)),
    "no leave-one-out": ("nash_md", nash_md, "leave_one_out", lambda rewards, group: rewards - 0.5),
    "KL with the wrong sign": ("nash_md", nash_md, "sequence_rewards", lambda f, s, m, k: _rewards(f, s, m, -k)),
    "the worst for the best": ("best_of_n", best_of_n, "best_weights", lambda s, g, k: _weights(-s, g, k)),
    "ties kept whole": ("best_of_n", best_of_n, "best_weights", lambda s, g, k: _weights(s, g, k).ceil()),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen_by_the_definition(bug, monkeypatch):
    name, module, attribute, wrong = BUGS[bug]
    monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises(AssertionError):
        assert_equals_slow(*DEFINITIONS[name])


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_stay_within_their_group_and_every_prompt_weighs_one():
    group = torch.tensor([5, 2, 5, 2, 5, 9])
    first, second = pairs_within(group)
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 2), (0, 4), (1, 3), (2, 4)]
    assert group_shares(group[first]).tolist() == pytest.approx([1 / 3, 1 / 3, 1, 1 / 3])
    first, second = pairs_between(group, torch.tensor([0, 1, 5]), torch.tensor([2, 3, 4]))
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 2), (0, 4), (1, 3)]
    best, worst = extremes(torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0, 7.0]), group)
    assert (best.tolist(), worst.tolist()) == ([2], [4])
    assert all(len(rows) == 0 for rows in extremes(torch.zeros(6), group))


def test_labels_put_the_likelier_side_first():
    first, second = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    chosen, rejected, sure = labelled(first, second, torch.tensor([0.2, 0.5, 0.9]), "soft")
    assert (chosen.tolist(), rejected.tolist()) == ([3, 1, 2], [0, 4, 5]) and sure.tolist() == pytest.approx(
        [0.8, 0.5, 0.9]
    )
    assert labelled(first, second, torch.tensor([0.2, 0.5, 0.9]), "hard")[2].tolist() == [1.0, 0.5, 1.0]


def test_a_batch_of_equal_scores_has_no_extremes_and_makes_no_update(tmp_path):
    method = OnlineDPO(pairs="extremes")
    models = models_for(method)
    models.reward = lambda rows: Scored(torch.zeros(len(rows)), {})
    before = [p.clone() for p in models.policy.parameters()]
    metrics = list(train(run_of(method, models, tmp_path)))
    assert [m["updates"] for m in metrics] == [0, 0, 0] and metrics[0]["groups/all_equal"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, models.policy.parameters(), strict=True))


@pytest.mark.parametrize("method", [OnlineDPO(), XPO(), NashMD(), BestOfN()], ids=lambda m: type(m).__name__)
def test_scores_are_written_beside_the_samples(method, tmp_path):
    run = run_of(method, models_for(method), tmp_path)
    metrics = list(train(run))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines and all(math.isfinite(line["score"]) for line in lines)
    assert {"score", "length/response", "score/std"} <= metrics[0].keys()


# --- who draws --------------------------------------------------------------------------------------------------------


def prompts(chat):
    return encode_records([Prompt(text) for text in ("a b c", "d", "e f")], "prompts", chat, max_length=24)[0]


def drawing(policy, reference, *whose, mixture=0.3, copies=2):
    chat = Chat(tokenizer_of())
    rollout = Rollout(policy, chat, SamplingSettings(max_new_tokens=5), copies, whose, reference, mixture)
    return rollout(prompts(chat), 3, 4)


@pytest.mark.parametrize("beside", ["reference", "mixture"])
def test_the_policys_samples_are_the_same_whoever_draws_beside(beside):
    policy, reference = tiny(seed=0), tiny(seed=1)
    both, alone = drawing(policy, reference, "policy", beside), drawing(policy, None, "policy")
    assert both.extras["drawn_by"] == ["policy", "policy", beside, beside] * 3
    assert both.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    own = both.select(rows_drawn_by("test", both, "policy"))
    assert torch.equal(own.ids, alone.ids) and torch.equal(own.response_mask, alone.response_mask)
    other = both.select(rows_drawn_by("test", both, beside))
    found, policys, references = (
        lists(values, other.response_mask)
        for values in (other.extras["sampler_logprobs"], *(token_logprobs(m, other) for m in (policy, reference)))
    )
    if beside == "reference":
        for row, wanted in zip(found, references, strict=True):
            assert row == pytest.approx(wanted, abs=1e-4)
    else:
        assert found != policys and found != references
    again = drawing(policy, reference, "policy", beside)
    assert torch.equal(again.ids, both.ids) and again.extras["drawn_by"] == both.extras["drawn_by"]


def test_reference_and_policy_of_the_same_weights_draw_different_responses():
    """With the same random numbers all pairs of the first batch would be of a response with itself."""
    policy = tiny(seed=0)
    both = drawing(policy, policy, "policy", "reference", copies=6)
    one, other = (both.select(rows_drawn_by("test", both, who)) for who in ("policy", "reference"))
    texts = [[row[m].tolist() for row, m in zip(t.ids, t.response_mask, strict=True)] for t in (one, other)]
    assert sum(a == b for a, b in zip(*texts, strict=True)) <= len(one) // 3


@pytest.mark.parametrize("method", [XPO(), NashMD()], ids=lambda m: type(m).__name__)
def test_rows_of_nobody_are_refused(method):
    with pytest.raises(DataError, match="drew no responses"):
        method.prepare(models_for(method), tokens())


# --- the mixture ------------------------------------------------------------------------------------------------------


def draws(model, other=None, mixture=0.0, seed=0, temperature=1.0, **options):
    settings = SamplingSettings(max_new_tokens=12, temperature=temperature)
    options = {"samples_per_prompt": 3, "stop_token_ids": [2]} | options
    generator = torch.Generator().manual_seed(seed)
    prompts = [[5, 9, 11], [7], [3, 1, 4, 1, 5, 9, 2, 6]]
    return sample(model, prompts, settings, generator=generator, other=other, mixture=mixture, **options)


def uncached(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0].float()


def check_mixture(rows, model, other, b, temperature=1.0):
    """log-softmax of ((1 - b) log pi + b log ref) / T of whole forwards of each row alone."""
    for row in range(len(rows)):
        ids = rows.ids[row][rows.attention_mask[row]]
        logits = (1 - b) * uncached(model, ids).log_softmax(-1) + b * uncached(other, ids).log_softmax(-1)
        wanted = (logits / temperature).log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
        kept = rows.response_mask[row, 1 : len(ids)]
        torch.testing.assert_close(
            rows.extras["sampler_logprobs"][row, 1 : len(ids)][kept], wanted[kept], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("b, temperature", [(0.3, 1.0), (0.7, 0.6)])
@pytest.mark.parametrize("kinds", [("llama", "llama"), ("gpt2", "llama")])
def test_the_mixtures_logprobs_are_those_of_two_uncached_forwards(b, temperature, kinds):
    """Rows that end early leave both caches; the two models need not be of one architecture."""
    model, other = tiny(kinds[0], seed=0), tiny(kinds[1], seed=1)
    rows = draws(model, other, b, temperature=temperature)
    assert len(rows) == 9 and rows.extras["finished"].any()
    check_mixture(rows, model, other, b, temperature)


def test_the_mixture_of_a_policy_and_its_adapter_off():
    policy = trained(add_lora(tiny(seed=0), LORA, seed=0, scalar=False), seed=2).eval()
    plain, reference = tiny(seed=0), AdapterOff(policy)
    check_mixture(draws(policy, reference, 0.4), policy, plain, 0.4)
    assert torch.equal(draws(policy, reference, 1.0).ids, draws(plain).ids)
    assert torch.equal(draws(reference).ids, draws(plain).ids)
    assert torch.equal(draws(policy, reference, 0.0).ids, draws(policy).ids) and not torch.equal(
        draws(policy).ids, draws(plain).ids
    )
    assert all(p.requires_grad for name, p in policy.named_parameters() if "lora_" in name), "left as it was"


def test_batching_never_changes_a_sample_of_the_mixture_and_the_ends_are_the_models():
    model, other = tiny(seed=0), tiny(seed=1)
    whole = draws(model, other, 0.5)
    for rows in (1, 4):
        again = draws(model, other, 0.5, max_batch_rows=rows)
        assert torch.equal(again.ids, whole.ids) and torch.equal(again.response_mask, whole.response_mask)
    assert not torch.equal(draws(model, other, 0.5, seed=1).ids, whole.ids)
    assert torch.equal(draws(model, other, 0.0).ids, draws(model).ids)
    assert torch.equal(draws(model, other, 1.0).ids, draws(other).ids)


def test_what_cannot_be_mixed_is_refused():
    model = tiny(seed=0)
    with pytest.raises(ConfigError, match="mixture"):
        draws(model, tiny(seed=1), 1.5)
    with pytest.raises(ConfigError, match="no other model"):
        draws(model, None, 0.5)
    words = [*tokenizer_of().get_vocab(), "q"]
    with pytest.raises(ModelError, match="vocabulary"):
        draws(model, tiny(seed=1, tokenizer=tokenizer_of(words)), 0.5)


# --- preferences ------------------------------------------------------------------------------------------------------


def longer(prompts, responses, others):
    return [len(a) / (len(a) + len(b) + 1e-9) if a or b else 0.5 for a, b in zip(responses, others, strict=True)]


def sampled_rows():
    policy = tiny(seed=0)
    return drawing(policy, policy, "policy", copies=3)


def test_a_function_with_others_compares():
    chat, rows = Chat(tokenizer_of()), sampled_rows()
    reward = load_reward(longer, chat)
    assert isinstance(reward, PreferenceFunction) and compares(reward)
    assert isinstance(load_reward(lambda responses: [0.0], chat), FunctionReward)
    first, second = pairs_within(rows.group)
    said = compare_responses(reward, rows, first, second)
    texts = [chat.text(ids[m].tolist()) for ids, m in zip(rows.ids, rows.response_mask, strict=True)]
    wanted = longer(None, [texts[i] for i in first], [texts[j] for j in second])
    assert said.probability.tolist() == pytest.approx(wanted)
    wins = [[] for _ in rows.ids]
    for i, j, p in zip(first.tolist(), second.tolist(), wanted, strict=True):
        wins[i].append(p)
        wins[j].append(1 - p)
    assert said.scored.scores.tolist() == pytest.approx([slow.mean(w) for w in wins])
    with pytest.raises(ConfigError, match="gives no scores"):
        reward(rows)


def test_probabilities_out_of_range_and_rules_for_scores_are_refused():
    chat, rows = Chat(tokenizer_of()), sampled_rows()
    pairs = pairs_within(rows.group)
    wrong = load_reward(lambda responses, others: [1.5] * len(others), chat)
    with pytest.raises(ModelError, match="one probability"):
        compare_responses(wrong, rows, *pairs)
    method = OnlineDPO(missing_eos_penalty=1.0)
    models = models_for(method)
    models.reward = load_reward(longer, chat)
    with pytest.raises(ConfigError, match="compares two responses"):
        method.prepare(models, rows)


# --- the best of n ----------------------------------------------------------------------------------------------------


def brute_force(p, scores, n):
    """Every n-tuple with its probability; the best shared equally among those that are the best, as often as they stand."""
    law = [0.0] * len(p)
    for draw in itertools.product(range(len(p)), repeat=n):
        best = max(scores[i] for i in draw)
        winners = [i for i in draw if scores[i] == best]
        for i in winners:
            law[i] += math.prod(p[j] for j in draw) / len(winners)
    return law


@pytest.mark.parametrize("scores", [[0.3, -1.0, 2.0, 0.7], [1.0, 1.0, 0.0, 1.0], [0.0] * 4])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_law_of_the_best_is_that_of_all_tuples(scores, n):
    p = [0.1, 0.45, 0.05, 0.4]
    wanted = brute_force(p, scores, n)
    law = exact.best_of_n_law(torch.tensor(p), torch.tensor(scores), n)
    assert law.tolist() == pytest.approx(wanted, abs=1e-6)
    kl = sum(q * math.log(q / x) for q, x in zip(wanted, p, strict=True) if q)
    assert float(exact.best_of_n_kl(torch.tensor(p), torch.tensor(scores), n)) == pytest.approx(kl, abs=1e-6)
    assert kl <= exact.best_of_n_kl_bound(n) + 1e-9


@pytest.mark.parametrize("n, keep", [(2, 1), (16, 1), (64, 1), (4, 2), (8, 3), (5, 5)])
def test_the_bound_is_reached_by_many_equally_likely_responses(n, keep):
    """Of V = 1000 equally likely ones without ties, row i (from the worst) is one of the k best of n, at random, with
    probability 1/V times the density of its quantile."""
    count = 1000
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tail = sum(math.comb(n - 1, j) * u ** (n - 1 - j) * (1 - u) ** j for j in range(keep))
    law = n / keep * tail / count
    assert float(law.sum()) == pytest.approx(1, abs=1e-3)
    kl = float((law * (law * count).clamp(min=1e-300).log()).sum())
    assert exact.best_of_n_kl_bound(n, keep) == pytest.approx(kl, abs=5e-3)
    if keep == 1:
        uniform, scores = torch.full((count,), 1 / count, dtype=torch.float64), torch.arange(float(count))
        found = float(exact.best_of_n_kl(uniform, scores, n))
        bound = exact.best_of_n_kl_bound(n)
        assert bound == math.log(n) - (n - 1) / n and bound - 0.05 < found <= bound
    if n == keep:
        assert kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "wrong", [lambda n: math.log(n), lambda n: math.log(n) - n / (n - 1), lambda n: math.log(n) - 1]
)
def test_a_bound_that_is_off_is_no_bound_or_is_not_reached(wrong):
    n, count = 4, 1000
    found = float(
        exact.best_of_n_kl(torch.full((count,), 1 / count, dtype=torch.float64), torch.arange(float(count)), n)
    )
    assert not wrong(n) - 0.05 < found <= wrong(n)


def test_kept_weights_are_what_a_random_choice_among_equals_would_keep_on_average():
    """All orders of five rows, three of them equal: sort by score, ties by the order; keep the first two."""
    scores = [2.0, 1.0, 1.0, 0.0, 1.0]
    kept, orders = [0.0] * 5, list(itertools.permutations(range(5)))
    for order in orders:
        for i in sorted(order, key=lambda i: -scores[i])[:2]:
            kept[i] += 1 / len(orders)
    group = torch.tensor([0] * 5 + [1] * 2)
    weights = exact.best_weights(torch.tensor([*scores, 7.0, 7.0]), group, 2)
    assert weights.tolist() == pytest.approx([*kept, 1.0, 1.0])


def test_keeping_all_is_refused():
    method = BestOfN(keep=3)
    with pytest.raises(DataError, match="nothing would be left out"):
        method.prepare(models_for(method), tokens())


# --- as settings, and as a whole run ----------------------------------------------------------------------------------


def config_of(name, **settings):
    given = {"model": "policy", "out": "run", "reward": "module:function", "data": {"train": "prompts.jsonl"}}
    return load_settings(name, settings=given | settings)


@pytest.mark.parametrize("name, wanted", [("online_dpo", 2), ("xpo", 1), ("nash_md", 4), ("best_of_n", 8)])
def test_samples_per_prompt_are_the_methods_unless_set(name, wanted):
    assert resolved(config_of(name), Facts(1000, 512)).samples_per_prompt == wanted
    if wanted > 1:
        with pytest.raises(ConfigError, match="samples_per_prompt"):
            require_all(config_of(name, samples_per_prompt=1))


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("online_dpo", {"labels": "firm"}, "labels = .firm., expected soft or hard"),
        ("online_dpo", {"pairs": "some"}, "pairs"),
        ("online_dpo", {"beta": 0.0}, "beta"),
        ("xpo", {"alpha": -1.0}, "alpha"),
        ("nash_md", {"mixture": 1.5}, "mixture"),
        ("best_of_n", {"keep": 0}, "keep"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        config_of(name, method=settings)


@pytest.mark.parametrize(
    "name, method, reward, lora",
    [
        ("online_dpo", {"pairs": "extremes"}, "few", False),
        ("online_dpo", {}, "fewer", False),
        ("xpo", {}, "few", True),
        ("nash_md", {}, "fewer", True),
        ("nash_md", {"mixture": 0.5}, "few", False),
        ("best_of_n", {}, "few", False),
        ("best_of_n", {"from_reference": True, "keep": 2}, "few", True),
    ],
)
def test_a_whole_run_from_its_settings(name, method, reward, lora, tmp_path, monkeypatch):
    """Sampled by the real sampler, with LoRA from the policy with its adapter off; scored or compared by a function."""
    import palate
    from palate.models.load import save_model

    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a} {b} "}) + "\n" for a in "abcd" for b in "efgh")
    )
    (tmp_path / "online_taste.py").write_text(
        "def few(prompts, responses):\n    return [sum(c in 'abcdefgh' for c in r) for r in responses]\n"
        "def fewer(prompts, responses, others):\n"
        "    return [0.9 if len(a) < len(b) else 0.1 if len(a) > len(b) else 0.5 for a, b in zip(responses, others)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = palate.train(
        name,
        model=tmp_path / "base",
        reward=f"online_taste:{reward}",
        data=tmp_path / "prompts.jsonl",
        out=tmp_path / "run",
        sampling={"max_new_tokens": 5},
        training={"batch_size": 4, "max_steps": 3, "learning_rate": 0.01, "eval_every": 2},
        method_settings=method,
        quiet=True,
        **({"lora": {"rank": 2}} if lora else {}),
    )
    assert (
        load_config(file=run / "config.yaml").method.settings
        == load_settings(
            name, settings={"model": "m", "out": "o", "data": {"train": "d"}, "method": method}
        ).method.settings
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["split"] == "train"]) == 3
    assert all(math.isfinite(line["score"]) for line in lines)
    if name != "best_of_n":
        assert abs(lines[1]["kl/reference"]) < 1e-6 and any(line["kl/reference"] != 0 for line in lines[2:])
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples and all(("score" in line) == (reward == "few" or "when" not in line) for line in samples)
    assert (run / "card.md").exists()


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [OnlineDPO(), XPO(), NashMD(mixture=0.4), BestOfN(from_reference=True)], ids=lambda m: type(m).__name__
)
def test_a_stopped_run_ends_as_if_nothing_had_happened(method, tmp_path):
    """All that is drawn is a function of seed and step, whoever draws."""
    chat = Chat(tokenizer_of())

    def new_run(folder):
        models = models_for(method)
        run = run_of(method, models, folder, max_steps=4, save_every=1, samples_every=1)
        run.items = prompts(chat)
        whose = getattr(method, "drawn_by", ("policy",))
        settings = SamplingSettings(max_new_tokens=5)
        run.rollout = Rollout(
            models.policy, chat, settings, 3, whose, models.reference, getattr(method, "mixture", 0.0)
        )
        return run

    list(train(whole := new_run(tmp_path / "whole")))
    resumed = stopped_and_resumed(new_run, tmp_path / "cut", 2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    for a, b in zip(whole.models.policy.parameters(), resumed.models.policy.parameters(), strict=True):
        assert torch.equal(a, b)
