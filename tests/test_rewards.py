"""Rewards that read text: functions, classifiers, reward models with another tokenizer, and sums of them."""

import math
import textwrap

import numpy
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from palate.data.chat import Chat
from palate.data.kinds import Prompt
from palate.errors import ConfigError, ModelError
from palate.models.forward import response_scores, score_responses
from palate.models.heads import normalise
from palate.models.load import load_scalar, load_tokenizer, save_model
from palate.models.rewards import (
    ClassifierReward,
    FunctionReward,
    TextRewardModel,
    WeightedReward,
    find_function,
    load_reward,
)
from palate.stage.roles import bill
from palate.types import Models, Tokens
from tiny import rows, tiny, tokenizer_of

PAIRS = [("a b", "c d e"), ("a b", "f"), ("g h i", "j k l m n o p a b c"), ("p", "o n")]


@pytest.fixture(scope="module")
def chat():
    return Chat(tokenizer_of())


def sampled(chat, pairs=PAIRS, *, finished=None, **fields):
    """Rows as a sampler hands them on, with their prompts' records."""
    encoded = [chat.encode(prompt, response) for prompt, response in pairs]
    width, n = max(len(ids) for ids, _ in encoded), len(encoded)
    ids, real, response = (
        torch.zeros(n, width, dtype=torch.long),
        torch.zeros(n, width).bool(),
        torch.zeros(n, width).bool(),
    )
    for i, (row, mask) in enumerate(encoded):
        cut = len(row) - (1 if finished is not None and not finished[i] else 0)
        ids[i, :cut], real[i, :cut], response[i, :cut] = torch.tensor(row[:cut]), True, torch.tensor(mask[:cut])
    records = [
        Prompt(prompt, {k: v[i] for k, v in fields.items() if v[i] is not None}, source=f"prompts.jsonl:{i + 1}")
        for i, (prompt, _) in enumerate(pairs)
    ]
    extras = {"records": records} | ({} if finished is None else {"finished": torch.tensor(finished)})
    return Tokens(ids, real, response, torch.arange(n), extras)


# -- functions ----------------------------------------------------------------------------------------------------------


def test_a_function_gets_prompts_responses_and_the_fields_it_asks_for(chat):
    seen = {}

    def judge(prompts, responses, answer):
        seen.update(prompts=prompts, responses=responses, answer=answer)
        return [len(response.split()) for response in responses]

    tokens = sampled(chat, answer=["1", None, "3", "4"], unused=[1, 2, 3, 4])
    scored = FunctionReward(judge, chat)(tokens)
    assert scored.scores.tolist() == [3, 1, 10, 2] and scored.scores.dtype == torch.float32 and scored.parts == {}
    assert seen["prompts"] == [p for p, _ in PAIRS] and seen["answer"] == ["1", None, "3", "4"]
    assert seen["responses"] == [f" {r}" for _, r in PAIRS]  # as the text goes on, with the blank after the prompt
    everything = FunctionReward(lambda **fields: [len(fields)] * 4, chat)(tokens)
    assert everything.scores.tolist() == [4] * 4  # prompts, responses, answer, unused


def test_prompts_are_decoded_where_rows_carry_no_records(chat):
    tokens = sampled(chat)
    bare = Tokens(tokens.ids, tokens.attention_mask, tokens.response_mask, tokens.group)
    found = []

    def look(prompts, responses):
        found.extend(prompts)
        return [0.0] * len(responses)

    FunctionReward(look, chat)(bare)
    assert found == [p for p, _ in PAIRS]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, numpy.array])
def test_numbers_may_come_in_any_sequence(chat, kind):
    scored = FunctionReward(lambda prompts, responses: kind([1.0, 2.0, 3.0, 4.0]), chat)(sampled(chat))
    assert scored.scores.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0, float("nan"), 4.0], r"gave nan \(1 of 4 scores"),
        ([1.0, 2.0, float("inf"), 4.0], r"gave inf \(1 of 4"),
        ([1.0, 2.0, "good", 4.0], "returned 'good'; a number was expected"),
        ([1.0, 2.0, None, 4.0], "returned None; a number was expected"),
        ([1.0, 2.0, 10**400, 4.0], "returned 1000.*; a number was expected"),  # no float at all
        ([1.0, 2.0, 1e300, 4.0], r"gave inf \(1 of 4"),  # none in float32
    ],
)
def test_what_is_no_finite_number_is_shown_with_its_sample(chat, returned, message):
    with pytest.raises(ModelError, match=message) as error:
        FunctionReward(lambda prompts, responses: returned, chat, name="taste")(sampled(chat))
    assert 'reward "taste"' in str(error.value) and "prompts.jsonl:3" in str(error.value)
    assert "prompt: 'g h i'" in str(error.value) and "j k l m n o p a b c" in str(error.value)


@pytest.mark.parametrize(
    ("returned", "found"), [([1.0], "1 scores"), (0.5, "float"), ("good", "str"), (None, "NoneType")]
)
def test_a_wrong_number_of_scores_is_refused(chat, returned, found):
    with pytest.raises(ModelError, match=f"returned {found} for 4 responses; one number for each"):
        FunctionReward(lambda prompts, responses: returned, chat)(sampled(chat))


def test_a_function_that_raises_is_shown_the_sample_it_raised_on(chat):
    def fragile(prompts, responses):
        return [1 / (len(prompt.split()) - 1) for prompt in prompts]

    with pytest.raises(ModelError, match="raised ZeroDivisionError: .*division by zero") as error:
        FunctionReward(fragile, chat)(sampled(chat))
    assert "prompts.jsonl:4" in str(error.value) and isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_field_that_no_record_has_is_named(chat):
    with pytest.raises(ConfigError, match='parameter "solution".*Found: prompts, responses, answer'):
        FunctionReward(lambda prompts, responses, solution: [0] * 4, chat)(sampled(chat, answer=[1, 2, 3, 4]))


def test_functions_are_found_by_module_and_by_file(tmp_path, monkeypatch):
    (tmp_path / "my_tastes.py").write_text(
        "def shortness(prompts, responses):\n    return [-len(r) for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert find_function("my_tastes:shortness")(["x"], ["four"]) == [-4]
    assert find_function(f"{tmp_path}/my_tastes.py:shortness")(["x"], ["four"]) == [-4]
    with pytest.raises(ConfigError, match='no function "shortnes".*Did you mean "shortness"'):
        find_function("my_tastes:shortnes")
    with pytest.raises(ConfigError, match='no module "not_there"'):
        find_function("not_there:shortness")
    with pytest.raises(ConfigError, match='no file "not_there.py"'):
        find_function("not_there.py:shortness")
    (tmp_path / "broken.py").write_text("import surely_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        find_function("broken:shortness")


def test_a_reward_file_may_hold_dataclasses_and_hides_no_other_module(tmp_path):
    """Dataclasses look their module up by name while it is read."""
    import json
    import sys

    (tmp_path / "json.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Taste:\n"
        "    weight: float = 2.0\n\n\ndef length(prompts, responses):\n"
        "    return [Taste().weight * len(r) for r in responses]\n"
    )
    assert find_function(f"{tmp_path}/json.py:length")(["x"], ["four"]) == [8.0]
    assert sys.modules["json"] is json


# -- classifiers --------------------------------------------------------------------------------------------------------


def reading_tokenizer(max_length=None):
    """Letters as WordPiece-like tokens between [CLS] and [SEP], lower-cased: not the policy's ids at all."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *["p", "o", "n", "m", "l", "k", "j", "i", "h", "g", "f", "e", "d", "c", "b", "a"],
        "\n",
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **special, **({"model_max_length": max_length} if max_length else {})
    )


def classifier_folder(path, architecture="distilbert", labels=("NEGATIVE", "POSITIVE"), **more):
    size = {
        "distilbert": (DistilBertConfig, {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
        "bert": (
            BertConfig,
            {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
        ),
        "roberta": (
            RobertaConfig,
            {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "pad_token_id": 0,
            },
        ),
        "gpt2": (GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    }
    kind, fields = size[architecture]
    config = kind(
        vocab_size=32,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        initializer_range=0.3,
        **({"max_position_embeddings": 64} if architecture != "gpt2" else {"n_positions": 64}) | fields | more,
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    reading_tokenizer().save_pretrained(path)
    return str(path)


def slow_logits(where, texts):
    """One text at a time, in plain transformers."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])


@pytest.mark.parametrize("architecture", ["distilbert", "bert", "roberta"])
@pytest.mark.parametrize("label", ["positive", "POSITIVE", 1])
def test_a_classifier_gives_what_plain_transformers_gives_text_by_text(tmp_path, chat, architecture, label):
    where = classifier_folder(tmp_path / "c", architecture)
    tokens = sampled(chat)
    texts = [f"{prompt} {response}" for prompt, response in PAIRS]
    logits = slow_logits(where, texts)
    assert logits[:, 1].std() > 1e-3
    for output, expected in {
        "logit": logits[:, 1],
        "probability": logits.softmax(-1)[:, 1],
        "logprob": logits.log_softmax(-1)[:, 1],
    }.items():
        reward = ClassifierReward(where, label, chat=chat, output=output, batch_tokens=30)
        assert torch.allclose(reward(tokens).scores, expected, atol=1e-5)
    assert not any(p.requires_grad for p in reward.model.parameters()) and not reward.model.training
    alone = ClassifierReward(where, label, chat=chat, reads="response")(tokens).scores
    assert torch.allclose(alone, slow_logits(where, [response for _, response in PAIRS])[:, 1], atol=1e-5)


def test_a_decoder_classifier_whose_pad_is_its_end_of_text_reads_the_last_token(tmp_path, chat):
    where = classifier_folder(tmp_path / "c", "gpt2", pad_token_id=3, eos_token_id=3)
    expected = []
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    for prompt, response in PAIRS:
        ids = tokenizer(f"{prompt} {response}", return_tensors="pt").input_ids
        assert ids[0, -1] == 3
        expected.append(model.score(model.transformer(ids).last_hidden_state[0, -1])[0])
    scores = ClassifierReward(where, "negative", chat=chat)(sampled(chat)).scores
    assert torch.allclose(scores, torch.stack(expected), atol=1e-5)


def test_one_label_needs_no_name_and_independent_labels_get_a_sigmoid(tmp_path, chat):
    one = classifier_folder(tmp_path / "one", labels=("SCORE",))
    tokens, texts = sampled(chat), [f"{prompt} {response}" for prompt, response in PAIRS]
    logits = slow_logits(one, texts)[:, 0]
    assert torch.allclose(ClassifierReward(one, chat=chat)(tokens).scores, logits, atol=1e-5)
    assert torch.allclose(
        ClassifierReward(one, chat=chat, output="probability")(tokens).scores, logits.sigmoid(), atol=1e-5
    )
    many = classifier_folder(tmp_path / "many", labels=("rude", "kind"), problem_type="multi_label_classification")
    kind = ClassifierReward(many, "kind", chat=chat, output="logprob")(tokens).scores
    assert torch.allclose(kind, slow_logits(many, texts)[:, 1].sigmoid().log(), atol=1e-5)


def test_an_unknown_label_lists_those_there_are(tmp_path, chat):
    where = classifier_folder(tmp_path / "c")
    with pytest.raises(ModelError, match="no label 'positiv'.*Did you mean .positive.*0 = NEGATIVE, 1 = POSITIVE"):
        ClassifierReward(where, "positiv", chat=chat)
    with pytest.raises(ModelError, match="no label 2.*0 = NEGATIVE, 1 = POSITIVE"):
        ClassifierReward(where, 2, chat=chat)
    with pytest.raises(ModelError, match="which label is the reward.*0 = NEGATIVE, 1 = POSITIVE"):
        ClassifierReward(where, chat=chat)
    with pytest.raises(ConfigError, match='output "logits" is not known.*Did you mean "logit"'):
        ClassifierReward(where, "positive", chat=chat, output="logits")


@pytest.mark.parametrize(("architecture", "limit"), [("distilbert", 12), ("roberta", 12)])
def test_a_text_beyond_the_context_loses_its_beginning_and_is_counted(tmp_path, chat, architecture, limit):
    positions = limit + (1 if architecture == "roberta" else 0)  # RoBERTa with pad 0 counts positions from 1
    where = classifier_folder(tmp_path / "c", architecture, max_position_embeddings=positions)
    reward = ClassifierReward(where, "positive", chat=chat)
    scores = reward(sampled(chat)).scores
    assert reward.truncated == 1 and reward.max_length == limit
    kept = " ".join(
        ["g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "a", "b", "c"][-(limit - 2) :]
    )  # between [CLS] and [SEP]
    assert torch.allclose(scores[2], slow_logits(where, [kept])[0, 1], atol=1e-5)


def test_a_language_model_or_an_empty_folder_is_no_classifier(tmp_path, chat):
    save_model(tiny(), tokenizer_of(), tmp_path / "policy")
    with pytest.raises(ModelError, match="not a classifier: it has no weights for score.weight"):
        ClassifierReward(str(tmp_path / "policy"), 0, chat=chat)
    with pytest.raises(ModelError, match="no tokenizer"):
        (tmp_path / "empty").mkdir()
        ClassifierReward(str(tmp_path / "empty"), 0, chat=chat)


# -- reward models with another tokenizer -------------------------------------------------------------------------------


def letters():
    """One token a character, so that nothing has the policy's ids or lengths."""
    words = ["<unk>", "<eos>", *"abcdefghijklmnop", " ", "\n"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    from tokenizers import decoders

    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A normalised reward model on characters, of another size than the policy."""
    folder = tmp_path_factory.mktemp("foreign")
    save_model(tiny("gpt2", letters(), hidden_size=32), letters(), folder / "base")
    reward = load_scalar(folder / "base", seed=1)
    normalise(reward, response_scores(reward, rows(9, 8, 7, 6, vocab=18)))
    save_model(reward, letters(), folder / "reward")
    return folder / "reward"


def one_by_one(where, pairs, ends):
    """The definition: each pair encoded by the reward model's own chat, alone; the stop token only where it ended."""
    model, own = load_scalar(where, trainable=False), Chat(load_tokenizer(where))
    scores = []
    for (prompt, response), end in zip(pairs, ends, strict=True):
        ids, mask = own.encode(prompt, response)
        assert ids[-1] == 1
        ids, mask = (ids, mask) if end else (ids[:-1], mask[:-1])
        raw = model.score(model.transformer(torch.tensor([ids])).last_hidden_state[0, -1])[0]
        scores.append((raw - model.config.score_mean) / model.config.score_std)
    return torch.stack(scores).detach()


def test_a_reward_model_with_another_tokenizer_reads_text_and_leaves_the_ids_alone(chat, foreign):
    tokens = sampled(chat, finished=[True, True, False, True])
    before = tokens.ids.clone()
    reward = TextRewardModel(str(foreign), chat)
    scores = reward(tokens).scores
    pairs = [(prompt, f" {response}") for prompt, response in PAIRS]
    expected = one_by_one(foreign, pairs, [True, True, False, True])
    assert expected.std() > 1e-3 and torch.allclose(scores, expected, atol=1e-4)
    assert torch.equal(tokens.ids, before) and scores.shape == (4,)
    assert not torch.allclose(scores[2], one_by_one(foreign, pairs, [True] * 4)[2], atol=1e-4)


def test_a_text_beyond_the_reward_models_context_loses_the_prompts_beginning(chat, foreign):
    reward = TextRewardModel(str(foreign), chat)  # 64 positions
    long = " ".join("abcdefghijklmnop" * 4)
    scores = reward(sampled(chat, [(long, "a b"), ("a", "b")])).scores
    assert reward.truncated == 1 and scores.isfinite().all()


# -- sums and settings --------------------------------------------------------------------------------------------------


def length(prompts, responses):
    return [len(response.split()) for response in responses]


def constant(prompts, responses):
    return [2.0] * len(responses)


def test_a_weighted_sum_keeps_its_parts(chat):
    inner = WeightedReward({"two": (FunctionReward(constant, chat), 10.0)})
    reward = WeightedReward({"length": (FunctionReward(length, chat), -0.5), "inner": (inner, 1.0)})
    scored = reward(sampled(chat))
    assert scored.scores.tolist() == [20 - 0.5 * n for n in (3, 1, 10, 2)]
    assert {name: part.tolist() for name, part in scored.parts.items()} == {
        "length": [3, 1, 10, 2],
        "inner": [20] * 4,
        "inner/two": [2] * 4,
    }
    for weight in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="finite number"):
            WeightedReward({"x": (inner, weight)})
    with pytest.raises(ConfigError, match="no rewards"):
        WeightedReward({})


def test_a_scalar_model_with_the_policys_tokenizer_reads_ids_and_another_reads_text(tmp_path, chat, foreign):
    save_model(tiny(), tokenizer_of(), tmp_path / "base")
    save_model(load_scalar(tmp_path / "base", seed=3), tokenizer_of(), tmp_path / "reward")
    reward = load_reward(str(tmp_path / "reward"), chat)
    assert isinstance(reward, torch.nn.Module) and not any(p.requires_grad for p in reward.parameters())
    tokens = sampled(chat)
    assert torch.equal(
        score_responses(reward, tokens).scores, response_scores(load_scalar(tmp_path / "reward"), tokens)
    )
    assert isinstance(load_reward(str(foreign), chat), TextRewardModel)
    templated = tokenizer_of()
    templated.chat_template = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}"
    save_model(load_scalar(tmp_path / "base", seed=3), templated, tmp_path / "templated")
    assert isinstance(load_reward(str(tmp_path / "templated"), chat), TextRewardModel)  # same ids, another template
    assert isinstance(load_reward(str(tmp_path / "templated"), Chat(templated)), torch.nn.Module)


def test_settings_of_every_shape_make_rewards(tmp_path, monkeypatch, chat, foreign):
    source = """
        def length(prompts, responses):
            return [len(r.split()) for r in responses]
    """
    (tmp_path / "lengths.py").write_text(textwrap.dedent(source))
    monkeypatch.chdir(tmp_path)
    where, tokens = classifier_folder(tmp_path / "sentiment"), sampled(chat)
    lengths = torch.tensor([3.0, 1, 10, 2])
    assert torch.equal(load_reward("lengths:length", chat)(tokens).scores, lengths)
    assert torch.equal(load_reward(length, chat)(tokens).scores, lengths)
    assert torch.equal(load_reward({"function": "lengths.py:length"}, chat)(tokens).scores, lengths)
    weighted = load_reward({"function": "lengths:length", "weight": -2}, chat)(tokens)
    assert torch.equal(weighted.scores, -2 * lengths) and list(weighted.parts) == ["length"]
    positive = load_reward({"classifier": where, "label": "positive", "output": "probability"}, chat)
    assert isinstance(positive, ClassifierReward) and positive(tokens).scores.max() < 1
    several = load_reward([{"classifier": where, "label": "positive"}, "lengths:length", "lengths:length"], chat)(
        tokens
    )
    assert list(several.parts) == ["positive", "length", "length_2"]
    assert torch.allclose(several.scores, several.parts["positive"] + 2 * lengths)
    named = {"mood": {"classifier": where, "label": 1, "weight": 0.5}, "brief": "lengths:length", "rm": str(foreign)}
    scored = load_reward(named, chat)(tokens)
    assert list(scored.parts) == ["mood", "brief", "rm"]
    assert torch.allclose(scored.scores, 0.5 * scored.parts["mood"] + lengths + scored.parts["rm"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"function": "a:b", "model": "c"}, "function and model together"),
        ({"classifier": "x", "lable": "positive"}, 'unknown key "lable" beside "classifier".*Did you mean "label"'),
        ({"function": "a:b", "weight": "much"}, "no module|weight 'much'"),
        ({"wieght": 0.5}, '"wieght" is 0.5; a reward was expected'),
        ([], "no rewards"),
    ],
)
def test_a_spec_that_makes_no_sense_is_a_config_error(chat, spec, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(spec, chat)


def test_the_bill_counts_the_models_in_a_sum_once(chat):
    one, other = tiny(seed=1), tiny(seed=2)
    inner = WeightedReward({"one": (one, 1.0), "words": (FunctionReward(lambda p, r: [0.0] * len(p), chat), 1.0)})
    line = bill(Models(reward=WeightedReward({"inner": (inner, 1.0), "one": (one, 0.5), "two": (other, 1.0)})), ())[0]
    assert line.parameters == sum(p.numel() for model in (one, other) for p in model.parameters())
    assert (line.trained, line.dtype, line.weights) == (0, "float32", 4 * line.parameters)
