"""A reward that can be verified: a small model gets better at sums because a program checks them.

    17+25=   ->   42         1 if the number is right, 0 if not (``check: number``)

A model made from scratch sees the answers of a few questions (supervised), then only whether its own answers to further
questions are right (GRPO). Measured on questions that neither has seen.

    python examples/arithmetic.py                # the whole experiment; the same command resumes it

Needs nothing beside palate: no data, no network, no GPU.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import palate
from palate.data.records import Demonstration, Prompt, write_records
from palate.evaluation.statistics import cluster_bootstrap

LARGEST = 40  # numbers are 0 to 39
TOKENS = 4  # of an answer at most, its end included


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    shown: int = 450  # questions whose answers are shown
    held_out: int = 200  # questions for the evaluation
    samples: int = 4  # answers to each, before and after
    epochs: float = 40  # of the supervised part
    batches: int = 300  # of reinforcement learning
    batch_size: int = 32  # questions a batch
    samples_per_prompt: int = 8


def questions(seed: int) -> list[Prompt]:
    """Every sum, shuffled, with its answer as a field."""
    every = [(a, b) for a in range(LARGEST) for b in range(LARGEST)]
    random.Random(f"questions {seed}").shuffle(every)
    return [Prompt(f"{a}+{b}=", {"answer": a + b}) for a, b in every]


def make_tokenizer(where: Path) -> Path:
    """A token a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<begin>", "<end>", *"0123456789+="]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<begin>", eos_token="<end>"
    )
    tokenizer.save_pretrained(where)
    return where


def accuracy(model: Path, held_out: Sequence[Prompt], samples: int, seed: int) -> list[float]:
    """How many answers, sampled at temperature 1, are right: [estimate, low, high], by resampling questions."""
    asked = [str(prompt.prompt) for prompt in held_out]
    lines = palate.sample(model, asked, samples_per_prompt=samples, seed=seed, max_new_tokens=TOKENS)
    wanted = [str(prompt.fields["answer"]) for prompt in held_out for _ in range(samples)]
    right = [float(line["response"] == answer) for line, answer in zip(lines, wanted, strict=True)]
    return list(cluster_bootstrap(right, [line["prompt"] for line in lines], share=True))


def experiment(out: Path, size: Size, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Run it, and return its figures."""
    every = questions(seed)
    held_out, shown = every[: size.held_out], every[size.held_out : size.held_out + size.shown]
    out.mkdir(parents=True, exist_ok=True)
    answers = [Demonstration(p.prompt, str(p.fields["answer"])) for p in shown]
    write_records(out / "answers.jsonl", answers, overwrite=True)
    write_records(out / "questions.jsonl", every[size.held_out :], overwrite=True)
    sft = palate.train(
        "sft",
        model={
            "architecture": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
        },
        tokenizer=str(make_tokenizer(out / "tokenizer")),
        data={"train": out / "answers.jsonl", "validation_fraction": 0},
        training={"learning_rate": 3e-3, "epochs": size.epochs, "batch_size": 32, "save_every": 0, "seed": seed},
        out=out / "sft",
        quiet=quiet,
    )
    tuned = palate.train(
        "grpo",
        model=sft / "model",
        reward={"check": "number"},
        data={"train": out / "questions.jsonl", "validation_fraction": 0},
        method_settings={"kl_coef": 0.0},
        sampling={"max_new_tokens": TOKENS},
        samples_per_prompt=size.samples_per_prompt,
        training={
            "learning_rate": 4e-4,
            "max_steps": size.batches,
            "batch_size": size.batch_size,
            "eval_every": 0,
            "save_every": 0.25,
            "seed": seed,
        },
        out=out / "grpo",
        quiet=quiet,
    )
    figures = {
        "before": accuracy(sft / "model", held_out, size.samples, seed + 1),
        "after": accuracy(tuned / "model", held_out, size.samples, seed + 1),
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Sums, learnt from a reward that checks them.")
    parser.add_argument("--out", type=Path, default=Path("runs/arithmetic"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    figures = experiment(given.out, Size(), given.seed)
    for when, found in figures.items():
        share, low, high = (f"{100 * x:.1f}" for x in found)
        print(f"held-out sums right {when:<7}{share} % [{low}, {high}]")
    return figures


if __name__ == "__main__":
    main()
