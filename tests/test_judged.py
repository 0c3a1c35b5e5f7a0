"""Bugs that a reading of the formulas beside the code has found; each test is named after its bug."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from batches import batch_of, models_for, run_of, tokens
from palate.data.chat import Chat
from palate.data.encode import encode_records
from palate.data.kinds import Ranking
from palate.errors import ConfigError
from palate.evaluation.reward_model import evaluate_reward_model
from palate.evaluation.statistics import cluster_bootstrap, wilson, win_rate
from palate.functional.masked import masked_mean, masked_variance
from palate.methods.ppo import PPO, rollout_metrics
from palate.methods.reward import RewardModel
from palate.methods.sft import SFT
from palate.models.forward import response_scores
from palate.stage.outcome import better_and_worse
from palate.training.loop import train
from palate.training.optimizer import make_optimizer, trained_parameters
from palate.training.settings import TrainingSettings
from palate.types import Comparisons, Mean, Models
from tiny import tiny, tokenizer_of

# --- statistics -----------------------------------------------------------------------------------------------


def test_a_share_of_few_that_are_all_right_is_no_certainty():
    """5 of 5: a resample of ones is ones, but Wilson's interval begins at 1 / (1 + z^2/5) = 0.5655."""
    assert win_rate([1.0] * 5, [0.0] * 5) == pytest.approx((1.0, 1 / (1 + 1.959964**2 / 5), 1.0))
    assert win_rate([0.0] * 5, [1.0] * 5) == pytest.approx((0.0, 0.0, 1 - 1 / (1 + 1.959964**2 / 5)))
    report = evaluate_reward_model([1.0] * 5, [0.0] * 5, chosen_length=[3] * 5, rejected_length=[2] * 5)
    assert report.accuracy == report.length.longer_wins == report.length.accuracy_longer_chosen == wilson(5, 5)


def test_a_share_of_one_prompt_is_one_trial_however_many_its_responses():
    """Two of four right, on one prompt: as little is known as from one trial that is half a success."""
    assert win_rate([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], ["a"] * 4) == wilson(0.5, 1)


def test_an_interval_of_shares_covers_the_truth_at_small_n():
    """10 pairs, 95 % of them right: the percentile interval held the truth in 41 % of samples, for 10 of 10 is [1, 1]."""
    held = 0
    for seed in range(300):
        right = (np.random.default_rng(seed).random(10) < 0.95).astype(float)
        interval = cluster_bootstrap(right, resamples=300, share=True)
        held += interval.low <= 0.95 <= interval.high
    assert held / 300 > 0.9


def test_a_mean_that_is_no_share_keeps_its_interval():
    assert cluster_bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_cannot_be_divided_by_is_refused(weight):
    with pytest.raises(ValueError, match="1 of 2 weights"):
        cluster_bootstrap([1.0, 2.0], weights=[1.0, weight])


def test_lengths_of_one_side_only_are_refused_not_ignored():
    with pytest.raises(ValueError, match="one side only"):
        evaluate_reward_model([1.0, 2.0], [0.0, 0.0], chosen_length=[3, 4])


# --- sums and means -------------------------------------------------------------------------------------------


def test_a_bf16_mean_counts_beyond_256():
    """1000 is 1000 in bf16 only by luck; 1.5 * 1000 / 1000 came out as 1.5078, and a variance likewise."""
    values, everything = torch.full((1001,), 1.5, dtype=torch.bfloat16), torch.ones(1001, dtype=torch.bool)
    assert masked_mean(values, everything).item() == 1.5
    values[::2] = 0.5
    wanted = values.double()
    assert masked_mean(values, everything).item() == pytest.approx(wanted.mean().item(), rel=1e-6)
    assert masked_variance(values, everything).item() == pytest.approx(wanted.var(correction=0).item(), rel=1e-6)


def test_a_number_times_a_mean_is_the_mean_times_the_number():
    """``2 * mean`` repeated the tuple: (total, count, total, count)."""
    mean = Mean(torch.tensor(6.0), torch.tensor(3.0))
    assert (2 * mean) == (mean * 2) == (12.0, 3.0)
    assert (0.5 * mean).item() == 1.0


# --- PPO ------------------------------------------------------------------------------------------------------


def test_junk_in_masked_slots_never_reaches_the_kl_coefficient():
    """NaN outside the response made kl_coef NaN in ``adapt``, and kl/reference in the metrics."""
    method = PPO(adaptive_kl_target=6.0, adaptive_kl_horizon=50.0)
    batch = method.prepare(models_for(method), tokens())
    mask = batch.tokens.response_mask
    dirty = {name: torch.where(mask, getattr(batch, name), math.nan) for name in ("logprobs", "reference_logprobs")}
    assert method.adapt(replace(batch, **dirty)).kl_coef == method.adapt(batch).kl_coef != method.kl_coef
    clean = rollout_metrics(batch.tokens, batch.logprobs, batch.reference_logprobs, batch.scores)
    junk = rollout_metrics(batch.tokens, **dirty, scores=batch.scores)
    assert {name: mean.item() for name, mean in junk.items()} == {name: mean.item() for name, mean in clean.items()}


# --- reward models --------------------------------------------------------------------------------------------


def test_accuracy_of_a_soft_label_below_half_is_that_of_the_likelier_side():
    """The same facts written the other way round: (w, l, p) and (l, w, 1 - p); loss and accuracy are one."""
    batch = replace(batch_of("comparisons"), margin=None, probability=torch.tensor([0.9, 0.8, 0.7, 1.0, 0.6, 0.51]))
    turned = replace(batch, chosen=batch.rejected, rejected=batch.chosen, probability=1 - batch.probability)
    method = RewardModel()
    models = models_for(method)
    one, other = method.loss(models, batch), method.loss(models, turned)
    assert one["loss"].item() == pytest.approx(other["loss"].item(), rel=1e-6)
    assert one["reward/accuracy"].item() == pytest.approx(other["reward/accuracy"].item())
    scores = response_scores(models.reward, batch.tokens)
    assert one["reward/accuracy"].item() == pytest.approx(
        float(((scores[batch.chosen] > scores[batch.rejected]) * batch.weight).sum() / batch.weight.sum())
    )


def test_held_out_pairs_take_the_likelier_side_as_better():
    """0.2 for the first is 0.8 for the second; 1/2 says nothing."""
    batch = Comparisons(
        tokens(), torch.tensor([0, 3, 6]), torch.tensor([1, 4, 7]), probability=torch.tensor([0.9, 0.2, 0.5])
    )
    assert better_and_worse(batch) == [(0, 1), (4, 3)]
    assert better_and_worse(replace(batch, probability=None)) == [(0, 1), (3, 4), (6, 7)]


@pytest.mark.parametrize(
    ("ranking", "settings", "reason"),
    [
        (Ranking("a", ("c", "c"), (1, 2)), {}, "identical pair"),
        (Ranking("a", ("c d e f g h i", "c d e f g h j"), (1, 2)), {"max_length": 6}, "identical pair once cut"),
        (Ranking("a", ("c d e f g h i j k", "c", "d"), (1, 2, 2)), {"truncate": "drop"}, "all responses tied"),
    ],
    ids=["identical", "identical once cut", "only ties are left"],
)
def test_a_ranking_that_says_nothing_is_dropped(ranking, settings, reason):
    """Kept, it weighed as much as any other in the mean (log 2 for ever), or, alone in a batch, ended the run."""
    fine = Ranking("b", ("c", "d"), (1, 2))
    items, report = encode_records([ranking, fine], "rankings", Chat(tokenizer_of()), **{"max_length": 10, **settings})
    assert [item.record for item in items] == [fine]
    assert list(report.dropped) == [reason] and report.kept == 1


def test_a_ranking_with_two_equal_responses_and_a_third_is_kept():
    items, _ = encode_records(
        [Ranking("a", ("c", "c", "d"), (1, 2, 3))], "rankings", Chat(tokenizer_of()), max_length=10
    )
    assert items[0].ranks == (1, 2, 3)


# --- the loop -------------------------------------------------------------------------------------------------


def test_a_value_learning_rate_of_zero_is_refused_not_ignored():
    """0 is false, so it silently meant ``learning_rate``."""
    with pytest.raises(ConfigError, match="value_learning_rate: found 0"):
        TrainingSettings(value_learning_rate=0.0)


def test_weight_decay_leaves_position_embeddings_alone():
    """GPT-2's ``wpe`` is a matrix, and an embedding."""
    model = tiny("gpt2")
    parameters = trained_parameters(Models(policy=model), SFT())
    optimizer = make_optimizer(parameters, TrainingSettings(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    inner = model.transformer
    assert id(inner.wpe.weight) not in decayed and id(inner.wte.weight) not in decayed
    assert id(inner.h[0].mlp.c_fc.weight) in decayed


def test_a_run_killed_before_its_last_old_checkpoint_was_removed_removes_it(tmp_path):
    """Nothing is saved any more when a finished run is resumed, so nothing was removed either."""
    method = SFT()

    def again():
        list(train(run_of(method, models_for(method), tmp_path, save_every=1, keep_last=1)))
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    assert again() == ["step-3"]
    shutil.copytree(tmp_path / "checkpoints" / "step-3", tmp_path / "checkpoints" / "step-2")
    assert again() == ["step-3"]


def test_a_broken_newest_checkpoint_never_costs_the_one_that_was_read(tmp_path):
    """The rule above counts folders; a folder that could not be read is no reason to remove the one that could."""
    method = SFT()
    settings = {"save_every": 1, "keep_last": 2}
    list(train(run_of(method, models_for(method), tmp_path, **settings)))
    (tmp_path / "checkpoints" / "step-3" / "weights.safetensors").write_bytes(b"half")
    resumed = train(run_of(method, models_for(method), tmp_path, **settings | {"keep_last": 1}))
    next(resumed)
    resumed.close()
    assert (tmp_path / "checkpoints" / "step-2").is_dir()


def test_a_changed_number_in_the_newest_checkpoints_state_is_not_gone_on_from(tmp_path):
    """The other files had checksums; what the state itself said was believed, as long as it was JSON."""
    method, settings = SFT(), {"save_every": 1, "keep_last": 2}
    list(train(run_of(method, models_for(method), tmp_path, **settings)))
    newest = tmp_path / "checkpoints" / "step-3" / "state.json"
    newest.write_text(newest.read_text().replace('"step": 3', '"step": 1'))
    again = list(train(run_of(method, models_for(method), tmp_path, **settings)))
    assert [metrics["step"] for metrics in again if metrics["split"] == "train"] == [3]
