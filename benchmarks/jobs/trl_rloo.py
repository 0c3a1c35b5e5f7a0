"""TRL's rloo on the workload: 32 responses of at most 64 tokens, a function as the reward, fp32, with a probe."""

import trl_common as common
from probe import Probe

args = common.arguments()
probe = Probe(args.out)

from datasets import load_dataset
from letters import letters
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

probe.imported()
common.count_tokens(probe)


def reward(completions, **fields):
    texts = [words if isinstance(words, str) else words[0]["content"] for words in completions]
    return letters(None, texts)


tokenizer = AutoTokenizer.from_pretrained(f"{args.workload}/policy", padding_side="left")
model = AutoModelForCausalLM.from_pretrained(f"{args.workload}/policy")
data = load_dataset("json", data_files=f"{args.workload}/prompts.jsonl", split=f"train[:{8 * args.steps}]")
config = RLOOConfig(
    per_device_train_batch_size=32,
    num_generations=4,
    max_completion_length=64,
    beta=0.05,
    learning_rate=1e-5,
    max_steps=args.steps,
    **common.plain(args),
)
trainer = RLOOTrainer(
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
