"""Preference optimisation without a reward model, four ways on the same comparisons: DPO, KTO, ORPO, SimPO.

    politeness    832 pairs of a polite and a rude answer, judged by a language model
    hh            6,057 pairs of HH-RLHF, judged by people (Bai et al. 2022, arXiv:2204.05862)

A fifth is held out: by prompt, or where several lengths of one conversation stand in the data by the conversation's opening.

What scores a response is what the method trains: log pi/pi_ref summed over it (DPO, KTO) or log pi a token (ORPO, SimPO).
KTO is given each side of a comparison as a judgement of its own.

    python examples/preferences.py                   # politeness; the same command resumes it
    python examples/preferences.py hh --methods dpo kto

Needs the folder of data (--data) with ``preferences/`` and ``models/stories260k-hf``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import palate
from palate.data.ranking import split_by_prompt
from palate.data.records import Comparison, Judgement, read_records, write_records

METHODS = ("dpo", "kto", "orpo", "simpo")
LENGTH_FREE = {"orpo", "simpo"}  # score a response by its mean log-probability, without a reference


@dataclass(frozen=True)
class Task:
    """Which comparisons, and how long to learn from them."""

    file: str
    split_by: Literal["prompt", "opening"]
    max_length: int  # tokens of a row; older turns are cut first
    epochs: float
    learning_rate: float


TASKS = {
    "politeness": Task("preferences/politeness_ai.jsonl.gz", "prompt", max_length=512, epochs=3, learning_rate=5e-4),
    "hh": Task("preferences/hh_rlhf.jsonl.gz", "opening", max_length=192, epochs=1, learning_rate=1e-4),
}


def experiment(
    data: Path, out: Path, task: Task, methods: Sequence[str] = METHODS, limit: int | None = None
) -> dict[str, Any]:
    """Train each method and measure it on the held-out pairs; {method: {"before", "after"}, "longer_wins": ...}."""
    records = read_records(data / task.file, "comparisons", limit=limit)
    train, held_out = split_by_prompt(records, 0.2, 0, by=task.split_by)
    judgements = [
        Judgement(pair.prompt, text, desirable=good)
        for pair in train
        for text, good in ((pair.chosen, True), (pair.rejected, False))
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_records(out / "comparisons.jsonl", train, overwrite=True)
    write_records(out / "judgements.jsonl", judgements, overwrite=True)
    model, found = data / "models/stories260k-hf", {"longer_wins": longer_wins(held_out)}
    print(f"{'longer':6} {shown(found['longer_wins'])}   (the longer text wins, {len(held_out)} pairs)")
    for method in methods:
        run = palate.train(
            method,
            model=model,
            data={
                "train": out / ("judgements.jsonl" if method == "kto" else "comparisons.jsonl"),
                "validation_fraction": 0.0,
                "max_length": task.max_length,
            },
            training={"learning_rate": task.learning_rate, "epochs": task.epochs, "batch_size": 16, "seed": 0},
            out=out / method,
            quiet=True,
        )
        before, after = (
            accuracy(policy, model, held_out, method in LENGTH_FREE, task.max_length)
            for policy in (model, run / "model")
        )
        found[method] = {"before": before, "after": after}
        print(f"{method:6} {shown(before)} -> {shown(after)}   ({after['pairs']} pairs)", flush=True)
    (out / "accuracy.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def shown(interval: dict[str, float]) -> str:
    return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def longer_wins(pairs: Sequence[Comparison]) -> dict[str, float]:
    """What knowing nothing but length gives, ties one half."""
    from palate.data.kinds import prompt_key
    from palate.evaluation.statistics import cluster_bootstrap

    leads = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    right = [0.5 if lead == 0 else float(lead > 0) for lead in leads]
    return cluster_bootstrap(right, [prompt_key(pair.prompt) for pair in pairs], share=True)._asdict()


def accuracy(
    policy: Path, reference: Path, pairs: Sequence[Comparison], length_free: bool, max_length: int
) -> dict[str, float]:
    """Share of pairs whose chosen response scores higher, ties one half; 95 % by resampling prompts."""
    import torch

    from palate.data.chat import Chat
    from palate.data.collate import collate, encode_records
    from palate.data.kinds import prompt_key
    from palate.evaluation.statistics import cluster_bootstrap
    from palate.models.forward import response_logprobs
    from palate.models.load import load_policy, load_tokenizer

    items, _ = encode_records(pairs, "comparisons", Chat(load_tokenizer(policy)), max_length=max_length)
    models = [load_policy(where, trainable=False) for where in (policy, reference)]
    right, prompts = [], []
    for item in items:
        batch = collate([item], "comparisons")
        with torch.no_grad():
            scores = response_logprobs(models[0], batch.tokens)
            if length_free:
                scores = scores / batch.tokens.response_mask.sum(-1)
            else:
                scores = scores - response_logprobs(models[1], batch.tokens)
        lead = scores[batch.chosen] - scores[batch.rejected]
        right += ((lead > 0).float() + (lead == 0).float() / 2).tolist()
        prompts += [prompt_key(item.record.prompt)] * len(lead)
    return cluster_bootstrap(right, prompts, share=True)._asdict() | {"pairs": len(right)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=list(TASKS), default="politeness")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=None, help="default: runs/TASK_preferences")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    given = parser.parse_args()
    if not given.data.is_dir():
        sys.exit(f"{given.data}: no such folder. Give the data with --data; examples/README.md says what lies there.")
    out = given.out or Path(f"runs/{given.task}_preferences")
    experiment(given.data, out, TASKS[given.task], given.methods)


if __name__ == "__main__":
    main()
