"""TRL's online_dpo on the workload: 32 responses of at most 64 tokens, a function as the reward, fp32, with a probe."""

import trl_common as common
from probe import Probe

args = common.arguments()
probe = Probe(args.out)

import torch
from datasets import load_dataset
from letters import letters
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

probe.imported()
common.count_tokens(probe)


def reward(completions, **fields):
    texts = [words if isinstance(words, str) else words[0]["content"] for words in completions]
    return letters(None, texts)


tokenizer = AutoTokenizer.from_pretrained(f"{args.workload}/policy", padding_side="left")
model = AutoModelForCausalLM.from_pretrained(f"{args.workload}/policy")
data = load_dataset("json", data_files=f"{args.workload}/prompts.jsonl", split=f"train[:{16 * args.steps}]")
config = OnlineDPOConfig(
    per_device_train_batch_size=16,
    max_new_tokens=64,
    temperature=1.0,
    max_length=256,
    learning_rate=1e-5,
    max_steps=args.steps,
    **common.plain(args),
)
trainer = OnlineDPOTrainer(
    model=model,
    reward_funcs=reward,
    args=config,
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[common.steps_to(probe, rest="update")],
)
forward = trainer._forward


def frozen_is_scoring(*positional, **named):
    """The policy and the reference go through one method; the reference's pass keeps no gradient."""
    if torch.is_grad_enabled():
        return forward(*positional, **named)
    with probe.phase("scoring"):
        return forward(*positional, **named)


trainer._forward = frozen_is_scoring
common.time_parts(trainer, probe, _generate="generation", _calculate_rewards_from_functions="scoring")
trainer.train()
probe.write(losses=common.losses(trainer))
