"""Palate's KTO on the workload: 16 judged responses a step, fp32."""

import palate_common as common

args = common.arguments()
common.measure(
    "kto",
    args,
    passes=1,
    model=f"{args.workload}/policy",
    data={"train": f"{args.workload}/judgements.jsonl", "limit": 16 * args.steps},
    training={"batch_size": 16, "learning_rate": 1e-5},
    reference_cache="off",
)
