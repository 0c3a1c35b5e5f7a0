"""What the scripts of the generation jobs share: the prompts, and how long a response may be."""

from __future__ import annotations

import argparse
import json
from typing import Any

NEW_TOKENS = 128
ROWS = 32


def prompts_of(args: argparse.Namespace, tokenizer: Any) -> tuple[list[list[int]], int]:
    """Token ids of the workload's first prompts, and how many responses each is to get: 32 responses in all."""
    copies = args.group or 1
    with open(f"{args.workload}/prompts.jsonl", encoding="utf-8") as lines:
        conversations = [json.loads(line)["prompt"] for line, _ in zip(lines, range(ROWS // copies), strict=False)]
    return [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) for turns in conversations
    ], copies


def drawn_tokens(row: list[int], end: int) -> int:
    """Tokens of a response, its end-of-text token included and the padding behind it not."""
    return row.index(end) + 1 if end in row else len(row)
