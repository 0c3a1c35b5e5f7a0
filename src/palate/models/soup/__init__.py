"""Rewarded soups: one policy from several, by the weighted mean of their weights -- Rame et al. 2023, arXiv:2306.04488.

    theta = sum_i w_i theta_i,      w_i >= 0,  sum_i w_i = 1                                           (section 2.2, step 2)

The theta_i start from the same model and were trained on different rewards. Then theta is close to what training on
sum_i w_i r_i would have given, for every w, after n trainings. It is exact where the policy is log-linear in what is
averaged and a response is one step: logits add, so pi ~ prod_i pi_i^(w_i), and with pi_i = ref exp(r_i / beta) / Z_i that is
ref exp(sum_i w_i r_i / beta) / Z. For sequences, and for deep networks, it is an approximation: measure it.

Whole models are mixed tensor by tensor (``whole.py``); of LoRA adapters it is the updates that are averaged, not the
factors (``adapters.py``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from palate.models.save import new_folder
from palate.models.soup.adapters import mix_adapters
from palate.models.soup.ingredients import Ingredients, check_ingredients
from palate.models.soup.weights import check_weights, grid, soup_name, weighted_mean
from palate.models.soup.whole import ALIKE, mix_models

__all__ = [
    "ALIKE",
    "SOUP_FILE",
    "Ingredients",
    "Soup",
    "check_ingredients",
    "check_weights",
    "grid",
    "make_soup",
    "soup_name",
    "weighted_mean",
]

SOUP_FILE = "soup.json"  # what a soup is made of


@dataclass(frozen=True)
class Soup:
    """What was made.

    Attributes:
        folder: a model folder, or an adapter folder of the same base.
        weights: of the ingredients, in their order.
        cosine: between the matrices of the first ingredient and of the one least like it; 1 = equal, about 0 = of
            different starts. None for adapters, whose common start is their base.
    """

    folder: Path
    weights: tuple[float, ...]
    cosine: float | None


def make_soup(
    models: Sequence[str | Path], weights: Sequence[float], out: str | Path, *, overwrite: bool = False
) -> Soup:
    """Write the weighted mean of policies as one folder, with config and tokenizer of the first.

    Args:
        models: at least two folders of whole models, or at least two LoRA adapter folders of one base.
        weights: one each, >= 0, with sum 1.
        out: written whole or not at all.
        overwrite: replace an earlier model folder.
    Raises:
        ConfigError: the weights.
        ModelError: folders that are not policies, or of different architectures, tokenizers, bases, or starts.
        RunError: ``out`` exists, or cannot be written.
    """
    found, mixed = check_ingredients(models), check_weights(weights, len(models))
    with new_folder(out, overwrite=overwrite) as target:
        if found.adapters:
            cosine = None
            mix_adapters(found, mixed, target)
        else:
            cosine = mix_models(found.folders, mixed, target)
        _copy_the_rest(found.folders[0], target)
        made = {"models": [str(folder) for folder in found.folders], "weights": list(mixed), "cosine": cosine}
        (target / SOUP_FILE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return Soup(Path(out), mixed, cosine)


def _copy_the_rest(source: Path, target: Path) -> None:
    """Config, generation config, tokenizer, template, index of shards: everything but weights and descriptions."""
    for path in sorted(source.iterdir()):
        readable = path.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken")
        if path.is_file() and readable and not (target / path.name).exists() and path.name != SOUP_FILE:
            shutil.copyfile(path, target / path.name)
