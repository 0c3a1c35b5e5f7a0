"""TRL's DPO on the workload with the reference's log-probs computed beforehand: 8 pairs a step, fp32."""

import trl_common as common
from probe import Probe

args = common.arguments()
probe = Probe(args.out)

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

probe.imported()
common.count_tokens(probe)
tokenizer = AutoTokenizer.from_pretrained(f"{args.workload}/policy")
model = AutoModelForCausalLM.from_pretrained(f"{args.workload}/policy")
data = load_dataset("json", data_files=f"{args.workload}/pairs.jsonl", split=f"train[:{8 * args.steps}]")
config = DPOConfig(
    per_device_train_batch_size=8,
    max_length=512,
    learning_rate=1e-5,
    max_steps=args.steps,
    precompute_ref_log_probs=True,
    **common.plain(args),
)
trainer = DPOTrainer(
    model=model,
    args=config,
    train_dataset=data,
    processing_class=tokenizer,
    callbacks=[common.steps_to(probe)],
)
trainer.train()
probe.write(losses=common.losses(trainer))
