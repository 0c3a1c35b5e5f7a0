"""Palate's online_dpo on the workload: 16 prompts, 2 responses of 64 tokens to each, a function as the reward, fp32."""

import palate_common as common

args = common.arguments()
common.measure(
    "online_dpo",
    args,
    passes=1,
    model=f"{args.workload}/policy",
    reward=f"{common.HERE}/letters.py:letters",
    data={"train": f"{args.workload}/prompts.jsonl", "limit": 16 * args.steps, "max_prompt_length": 192},
    training={"batch_size": 16, "learning_rate": 1e-5},
    samples_per_prompt=2,
    sampling={"max_new_tokens": 64},
)
