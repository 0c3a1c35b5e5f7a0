"""One set of frozen weights under several models.

Each role stays a whole model, with its own class, adapter, head, settings and folder, so that nothing that reads, saves or
runs a model knows of sharing. Only the trunk's parameters, which no adapter changes, are the same tensors in all of them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from palate.errors import ModelError
from palate.models.adapters import base_folder, is_adapted
from palate.models.attention import needed_attention
from palate.models.heads import base_of, new_score_head, scalar_head
from palate.models.memo import read_by_several


def stand_on(model: nn.Module, trunk: nn.Module, where: object) -> None:
    """Let ``model`` use the trunk's own frozen weights in the place of its copies of them, which are let go.

    Args:
        model: an adapted model, or one that is about to be; on any device.
        trunk: the model whose weights are kept, with an adapter.
        where: the model's folder, for errors.
    Raises:
        ModelError: some weight is not the same number for number.
    """
    mine, theirs = base_of(model), base_of(trunk)
    if type(mine) is not type(theirs):  # then the heads are unlike too
        mine, theirs = mine.base_model, theirs.base_model
    places, wanted = _places(mine), _frozen(theirs)
    unlike = [name for name, weight in wanted.items() if not _same(places.get(name), weight)]
    if unlike:
        what = (
            f"its base, {_base(model)}, is not that of the policy, {_base(trunk)}"
            if is_adapted(model)
            else f"found a whole model with weights of its own, expected an adapter on the policy's base, {_base(trunk)}"
        )
        raise ModelError(
            f"{where}: {what}: {len(unlike)} of {len(wanted)} weights are not the same, "
            f"{_difference(unlike[0], places, wanted)}. Roles on one trunk need one base in one dtype: {_remedy(trunk)}, or set "
            "sharing=reference for models of their own."
        )
    for name, weight in wanted.items():
        module, attribute = places[name]
        setattr(module, attribute, weight)


def stands_on(model: nn.Module, trunk: nn.Module) -> bool:
    """Does the model use the trunk's frozen weights?"""
    mine = {id(p) for p in model.parameters()}
    wanted = _frozen(base_of(trunk).base_model)
    return bool(wanted) and all(id(weight) in mine for weight in wanted.values())


def frozen_copy_of_adapter(model: nn.Module) -> nn.Module:
    """A frozen copy of an adapted model on the same trunk: what is trained stands twice, what is not stands once."""
    held = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, dict(held)).requires_grad_(False).eval()


def value_head_on(policy: nn.Module, seed: int) -> nn.Module:
    """A value model that is the policy's own trunk (adapter included) under a new scalar head.

    The trunk is one module in both: a gradient of the values moves the policy's weights, and log-probs and values of the
    same rows take one pass (``models.memo``).

    Args:
        seed: of the head, N(0, 1 / (hidden + 1)).
    Raises:
        ModelError: transformers has no scalar model of this architecture.
    """
    from transformers import AutoModelForSequenceClassification

    inner = base_of(policy)
    config = copy.deepcopy(inner.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):  # everything but the head is replaced
            value: Any = AutoModelForSequenceClassification.from_config(config, **needed_attention(config))
    except ValueError as error:
        raise ModelError(
            f"{type(inner).__name__}: transformers knows no sequence classifier of this architecture, whose head could "
            "be the value's. Take sharing=trunk or separate, with a value model of another kind."
        ) from error
    setattr(value, value.base_model_prefix, inner.base_model)
    scalar_head(value).to_empty(device=inner.device)
    new_score_head(value, seed)
    left = [name for name, p in value.named_parameters() if p.is_meta]
    if left or value.base_model is not inner.base_model:
        raise ModelError(
            f"{type(inner).__name__} and {type(value).__name__} are built too differently for one trunk "
            f"({', '.join(left[:3]) or value.base_model_prefix}). Take sharing=trunk."
        )
    if hasattr(inner, "compute_dtype"):
        value.compute_dtype = inner.compute_dtype
    read_by_several(inner.base_model)
    return value.train(policy.training)  # type: ignore[no-any-return]


def _frozen(trunk: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that no adapter changes, by the names that they have without adapter."""
    weights = {name: module.get_parameter(attribute) for name, (module, attribute) in _places(trunk).items()}
    return {name: weight for name, weight in weights.items() if not weight.requires_grad}


def _places(trunk: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name without adapter -> (module, attribute) of each parameter, adapters' own among them."""
    return {
        f"{name}.{attribute}".replace(".base_layer.", ".").replace(".original_module.", "."): (module, attribute)
        for name, module in trunk.named_modules()
        for attribute, weight in module.named_parameters(recurse=False)
    }


def _same(place: tuple[nn.Module, str] | None, weight: nn.Parameter) -> bool:
    if place is None:
        return False
    own = place[0].get_parameter(place[1])
    return own.dtype == weight.dtype and own.shape == weight.shape and torch.equal(own.to(weight.device), weight)


def _difference(name: str, places: dict[str, tuple[nn.Module, str]], wanted: dict[str, nn.Parameter]) -> str:
    if name not in places:
        return f"the first is {name}, which it lacks"
    own = places[name][0].get_parameter(places[name][1])
    facts, others = (f"{tuple(p.shape)} {str(p.dtype).removeprefix('torch.')}" for p in (own, wanted[name]))
    return f"the first is {name}" + (f" ({facts} there, {others} in the policy)" if facts != others else "")


def _base(model: nn.Module) -> str:
    return _folder(model) or f"a {type(base_of(model)).__name__} into which an earlier adapter was merged"


def _remedy(trunk: nn.Module) -> str:
    if _folder(trunk):
        return f"train this model with LoRA from {_folder(trunk)}"
    return "leave --lora out, so that the policy's own adapter is trained on and its base stays what it was"


def _folder(model: nn.Module) -> str:
    """Where the model's base is from; nothing of a merged one, which is in no folder."""
    return (base_folder(model) if is_adapted(model) else "") or str(base_of(model).name_or_path)
