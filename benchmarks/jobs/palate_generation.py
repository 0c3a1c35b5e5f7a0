"""Palate's sampler on the workload: 32 responses of at most 128 new tokens, temperature 1, again and again."""

import palate_common as common
from generation_common import NEW_TOKENS, prompts_of
from probe import Probe

args = common.arguments()
probe = Probe(args.out)

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palate.generation.sampler import sample
from palate.generation.settings import SamplingSettings
from palate.models.load import load_policy

assert AutoModelForCausalLM  # palate imports it when it needs it; a peer has it at the start
probe.imported()
tokenizer = AutoTokenizer.from_pretrained(f"{args.workload}/policy")
model = load_policy(f"{args.workload}/policy", dtype=args.dtype, device=args.device, trainable=False)
prompts, copies = prompts_of(args, tokenizer)
generator = torch.Generator(device=args.device).manual_seed(0)
probe.begin()
for _ in range(args.steps):
    tokens = sample(
        model,
        prompts,
        SamplingSettings(max_new_tokens=NEW_TOKENS),
        samples_per_prompt=copies,
        stop_token_ids=[tokenizer.eos_token_id],
        generator=generator,
    )
    probe.tokens(int(tokens.response_mask.sum()))
    probe.step()
probe.write()
