"""Palate's SFT on the workload: 16 demonstrations a step, fp32."""

import palate_common as common

args = common.arguments()
rows = args.rows or 16
common.measure(
    "sft",
    args,
    passes=1,
    model=f"{args.workload}/policy",
    data={"train": args.records or f"{args.workload}/sft.jsonl", "limit": rows * args.steps},
    training={"batch_size": rows, "learning_rate": 1e-3},
)
