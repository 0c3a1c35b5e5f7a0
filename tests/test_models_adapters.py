"""LoRA in every role: adapter folders in and out, what the adapter's switch gives, what peft itself makes of them."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from palate.errors import ConfigError, ModelError
from palate.models.adapters import LoraSettings, adds_nothing
from palate.models.forward import response_scores, token_logprobs
from palate.models.heads import normalise
from palate.models.load import load_policy, load_scalar, load_tokenizer, save_model
from tiny import LORA, rows, tiny, tokenizer_of, trained


@pytest.fixture
def base(tmp_path):
    save_model(tiny("llama"), tokenizer_of(), tmp_path / "base")
    return tmp_path / "base"


def sft_adapter(base, folder):
    policy = trained(load_policy(base, lora=LORA))
    save_model(policy, load_tokenizer(base), folder)
    return policy


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen2"])
def test_a_policy_adapter_loads_in_plain_peft_with_the_same_logits(tmp_path, architecture):
    save_model(tiny(architecture), tokenizer_of(), tmp_path / "base")
    policy = trained(load_policy(tmp_path / "base", lora=LORA))
    save_model(policy, tokenizer_of(), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    ids = rows(7).ids
    ours = policy(ids).logits
    plain_base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(plain_base(ids).logits, ours, atol=1e-2)
    assert torch.equal(peft.PeftModel.from_pretrained(plain_base, tmp_path / "adapter")(ids).logits, ours)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits, ours)
    assert torch.equal(load_policy(tmp_path / "adapter")(ids).logits, ours)
    assert torch.equal(load_policy(tmp_path / "adapter", trainable=False)(ids).logits, ours)


def test_only_the_adapter_is_trained_and_it_starts_as_nothing(base):
    policy = load_policy(base, lora=LORA)
    ids = rows(6).ids
    assert torch.equal(policy(ids).logits, load_policy(base)(ids).logits) and adds_nothing(policy)
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert len(names) == 2 * 7 * 2  # A and B of seven linear layers in each of two blocks, not the head
    again = load_policy(base, lora=LORA)
    other = load_policy(base, lora=LORA, seed=1)
    a, b, c = (dict(m.named_parameters())[names[0]] for m in (policy, again, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_reward_adapter_carries_head_and_normalisation(base, tmp_path):
    reward = trained(load_scalar(base, lora=LORA, seed=2))
    assert sorted({n.split(".")[-3] for n, p in reward.named_parameters() if p.requires_grad and "lora" not in n}) == [
        "modules_to_save"
    ]
    batch = rows(8, 5, 6)
    normalise(reward, response_scores(reward, batch))
    save_model(reward, load_tokenizer(base), tmp_path / "reward")
    keys = load_file(tmp_path / "reward" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in keys
    expected = response_scores(reward, batch)
    assert expected.mean().abs() < 1e-5 and expected.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    loaded = load_scalar(tmp_path / "reward")
    assert torch.equal(response_scores(loaded, batch), expected)
    assert any("score" in name and p.requires_grad for name, p in loaded.named_parameters())
    frozen = load_scalar(tmp_path / "reward", trainable=False)
    assert torch.equal(response_scores(frozen, batch), expected)
    assert not any(p.requires_grad for p in frozen.parameters())
    # plain peft: raw scores, on the base's body with one label
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain.config.pad_token_id = None
    plain = peft.PeftModel.from_pretrained(plain, tmp_path / "reward")
    raw = plain(rows(8).ids).logits[0, 0]
    mean, std = reward.config.score_mean, reward.config.score_std
    assert torch.allclose((raw - mean) / std, response_scores(reward, rows(8))[0], atol=1e-5)


def test_a_reward_adapter_on_bf16_keeps_the_float32_head(base, tmp_path):
    reward = trained(load_scalar(base, lora=LORA, dtype="bfloat16", seed=2))
    dtypes = {p.dtype for p in reward.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}  # adapter and head; the base is bf16
    save_model(reward, load_tokenizer(base), tmp_path / "reward")
    loaded = load_scalar(tmp_path / "reward", dtype="bfloat16")
    batch = rows(8, 5)
    assert torch.equal(response_scores(loaded, batch), response_scores(reward, batch))


def test_a_reward_adapter_without_its_head_is_refused(base, tmp_path):
    from safetensors.torch import save_file

    save_model(load_scalar(base, lora=LORA), load_tokenizer(base), tmp_path / "reward")
    path = tmp_path / "reward" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "score" not in k}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="saved without its score head.*modules_to_save"):
        load_scalar(tmp_path / "reward")


def test_a_value_model_with_lora_on_a_reward_adapter_begins_at_the_reward(base, tmp_path):
    reward = trained(load_scalar(base, lora=LORA, seed=2))
    batch = rows(8, 5)
    normalise(reward, response_scores(reward, rows(7, 6, 5, seed=3)))
    save_model(reward, load_tokenizer(base), tmp_path / "reward")
    value = load_scalar(tmp_path / "reward", lora=LoraSettings(rank=2))
    assert torch.allclose(response_scores(value, batch), response_scores(reward, batch), atol=1e-4)
    # its base exists in memory only: the saved folder is a whole model
    trained(value)
    save_model(value, load_tokenizer(base), tmp_path / "value")
    assert (tmp_path / "value" / "model.safetensors").exists()
    again = load_scalar(tmp_path / "value")
    assert torch.allclose(response_scores(again, batch), response_scores(value, batch), atol=1e-4)
    assert (again.config.score_mean, again.config.score_std) == (reward.config.score_mean, reward.config.score_std)


def test_a_reward_model_can_begin_from_an_sft_adapter(base, tmp_path):
    policy = sft_adapter(base, tmp_path / "sft")
    reward = load_scalar(tmp_path / "sft", seed=4)
    assert not hasattr(reward, "peft_config") and reward.score.weight.dtype == torch.float32
    ids = rows(7).ids
    with torch.no_grad():
        ours = reward.base_model(ids).last_hidden_state
        sft = policy.get_base_model().base_model(ids).last_hidden_state
    assert torch.allclose(ours, sft, atol=1e-5)
    save_model(reward, load_tokenizer(base), tmp_path / "reward")
    assert torch.equal(response_scores(load_scalar(tmp_path / "reward"), rows(7)), response_scores(reward, rows(7)))


def test_a_new_adapter_on_an_sft_adapter_begins_at_the_sft_model(base, tmp_path):
    sft = sft_adapter(base, tmp_path / "sft")
    policy = load_policy(tmp_path / "sft", lora=LORA)
    batch = rows(8, 6)
    assert torch.allclose(token_logprobs(policy, batch), token_logprobs(sft, batch), atol=1e-4)
    assert adds_nothing(policy)
    with policy.disable_adapter():
        assert torch.equal(
            token_logprobs(policy, batch), token_logprobs(load_policy(tmp_path / "sft", lora=LORA), batch)
        )
    trained(policy)
    save_model(policy, load_tokenizer(base), tmp_path / "ppo")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")  # a whole model: the merged base is nowhere else
    assert torch.allclose(plain(batch.ids[:1]).logits, policy(batch.ids[:1]).logits, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merging_while_saving_gives_the_sum_and_leaves_the_model_alone(tmp_path, architecture):
    save_model(tiny(architecture, tie_word_embeddings=True), tokenizer_of(), tmp_path / "base")
    policy = trained(load_policy(tmp_path / "base", lora=LORA))
    ids = rows(7).ids
    before = policy(ids).logits
    save_model(policy, tokenizer_of(), tmp_path / "whole", merge_adapter=True)
    assert torch.equal(policy(ids).logits, before)
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(ids).logits, before, atol=1e-4)
    reward = trained(load_scalar(tmp_path / "base", lora=LORA))
    save_model(reward, tokenizer_of(), tmp_path / "reward", merge_adapter=True)
    assert torch.allclose(
        response_scores(load_scalar(tmp_path / "reward"), rows(7)), response_scores(reward, rows(7)), atol=1e-4
    )


def test_an_adapter_of_another_model_or_without_its_base_is_refused(base, tmp_path):
    sft_adapter(base, tmp_path / "sft")
    shutil.copytree(tmp_path / "sft", tmp_path / "moved")
    config = tmp_path / "moved" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match="the base of this adapter, .*gone, is not there"):
        load_policy(tmp_path / "moved")
    save_model(tiny("llama", hidden_size=32), tokenizer_of(), tmp_path / "wide")
    config.write_text(json.dumps(content | {"base_model_name_or_path": str(tmp_path / "wide")}))
    with pytest.raises(ModelError, match="does not fit its base"):
        load_policy(tmp_path / "moved")
    save_model(tiny("llama", num_hidden_layers=3), tokenizer_of(), tmp_path / "deep")
    config.write_text(
        json.dumps(content | {"base_model_name_or_path": str(tmp_path / "deep"), "target_modules": ["q_proj"]})
    )
    with pytest.raises(ModelError, match="does not fit its base"):
        load_policy(tmp_path / "moved")


def test_an_adapter_folder_without_tokenizer_has_its_bases(base, tmp_path):
    sft_adapter(base, tmp_path / "sft")
    for path in (tmp_path / "sft").glob("tokenizer*"):
        path.unlink()
    assert load_tokenizer(tmp_path / "sft").get_vocab() == load_tokenizer(base).get_vocab()


def test_lora_settings_are_checked(base):
    with pytest.raises(ConfigError, match='names no layer of LlamaForCausalLM. Found: .*q_proj.*"all-linear"'):
        load_policy(base, lora=LoraSettings(target_modules=("c_attn",)))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"init": "pissa"}):
        with pytest.raises(ConfigError, match=f"lora.{next(iter(wrong))}"):
            LoraSettings(**wrong)
    asked = load_policy(base, lora=LoraSettings(dropout=0.5))
    assert 0.5 in {m.p for m in asked.modules() if isinstance(m, torch.nn.Dropout)} and asked.training


def test_the_adapter_of_a_policy_given_as_reward_is_refused_by_its_own_name(base, tmp_path):
    sft_adapter(base, tmp_path / "sft")
    with pytest.raises(ModelError, match=r"sft: this is a language model, not a reward.*--model \S*sft --data"):
        load_scalar(tmp_path / "sft", new_head=False)
