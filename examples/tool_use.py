"""Tool use: a policy learns to look up what it cannot know, and to repeat what it was told.

    user        Anna and Ben went out . where is Ben ?
    assistant   lookup Ben                             <- the policy: the right name
    tool        library                                <- the environment: read, never trained on
    assistant   library                                <- the policy: repeated; 1 if right, else 0

Who is where is drawn anew for every prompt and written nowhere that the policy can see, so guessing is right once in 16
times. The policy is made from scratch: a short supervised run on conversations that show the form and little more (some
guess, some ask for the wrong name, most say something else than they were told), then reinforcement learning (RLOO) with
the environment in this file and a checker as its reward.

    python examples/tool_use.py                  # the whole experiment; the same command resumes it
    python examples/tool_use.py --quick          # a smaller run of it

Needs nothing beside palate: no data, no network, no GPU.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import palate
from palate.data.chat import Chat
from palate.data.collate import encode_records
from palate.data.records import Demonstration, Prompt, write_records
from palate.environment import Environment, Turn
from palate.evaluation.statistics import wilson
from palate.generation.settings import SamplingSettings
from palate.models.load import load_policy, load_tokenizer
from palate.training.environments import Conversations

NAMES = "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Klara Leo".split()  # noqa: SIM905
PLACES = "garden kitchen library museum office park school shop station theatre harbour market farm forest lake bridge".split()  # noqa: SIM905
QUESTIONS = ("{a} and {b} went out . where is {c} ?", "where is {c} ? {a} and {b} left .", "find {c} . {a} knows {b} .")
ENVIRONMENT = {"function": f"{__file__}:lookup", "max_turns": 3}
TURN = 6  # tokens of a turn at most, its end included


# --- the environment and the reward -----------------------------------------------------------------------------------


def lookup(conversation: Sequence[Mapping[str, str]], fields: Mapping[str, Any]) -> Turn | None:
    """Answers "lookup NAME" from the record's table; anything else is the policy's last word."""
    said = conversation[-1]["content"].split()
    if said[:1] != ["lookup"]:
        return None
    return Turn(fields["table"].get(" ".join(said[1:]), "unknown"), role="tool")


def right(prompts: Sequence[Any], responses: Sequence[str], answer: Sequence[str]) -> list[float]:
    """1 where the last turn is the answer and nothing else."""
    return [float(response.strip() == wanted) for response, wanted in zip(responses, answer, strict=True)]


# --- records ----------------------------------------------------------------------------------------------------------


def all_prompts(seed: int) -> list[Prompt]:
    """Every pair of names in every question, shuffled; who is where is drawn for each."""
    rng = random.Random(f"prompts {seed}")
    found = []
    for question in QUESTIONS:
        for a in NAMES:
            for b in NAMES:
                if a == b:
                    continue
                for asked in (a, b):
                    table = {a: rng.choice(PLACES), b: rng.choice(PLACES)}
                    text = question.format(a=a, b=b, c=asked)
                    found.append(Prompt(text, {"table": table, "answer": table[asked], "asked": asked}))
    rng.shuffle(found)
    return found


def demonstrations(prompts: Sequence[Prompt], copies: int, seed: int) -> list[Demonstration]:
    """What an unskilled hand would show: a third guess, half of the lookups ask for the other name, and two in three end
    with some other place than the one that was told."""
    rng = random.Random(f"demonstrations {seed}")
    found = []
    for prompt in [p for p in prompts for _ in range(copies)]:
        question = {"role": "user", "content": prompt.prompt}
        if rng.random() < 1 / 3:
            found.append(Demonstration((question,), rng.choice(PLACES)))
            continue
        name = rng.choice(list(prompt.fields["table"]))
        told = rng.choice(PLACES)
        said = told if rng.random() < 1 / 3 else rng.choice(PLACES)
        call = {"role": "assistant", "content": f"lookup {name}"}
        found.append(Demonstration((question, call, {"role": "tool", "content": told}), said, every_turn=True))
    return found


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def make_tokenizer(where: Path) -> Path:
    """A token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<begin>", "<end>", "<unknown>", "<user>", "<assistant>", "<tool>"]
    ordinary = {word for question in QUESTIONS for word in question.split() if "{" not in word}
    words = [*special, *NAMES, *PLACES, "lookup", "unknown", *sorted(ordinary)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<begin>",
        eos_token="<end>",
        unk_token="<unknown>",
        additional_special_tokens=special[4:],
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(where)
    return where


# --- the experiment ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    copies: int = 8  # demonstrations of each prompt
    held_out: int = 200  # prompts for the evaluation
    samples: int = 2  # conversations of each, before and after
    batches: int = 120  # of reinforcement learning
    batch_size: int = 32  # prompts a batch
    samples_per_prompt: int = 8


QUICK = Size(batches=50)


def success(model: Path, prompts: Sequence[Prompt], samples: int, seed: int) -> dict[str, Any]:
    """How often a policy is right, sampled at temperature 1 with the environment; and the first conversations."""
    chat = Chat(load_tokenizer(str(model)))
    items, _ = encode_records(prompts, "prompts", chat, max_length=64)
    rollout = Conversations(
        load_policy(str(model), trainable=False),
        chat,
        SamplingSettings(max_new_tokens=TURN),
        samples,
        environment=Environment(lookup),
        max_turns=ENVIRONMENT["max_turns"],
    )
    rows = rollout(items, seed)
    records: Any = rows.extras["records"]
    talks = rollout.texts(rows, range(len(rows)))
    scores = right([], [talk["response"] for talk in talks], [record.fields["answer"] for record in records])
    # Who is where is drawn for each prompt, but its two samples share it: count it as one trial, right by halves.
    share = [sum(scores[i : i + samples]) / samples for i in range(0, len(scores), samples)]
    return {
        "success": list(wilson(sum(share), len(share))),
        "asked": sum(turns > 1 for turns in rows.extras["turns"].tolist()) / len(rows),
        "conversations": [record.fields["conversation"] for record in records[: 3 * samples : samples]],
        "prompts": [record.fields["asked"] for record in records[: 3 * samples : samples]],
    }


def experiment(out: Path, size: Size, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Run it, and return its figures; intervals are [estimate, low, high]."""
    prompts = all_prompts(seed)
    held_out, train = prompts[: size.held_out], prompts[size.held_out :]
    out.mkdir(parents=True, exist_ok=True)
    write_records(out / "demonstrations.jsonl", demonstrations(train, size.copies, seed), overwrite=True)
    write_records(out / "prompts.jsonl", train, overwrite=True)
    sft = palate.train(
        "sft",
        model={
            "architecture": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        tokenizer=str(make_tokenizer(out / "tokenizer")),
        data={"train": out / "demonstrations.jsonl", "validation_fraction": 0.05},
        training={"learning_rate": 3e-3, "epochs": 4, "batch_size": 32, "eval_every": 0, "save_every": 0, "seed": seed},
        out=out / "sft",
        quiet=quiet,
    )
    tuned = palate.train(
        "rloo",
        model=sft / "model",
        reward=f"{__file__}:right",
        environment=ENVIRONMENT,
        data={"train": out / "prompts.jsonl", "validation_fraction": 0.05},
        method_settings={"kl_coef": 0.0},
        sampling={"max_new_tokens": TURN},
        samples_per_prompt=size.samples_per_prompt,
        training={
            "learning_rate": 3e-3,
            "max_steps": size.batches,
            "batch_size": size.batch_size,
            "eval_every": 0,
            "save_every": 0.25,
            "seed": seed,
        },
        out=out / "rloo",
        quiet=quiet,
    )
    figures = {
        "before": success(sft / "model", held_out, size.samples, seed + 1),
        "after": success(tuned / "model", held_out, size.samples, seed + 1),
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Tool use: a lookup that the policy must make and repeat.")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/tool_use, or runs/tool_use-quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smaller run")
    given = parser.parse_args(arguments)
    out = given.out or Path("runs/tool_use-quick" if given.quick else "runs/tool_use")
    figures = experiment(out, QUICK if given.quick else Size(), given.seed)
    for when, found in figures.items():
        share, low, high = (f"{100 * x:.1f}" for x in found["success"])
        print(f"success {when:<7}{share} % [{low}, {high}]   asks in {100 * found['asked']:.0f} % of conversations")
    for when, found in figures.items():
        for asked, conversation in zip(found["prompts"], found["conversations"], strict=True):
            print(f"{when:<7}where is {asked}?  " + "  |  ".join(f"{t['role']}: {t['content']}" for t in conversation))
    return figures


if __name__ == "__main__":
    main()
