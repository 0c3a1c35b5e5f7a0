"""TRL's grpo on the workload: 32 responses of at most 64 tokens, a function as the reward, fp32, with a probe."""

import trl_common as common
from probe import Probe

args = common.arguments()
probe = Probe(args.out)

from datasets import load_dataset
from letters import letters
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

probe.imported()
common.count_tokens(probe)


def reward(completions, **fields):
    texts = [words if isinstance(words, str) else words[0]["content"] for words in completions]
    return letters(None, texts)


tokenizer = AutoTokenizer.from_pretrained(f"{args.workload}/policy", padding_side="left")
model = AutoModelForCausalLM.from_pretrained(f"{args.workload}/policy")
rows, group = args.rows or 32, args.group or 4
records = args.records or f"{args.workload}/prompts.jsonl"
data = load_dataset("json", data_files=records, split=f"train[:{rows // group * args.steps}]")
config = GRPOConfig(
    per_device_train_batch_size=rows,
    num_generations=group,
    max_completion_length=64,
    beta=0.04,
    learning_rate=1e-5,
    max_steps=args.steps,
    **common.plain(args),
)
trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=config,
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[common.steps_to(probe, rest="update")],
)
common.time_parts(trainer, probe, _generate="generation", _generate_and_score_completions="scoring")
trainer.train()
probe.write(losses=common.losses(trainer))
