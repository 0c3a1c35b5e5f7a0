"""TRL's KTO on the workload: 16 judged responses a step, fp32; a user's script with a probe."""

import trl_common as common
from probe import Probe

args = common.arguments()
probe = Probe(args.out)

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

probe.imported()
common.count_tokens(probe)
tokenizer = AutoTokenizer.from_pretrained(f"{args.workload}/policy")
model = AutoModelForCausalLM.from_pretrained(f"{args.workload}/policy")
data = load_dataset("json", data_files=f"{args.workload}/judgements.jsonl", split=f"train[:{16 * args.steps}]")
config = KTOConfig(
    per_device_train_batch_size=16,
    max_length=512,
    learning_rate=1e-5,
    max_steps=args.steps,
    **common.plain(args),
)
trainer = KTOTrainer(
    model=model,
    args=config,
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[common.steps_to(probe)],
)
trainer.train()
probe.write(losses=common.losses(trainer))
