"""Preference optimisation without a reward model, four ways on the same comparisons: DPO, KTO, ORPO, SimPO.

    832 pairs of a polite and a rude answer  ->  665 or so to train on, the rest held out by prompt  ->  who scores higher?

What scores a response is what the method trains: log pi/pi_ref summed over it (DPO, KTO) or log pi a token (ORPO, SimPO).
KTO is given each side of a comparison as a judgement of its own.

    python examples/politeness_preferences.py        # the same command resumes it

Needs the folder of data (--data) with ``preferences/politeness_ai.jsonl.gz`` and ``models/stories260k-hf``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import palate
from palate.data.ranking import split_by_prompt
from palate.data.records import Comparison, Judgement, read_records, write_records

METHODS = ("dpo", "kto", "orpo", "simpo")
LENGTH_FREE = {"orpo", "simpo"}  # score a response by its mean log-probability, without a reference


def experiment(data: Path, out: Path, methods: Sequence[str] = METHODS, limit: int | None = None) -> dict[str, Any]:
    """Train each method and measure it on the held-out pairs; {method: {"before", "after"}}."""
    records = read_records(data / "preferences/politeness_ai.jsonl.gz", "comparisons", limit=limit)
    train, held_out = split_by_prompt(records, 0.2, 0)
    judgements = [
        Judgement(pair.prompt, text, desirable=good)
        for pair in train
        for text, good in ((pair.chosen, True), (pair.rejected, False))
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_records(out / "comparisons.jsonl", train, overwrite=True)
    write_records(out / "judgements.jsonl", judgements, overwrite=True)
    model, found = data / "models/stories260k-hf", {}
    for method in methods:
        run = palate.train(
            method,
            model=model,
            data={
                "train": out / ("judgements.jsonl" if method == "kto" else "comparisons.jsonl"),
                "validation_fraction": 0.0,
            },
            training={"learning_rate": 5e-4, "epochs": 3, "batch_size": 16, "seed": 0},
            out=out / method,
            quiet=True,
        )
        before = accuracy(model, model, held_out, method in LENGTH_FREE)
        after = accuracy(run / "model", model, held_out, method in LENGTH_FREE)
        found[method] = {"before": before, "after": after}
        shown = [f"{x['estimate']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in (before, after)]
        print(f"{method:6} {shown[0]} -> {shown[1]}   ({after['pairs']} pairs)")
    (out / "accuracy.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def accuracy(policy: Path, reference: Path, pairs: Sequence[Comparison], length_free: bool) -> dict[str, float]:
    """Share of pairs whose chosen response scores higher, ties one half; 95 % by resampling prompts."""
    import torch

    from palate.data.chat import Chat
    from palate.data.collate import collate, encode_records
    from palate.data.kinds import prompt_key
    from palate.evaluation.statistics import cluster_bootstrap
    from palate.models.forward import response_logprobs
    from palate.models.load import load_policy, load_tokenizer

    items, _ = encode_records(pairs, "comparisons", Chat(load_tokenizer(policy)), max_length=512)
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
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/politeness_preferences"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    given = parser.parse_args()
    if not given.data.is_dir():
        sys.exit(f"{given.data}: no such folder. Give the data with --data; examples/README.md says what lies there.")
    experiment(given.data, given.out, given.methods)


if __name__ == "__main__":
    main()
