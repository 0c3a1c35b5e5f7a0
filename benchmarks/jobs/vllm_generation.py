"""vLLM on the workload: 32 responses of at most 128 new tokens, temperature 1, in this process.

Its cache of keys and values is set to 1 GiB on a CPU (its default is more than this work needs), so that the memory of
the table is not a reservation.
"""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # or its memory would be another process's
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if int(os.environ.get("OMP_NUM_THREADS") or 0) < (os.cpu_count() or 1):  # else it takes all cores, whatever is asked
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from command_line import arguments
from generation_common import NEW_TOKENS, prompts_of
from probe import Probe

if __name__ == "__main__":  # vLLM may start processes that import this file
    args = arguments()
    probe = Probe(args.out)

    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    probe.imported()
    tokenizer = AutoTokenizer.from_pretrained(f"{args.workload}/policy")
    model = LLM(model=f"{args.workload}/policy", dtype=args.dtype, max_model_len=512, seed=0)
    prompts, copies = prompts_of(args, tokenizer)
    drawing = SamplingParams(n=copies, temperature=1.0, top_p=1.0, top_k=0, max_tokens=NEW_TOKENS)
    probe.begin()
    for _ in range(args.steps):
        done = model.generate([{"prompt_token_ids": ids} for ids in prompts], drawing, use_tqdm=False)
        probe.tokens(sum(len(one.token_ids) for answer in done for one in answer.outputs))
        probe.step()
    probe.write()
