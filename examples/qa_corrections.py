"""Corrections of answers, used twice: DPO is told which answer is better, DDPO also which words people changed.

    324 answers with the characters that people marked as wrong, and their corrections
    ->  split by question  ->  train each  ->  held-out pairs: who scores higher? held-out answers: where does it charge?

The marks of the uncorrected answer are people's own; those of the correction are found by a diff. A response is scored by
log pi/pi_ref, summed over its tokens (DPO's implicit reward), and as the method itself weighs them (eq. 3 of RLHF-V).

    python examples/qa_corrections.py        # the same command resumes it

Needs the folder of data (--data) with ``segment/finegrained_qa_feedback.jsonl.gz`` and ``models/stories260k-hf``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import palate
from palate.data.ranking import split_by_prompt
from palate.data.records import SegmentedComparison, write_records

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "ddpo": {"beta": 0.1, "gamma": 5.0, "normalise": False},
}
HELD_OUT = 0.3


def corrections(where: Path) -> list[SegmentedComparison]:
    """Each answer that people corrected, with the characters in which they found errors."""
    found = []
    with gzip.open(where, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    for number, record in enumerate(records, 1):
        marked = record["span_errors"]
        before, after = record["responses"][marked["response_index"]], marked["corrected"] or ""
        if after.strip() in ("", before.strip()):
            continue
        spans = tuple((error["start"], error["end"]) for error in marked["errors"])
        prompt = f"Q: {record['question']}\nA: "
        source = f"{where.name}:{number}"
        # An answer in which only something is missing has no marks; where it belongs, the diff says.
        found.append(SegmentedComparison(prompt, after, before, None, spans or None, source=source))
    return found


def experiment(
    data: Path, out: Path, methods: Sequence[str] = tuple(METHODS), limit: int | None = None
) -> dict[str, Any]:
    """Train each method on the same pairs and measure it on the held-out ones; {method: {measure: interval}}."""
    records = corrections(data / "segment/finegrained_qa_feedback.jsonl.gz")[:limit]
    train, held_out = split_by_prompt(records, HELD_OUT, 0)
    out.mkdir(parents=True, exist_ok=True)
    write_records(out / "corrections.jsonl", train, overwrite=True)  # comparisons, to a method that reads those
    model = data / "models/stories260k-hf"
    shorter = [float(len(r.chosen) < len(r.rejected)) + (len(r.chosen) == len(r.rejected)) / 2 for r in held_out]
    found: dict[str, Any] = {"the shorter one wins": {"accuracy": interval(shorter, held_out)}}
    for method in methods:
        run = palate.train(
            method,
            model=model,
            data={"train": out / "corrections.jsonl", "validation_fraction": 0.0, "max_length": 512},
            training={"epochs": 2, "batch_size": 16, "seed": 0},  # the rate is the default of a model this small
            method_settings=METHODS[method],
            out=out / method,
            quiet=True,
        )
        found[method] = measured(run / "model", model, held_out)
    for name, measures in found.items():
        for measure, x in measures.items():
            print(f"{name:20}  {measure:28} {x['estimate']:6.3f} [{x['low']:.3f}, {x['high']:.3f}]")
    print(f"{len(train)} pairs to train on, {len(held_out)} held out")
    (out / "figures.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def measured(policy: Path, reference: Path, records: Sequence[SegmentedComparison]) -> dict[str, dict[str, float]]:
    """Accuracy of the implicit reward, plain and weighted, and what a token of an error is charged beyond others."""
    import torch

    from palate.data.chat import Chat
    from palate.data.collate import collate, encode_records
    from palate.methods.ddpo import segment_logprobs
    from palate.models.forward import token_logprobs
    from palate.models.load import load_policy, load_tokenizer

    items, _ = encode_records(records, "corrections", Chat(load_tokenizer(policy)), max_length=512)
    models = [load_policy(where, trainable=False) for where in (policy, reference)]
    plain, weighted, charged, charged_records = [], [], [], []
    for item in items:
        batch = collate([item], "corrections")
        mask, changed = batch.tokens.response_mask, batch.tokens.extras["changed"]
        with torch.no_grad():
            ratio = token_logprobs(models[0], batch.tokens) - token_logprobs(models[1], batch.tokens)
        for scores, right in (
            (ratio.sum(-1), plain),
            (segment_logprobs(ratio, mask, changed, gamma=5.0, normalise=False), weighted),
        ):
            lead = float(scores[batch.chosen[0]] - scores[batch.rejected[0]])
            right.append(float(lead > 0) + (lead == 0) / 2)
        row = int(batch.rejected[0])
        wrong, other = mask[row] & changed[row], mask[row] & ~changed[row]
        if wrong.any() and other.any():
            charged.append(float(ratio[row][other].mean() - ratio[row][wrong].mean()))
            charged_records.append(item.record)
    kept = [item.record for item in items]
    return {
        "accuracy": interval(plain, kept),
        "accuracy, weighted": interval(weighted, kept),
        "charge of an error, nats": interval(charged, charged_records, share=False),
    }


def interval(values: Sequence[float], records: Sequence[SegmentedComparison], share: bool = True) -> dict[str, float]:
    """The mean with its 95 % interval, by resampling questions."""
    from palate.data.kinds import prompt_key
    from palate.evaluation.statistics import cluster_bootstrap

    return cluster_bootstrap(values, [prompt_key(r.prompt) for r in records], share=share)._asdict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/qa_corrections"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    given = parser.parse_args()
    if not given.data.is_dir():
        sys.exit(f"{given.data}: no such folder. Give the data with --data; examples/README.md says what lies there.")
    experiment(given.data, given.out, given.methods)


if __name__ == "__main__":
    main()
