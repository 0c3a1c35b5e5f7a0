"""The three reward-model losses against plain Python on the model's own scores; gradients by central differences."""

from dataclasses import replace

import pytest
import torch

import slow
from batches import batch_of, means_and_gradient, models_for, tokens
from palate.errors import ConfigError
from palate.methods.reward import RewardModel, centring_penalty, reward_accuracy
from palate.methods.reward_infonce import RewardInfoNCE
from palate.methods.reward_listwise import RewardListwise
from palate.types import Comparisons, Rankings


def own_scores(model, rows):
    """What the model itself says of each row alone, in [N]; differentiable."""
    found = [model(input_ids=rows.ids[i][rows.attention_mask[i]][None]).logits[0, 0] for i in range(len(rows))]
    return torch.stack(found).double()


def assert_equals_slow(method, batch, definition):
    """Loss and gradient of the method are those of ``definition(scores: list[float]) -> float``."""
    models = models_for(method)
    means, gradient = means_and_gradient(method, models, batch, max_tokens=40)
    scores = own_scores(models.reward, batch.tokens)
    values = scores.detach().tolist()
    assert means["loss"] == pytest.approx(definition(values), abs=2e-5)
    by_score = torch.tensor(slow.difference_gradient(definition, values), dtype=torch.float64)
    named = dict(models.reward.named_parameters())
    wanted = torch.autograd.grad(scores, list(named.values()), by_score, allow_unused=True)
    for name, g in zip(named, wanted, strict=True):
        assert g is None or torch.allclose(gradient[f"reward.{name}"], g, atol=2e-5), name
    return means, values


@pytest.mark.parametrize("use_margin", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("centring", [0.0, 0.3])
@pytest.mark.parametrize("without", [(), ("weight", "margin", "probability")])
def test_bradley_terry_with_all_its_terms(use_margin, smoothing, centring, without):
    batch = replace(batch_of("comparisons"), **dict.fromkeys(without))

    def fact(name, pair, missing):
        values = getattr(batch, name)
        return missing if values is None else values[pair].item()

    def definition(scores):
        total = count = 0.0
        for pair, (w, r) in enumerate(zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)):
            margin = fact("margin", pair, 0.0) if use_margin else 0.0
            loss = slow.bradley_terry(scores[w], scores[r], margin, fact("probability", pair, 1.0), smoothing)
            weight = fact("weight", pair, 1.0)
            total += weight * (loss + centring * (scores[w] + scores[r]) ** 2)
            count += weight
        return total / count

    method = RewardModel(label_smoothing=smoothing, centring=centring, use_margin=use_margin)
    means, scores = assert_equals_slow(method, batch, definition)
    weights = [fact("weight", pair, 1.0) for pair in range(6)]
    pairs = list(zip(batch.chosen.tolist(), batch.rejected.tolist(), weights, strict=True))
    right = sum(weight * (scores[w] > scores[r]) for w, r, weight in pairs) / sum(weights)
    assert means["reward/accuracy"] == pytest.approx(right, abs=1e-6)
    lead = sum(weight * (scores[w] - scores[r]) for w, r, weight in pairs) / sum(weights)
    assert means["reward/margin"] == pytest.approx(lead, abs=1e-5)
    assert means["reward/chosen"] - means["reward/rejected"] == pytest.approx(lead, abs=1e-5)


def test_every_prompt_counts_once_however_many_responses_it_has():
    """InstructGPT eq. 1: 1/C(K,2) over the pairs of a prompt, then the mean over prompts; K = 3 and K = 2 here."""
    rows = tokens().select(torch.tensor([0, 1, 2, 3, 4]))
    pairs = [(1, 2), (1, 0), (2, 0), (3, 4)]
    batch = Comparisons(
        rows,
        chosen=torch.tensor([w for w, _ in pairs]),
        rejected=torch.tensor([r for _, r in pairs]),
        weight=torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]),
    )

    def definition(scores):
        losses = [slow.bradley_terry(scores[w], scores[r]) for w, r in pairs]
        return (slow.mean(losses[:3]) + losses[3]) / 2

    assert_equals_slow(RewardModel(), batch, definition)


def test_equal_scores_are_half_right():
    assert reward_accuracy(torch.tensor([1.0, 0.0, -2.0])).tolist() == [1, 0.5, 0]
    assert centring_penalty(torch.tensor([1.0]), torch.tensor([-3.0])).tolist() == [4]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_pick_the_best_of_k(temperature):
    """Ties for best take turns; a prompt without a worse response says nothing; the other prompts count once."""
    batch = batch_of("rankings")

    def definition(scores):
        losses = []
        for group in range(4):
            rows = range(3 * group, 3 * group + 3)
            best = min(batch.rank[i].item() for i in rows)
            top = [i for i in rows if batch.rank[i] == best]
            below = [scores[i] / temperature for i in rows if batch.rank[i] > best]
            if below:
                losses.append(slow.mean([slow.infonce(scores[i] / temperature, below) for i in top]))
        return slow.mean(losses)

    assert_equals_slow(RewardInfoNCE(temperature=temperature), batch, definition)


def test_the_whole_ranking():
    batch = batch_of("rankings")

    def definition(scores):
        losses = []
        for group in range(4):
            ranks = batch.rank[3 * group : 3 * group + 3].tolist()
            if len(set(ranks)) > 1:
                losses.append(slow.plackett_luce(scores[3 * group : 3 * group + 3], ranks))
        return slow.mean(losses)

    means, scores = assert_equals_slow(RewardListwise(), batch, definition)
    shares = []
    for group in range(4):
        rows = range(3 * group, 3 * group + 3)
        pairs = [(i, j) for i in rows for j in rows if batch.rank[i] < batch.rank[j]]
        if pairs:
            shares.append(slow.mean([float(scores[i] > scores[j]) for i, j in pairs]))
    assert means["reward/accuracy"] == pytest.approx(slow.mean(shares), abs=1e-6)


def test_with_two_responses_all_three_are_bradley_terry():
    rows = tokens().select(torch.tensor([0, 1, 3, 4, 6, 7]))
    ranking = Rankings(rows, torch.tensor([1, 2, 2, 1, 1, 2]))
    pairs = Comparisons(rows, torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5]))
    wanted = means_and_gradient(RewardModel(), models_for(RewardModel()), pairs)
    for method in (RewardInfoNCE(), RewardListwise()):
        means, gradient = means_and_gradient(method, models_for(method), ranking)
        assert means["loss"] == pytest.approx(wanted[0]["loss"], abs=1e-6)
        assert means["reward/accuracy"] == pytest.approx(wanted[0]["reward/accuracy"])
        assert all(torch.allclose(gradient[name], g, atol=1e-6) for name, g in wanted[1].items())


def test_a_head_that_says_the_same_of_everything_is_half_right_on_pairs():
    rows = tokens().select(torch.tensor([0, 1, 3, 4]))
    for method, batch in (
        (RewardModel(), Comparisons(rows, torch.tensor([0, 2]), torch.tensor([1, 3]))),
        (RewardInfoNCE(), Rankings(rows, torch.tensor([1, 2, 1, 2]))),
        (RewardListwise(), Rankings(rows, torch.tensor([1, 2, 1, 2]))),
    ):
        models = models_for(method)
        torch.nn.init.zeros_(models.reward.score.weight)
        assert means_and_gradient(method, models, batch)[0]["reward/accuracy"] == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: RewardModel(label_smoothing=0.5),
        lambda: RewardModel(label_smoothing=-0.1),
        lambda: RewardModel(centring=-1),
        lambda: RewardInfoNCE(temperature=0),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ConfigError, match="expected"):
        make()
