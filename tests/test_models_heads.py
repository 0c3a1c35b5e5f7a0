"""The scalar head and its normalisation."""

import pytest
import torch

from palate.errors import ModelError
from palate.models.forward import response_scores
from palate.models.heads import normalise, scalar_head
from palate.models.load import load_scalar, save_model
from tiny import rows, tiny, tokenizer_of


@pytest.fixture
def reward(tmp_path):
    save_model(tiny("llama"), tokenizer_of(), tmp_path / "base")
    return load_scalar(tmp_path / "base", seed=1)


def test_normalised_scores_have_mean_0_and_sd_1_also_after_save_and_load(reward, tmp_path):
    batch = rows(9, 8, 7, 6, 5)
    raw = response_scores(reward, batch)
    normalise(reward, raw)
    save_model(reward, tokenizer_of(), tmp_path / "reward")
    for model in (reward, load_scalar(tmp_path / "reward")):
        scores = response_scores(model, batch)
        assert scores.mean().item() == pytest.approx(0, abs=1e-5)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)
        assert torch.equal(scores.argsort(), raw.argsort())


def test_normalising_twice_is_normalising_by_the_second_set(reward):
    first, second = rows(9, 8, 7, seed=1), rows(9, 8, 7, 6, seed=2)
    raw = response_scores(reward, second)
    normalise(reward, response_scores(reward, first))
    normalise(reward, response_scores(reward, second))
    expected = (raw - raw.mean()) / raw.std(correction=0)
    assert torch.allclose(response_scores(reward, second), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.5, 0.5, 0.5], "all 3 scores are 0.5"),
        ([7.0000001, 7.0, 7.0], "all 3 scores are 7"),
        ([0.0, 0.0], "all 2 scores are 0"),
        ([1.0], "1 score"),
        ([1.0, float("nan"), 2.0], "1 of 3 scores are NaN or Inf"),
    ],
)
def test_scores_that_cannot_normalise_are_refused_and_change_nothing(reward, scores, message):
    with pytest.raises(ModelError, match=message):
        normalise(reward, torch.tensor(scores))
    assert not hasattr(reward.config, "score_mean")


def test_a_nonsense_normalisation_in_a_folder_is_refused(reward, tmp_path):
    reward.config.score_std = 0.0
    save_model(reward, tokenizer_of(), tmp_path / "reward")
    with pytest.raises(ModelError, match=r"score_std=0.0"):
        load_scalar(tmp_path / "reward")


def test_a_language_model_has_no_scalar_head():
    with pytest.raises(ModelError, match="LlamaForCausalLM has no scalar head"):
        scalar_head(tiny("llama"))
