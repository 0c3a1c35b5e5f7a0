"""What plays the reference: the policy with its adapter off, another folder, or a frozen copy.

The reference has to be the policy as it was when training began; anything else shows as a KL that is not 0 at the first
look. The cheapest way that is exact is taken.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palate.errors import ModelError
from palate.models.adapters import adds_nothing, is_adapted
from palate.models.checks import check_tokenizer, same_vocabulary
from palate.models.heads import base_of
from palate.models.load import load_policy, load_tokenizer


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
) -> nn.Module:
    """The frozen reference of a policy. Call it before training, with the policy's starting weights in place.

    Args:
        policy: as ``load_policy`` made it.
        reference_where: a folder or hub name, when the reference is not the policy's start. None:

            * a policy whose adapter adds nothing yet (fresh LoRA): ``AdapterOff(policy)``, free;
            * a policy whose adapter is already trained (an SFT adapter that is trained on): a frozen copy, because with
              the adapter off it would be the model before SFT. To save the memory, load the policy with ``lora=``: the
              SFT adapter is then merged into the base and a new adapter trained on top;
            * a policy without adapter: a frozen copy.
        dtype, device: of a reference that is loaded from ``reference_where``.
        tokenizer: the policy's; compared with that of ``reference_where`` when given.
    Raises:
        ModelError: the folder cannot be a reference, or has another vocabulary than the policy.
    """
    if reference_where is None:
        if is_adapted(policy) and adds_nothing(policy):
            return AdapterOff(policy)
        return frozen_copy(policy)
    own = load_tokenizer(reference_where)
    if tokenizer is not None and not same_vocabulary(own, tokenizer):
        raise ModelError(
            f"{reference_where}: its tokenizer has another vocabulary ({len(own)} tokens) than the policy's "
            f"({len(tokenizer)}). A reference reads the policy's token ids; take a model of the same family."
        )
    reference = load_policy(reference_where, dtype=dtype, device=device, trainable=False, tokenizer=own)
    if tokenizer is not None:
        check_tokenizer(reference, tokenizer, reference_where)
    return reference
