"""The four roles and what they share: a ladder of four rungs, and what plays the reference on each.

    separate      every role has weights of its own
    reference     the reference is the policy with its adapter off; without an adapter, a frozen copy
    trunk         reference, reward and value are adapters and heads on the policy's frozen trunk
    value_head    the same, and the value is a head on the policy's trunk, adapter included: one pass for both

The reference has to be the policy as it was when training began; anything else shows as a KL that is not 0 at the first
look. The cheapest way that is exact is taken.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from palate.errors import ModelError
from palate.models.adapters import adapter_config, adds_nothing, is_adapted
from palate.models.checks import check_tokenizer, same_vocabulary
from palate.models.heads import base_of
from palate.models.load import load_policy, load_tokenizer
from palate.models.sharing import frozen_copy_of_adapter

Sharing = Literal["separate", "reference", "trunk", "value_head"]


class AdapterOff(nn.Module):
    """The reference that costs no memory: the policy's own weights, run with its adapter off.

    The policy is held but not registered: this module has no parameters of its own, freezing or moving it leaves the
    policy alone, and a checkpoint never holds the weights twice.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        if not is_adapted(policy):
            raise ModelError(
                f"{type(policy).__name__} has no adapter to switch off. Load the policy with LoRA, or use a frozen copy "
                "as reference (reference_of does)."
            )
        object.__setattr__(self, "policy", policy)

    policy: nn.Module

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Within it, ``policy`` is the reference."""
        with self.policy.disable_adapter():  # type: ignore[operator]
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the policy says with its adapter off; never with a gradient."""
        with torch.no_grad(), self.context():
            return self.policy(*args, **kwargs)

    @property
    def config(self) -> Any:
        return base_of(self.policy).config

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device


def frozen(model: nn.Module) -> nn.Module:
    """The model itself, without gradients and without dropout."""
    return model.requires_grad_(False).eval()


def frozen_copy(model: nn.Module) -> nn.Module:
    """A second set of the same weights that never changes. Costs the model's memory once more."""
    return frozen(copy.deepcopy(model))


def reference_of(
    policy: nn.Module,
    reference_where: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    tokenizer: Any = None,
    sharing: Sharing = "reference",
) -> nn.Module:
    """The frozen reference of a policy. Call it before training, with the policy's starting weights in place.

    Args:
        policy: as ``load_policy`` made it.
        reference_where: a folder or hub name, when the reference is not the policy's start. None:

            * a policy whose adapter adds nothing yet (fresh LoRA): ``AdapterOff(policy)``, free;
            * a policy whose adapter is already trained (an SFT adapter that is trained on): a frozen copy of the adapter
              on the same trunk, because with the adapter off it would be the model before SFT;
            * a policy without adapter: a frozen copy.
        dtype, device: of a reference that is loaded from ``reference_where``.
        tokenizer: the policy's; compared with that of ``reference_where`` when given.
        sharing: "separate" = a copy of all weights in every case; from "trunk" on an adapter folder as
            ``reference_where`` stands on the policy's trunk, and must have the same base.
    Raises:
        ModelError: the folder cannot be a reference, or has another vocabulary than the policy.
    """
    if reference_where is None:
        if sharing == "separate" or not is_adapted(policy):
            return frozen_copy(policy)
        return AdapterOff(policy) if adds_nothing(policy) else frozen_copy_of_adapter(policy)
    own = load_tokenizer(reference_where)
    if tokenizer is not None and not same_vocabulary(own, tokenizer):
        raise ModelError(
            f"{reference_where}: its tokenizer has another vocabulary ({len(own)} tokens) than the policy's "
            f"({len(tokenizer)}). A reference reads the policy's token ids; take a model of the same family."
        )
    on_trunk = sharing in ("trunk", "value_head") and is_adapted(policy) and adapter_config(str(reference_where))
    reference = load_policy(
        reference_where,
        dtype=dtype,
        device=device,
        trainable=False,
        tokenizer=own,
        trunk=policy if on_trunk else None,
    )
    if tokenizer is not None:
        check_tokenizer(reference, tokenizer, reference_where)
    return reference
