"""Palate's ORPO on the workload: 8 pairs a step, fp32."""

import palate_common as common

args = common.arguments()
common.measure(
    "orpo",
    args,
    passes=1,
    model=f"{args.workload}/policy",
    data={"train": f"{args.workload}/pairs.jsonl", "limit": 8 * args.steps},
    training={"batch_size": 8, "learning_rate": 1e-5},
)
