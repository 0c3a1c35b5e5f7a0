"""Palate's PPO on the workload: 32 responses of 64 tokens, 4 epochs over policy and value model, fp32."""

import palate_common as common

args = common.arguments()
common.measure(
    "ppo",
    args,
    passes=4 * 2,
    model=f"{args.workload}/policy",
    reward=f"{args.workload}/reward",
    value=f"{args.workload}/reward",
    data={"train": f"{args.workload}/prompts.jsonl", "limit": 32 * args.steps, "max_prompt_length": 192},
    training={"batch_size": 32, "learning_rate": 1e-5},
    sampling={"max_new_tokens": 64},
    method={"epochs": 4, "minibatches": 1, "missing_eos_penalty": 1.0},
)
