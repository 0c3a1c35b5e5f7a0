"""Controlled sentiment, end to end: a story teller learns to write happier stories from ranked continuations.

    openings of TinyStories  ->  K = 4 continuations of each by a small story model  ->  a noisy annotator ranks them by
    sentiment  ->  reward model  ->  PPO  ->  sentiment on openings that nothing was trained on, before and after

The task is that of Ziegler et al. 2019 (arXiv:1909.08593, section 3.1) and Rafailov et al. 2023 (arXiv:2305.18290, section
6.1): the gold preference is a program, so what people "really" want can be measured at the end. Here it is VADER (Hutto
and Gilbert 2014): a sentiment in [-1, 1], read off the continuation alone.

    python examples/sentiment.py                  # the whole experiment; the same command resumes it
    python examples/sentiment.py --quick          # a minute's worth of it

Needs: pip install ".[examples]" in the checkout, and the folder of data (--data) with ``lm/tinystories.jsonl.gz`` and
``models/stories260k-hf``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import palate
from palate.data.records import Prompt, write_records
from palate.feedback.simulated import SimulatedAnnotator, annotate, bayes_accuracy
from palate.pipelines.compare import compare
from palate.report.charts import distribution_chart
from palate.report.metrics import metric_charts, read_metrics
from palate.report.page import Headline, Page, Sample, Section, write_page

OPENING = 12  # words of a story that are the prompt
TOKENS = 48  # of a continuation at most
K = 4  # continuations of an opening that are ranked
# Two continuations whose sentiment differs by 0.25 of the 2 that are possible are ranked right in 73 % of cases.
ANNOTATOR = SimulatedAnnotator("reader", temperature=0.25)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    labelled: int = 800  # openings whose continuations are ranked
    held_out: int = 200  # openings for the evaluation
    samples: int = 4  # continuations of each at the evaluation, before and after
    reward_epochs: float = 2
    batches: int = 30  # of PPO
    batch_size: int = 128  # openings a batch
    learning_rate: float = 3e-4  # of PPO


QUICK = Size(labelled=240, held_out=64, samples=2, batches=12, batch_size=64, learning_rate=6e-4)


@cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        sys.exit('examples/sentiment.py needs the package vaderSentiment: pip install ".[examples]"')
    return SentimentIntensityAnalyzer()


def sentiment(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The gold preference, in the form of a reward function: VADER's compound score of each response, in [-1, 1]."""
    return [_vader().polarity_scores(response)["compound"] for response in responses]


def openings(stories: Path, seed: int) -> list[str]:
    """The first words of each story, every opening once, shuffled."""
    with gzip.open(stories, "rt", encoding="utf-8") as lines:
        words = [json.loads(line)["text"].split() for line in lines]
    found = list(dict.fromkeys(" ".join(w[:OPENING]) for w in words if len(w) > OPENING))
    random.Random(seed).shuffle(found)
    return found


def label(model: Path, prompts: Sequence[str], where: Path, seed: int) -> float:
    """Write rankings of K sampled continuations; returns the accuracy that no reward model can exceed on such labels."""
    made = palate.sample(model, prompts, samples_per_prompt=K, seed=seed, max_new_tokens=TOKENS)
    texts = [[line["response"] for line in made[i : i + K]] for i in range(0, len(made), K)]
    gold = [sentiment([], responses) for responses in texts]
    rankings = annotate([Prompt(p) for p in prompts], texts, gold, [ANNOTATOR], seed=seed)
    write_records(where, rankings, overwrite=True)
    return bayes_accuracy(gold, texts, [ANNOTATOR])


def experiment(data: Path, out: Path, size: Size, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Run it, and return its figures; intervals are [estimate, low, high], by resampling openings."""
    model = data / "models" / "stories260k-hf"
    held_out, train = _split(openings(data / "lm" / "tinystories.jsonl.gz", seed), size.held_out)
    out.mkdir(parents=True, exist_ok=True)
    ceiling = label(model, train[: size.labelled], out / "rankings.jsonl", seed)
    write_records(out / "openings.jsonl", [Prompt(p) for p in train], overwrite=True)

    reward = palate.train(
        "reward",
        model=model,
        reference=model,  # scores have mean 0 and standard deviation 1 on its samples, cut at TOKENS as PPO's will be
        sampling={"max_new_tokens": TOKENS},
        data={"train": out / "rankings.jsonl", "validation_fraction": 0.15, "max_length": 128},
        training={"learning_rate": 1e-3, "epochs": size.reward_epochs, "batch_size": 16, "seed": seed},
        out=out / "reward",
        quiet=quiet,
    )
    ppo = palate.train(
        "ppo",
        model=model,
        # gold is watched, not trained on: its weight is 0
        reward={"reward": {"model": reward / "model"}, "gold": {"function": f"{__file__}:sentiment", "weight": 0}},
        value=reward / "model",
        data={"train": out / "openings.jsonl", "validation_fraction": 0.05, "max_length": 128},
        method_settings={"kl_coef": 0.15, "epochs": 2, "minibatches": 4},
        sampling={"max_new_tokens": TOKENS},
        training={
            "learning_rate": size.learning_rate,
            "max_steps": size.batches,
            "batch_size": size.batch_size,
            "warmup": 3,
            "eval_every": 0,
            "save_every": 0.25,
            "seed": seed,
        },
        out=out / "ppo",
        quiet=quiet,
    )
    figures, entries = compare(
        str(model),
        str(ppo / "model"),
        [Prompt(p) for p in held_out],
        sentiment,
        str(reward / "model"),
        samples_per_prompt=size.samples,
        max_new_tokens=TOKENS,
        seed=seed + 1,
    )
    judged = json.loads((reward / "evaluation.json").read_text())
    figures |= {"reward_model": judged, "ceiling": ceiling, "samples": entries}
    (out / "figures.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False))
    return figures


def _split(texts: list[str], count: int) -> tuple[list[str], list[str]]:
    return texts[:count], texts[count:]


def summary(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured, as (name, value)."""
    before, after, judged = figures["before"], figures["after"], figures["reward_model"]
    accuracy = judged["accuracy"]
    return [
        (
            "reward model, held-out accuracy",
            f"{_interval(list(accuracy.values()), 3)} on {judged['pairs']} pairs; at most {figures['ceiling']:.3f} is possible",
        ),
        ("gold sentiment before", _interval(before["gold"])),
        ("gold sentiment after", _interval(after["gold"])),
        ("gain on the same openings", _interval(figures["gold_gain"])),
        ("win rate over before, by gold", _interval(figures["win_rate"])),
        ("sequence KL to before, nats", f"{_interval(figures['kl'])}; before: 0"),
        ("tokens of a continuation", f"{before['tokens']:.1f} before, {after['tokens']:.1f} after"),
        ("distinct-2 over all", f"{before['distinct_2']:.3f} before, {after['distinct_2']:.3f} after"),
    ]


def _interval(values: Sequence[float], digits: int = 2) -> str:
    estimate, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{estimate} [{low}, {high}]"


def page(figures: dict[str, Any], out: Path) -> Path:
    """``report.html``: the figures, samples side by side, curves of both runs."""
    values = figures["gold_values"]
    spread = distribution_chart(
        "Sentiment", "held-out openings", {"before": values["before"], "after": values["after"]}
    )
    sections = [Section("What changed", charts=[spread])]
    for name, title in (("ppo", "Reinforcement learning"), ("reward", "Reward model")):
        charts, more = metric_charts(read_metrics(out / name / "metrics.jsonl"))
        sections.append(Section(title, charts=charts, more_charts=more))
    report = Page(
        title="A story teller learns to write happier stories",
        lead=f"{figures['prompts']} openings that nothing was trained on, {figures['responses']} continuations each time.",
        headlines=[Headline(name, *_value_and_note(value)) for name, value in summary(figures)[:6]],
        samples=[
            Sample(e["prompt"], e["before"], e["after"], e["before_gold"], e["after_gold"])
            for e in figures["samples"][:8]
        ],
        samples_text="The first continuation of the first eight openings, with its gold sentiment; none was chosen.",
        sections=sections,
        footer="Intervals: 95 %, by resampling openings.",
    )
    return write_page(report, out / "report.html")


def _value_and_note(text: str) -> tuple[str, str]:
    value, _, note = text.partition(" ")
    return value, note


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Controlled sentiment: rankings, reward model, PPO, evaluation.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/sentiment, or runs/sentiment-quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=None, help="of PPO")
    parser.add_argument("--quick", action="store_true", help="a small part of everything")
    given = parser.parse_args(arguments)
    if not given.data.is_dir():
        sys.exit(f"{given.data}: no such folder. Give the data with --data; examples/README.md says what lies there.")
    size = QUICK if given.quick else Size()
    size = replace(size, batches=given.batches) if given.batches else size
    out = given.out or Path("runs/sentiment-quick" if given.quick else "runs/sentiment")
    figures = experiment(given.data, out, size, given.seed)
    for name, value in summary(figures):
        print(f"{name:<34}{value}")
    for entry in figures["samples"][:4]:
        print(f"\n{entry['prompt']} ...")
        print(f"   before {entry['before_gold']:+.2f}   ... {entry['before'].strip()}")
        print(f"   after  {entry['after_gold']:+.2f}   ... {entry['after'].strip()}")
    print(f"\npage: {page(figures, out)}")
    return figures


if __name__ == "__main__":
    main()
