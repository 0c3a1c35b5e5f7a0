"""Palate's DPO on the workload with the reference's log-probs computed once beforehand: 8 pairs a step, fp32."""

import palate_common as common

args = common.arguments()
common.measure(
    "dpo",
    args,
    passes=1,
    model=f"{args.workload}/policy",
    data={"train": f"{args.workload}/pairs.jsonl", "limit": 8 * args.steps},
    training={"batch_size": 8, "learning_rate": 1e-5},
    reference_cache=f"{args.scratch}/cache",
)
