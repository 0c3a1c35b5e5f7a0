"""Palate's SFT on the workload: 16 demonstrations a step, fp32."""

import palate_common as common

args = common.arguments()
common.measure(
    "sft",
    args,
    passes=1,
    model=f"{args.workload}/policy",
    data={"train": f"{args.workload}/sft.jsonl", "limit": 16 * args.steps},
    training={"batch_size": 16, "learning_rate": 1e-3},
)
