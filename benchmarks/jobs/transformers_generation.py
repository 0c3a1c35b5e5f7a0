"""transformers' own generation on the workload: 32 responses of at most 128 new tokens, temperature 1.

``--mode dynamic``: ``generate()`` as shipped. ``static``: with its static cache. ``batching``: ``generate_batch``, its
continuous batching.
"""

from command_line import arguments
from generation_common import NEW_TOKENS, drawn_tokens, prompts_of
from probe import Probe

args = arguments()
probe = Probe(args.out)

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

probe.imported()
tokenizer = AutoTokenizer.from_pretrained(f"{args.workload}/policy", padding_side="left")
model = AutoModelForCausalLM.from_pretrained(f"{args.workload}/policy", dtype=getattr(torch, args.dtype))
model = model.to(args.device).eval()
prompts, copies = prompts_of(args, tokenizer)
end = tokenizer.eos_token_id
drawing = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "eos_token_id": end,
    "pad_token_id": tokenizer.pad_token_id,
}


def batched() -> list[list[int]]:
    """generate(): the prompts padded on the left, the responses cut out of the rows that come back."""
    given = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(args.device)
    cache = {"cache_implementation": "static"} if args.mode == "static" else {}
    with torch.no_grad():
        rows = model.generate(**given, num_return_sequences=copies, **drawing, **cache)
    return rows[:, given["input_ids"].shape[1] :].tolist()


def continuous() -> list[list[int]]:
    """generate_batch(): every request by itself; a group is its prompt several times."""
    requests = [prompt for prompt in prompts for _ in range(copies)]
    done = model.generate_batch(inputs=requests, generation_config=GenerationConfig(**drawing), progress_bar=False)
    return [output.generated_tokens for output in done.values()]


generate = continuous if args.mode == "batching" else batched
torch.manual_seed(0)
probe.begin()
for _ in range(args.steps):
    rows = generate()
    assert len(rows) == copies * len(prompts), f"{len(rows)} responses came back"
    probe.tokens(sum(drawn_tokens(row, end) for row in rows))
    probe.step()
probe.write()
