"""Palate's reward model (Bradley-Terry) on the workload: 8 pairs a step, fp32."""

import palate_common as common

args = common.arguments()
common.measure(
    "reward",
    args,
    passes=1,
    model=f"{args.workload}/reward",
    data={"train": f"{args.workload}/pairs.jsonl", "limit": 8 * args.steps},
    training={"batch_size": 8, "learning_rate": 1e-4},
)
