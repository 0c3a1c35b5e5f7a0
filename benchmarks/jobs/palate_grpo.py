"""Palate's GRPO on the workload: 8 prompts, 4 responses of 64 tokens to each, a function as the reward, fp32.

A group of one has nothing to be compared with: ``--group 1`` is REINFORCE with the batch's mean as baseline, which does
the same work.
"""

import palate_common as common

args = common.arguments()
group = args.group or 4
prompts = (args.rows or 32) // group
common.measure(
    "grpo" if group > 1 else "reinforce",
    args,
    passes=1,
    model=f"{args.workload}/policy",
    reward=f"{common.HERE}/letters.py:letters",
    data={
        "train": args.records or f"{args.workload}/prompts.jsonl",
        "limit": prompts * args.steps,
        "max_prompt_length": 192,
    },
    training={"batch_size": prompts, "learning_rate": 1e-5},
    samples_per_prompt=group,
    sampling={"max_new_tokens": 64},
    method={} if group > 1 else {"baseline": "batch"},
)
