"""How many operations the work needs: the numerator of "share of the machine's peak". Pure arithmetic.

Counted are the multiply-adds (two operations each) of weight matrices only, and only where a result is wanted:

* the body for every real token, no padding; the vocabulary head for response tokens only;
* a prompt shared by several responses once;
* backward = two forwards. No recomputation, attention scores, norms or optimizer: needed work, not work done.

The same number is set against every tool's time, so that a tool cannot raise its share by wasting operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama's matrix sizes."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def body(self) -> int:
        """Weights that every token passes through."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Weights of the projection to the vocabulary."""
        return self.hidden * self.vocabulary


def sft(shape: Shape, rows: Sequence[tuple[int, int]]) -> float:
    """Operations of one training pass over rows of (prompt tokens, prompt + response tokens)."""
    return sum(6.0 * (shape.body * total + shape.head * (total - prompt)) for prompt, total in rows)


def reward(shape: Shape, pairs: Sequence[tuple[int, int, int]]) -> float:
    """Operations of one training pass over (prompt, prompt + chosen, prompt + rejected) tokens; the head is one row."""
    return sum(6.0 * shape.body * (chosen + rejected - prompt) for prompt, chosen, rejected in pairs)


def preference(shape: Shape, pairs: Sequence[tuple[int, int, int]], reference: bool) -> float:
    """Operations of one pass of DPO over (prompt, prompt + chosen, prompt + rejected) tokens.

    Without ``reference`` (its log-probs are known, or there is none, as in ORPO) the training pass alone.
    """
    once = 0.0
    for prompt, chosen, rejected in pairs:
        once += shape.body * (chosen + rejected - prompt) + shape.head * (chosen + rejected - 2 * prompt)
    return once * (8.0 if reference else 6.0)


def kto(shape: Shape, pairs: Sequence[tuple[int, int, int]]) -> float:
    """Operations of one pass of KTO over both responses of each pair as rows of their own.

    Besides the training pass and the reference's forward, policy and reference read every prompt with another row's
    response: the prompt's states are there already, so this costs the response alone.
    """
    total = 0.0
    for prompt, *rows in pairs:
        for row in rows:
            response = row - prompt
            total += 8.0 * (shape.body * row + shape.head * response)
            total += 4.0 * (shape.body + shape.head) * response
    return total


def group(shape: Shape, prompts: Sequence[int], response: int, size: int) -> dict[str, float]:
    """Operations of one step of a critic-free method: ``size`` responses a prompt, which is read once for all of them.

    By phase: sampling (its log-probs serve as old log-probs), a forward of the reference, one training pass.
    """
    rows = sum(shape.body * (prompt + size * response) + shape.head * size * response for prompt in prompts)
    return {"generation": 2.0 * rows, "scoring": 2.0 * rows, "update": 6.0 * rows}


def ppo(shape: Shape, prompts: Sequence[int], response: int, epochs: int) -> dict[str, float]:
    """Operations of one PPO iteration by phase: sample (its log-probs serve as old log-probs), score, update.

    Scoring is a forward of the reference, the reward model and the value model; the update trains policy and value
    ``epochs`` times over every row.
    """
    rows = sum(shape.body * (prompt + response) for prompt in prompts)
    head = len(prompts) * shape.head * response
    return {
        "generation": 2.0 * (rows + head),
        "scoring": 2.0 * (rows + head) + 2 * 2.0 * rows,
        "update": epochs * 6.0 * (2 * rows + head),
    }


def generation(shape: Shape, prompts: Sequence[int], response: int, size: int) -> float:
    """Operations of sampling ``size`` responses of so many tokens to each prompt, which is read once for all of them."""
    return group(shape, prompts, response, size)["generation"]
