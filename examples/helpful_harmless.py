"""Helpful against harmless: two rewards that pull apart, the policies between them, and what mixing weights gives for free.

    HH-RLHF (Bai et al. 2022, arXiv:2204.05862)  ->  a small language model of the chosen replies  ->  two reward models, one of
    the helpful-base comparisons, one of harmless-base  ->  RLOO on w * helpful + (1 - w) * harmless for five w  ->  beside
    them the soups of the two extremes (Rame et al. 2023, arXiv:2306.04488)  ->  one picture

Both rewards are normalised on samples of the reference before they are weighed. Everything is measured on held-out
conversations, by the same two reward models: the picture shows what optimisation does with two objectives and whether a
soup keeps up with training. It says nothing of real help or harm: from 1,300 comparisons each, a model of half a million
weights learns little of either (its accuracy on held-out pairs is printed beside that of "the longer one wins").

    python examples/helpful_harmless.py            # the same command resumes it
    python examples/helpful_harmless.py --quick

Needs the folder of data (--data) with ``preferences/hh_rlhf.jsonl.gz``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hh_reward import tokenizer_of  # beside this file

import palate
from palate.data.collate import encode_records
from palate.data.ranking import split_by_prompt
from palate.data.records import Comparison, Demonstration, Prompt, write_records
from palate.evaluation.frontier import pareto
from palate.evaluation.statistics import Interval
from palate.models.load import load_policy
from palate.models.rewards import load_reward
from palate.models.soup import make_soup, soup_name
from palate.pipelines.answers import Speaker
from palate.pipelines.measure import Yardstick
from palate.report.frontier_chart import Dot, Family, frontier_chart
from palate.report.page import Page, Section, Table, write_page
from palate.run_folder import read_settings

SIDES = ("helpful", "harmless")
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # w, the weight of "helpful"
MODEL = {
    "architecture": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    comparisons: int | None = None  # of each side; None = all (1,665 and 1,675)
    vocabulary: int = 2048
    max_length: int = 128  # tokens of a row; older turns are cut first
    tokens: int = 24  # of a reply at most
    language_epochs: float = 2
    reward_epochs: float = 1
    prompts: int = 24  # of RLOO a batch, four replies to each
    batches: int = 16
    shares: Sequence[float] = SHARES
    held_out: int = 150  # conversations for the evaluation
    samples: int = 4  # replies to each


QUICK = Size(
    comparisons=240,
    vocabulary=600,
    max_length=80,
    tokens=16,
    language_epochs=1,
    prompts=8,
    batches=4,
    shares=(1.0, 0.5, 0.0),
    held_out=24,
    samples=2,
)


def comparisons(file: Path, side: str, limit: int | None) -> list[Comparison]:
    """Those of ``helpful-base`` or ``harmless-base``."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    found = [
        Comparison(tuple(r["prompt"]), r["chosen"], r["rejected"]) for r in records if r["subset"] == f"{side}-base"
    ]
    return found[:limit]


def experiment(data: Path, out: Path, size: Size, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Run it; returns the judgement of both reward models and what every policy reached ([estimate, low, high])."""
    out.mkdir(parents=True, exist_ok=True)
    pairs = {s: comparisons(data / "preferences" / "hh_rlhf.jsonl.gz", s, size.comparisons) for s in SIDES}
    # One split of both together, by the opening: some conversations stand on both sides.
    train, held_out = split_by_prompt([p for side in SIDES for p in pairs[side]], 0.2, seed, by="opening")
    model = language_model(train, out, size, seed, quiet)
    judged = {s: reward_model(s, pairs[s], train, held_out, model, out, size, seed, quiet) for s in SIDES}
    write_records(out / "prompts.jsonl", _prompts(train), overwrite=True)
    runs = {share: policy(share, model, out, size, seed, quiet) for share in size.shares}
    soups = {share: soup(share, runs, out) for share in size.shares if 0 < share < 1}
    places = {
        "start": model,
        **{f"trained {w:g}": runs[w] / "model" for w in size.shares},
        **{f"soup {w:g}": soups[w] for w in soups},
    }
    figures = {"reward_models": judged, "policies": measure(places, runs[1.0], _prompts(held_out), model, size, seed)}
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures


def language_model(train: Sequence[Any], out: Path, size: Size, seed: int, quiet: bool) -> Path:
    """Where everything starts: from nothing, on the chosen replies of both sides."""
    texts = [text for pair in train for text in (*(turn["content"] for turn in pair.prompt), pair.chosen)]
    tokenizer_of(texts, size.vocabulary).save_pretrained(str(out / "tokenizer"))
    replies = [Demonstration(pair.prompt, pair.chosen, every_turn=True) for pair in train]
    write_records(out / "demonstrations.jsonl", replies, overwrite=True)
    return (
        palate.train(
            "sft",
            model=MODEL,
            tokenizer=out / "tokenizer",
            data={"train": out / "demonstrations.jsonl", "validation_fraction": 0.02, "max_length": size.max_length},
            training={"learning_rate": 3e-3, "epochs": size.language_epochs, "batch_size": 32, "seed": seed},
            sampling={"max_new_tokens": size.tokens},
            out=out / "language_model",
            quiet=quiet,
        )
        / "model"
    )


def reward_model(
    side: str,
    own: Sequence[Comparison],
    train: Sequence[Any],
    held_out: Sequence[Any],
    model: Path,
    out: Path,
    size: Size,
    seed: int,
    quiet: bool,
) -> dict[str, Any]:
    """Train on one side's comparisons; returns the judgement on its held-out ones."""
    mine = {id(pair) for pair in own}
    for name, records in (("train", train), ("held_out", held_out)):
        write_records(out / f"{side}_{name}.jsonl", [r for r in records if id(r) in mine], overwrite=True)
    run = palate.train(
        "reward",
        model=model,
        data={
            "train": out / f"{side}_train.jsonl",
            "validation": out / f"{side}_held_out.jsonl",
            "max_length": size.max_length,
        },
        training={"learning_rate": 5e-4, "epochs": size.reward_epochs, "batch_size": 32, "seed": seed},
        out=out / side,
        quiet=quiet,
    )
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    return found


def policy(share: float, model: Path, out: Path, size: Size, seed: int, quiet: bool) -> Path:
    """RLOO on share * helpful + (1 - share) * harmless; what has weight 0 is only watched."""
    weights = dict(zip(SIDES, (share, 1 - share), strict=True))
    return palate.train(
        "rloo",
        model=model,
        reward={
            side: {"model": out / side / "model", "weight": weights[side], "normalise": "reference"} for side in SIDES
        },
        data={"train": out / "prompts.jsonl", "validation_fraction": 0.02, "max_length": size.max_length},
        method_settings={"kl_coef": 0.1, "epochs": 2, "minibatches": 2},
        sampling={"max_new_tokens": size.tokens},
        samples_per_prompt=4,
        training={
            "learning_rate": 1e-3,
            "max_steps": size.batches,
            "batch_size": size.prompts,
            "warmup": 3,
            "eval_every": 0,
            "save_every": 0,
            "seed": seed,
        },
        out=out / f"trained-{share:g}",
        quiet=quiet,
    )


def soup(share: float, runs: dict[float, Path], out: Path) -> Path:
    """The mean of the weights of the two extremes."""
    weights = (share, 1 - share)
    where = out / f"soup-{soup_name(weights)}"
    make_soup([runs[1.0] / "model", runs[0.0] / "model"], weights, where, overwrite=True)
    return where


def measure(
    places: dict[str, Path], run: Path, prompts: Sequence[Prompt], model: Path, size: Size, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Every policy on the same held-out conversations. Scores are in standard deviations of the reference's samples."""
    start = Speaker.load(str(model))
    reward = read_settings(run / "config.yaml")["reward"]  # with the numbers that "reference" became
    chosen = list({json.dumps(p.prompt): p for p in prompts}.values())[: size.held_out]
    items, _ = encode_records(chosen, "prompts", start.chat, max_length=size.max_length - size.tokens)
    stick = Yardstick(
        start.chat,
        items,
        reference=start.policy,
        reward=load_reward({side: reward[side] | {"weight": 1} for side in SIDES}, start.chat),
        max_new_tokens=size.tokens,
        samples_per_prompt=size.samples,
        seed=seed + 1,
    )
    found = {}
    for name, where in places.items():
        measured = stick.measure(load_policy(where, trainable=False))
        for side in SIDES:
            scale = reward[side]["normalise"]
            measured[side] = [(x - scale["mean"]) / scale["std"] for x in measured[f"score/{side}"]]
        found[name] = measured
    return found


def _prompts(pairs: Sequence[Any]) -> list[Prompt]:
    return [Prompt(pair.prompt) for pair in pairs]


COLUMNS = {"helpful": "helpful", "harmless": "harmless", "kl": "KL, nats", "length/response": "tokens"}


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """One a policy: its name, both scores, KL, length, and a mark if no other is at least as good in both scores."""
    found = figures["policies"]
    points = [(m["helpful"][0], m["harmless"][0]) for m in found.values()]
    best = pareto(points, (False, False))
    return [
        (name, *(_interval(m[key]) for key in COLUMNS), "●" if front else "")
        for (name, m), front in zip(found.items(), best, strict=True)
    ]


def _interval(values: Sequence[float]) -> str:
    estimate, low, high = (f"{value:.2f}" for value in values)
    return f"{estimate} [{low}, {high}]"


def picture(figures: dict[str, Any]) -> str:
    """Helpful across, harmless up: the trained policies, the soups, the start, and a coin between the extremes."""
    found = figures["policies"]
    best = {row[0] for row in rows(figures) if row[-1]}

    def dots(kind: str) -> list[Dot]:
        mine = {name: m for name, m in found.items() if name.split()[0] == kind}
        return [
            Dot(Interval(*m["helpful"]), Interval(*m["harmless"]), name.split()[-1], name in best)
            for name, m in mine.items()
        ]

    families = [
        Family("trained on the weighted sum", dots("trained"), joined=True),
        Family("soup of the extremes", dots("soup"), joined=True),
        Family("one of the extremes by a coin", coin(figures), joined=True, quiet=True),
        Family("", dots("start"), quiet=True),
    ]
    return frontier_chart(
        "Helpful against harmless",
        "scores of the two reward models; a number is the weight of helpful",
        families,
        across="helpful, standard deviations",
        up="harmless, standard deviations",
    )


def coin(figures: dict[str, Any]) -> list[Dot]:
    """What everybody can have who has the extremes: for each conversation one of them, helpful with probability w."""
    ends = [[figures["policies"][name][side][0] for side in SIDES] for name in ("trained 1", "trained 0")]
    shares = [share for share in SHARES if 0 < share < 1]
    mixed = [[w * a + (1 - w) * b for a, b in zip(*ends, strict=True)] for w in shares]
    return [Dot(*point, f"{w:g}") for w, point in zip(shares, mixed, strict=True)]


def summary(figures: dict[str, Any]) -> list[str]:
    """Lines to print."""
    lines = []
    for side, judged in figures["reward_models"].items():
        accuracy, longer = judged["accuracy"], judged["length"]["longer_wins"]
        lines.append(
            f"{side:<10} reward model: {_interval(list(accuracy.values()))} of {judged['pairs']} held-out pairs; "
            f'"the longer one wins": {_interval(list(longer.values()))}'
        )
    table = [("", *COLUMNS.values(), "front"), *rows(figures)]
    return [*lines, "", *("".join(f"{cell:<22}" for cell in row).rstrip() for row in table)]


def page(figures: dict[str, Any], out: Path) -> Path:
    """``report.html``: the picture and the table."""
    columns = ["policy", *COLUMNS.values(), "front"]
    note = (
        "A ring: no other policy is at least as good in both scores, by the estimates alone. Grey: what drawing one of the "
        "two extremes for each conversation gives; a mixture is worth making where it lies above. "
        "Intervals: 95 %, by resampling conversations. The judges are the reward models that were trained on."
    )
    sections = [
        Section("Two objectives", note, charts=[picture(figures)]),
        Section("Policies", table=Table(columns, rows(figures), numbers=columns[1:-1])),
        Section("Reward models", "\n".join(summary(figures)[:2])),
    ]
    lead = "RLOO on a weighted sum of two rewards, and mixtures of the weights of its two extremes."
    return write_page(Page(title="Helpful against harmless", lead=lead, sections=sections), out / "report.html")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Two rewards, policies between them, and soups of the extremes.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/helpful_harmless (-quick)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small part of everything")
    given = parser.parse_args(arguments)
    if not given.data.is_dir():
        sys.exit(f"{given.data}: no such folder. Give the data with --data; examples/README.md says what lies there.")
    out = given.out or Path("runs/helpful_harmless-quick" if given.quick else "runs/helpful_harmless")
    figures = experiment(given.data, out, QUICK if given.quick else Size(), given.seed)
    print("\n".join(summary(figures)))
    print(f"\npage: {page(figures, out)}")
    return figures


if __name__ == "__main__":
    main()
