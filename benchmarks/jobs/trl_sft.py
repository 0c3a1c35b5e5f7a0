"""TRL's SFT on the workload: completion-only loss, padding, fp32; a user's script with a probe."""

import trl_common as common
from probe import Probe

args = common.arguments()
probe = Probe(args.out)

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

probe.imported()
common.count_tokens(probe)
tokenizer = AutoTokenizer.from_pretrained(f"{args.workload}/policy")
model = AutoModelForCausalLM.from_pretrained(f"{args.workload}/policy")
rows, records = args.rows or 16, args.records or f"{args.workload}/sft.jsonl"
data = load_dataset("json", data_files=records, split=f"train[:{rows * args.steps}]")
config = SFTConfig(
    per_device_train_batch_size=rows,
    max_length=args.max_length,
    learning_rate=1e-3,
    max_steps=args.steps,
    **common.plain(args),
)
trainer = SFTTrainer(
    model=model,
    args=config,
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[common.steps_to(probe)],
)
trainer.train()
probe.write(losses=common.losses(trainer))
