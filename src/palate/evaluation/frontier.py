"""What a policy earns for the distance it went: samples to means with intervals, and which of several points is on the front.

    KL(pi || ref) = E_{y ~ pi} [ log pi(y|x) - log ref(y|x) ]      nats a sequence; the mean over y that pi drew estimates it

Reward against KL is how alignment methods are compared when they spend differently (Gao, Schulman and Hilton 2022,
arXiv:2210.10760, section 3; Rafailov et al. 2023, arXiv:2305.18290, section 6.1 and figure 2). Nothing here samples or
loads; that is the business of ``palate.pipelines.measure``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from numpy.typing import ArrayLike

from palate.evaluation.statistics import Interval, cluster_bootstrap

# Quantities of which less is better; "kl/..." and "length/..." too, and the same on held-out records ("held_out/loss").
LESS_IS_BETTER = ("kl", "length", "loss", "nll", "ece")
SHARES = ("accuracy", "length/no_eos")  # values of 0 and 1


def less_is_better(quantity: str) -> bool:
    """Whether a quantity is a price (distance, length, loss) rather than a gain.

    >>> [less_is_better(name) for name in ("kl", "length/response", "held_out/loss", "score/helpful", "gold")]
    [True, True, True, False, False]
    """
    return quantity.removeprefix("held_out/").partition("/")[0] in LESS_IS_BETTER


def means(
    columns: Mapping[str, ArrayLike],
    prompts: Sequence[Hashable],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Mean of each quantity over responses, with an interval that resamples whole prompts.

    Args:
        columns: quantity -> one value a response, [N]: "kl" is log pi(y|x) - log ref(y|x), summed over the tokens of the
            response, of responses that pi itself drew at temperature 1 and without filters. Other samples bias it.
        prompts: [N], equal = the same prompt.
    """
    return {
        name: cluster_bootstrap(
            values, prompts, confidence=confidence, resamples=resamples, seed=seed, share=name in SHARES
        )
        for name, values in columns.items()
    }


def pareto(points: Sequence[tuple[float, float]], less: tuple[bool, bool]) -> list[bool]:
    """Which points no other beats: none is at least as good in both quantities and better in one.

    It goes by the estimates alone; two points whose intervals overlap may change places with other samples.

    Args:
        points: [n] pairs of values.
        less: for each of the two, whether less is better.
    Returns:
        [n]; equal points are all on the front.

    >>> pareto([(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)], less=(True, False))      # KL, score
    [True, True, False]
    """
    signs = [-1.0 if lower else 1.0 for lower in less]
    worth = [(signs[0] * x, signs[1] * y) for x, y in points]
    return [not any(a[0] >= b[0] and a[1] >= b[1] and a != b for a in worth) for b in worth]
