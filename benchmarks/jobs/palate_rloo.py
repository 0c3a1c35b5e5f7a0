"""Palate's rloo on the workload: 8 prompts, 4 responses of 64 tokens to each, a function as the reward, fp32."""

import palate_common as common

args = common.arguments()
common.measure(
    "rloo",
    args,
    passes=1,
    model=f"{args.workload}/policy",
    reward=f"{common.HERE}/letters.py:letters",
    data={"train": f"{args.workload}/prompts.jsonl", "limit": 8 * args.steps, "max_prompt_length": 192},
    training={"batch_size": 8, "learning_rate": 1e-5},
    samples_per_prompt=4,
    sampling={"max_new_tokens": 64},
)
