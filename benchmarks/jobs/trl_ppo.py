"""TRL's PPO (1.12, the last with one) on the workload: 32 responses of 64 tokens, 4 epochs, fp32, with a probe.

One iteration is one step. Generation is the time in ``batch_generation``; the update begins with the first forward
that keeps a gradient; what lies between is scoring.
"""

import trl_common as common
from probe import Probe

args = common.arguments()
probe = Probe(args.out)

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

probe.imported()
common.count_tokens(probe, update_mark=True)
ppo_trainer.batch_generation = probe.timed("generation", ppo_trainer.batch_generation)

tokenizer = AutoTokenizer.from_pretrained(f"{args.workload}/policy", padding_side="left")
policy, reference = (AutoModelForCausalLM.from_pretrained(f"{args.workload}/policy") for _ in range(2))
reward, value = (
    AutoModelForSequenceClassification.from_pretrained(f"{args.workload}/reward", num_labels=1) for _ in range(2)
)
data = load_dataset("json", data_files=f"{args.workload}/prompts.jsonl", split="train")


def encode(record):
    messages = record["prompt"]
    return {"input_ids": tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)}


rows = data.select(range(32 * args.steps)).map(encode, remove_columns=["prompt"])
unused = data.select(range(len(data) - 32, len(data))).map(encode, remove_columns=["prompt"])
config = PPOConfig(
    per_device_train_batch_size=32,
    gradient_accumulation_steps=1,
    num_mini_batches=1,
    num_ppo_epochs=4,
    response_length=64,
    local_rollout_forward_batch_size=32,
    total_episodes=32 * args.steps,
    learning_rate=1e-5,
    temperature=1.0,
    missing_eos_penalty=1.0,
    num_sample_generations=0,
    **common.plain(args),
)
trainer = PPOTrainer(
    args=config,
    processing_class=tokenizer,
    model=policy,
    ref_model=reference,
    reward_model=reward,
    value_model=value,
    train_dataset=rows,
    eval_dataset=unused,
    callbacks=[common.steps_to(probe, rest="scoring")],
)
trainer.train()
probe.write(losses=common.losses(trainer))
