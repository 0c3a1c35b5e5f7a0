"""The examples, run: what they promise is measured here, on real data or on small stand-ins for models of the hub."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import palate

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def script(file: str) -> ModuleType:
    name = f"examples_{file}"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))  # one example uses another, as when it is run from its folder
    spec.loader.exec_module(module)
    return module


def lines(where: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in where.read_text(encoding="utf-8").splitlines()]


@pytest.mark.shared_data
def test_politeness_is_learnt_to_87_percent(shared_data: Path, tmp_path: Path) -> None:
    """As in the file, but for the places."""
    run = palate.train(
        config=EXAMPLES / "politeness_reward.yaml",
        overrides={
            "model": shared_data / "models/stories260k-hf",
            "data.train": shared_data / "preferences/politeness_ai.jsonl.gz",
            "out": tmp_path / "run",
        },
        quiet=True,
    )
    found = json.loads((run / "evaluation.json").read_text())
    accuracy, longer = found["accuracy"], found["length"]["longer_wins"]
    assert found["pairs"] > 150
    assert accuracy["estimate"] >= 0.87
    assert longer["high"] < accuracy["low"]  # it is not length


@pytest.mark.shared_data
def test_politeness_is_learnt_without_a_reward_model(shared_data: Path, tmp_path: Path) -> None:
    """DPO alone; the start is a coin, for policy and reference are the same."""
    example = script("preferences")
    found = example.experiment(shared_data, tmp_path, example.TASKS["politeness"], ["dpo"])["dpo"]
    assert found["before"]["estimate"] == 0.5 and found["after"]["pairs"] == 165
    assert found["after"]["low"] > 0.8


@pytest.mark.shared_data
def test_the_marks_of_the_corrections_are_what_people_quoted(shared_data: Path) -> None:
    """336 answers; 7 have no correction and 5 an equal one. The file quotes the text of every mark."""
    import gzip

    where = shared_data / "segment/finegrained_qa_feedback.jsonl.gz"
    found = script("qa_corrections").corrections(where)
    assert len(found) == 324
    with gzip.open(where, "rt", encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    for record in found:
        errors = answers[int(record.source.split(":")[1]) - 1]["span_errors"]["errors"]
        marked = "".join(record.rejected[a:b] for a, b in record.rejected_spans or ())
        assert all(error["text"].strip() in marked for error in errors)
        assert (record.rejected_spans is None) == (not errors)


@pytest.mark.shared_data
def test_corrections_train_and_are_measured_on_held_out_questions(shared_data: Path, tmp_path: Path) -> None:
    """A few of them: that it runs from file to figures, from a coin at the start; not that it learns."""
    found = script("qa_corrections").experiment(shared_data, tmp_path, ["ddpo"], limit=24)
    first = lines(tmp_path / "ddpo/metrics.jsonl")[0]
    assert first["loss/preference"] == pytest.approx(0.6931, abs=1e-3)
    assert {"the shorter one wins", "ddpo"} == set(found) == set(json.loads((tmp_path / "figures.json").read_text()))
    for name in ("accuracy", "accuracy, weighted"):
        assert 0 <= found["ddpo"][name]["low"] <= found["ddpo"][name]["estimate"] <= found["ddpo"][name]["high"] <= 1
    assert found["ddpo"]["charge of an error, nats"]["estimate"] != 0


@pytest.mark.shared_data
def test_hh_beats_the_longer_one_wins_without_a_leak(shared_data: Path, tmp_path: Path) -> None:
    """The first 800 comparisons are about harm, where people prefer the shorter reply."""
    hh = script("hh_reward")
    found = hh.experiment(shared_data, tmp_path, hh.QUICK, quiet=True)
    accuracy, longer = found["accuracy"], found["length"]["longer_wins"]
    assert longer["high"] < 0.5 < accuracy["estimate"]
    assert longer["high"] < accuracy["low"]
    assert accuracy["estimate"] < 0.7  # more would be a leak
    sides = [
        {line["prompt"][0]["content"] for line in lines(tmp_path / f"{side}.jsonl")} for side in ("train", "held_out")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]  # no conversation stands on both sides


@pytest.mark.shared_data
def test_sentiment_rises_by_gold_at_a_finite_distance(shared_data: Path, tmp_path: Path) -> None:
    """PPO and one method without a value model, on the same prompts and reward model."""
    pytest.importorskip("vaderSentiment", reason="the gold preference of this example: pip install vaderSentiment")
    sentiment = script("sentiment")
    figures = sentiment.experiment(shared_data, tmp_path, sentiment.QUICK, quiet=True, methods=["ppo", "rloo"])
    accuracy = figures["reward_model"]["accuracy"]["estimate"]
    assert 0.55 < accuracy < figures["ceiling"] + 0.1
    for found in figures["methods"].values():
        gain, low, _ = found["gold_gain"]
        assert low > 0 and gain > 0.1
        assert 0 < found["kl"][1] < found["kl"][0] < 40
        assert found["before"]["gold"][0] + gain == pytest.approx(found["after"]["gold"][0])
    before = [found["before"]["gold"] for found in figures["methods"].values()]
    assert before[0] == before[1]  # both are held against the same answers
    assert [row[0] for row in sentiment.rows(figures)] == ["before", "ppo", "rloo"]
    assert sentiment.rows(figures)[0][-1] == "●"  # nothing is nearer than no distance
    assert len(sentiment.trail(tmp_path / "rloo")) == 6  # 12 batches in six parts
    text = sentiment.page(figures, tmp_path).read_text()
    assert figures["methods"]["ppo"]["samples"][0]["prompt"].split()[0] in text
    assert "Gold sentiment against KL" in text and "<svg" in text


def test_all_methods_of_the_sentiment_example_exist_and_draw_as_many_continuations() -> None:
    from palate.config import load_settings

    sentiment = script("sentiment")
    for name, way in sentiment.WAYS.items():
        load_settings(name, settings={"method": dict(way.settings), "model": "m", "out": "o"})  # each setting is known
        assert sentiment.Size().batch_size % way.group == 0 and sentiment.QUICK.batch_size % way.group == 0
    prices = {way.settings.get("kl_coef", way.settings.get("beta")) for way in sentiment.WAYS.values()}
    assert prices == {sentiment.KL_COEF, None}  # None: best_of_n


@pytest.mark.shared_data
def test_two_objectives_and_their_soups_are_measured_alike(shared_data: Path, tmp_path: Path) -> None:
    """So small a run shows that everything is there and measured in the same units, and no more."""
    example = script("helpful_harmless")
    figures = example.experiment(shared_data, tmp_path, example.QUICK, quiet=True)
    found = figures["policies"]
    assert list(found) == ["start", "trained 1", "trained 0.5", "trained 0", "soup 0.5"]
    start = found["start"]
    assert start["kl"] == pytest.approx([0, 0, 0], abs=1e-3)
    # Normalised on other samples of the same model: mean 0 up to the error of 48 answers of 24 conversations.
    assert start["helpful"][1] < 0.5 and start["helpful"][2] > -0.5
    assert all(m["kl"][0] > 0.01 for name, m in found.items() if name != "start")
    sides = [
        {line["prompt"][0]["content"] for name in example.SIDES for line in lines(tmp_path / f"{name}_{side}.jsonl")}
        for side in ("train", "held_out")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]  # no conversation stands on both sides
    assert json.loads((tmp_path / "soup-0.5-0.5" / "soup.json").read_text())["cosine"] > 0.9
    text = example.page(figures, tmp_path).read_text()
    assert "Helpful against harmless" in text and "<svg" in text


REVIEWS = [
    "This film was a joy to watch, and the actors were wonderful in every scene of it.",
    "I hated the plot; two hours of noise and a boring end that nobody asked for.",
    "A quiet story, well told, with music that stays in your head for days and days.",
    "The worst picture of the year: badly cut, badly lit, and far too long for anyone.",
    "My family laughed a lot, and my little sister wants to see it again next week.",
    "Do not waste your money on this, the trailer shows the only good scene there is.",
]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy/ (GPT-2), classifier/ (DistilBERT with two labels and a tokenizer of its own) and reviews.jsonl."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = bytes_, decoders.ByteLevel()
    end = "<|endoftext|>"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        REVIEWS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=[end], initial_alphabet=alphabet, show_progress=False),
    )
    # Like GPT-2's: begin and end of text are one token, and there is no pad token.
    gpt2 = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=end, eos_token=end, unk_token=end)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    config = GPT2Config(vocab_size=len(gpt2), bos_token_id=0, eos_token_id=0, **shape)
    GPT2LMHeadModel(config).save_pretrained(folder / "policy")
    gpt2.save_pretrained(folder / "policy")

    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces.train_from_iterator(
        REVIEWS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    bert = PreTrainedTokenizerFast(tokenizer_object=pieces, mask_token="[MASK]", **names)
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    small = DistilBertConfig(
        vocab_size=len(bert), dim=32, hidden_dim=64, n_layers=2, n_heads=2, max_position_embeddings=128
    )
    small.id2label, small.label2id = labels, {name: i for i, name in labels.items()}
    small.initializer_range = 0.5  # so that its logits tell texts apart
    DistilBertForSequenceClassification(small).save_pretrained(folder / "classifier")
    bert.save_pretrained(folder / "classifier")

    with open(folder / "reviews.jsonl", "w", encoding="utf-8") as file:
        for i in range(60):
            review = f"{i} stars? {REVIEWS[i % len(REVIEWS)]}"
            file.write(json.dumps({"text": review, "label": i % 2}) + "\n")
    return folder


def test_imdb_runs_with_stand_ins_and_scores_like_the_classifier(stand_ins: Path, tmp_path: Path) -> None:
    """The file as it is, but for the three places and the number and size of batches."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = palate.train(
        config=EXAMPLES / "imdb_sentiment.yaml",
        overrides={
            "model": stand_ins / "policy",
            "reward.classifier": stand_ins / "classifier",
            "data.train": stand_ins / "reviews.jsonl",
            "training.max_steps": 3,
            "training.batch_size": 16,
            "out": tmp_path / "run",
        },
        quiet=True,
    )
    steps = [line for line in lines(run / "metrics.jsonl") if line["split"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert abs(steps[0]["kl/reference"]) < 1e-4  # the reference is the policy before training
    assert steps[-1]["kl/reference"] != steps[0]["kl/reference"]
    assert steps[-1]["kl/coef"] < 0.2  # steered towards 6 nats, and far below them

    tokenizer = AutoTokenizer.from_pretrained(stand_ins / "classifier")
    classifier = AutoModelForSequenceClassification.from_pretrained(stand_ins / "classifier").eval()
    shown = [line for line in lines(run / "samples.jsonl") if line.get("when") == "after"]
    assert shown and all(len(line["prompt"].split()) == 6 for line in shown)
    for line in shown:
        with torch.no_grad():
            inputs = tokenizer(line["prompt"] + line["response"], return_tensors="pt")
            logits = classifier(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0]
        assert classifier.config.id2label[1] == "POSITIVE"
        assert line["score"] == pytest.approx(float(logits[1]), abs=1e-4)
    assert {"model.safetensors", "tokenizer.json"} <= {p.name for p in (run / "model").iterdir()}


def test_an_opening_is_the_first_words_of_a_text_and_of_nothing_else() -> None:
    from palate.data.records import Demonstration, Prompt
    from palate.stage.records import opening

    assert opening(Prompt(" A  film,\nlong "), 2) == Prompt(" A  film,")
    assert opening(Prompt("A film"), 5) == Prompt("A film")
    turns = ({"role": "user", "content": "one two three"},)
    assert opening(Prompt(turns), 1) == Prompt(turns)
    assert opening(Demonstration("one two", "three"), 1) == Demonstration("one two", "three")


def test_imdb_names_the_models_of_the_hub() -> None:
    from palate.config import load_config

    config = load_config(file=EXAMPLES / "imdb_sentiment.yaml")
    assert config.method.name == "ppo" and config.reference is None
    assert config.model == "lvwerra/gpt2-imdb"
    assert isinstance(config.reward, dict) and config.reward["classifier"] == "lvwerra/distilbert-imdb"
    assert config.reward["label"] == "POSITIVE"


def test_a_lookup_is_learnt_by_asking_and_repeating(tmp_path: Path) -> None:
    """A third of the batches of the whole example: on the way, and already far from where it began."""
    example = script("tool_use")
    figures = example.experiment(tmp_path, example.QUICK, quiet=True)
    before, after = figures["before"], figures["after"]
    assert before["success"][2] < 0.2 < after["success"][1]
    assert after["asked"] > 0.9 > before["asked"]
    trained = {line["prompt"] for line in lines(tmp_path / "prompts.jsonl")}
    held_out = {prompt.prompt for prompt in example.all_prompts(0)[: example.QUICK.held_out]}
    assert len(held_out) == example.QUICK.held_out and not held_out & trained
    talks = [line for line in lines(tmp_path / "rloo" / "samples.jsonl") if "asked" in line]
    assert all([turn["role"] for turn in talk["prompt"]][:3] == ["user", "assistant", "tool"] for talk in talks)


def test_the_environment_of_the_lookup_answers_only_what_it_is_asked() -> None:
    example = script("tool_use")
    fields = {"table": {"Anna": "park", "Ben": "lake"}}

    def said(text: str) -> Any:
        return example.lookup([{"role": "assistant", "content": text}], fields)

    assert said("lookup Anna").text == "park" and said("lookup Ben").text == "lake"
    assert said("lookup Leo").text == said("lookup").text == said("lookup Anna Ben").text == "unknown"
    assert said("park") is None and not said("lookup Anna").done
    assert example.right([], ["park", "park lake", "", "lookup Anna"], ["park"] * 4) == [1, 0, 0, 0]


def test_sums_that_nobody_showed_get_better_by_a_reward_that_checks_them(tmp_path: Path) -> None:
    """As in the file. The start is not nothing, and far from all."""
    example = script("arithmetic")
    size = example.Size()
    figures = example.experiment(tmp_path, size, quiet=True)
    assert 0.2 < figures["before"][0] and figures["before"][2] < 0.7
    assert figures["after"][0] > figures["before"][2]
    every = [prompt.prompt for prompt in example.questions(0)]
    assert len(set(every)) == len(every) == example.LARGEST**2
    seen = {line["prompt"] for name in ("answers", "questions") for line in lines(tmp_path / f"{name}.jsonl")}
    assert not seen & set(every[: size.held_out])
