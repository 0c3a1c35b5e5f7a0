"""The common work of a benchmark: one tokenizer, two random Llama models, real human comparisons. Deterministic.

    python benchmarks/workload.py            # writes PALATE_BENCH_DIR/workload/v8192

Model: Llama, hidden 288, intermediate 768, 6 layers, 6 heads, untied, byte-level BPE vocabulary of 8,192 trained on the
texts themselves: 10.7 M parameters, of which 8.33 M are in matrix multiplies (5.98 M body, 2.36 M head). The reward
model has the same shape with one output. Data: the "harmless-base" part of HH-RLHF (Bai et al. 2022,
arXiv:2204.05862), multi-turn prompts with a chat template, in the peers' own format, which palate reads as well.

Rows longer than ``MAX_LENGTH`` are left out (and counted): peers drop such rows or cut them, each in its own way, and
then the work would differ. PPO's prompts have at most ``MAX_PROMPT`` tokens.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VERSION = 2  # part of the finished mark: a workload of another version is made anew
MAX_LENGTH = 512
MAX_PROMPT = 192
HIDDEN, INTERMEDIATE, LAYERS, HEADS = 288, 768, 6, 6
# Millions of parameters -> hidden, intermediate, layers, heads. At a vocabulary of 8,192: 10.7, 34, 98, 497, 1,450 million.
SIZES = {
    10: (HIDDEN, INTERMEDIATE, LAYERS, HEADS),
    30: (512, 1408, 8, 8),
    100: (768, 2048, 12, 12),
    500: (1280, 3456, 24, 20),
    1500: (2048, 5504, 28, 16),
}
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

# An assistant's turn ends with EOS, another's with <|end|>; the generation marks serve libraries that need them to
# find the response tokens.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def bench_folder() -> Path:
    """Where environments, workload and results live: PALATE_BENCH_DIR, or ``.bench`` in the repository."""
    return Path(os.environ.get("PALATE_BENCH_DIR") or Path(__file__).parent.parent / ".bench").resolve()


def shared_data() -> Path:
    """The folder with ``preferences/hh_rlhf.jsonl.gz``: PALATE_SHARED_DATA, or ``../shared/data``."""
    return Path(os.environ.get("PALATE_SHARED_DATA") or Path(__file__).parent.parent.parent / "shared" / "data")


def folder_of(vocabulary: int, size: int) -> Path:
    """Where a workload lies, made or not."""
    return bench_folder() / "workload" / (f"v{vocabulary}" if size == 10 else f"v{vocabulary}-{size}m")


def ready(vocabulary: int, size: int = 10) -> Path | None:
    """The folder of the finished workload, or None when it must be made."""
    folder = folder_of(vocabulary, size)
    mark = folder / "workload.json"
    return folder if mark.exists() and json.loads(mark.read_text())["version"] == VERSION else None


def make(vocabulary: int = 8192, size: int = 10) -> Path:
    """Write ``policy/``, ``reward/``, ``sft``, ``pairs``, ``judgements``, ``prompts`` (each ``.jsonl``) and ``workload.json``.

    Args:
        vocabulary: entries. size: millions of parameters, one of ``SIZES``.

    Raises:
        FileNotFoundError: the comparisons are not there.
    """
    if found := ready(vocabulary, size):
        return found
    source = shared_data() / "preferences" / "hh_rlhf.jsonl.gz"
    if not source.exists():
        raise FileNotFoundError(f"{source} is not there; set PALATE_SHARED_DATA to the folder that has preferences/")
    final = folder_of(vocabulary, size)
    folder = final.with_name(final.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    folder.mkdir(parents=True)

    pairs = _pairs(source)
    tokenizer = _tokenizer(pairs, vocabulary)
    parameters = write_models(folder, tokenizer, size, roles=("policy", "reward"))
    facts = _write_data(folder, pairs, tokenizer)
    mark = {"version": VERSION, "vocabulary": len(tokenizer), "parameters": parameters, **facts}
    (folder / "workload.json").write_text(json.dumps(mark))
    folder.rename(final)
    return final


def _pairs(source: Path) -> list[dict[str, Any]]:
    """The comparisons whose turns alternate and end with the user, in a fixed random order."""
    pairs = []
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            roles = [turn["role"] for turn in record["prompt"]]
            alternating = all(role == ("user", "assistant")[i % 2] for i, role in enumerate(roles))
            if record["subset"] == "harmless-base" and roles and alternating and roles[-1] == "user":
                pairs.append(record)
    random.Random(0).shuffle(pairs)
    return pairs


def _tokenizer(pairs: list[dict[str, Any]], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = (text for p in pairs for text in [turn["content"] for turn in p["prompt"]] + [p["chosen"], p["rejected"]])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        additional_special_tokens=SPECIAL[3:],
        model_max_length=2048,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_models(
    folder: Path, tokenizer: Any, size: int, *, roles: Iterable[str], vocabulary: int = 0, positions: int = 2048
) -> dict[str, int]:
    """Random models with their tokenizer, each in a folder named after its role; how many parameters each has.

    Args:
        roles: of "policy" and "reward". vocabulary: of the model, where it is larger than the tokenizer's.
        positions: the model's context.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    hidden, intermediate, layers, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    counted = {}
    for seed, (name, kind) in enumerate((("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification))):
        if name not in roles:
            continue
        torch.manual_seed(seed)
        config.num_labels = 1
        model = kind(config).float()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        counted[name] = sum(p.numel() for p in model.parameters())
    return counted


def _write_data(folder: Path, pairs: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """Write the four files and return the token counts of their records, from which the needed work is reckoned."""

    def length(messages: list[dict[str, str]], **kwargs: Any) -> int:
        return len(tokenizer.apply_chat_template(messages, return_dict=False, **kwargs))

    sft, comparisons, judgements, prompts = [], [], [], []
    lengths: dict[str, list[list[int]]] = {"sft": [], "pairs": [], "prompts": []}
    for pair in pairs:
        prompt = pair["prompt"]
        chosen, rejected = ([{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected"))
        counts = [length(prompt, add_generation_prompt=True), length(prompt + chosen), length(prompt + rejected)]
        if max(counts) > MAX_LENGTH:
            continue
        sft.append({"prompt": prompt, "completion": chosen})
        comparisons.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        judgements.append({"prompt": prompt, "completion": chosen, "label": True})
        judgements.append({"prompt": prompt, "completion": rejected, "label": False})
        lengths["sft"].append(counts[:2])
        lengths["pairs"].append(counts)
        if counts[0] <= MAX_PROMPT:
            prompts.append({"prompt": prompt})
            lengths["prompts"].append(counts[:1])
    files = (("sft", sft), ("pairs", comparisons), ("judgements", judgements), ("prompts", prompts))
    for name, records in files:
        _write_lines(folder / f"{name}.jsonl", records)
    return {"longer_than_max": len(pairs) - len(comparisons), "lengths": lengths}


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the benchmark's workload (models, tokenizer, data).")
    parser.add_argument("--vocabulary", type=int, default=8192, help="size of the vocabulary, e.g. 8192 or 32768")
    parser.add_argument("--size", type=int, choices=SIZES, default=10, help="of the models, in millions of parameters")
    args = parser.parse_args()
    print(make(args.vocabulary, args.size))
