"""A small world to practise in: guests ask a waiter, and a gold preference knows how much each answer is worth."""

from palate.pipelines.kitchen.grammar import all_prompts, draw_prompts, mixed_response, perfect_response, split_prompts
from palate.pipelines.kitchen.taste import gold, gold_reward, tastes

__all__ = [
    "all_prompts",
    "draw_prompts",
    "gold",
    "gold_reward",
    "mixed_response",
    "perfect_response",
    "split_prompts",
    "tastes",
]
