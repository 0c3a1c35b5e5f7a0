"""Loading policies and scalar models: right numbers, right dtypes, and words for what is wrong with a folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from palate.errors import ConfigError, ModelError
from palate.models.forward import response_logprobs, response_scores, token_values
from palate.models.load import (
    check_tokenizer,
    load_policy,
    load_scalar,
    load_tokenizer,
    new_policy,
    same_vocabulary,
    save_model,
)
from tiny import SMALL, WORDS, rows, tiny, tokenizer_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved policy of every architecture, made once."""
    root = tmp_path_factory.mktemp("models")
    for name in SMALL:
        save_model(tiny(name), tokenizer_of(), root / name)
    return root


def reward_folder(path, architecture="llama", std=1.0, seed=1, folder=None):
    """A reward model made from a language model, with scores of a given spread, saved."""
    model = load_scalar(folder, seed=seed)
    model.config.score_mean, model.config.score_std = 0.25, std
    save_model(model, load_tokenizer(folder), path)
    return model


@pytest.mark.parametrize("architecture", SMALL)
def test_a_policy_gives_the_logits_of_plain_transformers(folders, architecture):
    policy, plain = load_policy(folders / architecture), AutoModelForCausalLM.from_pretrained(folders / architecture)
    batch = rows(7)
    assert torch.equal(policy(batch.ids).logits, plain(batch.ids).logits)
    expected = plain(batch.ids).logits.log_softmax(-1)[0, 1:-1].gather(-1, batch.ids[0, 2:, None]).sum()
    assert torch.allclose(response_logprobs(policy, batch)[0], expected, atol=1e-4)


@pytest.mark.parametrize("architecture", SMALL)
def test_a_saved_reward_folder_scores_the_same_in_plain_transformers(folders, tmp_path, architecture):
    model = reward_folder(tmp_path / "reward", std=2.0, folder=folders / architecture)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert plain.config.num_labels == 1 and plain.config.pad_token_id == 3
    batch = rows(9, 5, 7)
    padded = batch.ids.masked_fill(~batch.attention_mask, plain.config.pad_token_id)
    padded[1, 4] = 2  # this row ends with the end of text
    batch.ids[1, 4] = 2
    with torch.no_grad():
        raw = plain(input_ids=padded, attention_mask=batch.attention_mask.long()).logits[:, 0]
    assert raw.std() > 1e-3
    for reward in (model, load_scalar(tmp_path / "reward", trainable=False)):
        assert torch.allclose(response_scores(reward, batch), (raw - 0.25) / 2.0, atol=1e-5)


def test_a_value_model_from_the_reward_folder_says_the_reward_at_the_last_token(folders, tmp_path):
    reward_folder(tmp_path / "reward", std=3.0, folder=folders / "llama")
    reward, value = load_scalar(tmp_path / "reward", trainable=False), load_scalar(tmp_path / "reward")
    batch = rows(8)
    # The value of column t is read before token t: one more token makes the row's last one a state to be valued.
    longer = rows(9)
    longer.ids[:, :8] = batch.ids
    assert torch.allclose(token_values(value, longer)[0, -1], response_scores(reward, batch)[0], atol=1e-6)
    assert all(p.requires_grad for p in value.parameters()) and not any(p.requires_grad for p in reward.parameters())


def test_a_new_head_has_the_papers_spread_and_follows_its_seed(tmp_path):
    tokenizer = tokenizer_of()
    save_model(tiny("llama", hidden_size=512, num_hidden_layers=1), tokenizer, tmp_path / "wide")
    first, again, other = (load_scalar(tmp_path / "wide", seed=seed).score for seed in (3, 3, 4))
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    assert first.bias is None
    # 512 draws of N(0, 1/513): the sample's spread is within 15 % of it, almost surely
    assert first.weight.std().item() == pytest.approx(513**-0.5, rel=0.15)


def test_the_head_of_a_bf16_reward_has_the_files_own_digits(folders, tmp_path):
    saved = reward_folder(tmp_path / "reward", folder=folders / "llama")
    head = saved.score.weight
    assert not torch.equal(head, head.bfloat16().float())
    model = load_scalar(tmp_path / "reward", dtype="bfloat16")
    assert model.score.weight.dtype == torch.float32 and torch.equal(model.score.weight, head)
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    save_model(model, load_tokenizer(tmp_path / "reward"), tmp_path / "again")  # and once more through a bf16 folder
    assert torch.equal(load_scalar(tmp_path / "again", dtype="bfloat16").score.weight, head)
    assert torch.allclose(response_scores(model, rows(6)), response_scores(saved, rows(6)), atol=0.1)


def test_mixed_multiplies_in_bf16_and_learns_in_float32(folders):
    model, exact = (load_policy(folders / "llama", dtype=dtype) for dtype in ("mixed", "float32"))
    for weight, digits in zip(model.parameters(), exact.parameters(), strict=True):
        assert weight.dtype == torch.bfloat16 and torch.equal(weight.master, digits)


@pytest.mark.parametrize("load", [load_policy, load_scalar])
def test_all_dropouts_are_off_unless_asked_for(tmp_path, load):
    model = tiny("gpt2")
    save_model(model, tokenizer_of(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3})
    )
    loaded = load(tmp_path / "m")
    assert {m.p for m in loaded.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert loaded.config.resid_pdrop == loaded.config.attn_pdrop == loaded.config.embd_pdrop == 0.0
    loaded.train()
    assert torch.equal(loaded(rows(6).ids).logits, loaded(rows(6).ids).logits)
    kept = load(tmp_path / "m", keep_dropout=True)
    assert kept.training and 0.3 in {m.p for m in kept.modules() if isinstance(m, torch.nn.Dropout)}


def test_nan_weights_are_named(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    for load in (load_policy, load_scalar):
        with pytest.raises(
            ModelError, match=r"NaN or Inf, first model.layers.1.mlp.up_proj.weight \(1 of 384 numbers\)"
        ):
            load(tmp_path / "m")


def test_missing_weights_are_named(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"], weights["lm_head.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="no weights for 2 parts of the model .*lm_head.weight, model.layers.0"):
        load_policy(tmp_path / "m")
    with pytest.raises(ModelError, match="no weights for 1 parts of the model .*model.layers.0"):
        load_scalar(tmp_path / "m")


def test_a_folder_without_tokenizer_is_refused(folders, tmp_path):
    AutoModelForCausalLM.from_pretrained(folders / "llama").save_pretrained(tmp_path / "m")
    for load in (load_tokenizer, load_policy, load_scalar):
        with pytest.raises(ModelError, match="no tokenizer in this folder.*Found: config.json, .*model.safetensors"):
            load(tmp_path / "m")
    assert load_policy(tmp_path / "m", tokenizer=tokenizer_of()) is not None


def test_what_is_not_a_model_folder_says_what_it_is(folders, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="no config.json. Found: notes.txt"):
        load_policy(tmp_path)
    shutil.copytree(folders / "llama", tmp_path / "model")
    with pytest.raises(ModelError, match="Did you mean .*/model"):
        load_policy(tmp_path)
    with pytest.raises(ModelError, match="this is a file"):
        load_policy(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match="no such folder"):
        load_policy(tmp_path / "nowhere")
    (tmp_path / "model" / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match="its config cannot be read"):
        load_policy(tmp_path / "model")


def test_a_hub_name_that_cannot_be_reached_is_a_model_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing.*check the name and the network"):
        load_policy("nobody/nothing")


def test_pickled_weights_are_not_read(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled .*save them as safetensors"):
        load_policy(tmp_path / "m")


def test_a_broken_weight_file_is_a_model_error(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "m")
    content = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_policy(tmp_path / "m")


def test_a_reward_folder_is_no_policy_and_several_labels_are_no_scalar(folders, tmp_path):
    reward_folder(tmp_path / "reward", folder=folders / "llama")
    with pytest.raises(ModelError, match="LlamaForSequenceClassification .*not a language model"):
        load_policy(tmp_path / "reward")
    two = AutoModelForSequenceClassification.from_pretrained(
        folders / "llama", id2label={0: "NEGATIVE", 1: "POSITIVE"}, num_labels=2
    )
    save_model(two, tokenizer_of(), tmp_path / "two")
    with pytest.raises(ModelError, match=r'2 labels \(NEGATIVE, POSITIVE\).*"label": "POSITIVE"'):
        load_scalar(tmp_path / "two")


def test_a_reward_folder_without_its_head_is_refused(folders, tmp_path):
    reward_folder(tmp_path / "reward", folder=folders / "llama")
    weights = load_file(tmp_path / "reward" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "reward" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="without its head's weights .score.weight."):
        load_scalar(tmp_path / "reward")


def test_encoders_are_refused_as_policy_and_as_scalar(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertLMHeadModel

    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=1
    )
    torch.manual_seed(0)
    save_model(BertLMHeadModel(config), tokenizer_of(), tmp_path / "lm")
    save_model(BertForSequenceClassification(config), tokenizer_of(), tmp_path / "cls")
    with pytest.raises(ModelError, match="see later tokens"):
        load_policy(tmp_path / "lm")
    with pytest.raises(ModelError, match="does not read its score off the last token"):
        load_scalar(tmp_path / "cls")


@pytest.mark.parametrize(
    "special", [{"pad_token": None}, {"pad_token": "</s>"}, {"pad_token": None, "unk_token": None}]
)
def test_no_pad_token_and_pad_equal_to_eos_change_no_number(tmp_path, special):
    tokenizer = tokenizer_of(**special)
    save_model(tiny("llama"), tokenizer_of(), tmp_path / "usual")
    save_model(tiny("llama", tokenizer), tokenizer, tmp_path / "special")
    batch = rows(9, 5)
    batch.ids[0, 8] = batch.ids[1, 4] = 2
    usual, other = load_policy(tmp_path / "usual"), load_policy(tmp_path / "special")
    assert torch.equal(response_logprobs(usual, batch), response_logprobs(other, batch))
    assert other.get_input_embeddings().padding_idx is None  # the end of text learns
    assert other.get_input_embeddings().weight[2].abs().sum() > 0
    reward = load_scalar(tmp_path / "special", seed=1)
    assert torch.equal(response_scores(load_scalar(tmp_path / "usual", seed=1), batch), response_scores(reward, batch))
    save_model(reward, tokenizer, tmp_path / "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert plain.config.pad_token_id == (0 if "unk_token" not in special else 1)  # to spare, and not the end of text


def test_the_end_of_text_is_scored_by_plain_transformers_or_batches_are_refused(tmp_path):
    """GPT-2's kind of tokenizer: one token for everything. A pad id would hide the end of text from transformers."""
    words = ["<|endoftext|>", *WORDS[4:]]
    one = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|endoftext|>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **one)
    save_model(tiny("gpt2", tokenizer), tokenizer, tmp_path / "policy")
    save_model(load_scalar(tmp_path / "policy"), tokenizer, tmp_path / "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    batch = rows(6, vocab=len(words))
    batch.ids[0, 5] = 0
    with torch.no_grad():
        assert torch.allclose(plain(batch.ids).logits[0], response_scores(load_scalar(tmp_path / "reward"), batch))
    with pytest.raises(ValueError, match="no padding token"):
        plain(batch.ids.repeat(2, 1))


def test_tied_embeddings_load_save_and_stay_tied(tmp_path):
    save_model(tiny("llama", tie_word_embeddings=True), tokenizer_of(), tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    model = load_policy(tmp_path / "m")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    batch = rows(6)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    save_model(model, tokenizer_of(), tmp_path / "again")
    assert torch.equal(load_policy(tmp_path / "again")(batch.ids).logits, model(batch.ids).logits)
    assert response_scores(load_scalar(tmp_path / "m"), batch).isfinite().all()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_with_the_tokens(folders, tmp_path):
    shutil.copytree(folders / "llama", tmp_path / "m")
    wide = tokenizer_of([*WORDS, "q", "r"])
    wide.save_pretrained(tmp_path / "m")
    for load in (load_policy, load_scalar):
        with pytest.raises(
            ModelError, match="2 token.s. that the model's embedding of 20 rows has no place for: 'q' = 20"
        ):
            load(tmp_path / "m")
    check_tokenizer(tiny("llama", vocab_size=32), wide)  # a larger embedding is fine
    with pytest.raises(ModelError, match="no place for"):
        tiny("llama", wide, vocab_size=20)


def test_vocabularies_are_compared_by_ids():
    assert same_vocabulary(tokenizer_of(), tokenizer_of(pad_token=None))
    assert not same_vocabulary(tokenizer_of(), tokenizer_of([*WORDS[:-2], "p", "o"]))


def test_a_new_policy_follows_its_seed_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again, other = tiny(seed=5), tiny(seed=5), tiny(seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.config.vocab_size == len(WORDS) and first.config.eos_token_id == 2


def test_a_misspelt_config_says_what_was_meant():
    with pytest.raises(ConfigError, match='unknown field "hiden_size".*Did you mean "hidden_size"'):
        new_policy({"architecture": "llama", "hiden_size": 16}, tokenizer_of(), 0)
    with pytest.raises(ConfigError, match='unknown architecture "lama".*Did you mean "llama"'):
        new_policy({"architecture": "lama"}, tokenizer_of(), 0)
    with pytest.raises(ConfigError, match="no llama can be built"):
        new_policy({"architecture": "llama", "hidden_size": 16, "num_attention_heads": 3}, tokenizer_of(), 0)


def test_an_unknown_dtype_or_device_is_a_config_error(folders):
    with pytest.raises(ConfigError, match='dtype "float16" is not known.*Choose from: float32, bfloat16, mixed'):
        load_policy(folders / "llama", dtype="float16")
    with pytest.raises(ConfigError, match='device "gpu" is not known'):
        load_policy(folders / "llama", device="gpu")


def test_loaded_weights_give_the_last_digit_of_the_weights_that_were_saved(folders, tmp_path):
    """Mapped from a file they begin at any address, and kernels round differently at unaligned ones."""
    policy = load_policy(folders / "llama")
    assert {p.data_ptr() % 64 for p in policy.parameters()} == {0}
    batch, scalar = rows(9, 7, 4), load_scalar(folders / "llama")
    assert {p.data_ptr() % 64 for p in scalar.parameters()} == {0}
    save_model(scalar, tokenizer_of(), tmp_path / "reward")
    assert torch.equal(response_scores(load_scalar(tmp_path / "reward"), batch), response_scores(scalar, batch))


@pytest.mark.parametrize("kind", ["policy", "new", "scalar"])
def test_a_model_that_caps_its_attentions_logits_runs_with_the_attention_that_does(tmp_path, kind):
    """Gemma 2: a cap of 0.05 makes attention nearly even, so that leaving it out shows in every log-prob."""
    capped, free = (
        tiny("gemma2", attn_logit_softcapping=cap, query_pre_attn_scalar=1, initializer_range=0.5)
        for cap in (0.05, None)
    )
    free.load_state_dict(capped.state_dict())
    save_model(capped, tokenizer_of(), tmp_path / "m")
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    model = (
        capped if kind == "new" else load_policy(tmp_path / "m") if kind == "policy" else load_scalar(tmp_path / "m")
    )
    assert model.config._attn_implementation == "eager"
    batch = rows(9, 9)
    states = [m.base_model(batch.ids).last_hidden_state for m in (model, eager, free)]
    assert torch.equal(states[0], states[1]) and (states[0] - states[2]).abs().max() > 1e-2
    if kind != "scalar":
        plain = eager(batch.ids).logits.log_softmax(-1)[:, 1:-1].gather(-1, batch.ids[:, 2:, None]).sum((1, 2))
        assert torch.allclose(response_logprobs(model, batch), plain, atol=1e-4)


def test_a_model_without_a_cap_keeps_the_fast_attention(folders):
    assert load_policy(folders / "llama").config._attn_implementation == "sdpa"
