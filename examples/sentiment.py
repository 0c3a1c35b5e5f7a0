"""Controlled sentiment, end to end: a story teller learns to write happier stories from ranked continuations.

    openings of TinyStories  ->  K = 4 continuations of each by a small story model  ->  a noisy annotator ranks them by
    sentiment  ->  reward model  ->  PPO (or several methods)  ->  sentiment on openings that nothing was trained on

The task is that of Ziegler et al. 2019 (arXiv:1909.08593, section 3.1) and Rafailov et al. 2023 (arXiv:2305.18290, section
6.1): the gold preference is a program, so what people "really" want can be measured at the end. Here it is VADER (Hutto
and Gilbert 2014): a sentiment in [-1, 1], read off the continuation alone.

    python examples/sentiment.py                  # the whole experiment with PPO; the same command resumes it
    python examples/sentiment.py --methods all    # six methods on the same prompts and reward model, and one picture
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import palate
from palate.data.records import Prompt, write_records
from palate.evaluation.frontier import pareto
from palate.evaluation.statistics import Interval
from palate.feedback.simulated import SimulatedAnnotator, annotate, bayes_accuracy
from palate.pipelines.compare import compare
from palate.report.charts import distribution_chart
from palate.report.frontier_chart import Dot, Family, frontier_chart
from palate.report.metrics import metric_charts, read_metrics
from palate.report.page import Headline, Page, Sample, Section, Table, write_page

OPENING = 12  # words of a story that are the prompt
TOKENS = 48  # of a continuation at most
K = 4  # continuations of an opening that are ranked
# Two continuations whose sentiment differs by 0.25 of the 2 that are possible are ranked right in 73 % of cases.
ANNOTATOR = SimulatedAnnotator("reader", temperature=0.25)
KL_COEF = 0.15  # reward units per nat


@dataclass(frozen=True)
class Way:
    """How one method is run. Every method draws the same number of continuations a batch.

    Attributes:
        settings: of the method.
        group: continuations of one opening in a batch.
        rate: factor on the learning rate.
    """

    settings: Mapping[str, Any]
    group: int = 1
    rate: float = 1.0


EIGHT = {"epochs": 2, "minibatches": 4}  # updates a batch
# But for best_of_n, which has no price of distance, all have the same optimum: reference * exp(reward / KL_COEF) / Z. So grpo
# charges the KL in the reward, not in the loss, and online_dpo has soft labels and KL_COEF as its beta.
WAYS = {
    "ppo": Way({"kl_coef": KL_COEF, **EIGHT}),
    "rloo": Way({"kl_coef": KL_COEF, **EIGHT}, group=4),
    "grpo": Way({"kl_coef": KL_COEF, "kl": "reward", **EIGHT}, group=4),
    "reinforce_pp": Way({"kl_coef": KL_COEF, **EIGHT}),
    "online_dpo": Way({"beta": KL_COEF}, group=4, rate=4),  # one update a batch, where the others have eight
    "best_of_n": Way(EIGHT, group=4),
}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    labelled: int = 800  # openings whose continuations are ranked
    held_out: int = 200  # openings for the evaluation
    samples: int = 4  # continuations of each at the evaluation, before and after
    reward_epochs: float = 2
    batches: int = 30  # of every method
    batch_size: int = 128  # continuations a batch
    learning_rate: float = 3e-4


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


def experiment(
    data: Path, out: Path, size: Size, seed: int = 0, quiet: bool = False, methods: Sequence[str] = ("ppo",)
) -> dict[str, Any]:
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
    judged = json.loads((reward / "evaluation.json").read_text())
    figures: dict[str, Any] = {"reward_model": judged, "ceiling": ceiling, "methods": {}}
    for name in methods:
        run = align(name, model, reward / "model", out, size, seed, quiet)
        found, entries = compare(
            str(model),
            str(run / "model"),
            [Prompt(p) for p in held_out],
            sentiment,
            str(reward / "model"),
            samples_per_prompt=size.samples,
            max_new_tokens=TOKENS,
            seed=seed + 1,
        )
        figures["methods"][name] = found | {"samples": entries}
        (out / "figures.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False))
    return figures


def align(name: str, model: Path, reward: Path, out: Path, size: Size, seed: int, quiet: bool) -> Path:
    """One method on the openings that were not held out."""
    way = WAYS[name]
    return palate.train(
        name,
        model=model,
        # gold is watched, not trained on: its weight is 0
        reward={"reward": {"model": reward}, "gold": {"function": f"{__file__}:sentiment", "weight": 0}},
        value=reward if name == "ppo" else None,
        data={"train": out / "openings.jsonl", "validation_fraction": 0.05, "max_length": 128},
        method_settings=dict(way.settings),
        sampling={"max_new_tokens": TOKENS},
        samples_per_prompt=way.group,
        training={
            "learning_rate": size.learning_rate * way.rate,
            "max_steps": size.batches,
            "batch_size": size.batch_size // way.group,
            "warmup": 3,
            "eval_every": 0,
            "save_every": 0.25,
            "seed": seed,
        },
        out=out / name,
        quiet=quiet,
    )


def _split(texts: list[str], count: int) -> tuple[list[str], list[str]]:
    return texts[:count], texts[count:]


def summary(figures: dict[str, Any], method: str) -> list[tuple[str, str]]:
    """What was measured of one method, as (name, value)."""
    judged, accuracy = figures["reward_model"], figures["reward_model"]["accuracy"]
    ceiling, figures = figures["ceiling"], figures["methods"][method]
    before, after = figures["before"], figures["after"]
    return [
        (
            "reward model, held-out accuracy",
            f"{_interval(list(accuracy.values()), 3)} on {judged['pairs']} pairs; at most {ceiling:.3f} is possible",
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


COLUMNS = ("", "gold sentiment", "KL, nats", "score", f"score - {KL_COEF} KL", "distinct-2", "tokens", "front")


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """One a method, and the start; the last cell marks those that no other beats in both gold sentiment and KL."""
    found = figures["methods"]
    points = [(0.0, next(iter(found.values()))["before"]["gold"][0])]
    points += [(each["kl"][0], each["after"]["gold"][0]) for each in found.values()]
    best = pareto(points, (True, False))
    facts = [("before", next(iter(found.values()))["before"], "0")]
    facts += [(name, each["after"], _interval(each["kl"])) for name, each in found.items()]
    return [
        (
            name,
            _interval(fact["gold"]),
            kl,
            _interval(fact["score"]),
            f"{fact['score'][0] - KL_COEF * distance:.2f}",  # what all but best_of_n maximise
            f"{fact['distinct_2']:.3f}",
            f"{fact['tokens']:.1f}",
            "●" if front else "",
        )
        for (name, fact, kl), (distance, _), front in zip(facts, points, best, strict=True)
    ]


def picture(figures: dict[str, Any], out: Path) -> str:
    """Gold sentiment against KL on held-out openings; the trails are what training itself saw, on its own openings."""
    best = {row[0] for row in rows(figures) if row[-1]}
    found = figures["methods"]
    families = []
    for name, each in found.items():
        dot = Dot(Interval(*each["kl"]), Interval(*each["after"]["gold"]), name, name in best, trail(out / name))
        families.append(Family(name, [dot]))
    before = next(iter(found.values()))["before"]["gold"]
    start = Family("", [Dot(0.0, Interval(*before), "before", "before" in best)], quiet=True)
    title, unit = "Gold sentiment against KL", "held-out openings; small dots: during training"
    across = "sequence KL to the model before, nats"
    return frontier_chart(title, unit, [*families, start], across=across, up="gold sentiment", root=True)


def trail(run: Path, parts: int = 6) -> list[tuple[float, float]]:
    """(KL, gold sentiment) along a run: means over equal parts of its batches; none where the KL was not measured."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line.get("split") == "train"]
    points = [(line["kl/reference"], line["score/gold"]) for line in lines if "kl/reference" in line]
    size = max(1, -(-len(points) // parts))  # a batch alone is noise
    blocks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(x for x, _ in block), fmean(y for _, y in block)) for block in blocks]


def page(figures: dict[str, Any], out: Path) -> Path:
    """``report.html``: the picture of all methods, then samples side by side and the curves of every run."""
    found, several = figures["methods"], len(figures["methods"]) > 1
    first = found[next(iter(found))]
    groups = {"before": first["gold_values"]["before"]}
    groups |= {name if several else "after": each["gold_values"]["after"] for name, each in found.items()}
    shown = dict([*groups.items()][:4])
    sections = []
    if several:
        note = "A ring: no other is at least as good in both and better in one, by the estimates alone."
        sections.append(Section("What each method bought", note, charts=[picture(figures, out)]))
        sections.append(Section("Methods", table=Table(COLUMNS, rows(figures), numbers=COLUMNS[1:-1])))
    sections.append(Section("What changed", charts=[distribution_chart("Sentiment", "held-out openings", shown)]))
    for name, title in [*((name, f"Training: {name}") for name in found), ("reward", "Reward model")]:
        charts, more = metric_charts(read_metrics(out / name / "metrics.jsonl"))
        sections.append(Section(title, charts=charts, more_charts=more))
    name = next(iter(found))
    report = Page(
        title="A story teller learns to write happier stories",
        lead=f"{first['prompts']} openings that nothing was trained on, {first['responses']} continuations each time.",
        headlines=[Headline(label, *_value_and_note(value)) for label, value in summary(figures, name)[:6]],
        samples=[
            Sample(e["prompt"], e["before"], e["after"], e["before_gold"], e["after_gold"])
            for e in first["samples"][:8]
        ],
        after=name,
        samples_text="The first continuation of the first eight openings, with its gold sentiment; none was chosen.",
        sections=sections,
        footer=f"Large figures and samples: {name}. Intervals: 95 %, by resampling openings.",
    )
    return write_page(report, out / "report.html")


def _value_and_note(text: str) -> tuple[str, str]:
    value, _, note = text.partition(" ")
    return value, note


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Controlled sentiment: rankings, reward model, methods, evaluation.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/sentiment, or runs/sentiment-quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["ppo"], choices=[*WAYS, "all"], help="default: ppo")
    parser.add_argument("--batches", type=int, default=None, help="of every method")
    parser.add_argument("--quick", action="store_true", help="a small part of everything")
    given = parser.parse_args(arguments)
    if not given.data.is_dir():
        sys.exit(f"{given.data}: no such folder. Give the data with --data; examples/README.md says what lies there.")
    size = QUICK if given.quick else Size()
    size = replace(size, batches=given.batches) if given.batches else size
    out = given.out or Path("runs/sentiment-quick" if given.quick else "runs/sentiment")
    methods = list(WAYS) if "all" in given.methods else list(dict.fromkeys(given.methods))
    figures = experiment(given.data, out, size, given.seed, methods=methods)
    for name in methods:
        print(f"\n{name}" if len(methods) > 1 else "")
        for label, value in summary(figures, name):
            print(f"{label:<34}{value}")
    if len(methods) > 1:
        print()
        for row in (COLUMNS, *rows(figures)):
            print("".join(f"{cell:<22}" for cell in row).rstrip())
    for entry in figures["methods"][methods[0]]["samples"][:4]:
        print(f"\n{entry['prompt']} ...")
        print(f"   before {entry['before_gold']:+.2f}   ... {entry['before'].strip()}")
        print(f"   after  {entry['after_gold']:+.2f}   ... {entry['after'].strip()}")
    print(f"\npage: {page(figures, out)}")
    return figures


if __name__ == "__main__":
    main()
