"""One step of the policy inside a trust region -- Schulman et al. 2015, arXiv:1502.05477, section 6 and appendix C.

    x      = F^-1 g            by conjugate gradient, g = gradient of the surrogate, F = Hessian of the mean KL(old || new)
    beta   = sqrt(2 delta / x^T F x)                     the longest step for which the quadratic model of the KL is delta
    theta  = theta_old + shrink^k beta x,   k = 0, 1, ...   the first for which the surrogate improves and KL <= delta

What is optimised and what the KL is of belongs to the method, which says so by having a ``trust_region``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from palate.errors import ConfigError
from palate.functional.trust_region import TrustRegion, conjugate_gradient
from palate.models.curvature import fisher_product, flat, kl_to_moved, put
from palate.types import Batch, Mean, microbatches

if TYPE_CHECKING:
    from palate.training.loop import Run


def trust_region_step(run: Run, batch: Batch, parameters: Sequence[Tensor], region: TrustRegion) -> dict[str, float]:
    """Move the policy; returns what happened as metrics.

    Args:
        batch: what the gradients in ``parameters`` were computed on. They are the mean loss's; afterwards they are None,
            so that the optimizer leaves these weights alone.
        parameters: the policy's trained weights.
    Raises:
        ConfigError: weights or products are not float32 at least: conjugate gradient in bf16 fails.
    """
    if run.dtype != "float32":
        raise ConfigError(
            "a trust region needs exact curvature: set dtype=float32 (bfloat16 and mixed are too coarse)."
        )
    parts = list(microbatches(batch, run.settings.microbatch_tokens(run.device.type)))
    states = float(sum(int(part.tokens.response_mask.sum()) for part in parts))
    temperature = float(getattr(run.method, "temperature", 1.0))
    policy = run.models.policy
    assert policy is not None
    descent = -flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    for p in parameters:
        p.grad = None

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for part in parts:
            total += fisher_product(policy, part.tokens, parameters, vector, temperature=temperature)
        return total / states + region.damping * vector

    def distance(old: Tensor, new: Tensor) -> float:
        kls = (kl_to_moved(policy, part.tokens, parameters, old, new, temperature=temperature) for part in parts)
        return float(sum(kls)) / states

    direction = conjugate_gradient(product, descent, region.iterations)
    curvature = float(direction @ product(direction))
    if not (math.isfinite(curvature) and curvature > 0):
        return {"trust_region/accepted": 0.0, "trust_region/kl": 0.0, "trust_region/improvement": 0.0}
    step = math.sqrt(2 * region.delta / curvature) * direction
    return _line_search(step, parameters, distance, lambda: _surrogate(run, parts), region)


def _line_search(
    step: Tensor,
    parameters: Sequence[Tensor],
    distance: Callable[[Tensor, Tensor], float],
    loss: Callable[[], float],
    region: TrustRegion,
) -> dict[str, float]:
    """Shorten the step until it does what it should; leave the weights as they were where it never does."""
    old, before = flat(parameters), loss()
    for tried in range(region.backtracks + 1):
        new = old + region.shrink**tried * step
        kl = distance(old, new)  # leaves the weights at ``new``
        improvement = before - loss()
        if improvement > 0 and kl <= region.delta:
            return {
                "trust_region/accepted": 1.0,
                "trust_region/kl": kl,
                "trust_region/improvement": improvement,
                "trust_region/backtracks": float(tried),
            }
    put(parameters, old)
    return {"trust_region/accepted": 0.0, "trust_region/kl": 0.0, "trust_region/improvement": 0.0}


@torch.no_grad()
def _surrogate(run: Run, parts: Sequence[Any]) -> float:
    """The mean policy loss with the weights as they are."""
    total: Mean | None = None
    for part in parts:
        mean = run.method.loss(run.models, part)["loss/policy"]
        total = mean if total is None else total + mean
    assert total is not None
    return total.item()
