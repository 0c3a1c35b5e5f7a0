"""DDPO against plain Python, one token at a time; what it is when gamma is 1; what masked slots may hold."""

import math
from dataclasses import replace

import pytest
import torch

import slow
from batches import batch_for, batch_of, means_and_gradient, models_for, run_of
from palate.errors import ConfigError, DataError
from palate.methods.ddpo import DDPO, segment_logprobs
from palate.methods.dpo import DPO, dpo_loss
from palate.methods.ln_dpo import LNDPO
from palate.training.loop import train

T, F = True, False
# (response mask, changed) of rows of five tokens: mixed, nothing changed, all changed, one token of each sort.
ROWS = [
    ((F, T, T, T, T), (T, F, T, T, F)),
    ((F, F, T, T, T), (F, F, F, F, F)),
    ((F, T, T, T, F), (T, T, T, T, T)),
    ((F, F, F, T, F), (F, F, F, F, F)),
    ((F, F, F, F, T), (F, F, F, F, T)),
]


def slow_segment(logprobs, mask, changed, gamma, normalise):
    """Eq. 3 of one row, in floats."""
    unchanged_sum = changed_sum = 0.0
    unchanged = several = 0
    for p, counts, marked in zip(logprobs, mask, changed, strict=True):
        if counts and marked:
            changed_sum, several = changed_sum + p, several + 1
        elif counts:
            unchanged_sum, unchanged = unchanged_sum + p, unchanged + 1
    return (unchanged_sum + gamma * changed_sum) / ((unchanged + gamma * several) if normalise else 1)


def slow_ddpo(policy, reference, pair, beta, gamma, normalise):
    """The loss of one pair of rows, from the log-probs of their tokens."""
    w, r = (
        slow_segment(policy[i], *ROWS[i], gamma, normalise) - slow_segment(reference[i], *ROWS[i], gamma, normalise)
        for i in pair
    )
    return slow.dpo(w, r, beta)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("gamma", [5.0, 1.0, 0.25])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_loss_of_a_pair_is_its_definition_also_a_thousand_nats_apart(normalise, gamma, scale):
    """In float64, with gradients by central differences; junk stands wherever a token does not count."""
    generator = torch.Generator().manual_seed(0)
    mask, changed = (torch.tensor(side) for side in zip(*ROWS, strict=True))
    policy, reference = (-scale * torch.rand(5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    junk = torch.where(torch.rand(5, 5, generator=generator) < 0.5, torch.nan, -torch.inf).double()
    for pair in [(0, 1), (1, 2), (2, 0), (3, 4), (4, 2)]:
        logprobs = torch.where(mask, policy, junk).requires_grad_()
        q = segment_logprobs(torch.where(mask, reference, junk), mask, changed, gamma, normalise)
        ratio = segment_logprobs(logprobs, mask, changed, gamma, normalise) - q
        assert ratio.dtype == torch.float64
        loss = dpo_loss(ratio[pair[0]], ratio[pair[1]], 0.5)

        def definition(values, pair=pair):
            return slow_ddpo(
                [values[5 * i : 5 * i + 5] for i in range(5)], reference.tolist(), pair, 0.5, gamma, normalise
            )

        assert loss.item() == pytest.approx(definition(policy.flatten().tolist()), rel=1e-9, abs=1e-9)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        slopes = slow.difference_gradient(definition, policy.flatten().tolist(), step=1e-4)
        assert gradient.flatten().tolist() == pytest.approx(slopes, rel=2e-5, abs=2e-6)
        assert not gradient[~mask].any()


def test_a_response_without_a_token_has_no_log_probability():
    found = segment_logprobs(torch.full((1, 3), torch.nan), torch.zeros(1, 3).bool(), torch.ones(1, 3).bool(), 5.0)
    assert found.tolist() == [0.0]


def test_one_weight_for_everything_cancels_in_the_mean_but_not_in_the_sum():
    """All changed or all unchanged: the mean is the same, the sum gamma times as much."""
    p, mask = torch.tensor([[-1.0, -2.0, -3.0]]), torch.ones(1, 3).bool()
    for normalise, times in ((True, 1.0), (False, 5.0)):
        plain, dense = (segment_logprobs(p, mask, c, 5.0, normalise).item() for c in (~mask, mask))
        assert dense == times * plain


def same(found, wanted):
    for name in wanted[0]:
        assert found[0][name] == pytest.approx(wanted[0][name], abs=1e-5, rel=1e-5), name
    for name, gradient in wanted[1].items():
        assert torch.allclose(found[1][name], gradient, atol=1e-5), name


@pytest.mark.parametrize("anchor", [0.0, 0.3])
def test_with_gamma_1_the_weighted_sum_is_dpo(anchor):
    batch = batch_for(DDPO())
    dpo = means_and_gradient(DPO(beta=0.3, anchor=anchor), models_for(DPO()), batch)
    same(means_and_gradient(DDPO(0.3, 1.0, normalise=False, anchor=anchor), models_for(DDPO()), batch), dpo)
    other, _ = means_and_gradient(DDPO(0.3, 2.0, normalise=False, anchor=anchor), models_for(DDPO()), batch)
    assert abs(other["loss"] - dpo[0]["loss"]) > 1e-3


def test_with_gamma_1_the_weighted_mean_is_dpo_on_means():
    batch = batch_for(DDPO())
    wanted = means_and_gradient(LNDPO(beta=4.0), models_for(LNDPO()), batch)
    same(means_and_gradient(DDPO(beta=4.0, gamma=1.0), models_for(DDPO()), batch), wanted)


@pytest.mark.parametrize("method", [DDPO(), DDPO(normalise=False), DDPO(anchor=0.7)], ids=repr)
def test_ddpo_is_the_mean_over_pairs_of_its_definition(method):
    """From the models' own log-probabilities, row by row without padding."""
    models, batch = models_for(method), batch_for(method)
    rows, changed = batch.tokens, batch.tokens.extras["changed"]

    def facts(model):
        """(weighted, plain sum) of each row, with eq. 3 of that row's own tokens."""
        found = []
        for i in range(len(rows)):
            real = rows.attention_mask[i]
            ids, mask, marks = rows.ids[i][real], rows.response_mask[i][real].tolist(), changed[i][real].tolist()
            with torch.no_grad():
                logp = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            each = [0.0, *(logp[t - 1, ids[t]].item() for t in range(1, len(ids)))]
            plain = sum(p for p, m in zip(each, mask, strict=True) if m)
            found.append((slow_segment(each, mask, marks, method.gamma, method.normalise), plain))
        return found

    policy, reference = facts(models.policy), facts(models.reference)
    lengths = rows.response_mask.sum(-1).tolist()
    total = 0.0
    for w, r, weight in zip(batch.chosen.tolist(), batch.rejected.tolist(), batch.weight.tolist(), strict=True):
        ratios = [policy[i][0] - reference[i][0] for i in (w, r)]
        total += weight * (slow.dpo(*ratios, method.beta) - method.anchor * policy[w][1] / lengths[w])
    found, _ = means_and_gradient(method, models, batch, max_tokens=40)
    assert found["loss"] == pytest.approx(total / batch.weight.sum().item(), rel=3e-5)
    chosen = sum(policy[w][1] * k for w, k in zip(batch.chosen.tolist(), batch.weight.tolist(), strict=True))
    assert found["logprob/chosen"] == pytest.approx(chosen / batch.weight.sum().item(), rel=1e-4)  # unweighted


@pytest.mark.parametrize("method", [DDPO(), DDPO(normalise=False, anchor=0.2)], ids=repr)
def test_the_first_loss_is_a_coins(method, tmp_path):
    models = models_for(method)
    models.reference.load_state_dict(models.policy.state_dict())
    run = run_of(method, models, tmp_path)
    run.starts_at_reference = True
    assert next(iter(train(run)))["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_reference_is_weighted_even_where_a_plain_sum_is_known():
    """A batch may bring the reference's plain sums along; eq. 3 needs other numbers."""
    models, batch = models_for(DDPO()), batch_for(DDPO())
    with torch.no_grad():
        fresh = DDPO().prepare(models, batch).reference_logprobs
        known = DDPO().prepare(models, replace(batch, reference_logprobs=torch.full((12,), -7.0))).reference_logprobs
    assert torch.equal(fresh, known)


def test_a_batch_that_does_not_say_what_was_changed_is_an_error():
    batch = replace(batch_of("comparisons"), margin=None, probability=None)
    with pytest.raises(DataError, match=r'extras\["changed"\].*collate\(items, "corrections"\)'):
        DDPO().prepare(models_for(DDPO()), batch)


@pytest.mark.parametrize(
    "wrong", [{"beta": 0.0}, {"gamma": 0.0}, {"gamma": math.inf}, {"anchor": -0.1}, {"anchor": math.nan}], ids=repr
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=f"ddpo: .*{next(iter(wrong))}"):
        DDPO(**wrong)
