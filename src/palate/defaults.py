"""Learning rates for the run at hand: what the papers used for a job, by the size of the model that is trained.

The rows of a table are (up to so many parameters, learning rate, where from). AdamW in every case. Below the sizes
that papers report, the figures are what our own small runs train well with. Sources, unless the row says otherwise:
TRL's SFT default; Stiennon et al. 2020 and Ouyang et al. 2022 for reward models; Ziegler et al. 2019, Huang et al.
2024 (arXiv:2403.17031) and Touvron et al. 2023 for PPO; Rafailov et al. 2023 for losses on pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LORA_FACTOR = 10.0  # adapters train well at about ten times the full model's rate ("LoRA Without Regret", 2025)


class LearningRate(NamedTuple):
    """A rate and the reason for it, to be shown and written beside it."""

    value: float
    source: str


_INFINITY = float("inf")
_TABLES: dict[str, list[tuple[float, float, str]]] = {
    "supervised fine-tuning": [
        (1e7, 1e-3, "small models"),
        (1e8, 3e-4, "small models"),
        (1e9, 5e-5, "models of the size of GPT-2"),
        (_INFINITY, 2e-5, "TRL"),
    ],
    "reward model": [
        (1e7, 5e-4, "small models"),
        (1e8, 1e-4, "small models"),
        (1e9, 1.77e-5, "Ziegler et al. 2019, GPT-2"),
        (_INFINITY, 9e-6, "InstructGPT, 6B"),
    ],
    "reinforcement learning": [
        (1e7, 1e-4, "small models"),
        (1e8, 3e-5, "small models"),
        (1e9, 1e-5, "Ziegler et al. 2019, GPT-2"),
        (7e9, 3e-6, "arXiv:2403.17031, 1B to 6.9B"),
        (_INFINITY, 1e-6, "Llama 2, 7B and up"),
    ],
    "preferences without a reward model": [
        (1e7, 1e-4, "small models"),
        (1e8, 3e-5, "small models"),
        (1e9, 5e-6, "models of the size of GPT-2"),
        (7e9, 1e-6, "Rafailov et al. 2023, 2.8B and 6B"),
        (_INFINITY, 5e-7, "Tunstall et al. 2023 (Zephyr), 7B"),
    ],
}


def default_learning_rate(trains: Sequence[str], reads: str, parameters: int, lora: bool = False) -> LearningRate:
    """The rate for a method that trains these roles on this kind of data.

    Args:
        trains: the method's roles with gradients.
        reads: the method's kind of records.
        parameters: of the whole backbone, adapters or not.
        lora: only an adapter is trained.
    """
    if "policy" not in trains:
        job = "reward model"
    elif reads == "demonstrations":
        job = "supervised fine-tuning"
    elif reads == "prompts":
        job = "reinforcement learning"
    else:
        job = "preferences without a reward model"
    rate, source = next((rate, source) for most, rate, source in _TABLES[job] if parameters <= most)
    value = rate * LORA_FACTOR if lora else rate
    times = f", x{LORA_FACTOR:g} for LoRA" if lora else ""
    return LearningRate(float(f"{value:.3g}"), f"default: {job}, {parameters:,} parameters ({source}){times}")
