"""Soups of policies: what is averaged, where that is exact, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from enumerable import COUNT, PREFIX, RESPONSES, VOCABULARY, Tabular, distribution, total_variation
from palate.cli import app
from palate.errors import ConfigError, ModelError, RunError
from palate.models.load import LoraSettings, load_policy, load_scalar, save_model
from palate.models.soup import SOUP_FILE, grid, make_soup, soup_name, weighted_mean
from tiny import LORA, WORDS, rows, tiny, tokenizer_of, trained

MIX = (0.25, 0.75)


def saved(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    save_model(model, tokenizer or tokenizer_of(), folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny(), tmp_path_factory.mktemp("soup") / "base")


def moved(base: Path, folder: Path, seed: int, size: float = 0.1) -> Path:
    """The base, trained a little."""
    model, generator = load_policy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * weight.std() * torch.randn(weight.shape, generator=generator)
    return saved(model, folder)


@pytest.fixture(scope="module")
def pair(base: Path) -> tuple[Path, Path]:
    return moved(base, base.parent / "a", 1), moved(base, base.parent / "b", 2)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


def logits(folder: Path) -> torch.Tensor:
    tokens = rows(7, 5)
    with torch.no_grad():
        found = load_policy(folder, trainable=False)(tokens.ids, attention_mask=tokens.attention_mask).logits
    return found[tokens.attention_mask]


# -- what it computes ------------------------------------------------------------------------------------------------


def test_every_weight_is_the_weighted_mean(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = make_soup(pair, MIX, tmp_path / "soup")
    a, b, soup = weights_of(pair[0]), weights_of(pair[1]), weights_of(tmp_path / "soup")
    assert soup.keys() == a.keys()
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, 0.25 * a[name] + 0.75 * b[name], rtol=1e-6, atol=1e-7)
    assert json.loads((tmp_path / "soup" / SOUP_FILE).read_text())["weights"] == list(MIX)
    assert made.cosine is not None and 0.9 < made.cosine < 1


def test_a_weight_of_one_gives_the_model_back_bit_by_bit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    make_soup(pair, (0, 1), tmp_path / "soup")
    b, soup = weights_of(pair[1]), weights_of(tmp_path / "soup")
    assert all(torch.equal(soup[name], b[name]) for name in b)


def test_what_has_weight_zero_takes_no_part_and_bfloat16_is_summed_in_float32() -> None:
    """bfloat16 has 8 bits: (1 + 256)/2 = 128.5 lies between 128 and 129 and goes to the even one."""
    huge, one = torch.full((2,), 3e38), torch.ones(2)
    assert weighted_mean([huge, one], (0.0, 1.0)).tolist() == [1.0, 1.0]
    parts = [torch.full((1,), float(2**k), dtype=torch.bfloat16) for k in (0, 8)]
    assert float(weighted_mean(parts, (0.5, 0.5))) == 128.0
    many = [torch.ones(1, dtype=torch.bfloat16)] * 1000
    assert float(weighted_mean(many, [0.001] * 1000)) == 1.0  # a sum in bfloat16 would stop growing at 1/4
    assert weighted_mean([torch.arange(3), torch.zeros(3)], MIX).tolist() == [0, 1, 2]


def test_a_soup_of_log_linear_one_step_policies_is_the_optimum_of_the_weighted_reward(
    base: Path, tmp_path: Path
) -> None:
    """With logits W h and h fixed, ref exp(r/beta)/Z is reached by adding r h' / (beta |h|^2) to W.

    So the soup of the optima of r_1 and r_2 must be ref exp((w_1 r_1 + w_2 r_2)/beta)/Z, of which the right side is
    computed here from ref and the rewards alone.
    """
    beta, generator = 0.5, torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 5, 6]])
    reference = load_policy(base, trainable=False)
    rewards = torch.randn(2, len(WORDS), generator=generator)
    with torch.no_grad():
        h = reference.base_model(ids).last_hidden_state[0, -1]
        p = reference(ids).logits[0, -1].double().softmax(-1)
        for i, reward in enumerate(rewards):
            model = load_policy(base)
            assert model.lm_head.weight is not model.get_input_embeddings().weight
            model.lm_head.weight += torch.outer(reward / beta, h) / (h @ h)
            saved(model, tmp_path / str(i))
    make_soup([tmp_path / "0", tmp_path / "1"], MIX, tmp_path / "soup")
    with torch.no_grad():
        q = load_policy(tmp_path / "soup", trainable=False)(ids).logits[0, -1].double().softmax(-1)
    optimum = p * ((torch.tensor(MIX) @ rewards).double() / beta).exp()
    optimum /= optimum.sum()
    assert float((q - optimum).abs().sum() / 2) < 1e-6
    assert float((q - p).abs().sum() / 2) > 0.05  # it is not where it started


def test_a_soup_of_sequence_policies_is_close_to_the_optimum_but_not_at_it() -> None:
    """Each state's logits of the optimum hold the logarithm of a sum over what may follow, which does not add up."""
    reference = Tabular(seed=1)
    p, generator = distribution(reference), torch.Generator().manual_seed(2)
    rewards = torch.randn(2, 2, COUNT, generator=generator, dtype=torch.float64)
    optima = [_normal(p * reward.exp()) for reward in rewards]
    tables = [_logits(q) for q in optima]
    soup = Tabular(seed=0)
    with torch.no_grad():
        soup.base_model.table.copy_(weighted_mean([t.float() for t in tables], (0.5, 0.5)))
    wanted = _normal(p * rewards.mean(0).exp())
    extreme = Tabular(seed=0)
    with torch.no_grad():
        extreme.base_model.table.copy_(tables[0])
    assert total_variation(distribution(extreme), optima[0]) < 1e-6  # the tables are right
    off = total_variation(distribution(soup), wanted)
    assert 1e-3 < off < min(total_variation(q, wanted) for q in optima)


def _normal(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _logits(q: torch.Tensor) -> torch.Tensor:
    """The table of the policy whose responses have probabilities ``q``: log of the mass that goes through each token."""
    table = torch.zeros(sum(VOCABULARY**n for n in range(1, PREFIX + 1)), VOCABULARY, dtype=torch.float64)
    for prompt in range(2):
        for length in range(3):
            for prefix in {r[:length] for r in RESPONSES if len(r) > length}:
                code, first = prompt + 1, VOCABULARY
                for token in prefix:
                    code, first = code * VOCABULARY + token, first * VOCABULARY
                state = sum(VOCABULARY**n for n in range(1, length + 1)) + code
                for token in range(VOCABULARY):
                    ahead = (*prefix, token)
                    mass = sum(float(q[prompt, i]) for i, r in enumerate(RESPONSES) if r[: length + 1] == ahead)
                    table[state, token] = torch.tensor(mass).log() if mass else -1e9
    return table


def test_shards_are_read_and_written_as_the_first_model_has_them(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = make_soup(pair, MIX, tmp_path / "whole").folder
    load_policy(pair[0]).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pair[0] / name, tmp_path / "sharded")
    made = make_soup([tmp_path / "sharded", pair[1]], MIX, tmp_path / "soup").folder
    assert len(list(made.glob("*.safetensors"))) == 2
    assert torch.equal(logits(made), logits(whole))


def test_three_models_are_averaged_too(pair: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    made = make_soup([*pair, base], (0.5, 0.25, 0.25), tmp_path / "soup").folder
    parts = [weights_of(folder) for folder in (*pair, base)]
    for name, tensor in weights_of(made).items():
        wanted = 0.5 * parts[0][name] + 0.25 * parts[1][name] + 0.25 * parts[2][name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)


def test_a_soup_of_adapters_is_the_mean_of_their_updates(base: Path, tmp_path: Path) -> None:
    """Against the soup of the merged models. Ranks, scales and factors differ; the mean of the factors would be another."""
    for name, settings, seed in (("a", LORA, 1), ("b", LoraSettings(rank=2, alpha=10.0), 2)):
        model = load_policy(base, lora=settings, seed=seed)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        saved(model, tmp_path / name)
        save_model(model, tokenizer_of(), tmp_path / f"{name}-whole", merge_adapter=True)
    soup = make_soup([tmp_path / "a", tmp_path / "b"], MIX, tmp_path / "soup")
    whole = make_soup([tmp_path / "a-whole", tmp_path / "b-whole"], MIX, tmp_path / "whole")
    assert soup.cosine is None and json.loads((soup.folder / "adapter_config.json").read_text())["r"] == 6
    torch.testing.assert_close(logits(soup.folder), logits(whole.folder), rtol=1e-4, atol=1e-5)
    alone = make_soup([tmp_path / "a", tmp_path / "b"], (1, 0), tmp_path / "alone").folder
    torch.testing.assert_close(logits(alone), logits(tmp_path / "a"), rtol=1e-5, atol=1e-6)
    assert (logits(soup.folder) - logits(tmp_path / "a")).abs().max() > 0.01


# -- families --------------------------------------------------------------------------------------------------------


def test_a_grid_has_every_weight_once_and_its_corners_are_the_models() -> None:
    """Of n models in m steps there are C(m + n - 1, n - 1)."""
    found = grid(3, 5)
    assert len(found) == len(set(found)) == 15
    assert all(sum(w) == pytest.approx(1) for w in found)
    assert {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.25, 0.25)} <= set(found)
    assert soup_name((1 / 3, 2 / 3)) == "0.3333-0.6667"
    for points, models in ((1, 2), (30, 5)):
        with pytest.raises(ConfigError, match="--grid"):
            grid(models, points)


def palate(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["soup", *(str(a) for a in arguments)])
    assert result.exit_code == code, f"{result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception}"
    return result


def test_the_command_writes_one_soup_or_a_family(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = json.loads(palate(*pair, "--out", tmp_path / "half", "--json").stdout)
    assert made[0]["weights"] == [0.5, 0.5]
    palate(*pair, "--weights", "0.25,0.75", "--out", tmp_path / "one")
    palate(*pair, "--grid", 3, "--out", tmp_path / "family")
    assert sorted(p.name for p in (tmp_path / "family").iterdir()) == ["0-1", "0.5-0.5", "1-0"]
    assert torch.equal(logits(tmp_path / "family" / "0.5-0.5"), logits(tmp_path / "half"))
    assert not torch.equal(logits(tmp_path / "one"), logits(tmp_path / "half"))
    assert "not overwritten" in palate(*pair, "--out", tmp_path / "half", code=1).stderr
    palate(*pair, "--out", tmp_path / "half", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "0.5,0.6"], "their sum is 1.1; 1 was expected. Did you mean 0.4545,0.5455?"),
        (["--weights", "1.5,-0.5"], "numbers of at least 0"),
        (["--weights", "1"], "1 weight(s) for 2 models"),
        (["--weights", "a,b"], "numbers with commas"),
        (["--weights", "0.5,0.5", "--grid", "3"], "give one of them"),
        (["--weights", "nan,1"], "numbers of at least 0"),
    ],
)
def test_wrong_weights_are_said(pair: tuple[Path, Path], tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in palate(*pair, *arguments, "--out", tmp_path / "soup", code=2).stderr
    assert not (tmp_path / "soup").exists()


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(models: Any, out: Path, *words: str) -> None:
    with pytest.raises(ModelError) as found:
        make_soup(models, (0.5, 0.5), out)
    assert all(word in str(found.value) for word in words), str(found.value)
    assert not out.exists() and not list(out.parent.glob(".*saving"))


def test_models_of_other_shapes_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    wide = saved(tiny(intermediate_size=32), tmp_path / "wide")
    gpt2 = saved(tiny("gpt2"), tmp_path / "gpt2")
    refused([pair[0], wide], tmp_path / "soup", "different architectures", "intermediate_size 24 and 32")
    refused([pair[0], gpt2], tmp_path / "soup", "different architectures")


def test_other_tokenizers_and_templates_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_policy(pair[1])
    swapped = tokenizer_of([*WORDS[:-2], WORDS[-1], WORDS[-2]])
    refused([pair[0], saved(model, tmp_path / "b", swapped)], tmp_path / "soup", "different tokenizers")
    told = tokenizer_of()
    told.chat_template = "{{ messages[0].content }}"
    refused([pair[0], saved(model, tmp_path / "c", told)], tmp_path / "soup", "different chat templates")


def test_models_of_different_starts_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Independent draws have a cosine near 0; no file says where a model comes from, its weights do."""
    stranger = saved(tiny(seed=5), tmp_path / "stranger")
    refused([pair[0], stranger], tmp_path / "soup", "same start", "cosine")


def test_broken_and_missing_weights_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name, change in (("nan", float("nan")), ("missing", None)):
        folder = tmp_path / name
        shutil.copytree(pair[1], folder)
        weights = load_file(folder / "model.safetensors")
        first = min(weights)
        if change is None:
            del weights[first]
        else:
            weights[first].view(-1)[0] = change
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused([pair[0], tmp_path / "nan"], tmp_path / "soup", "NaN or Inf")
    refused([pair[0], tmp_path / "missing"], tmp_path / "soup", "in one of them only")


def test_rewards_runs_and_mixtures_of_kinds_are_refused(base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    reward = tmp_path / "reward"
    save_model(load_scalar(base), tokenizer_of(), reward)
    refused([reward, reward], tmp_path / "soup", "reward or value model", "ensemble")
    refused([pair[0], reward], tmp_path / "soup", "reward or value model", "ensemble")
    saved(load_policy(base), tmp_path / "run" / "model")
    refused([pair[0], tmp_path / "run"], tmp_path / "soup", "Did you mean", "run/model")
    refused([pair[0], tmp_path / "nowhere"], tmp_path / "soup", "no such folder")
    adapter = saved(trained(load_policy(base, lora=LORA)), tmp_path / "adapter")
    refused([pair[0], adapter], tmp_path / "soup", "is an adapter")
    other = saved(trained(load_policy(pair[0], lora=LORA)), tmp_path / "other")
    refused([adapter, other], tmp_path / "soup", "adapters of one base")
    with pytest.raises(ConfigError, match="at least two"):
        make_soup([pair[0]], (1,), tmp_path / "soup")


def test_what_stands_at_the_place_is_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "soup").mkdir()
    (tmp_path / "soup" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="not overwritten"):
        make_soup(pair, MIX, tmp_path / "soup")
    assert (tmp_path / "soup" / "letter.txt").read_text() == "dear"
