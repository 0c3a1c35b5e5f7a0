"""The models and records of the scaling tables, made from the common workload when they are first asked for.

    python benchmarks/scaled.py --size 30 --vocabulary 8192     # prints the folder with policy/ in it

Models keep the workload's tokenizer, also where their vocabulary is larger: the rows are the same then, and only the
head grows. For the lengths there are demonstrations of a prompt of about 64 tokens and a response of about 64 to 2,048,
cut from the workload's own texts.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import islice
from pathlib import Path

from scaling import AXES, ROWS, STEPS
from workload import SIZES, bench_folder, make, write_models

POSITIONS = 4096
PROMPT = 64


def model(size: int, vocabulary: int) -> Path:
    """A folder with ``policy/``: so many millions of parameters at the workload's vocabulary, and this vocabulary."""
    from transformers import AutoTokenizer

    base = make()
    final = bench_folder() / "workload" / f"scaled-{size}m-v{vocabulary}"
    if not final.exists():
        folder = final.with_name(final.name + ".part")
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer = AutoTokenizer.from_pretrained(base / "policy")
        write_models(folder, tokenizer, size, roles=("policy",), vocabulary=vocabulary, positions=POSITIONS)
        folder.rename(final)
    return final


def lengths() -> Path:
    """A folder with ``sft-64.jsonl`` and so on."""
    from transformers import AutoTokenizer

    base = make()
    final = bench_folder() / "workload" / "lengths"
    if final.exists():
        return final
    tokenizer = AutoTokenizer.from_pretrained(base / "policy")
    texts = []
    with (base / "sft.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            texts += [turn["content"] for turn in record["prompt"]] + [record["completion"][0]["content"]]
    ids = tokenizer(" ".join(texts), add_special_tokens=False)["input_ids"]
    folder = final.with_name(final.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for length in AXES["length"].values:
        place = iter(ids * (1 + ROWS * STEPS * (PROMPT + length) // len(ids)))
        with (folder / f"sft-{length}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(ROWS * STEPS):
                prompt, response = (tokenizer.decode(list(islice(place, count))) for count in (PROMPT - 4, length - 1))
                record = {
                    "prompt": [{"role": "user", "content": prompt}],
                    "completion": [{"role": "assistant", "content": response}],
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    folder.rename(final)
    return final


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a model and the records of the scaling tables.")
    parser.add_argument("--size", type=int, choices=SIZES, default=10, help="millions of parameters")
    parser.add_argument("--vocabulary", type=int, default=8192)
    args = parser.parse_args()
    lengths()
    print(model(args.size, args.vocabulary))
