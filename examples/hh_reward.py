"""A reward model from real people's comparisons, from nothing: tokenizer, language model, reward model.

    6,057 comparisons of HH-RLHF (Bai et al. 2022, arXiv:2204.05862)  ->  a tokenizer of their words  ->  a small language
    model of the chosen replies, from scratch  ->  a reward model from it (Ouyang et al. 2022, arXiv:2203.02155, section 3.5)

Several lengths of one conversation stand in this data, so it is split by the conversation's opening: split by prompt, a
part of what is held out would have been trained on. Half of the comparisons are about help and half about harm, where
people want opposite things (the longer reply here, the shorter one there); without a large pre-trained model little of that
can be learnt from 4,800 pairs. An accuracy of 0.54 to 0.62 is honest. 0.7 would be a leak.

    python examples/hh_reward.py             # the same command resumes it
    python examples/hh_reward.py --quick     # 800 comparisons

Needs the folder of data (--data) with ``preferences/hh_rlhf.jsonl.gz``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import palate
from palate.data.ranking import split_by_prompt
from palate.data.records import Comparison, Demonstration, read_records, write_records

MODEL = {
    "architecture": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    records: int | None = None  # None = all
    held_out: float = 0.2  # share of the openings
    max_length: int = 192  # tokens of a row; older turns are cut first
    language_epochs: float = 2
    reward_epochs: float = 1


QUICK = Size(records=800, max_length=128, language_epochs=1, reward_epochs=1)


def tokenizer_of(texts: Sequence[str], vocabulary: int = 4096) -> Any:
    """A byte-level BPE of these texts, with a turn token for each role."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
    )


def experiment(data: Path, out: Path, size: Size, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Run it; returns what ``palate.evaluation.reward_model`` found on the held-out comparisons."""
    out.mkdir(parents=True, exist_ok=True)
    records = read_records(data / "preferences" / "hh_rlhf.jsonl.gz", "comparisons", limit=size.records)
    train, held_out = split_by_prompt(records, size.held_out, seed, by="opening")
    pairs = [record for record in train if isinstance(record, Comparison)]
    tokenizer_of([text for pair in pairs for text in _texts(pair)]).save_pretrained(str(out / "tokenizer"))
    replies = [Demonstration(pair.prompt, pair.chosen, every_turn=True) for pair in pairs]
    write_records(out / "demonstrations.jsonl", replies, overwrite=True)
    write_records(out / "train.jsonl", train, overwrite=True)
    write_records(out / "held_out.jsonl", held_out, overwrite=True)

    language_model = palate.train(
        "sft",
        model=MODEL,
        tokenizer=out / "tokenizer",
        data={"train": out / "demonstrations.jsonl", "validation_fraction": 0.02, "max_length": size.max_length},
        training={
            "learning_rate": 3e-3,
            "epochs": size.language_epochs,
            "batch_size": 32,
            "eval_every": 0.5,
            "seed": seed,
        },
        sampling={"max_new_tokens": 40},
        out=out / "language_model",
        quiet=quiet,
    )
    reward = palate.train(
        "reward",
        model=language_model / "model",
        data={"train": out / "train.jsonl", "validation": out / "held_out.jsonl", "max_length": size.max_length},
        training={
            "learning_rate": 5e-4,
            "epochs": size.reward_epochs,
            "batch_size": 32,
            "eval_every": 0.25,
            "seed": seed,
        },
        out=out / "reward",
        quiet=quiet,
    )
    found: dict[str, Any] = json.loads((reward / "evaluation.json").read_text(encoding="utf-8"))
    return found


def _texts(pair: Comparison) -> list[str]:
    turns = [pair.prompt] if isinstance(pair.prompt, str) else [str(turn["content"]) for turn in pair.prompt]
    return [*turns, pair.chosen, pair.rejected]


def summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured, as (name, value); intervals resample prompts."""
    length = found["length"]
    return [
        ("held-out pairs", str(found["pairs"])),
        ("accuracy", _share(found["accuracy"])),
        ("the longer one wins", _share(length["longer_wins"])),
        ("accuracy where the longer was chosen", _share(length["accuracy_longer_chosen"])),
        ("accuracy where the shorter was chosen", _share(length["accuracy_shorter_chosen"])),
        ("negative log-likelihood", f"{found['nll']:.3f} nats a pair; knowing nothing is 0.693"),
        ("calibration error", f"{found['ece']:.3f}"),
    ]


def _share(interval: dict[str, float] | None) -> str:
    if interval is None:
        return "no such pair"
    return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="A reward model of HH-RLHF's comparisons, from scratch.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/hh, or runs/hh-quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small part of everything")
    given = parser.parse_args(arguments)
    if not given.data.is_dir():
        sys.exit(f"{given.data}: no such folder. Give the data with --data; examples/README.md says what lies there.")
    out = given.out or Path("runs/hh-quick" if given.quick else "runs/hh")
    found = experiment(given.data, out, QUICK if given.quick else Size(), given.seed)
    for name, value in summary(found):
        print(f"{name:<40}{value}")
    return found


if __name__ == "__main__":
    main()
