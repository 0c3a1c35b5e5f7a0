"""LoRA adapters: their updates are averaged, not their factors, so the ranks add up.

sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...],      s_i = alpha_i / rank_i.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palate.errors import ModelError
from palate.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from palate.models.soup.ingredients import Ingredients


def mix_adapters(found: Ingredients, weights: Sequence[float], target: Path) -> None:
    """Factors side by side: the rank of the soup is the sum of the ranks, and its scale is 1."""
    from safetensors.torch import load_file, save_file

    factors = []
    for folder in found.folders:
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise ModelError(f"{folder}: an {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}. Save the adapter again.")
        factors.append(load_file(folder / ADAPTER_WEIGHTS))
        bad = [name for name, tensor in factors[-1].items() if not bool(tensor.isfinite().all())]
        if bad:
            raise ModelError(f"{folder}: {bad[0]} holds NaN or Inf. The run that saved it had diverged.")
        if factors[-1].keys() != factors[0].keys():
            odd = min(factors[-1].keys() ^ factors[0].keys())
            raise ModelError(
                f"{found.folders[0]} and {folder} adapt different layers ({odd} is in one of them only). Train both with the "
                "same lora.target_modules."
            )
    scales = [weight * _scale(config) for weight, config in zip(weights, found.adapters, strict=True)]
    mixed = {name: _joined(name, [each[name] for each in factors], scales) for name in factors[0]}
    rank = sum(int(config["r"]) for config in found.adapters)
    own = {"r": rank, "lora_alpha": rank, "use_rslora": False}
    config = dict(found.adapters[0]) | own
    save_file(mixed, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (target / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _scale(config: Mapping[str, Any]) -> float:
    """s in s B A; rank-stabilised LoRA divides by the root of the rank."""
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _joined(name: str, parts: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    if "lora_A" in name or "lora_embedding_A" in name:
        return torch.cat(list(parts), 0).contiguous()
    if "lora_B" in name or "lora_embedding_B" in name:
        scaled = [
            scale * part.float() if scale else torch.zeros_like(part) for scale, part in zip(scales, parts, strict=True)
        ]
        return torch.cat([part.to(parts[0].dtype) for part in scaled], 1).contiguous()
    raise ModelError(f"{name}: no factor of a plain LoRA adapter. Merge each adapter into its base first.")
