"""Annotator-aware Bradley-Terry with ties: whose vote is worth how much, learnt together with what is better.

Vote of annotator k on the pair (l, r) as it stood on the screen:

    z = a_k (s_l - s_r) + b_k                                     a_k reliability, b_k bias to the left, in logits
    P(left, right, tie) = softmax(z/2, -z/2, log nu_k)            nu_k: ties; P(tie | z = 0) = nu_k / (2 + nu_k)

so that P(left | not a tie) = sigmoid(z): Bradley-Terry (1952) with Davidson's ties (1970, his eq. 2.3 with z a difference
of log-worths) and, as in Dawid and Skene (1979), a character for each annotator; a_k < 0 is an annotator who prefers what
others do not (Chen et al. 2013, "Pairwise ranking aggregation in a crowdsourced setting", is the case without b and nu).
Priors, which also fix the scale and the sign that the likelihood leaves open:

    s ~ N(0, 1) per response, so each prompt's have mean zero at the mode;   a_k ~ N(1, 1);   b_k ~ N(0, 1);
    log nu_k ~ N(0, 2^2)

Estimation. The joint mode of (s, a) is no good: there are thousands of s and few a, so it shrinks all s and inflates all
a until every pair looks certain (the incidental parameter problem; Neyman and Scott 1948). So the annotators' parameters
are the mode of their posterior with the scores integrated out, by EM:

    E  scores: their mode given the annotators (concave; L-BFGS with autograd) and Laplace's normal approximation there
    M  annotators: the mode of the expected log posterior, over d = s_l - s_r ~ N(mean, variance) by Gauss-Hermite

Standard errors of a, b, log nu: the observed information of EM (Louis 1982; Oakes 1999), differentiated by autograd.
Standard errors of s include those of the annotators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from palate.errors import FeedbackError
from palate.feedback.votes import OUTCOMES, Vote

Item = tuple[Hashable, Hashable]
# steps of L-BFGS within one step of EM: going up is enough (generalised EM; Dempster, Laird and Rubin 1977, section 2)
INNER = 5


@dataclass(frozen=True)
class ModelSettings:
    """Priors and stopping.

    Attributes:
        reliability: mean and standard deviation of a_k's prior; the mean above 0 says that most people are honest.
        bias_sd: of b_k, in logits, > 0; 1 = a bias of 73 : 27 is nothing unusual.
        log_tie_sd: of log nu_k, > 0.
        ties: False where people could not say "tie".
        tolerance: EM stops when no annotator's parameter moves by more, in logits; the rest of the way is of that order.
        max_steps: of EM; reaching them is reported in ``converged``.
    """

    reliability: tuple[float, float] = (1.0, 1.0)
    bias_sd: float = 1.0
    log_tie_sd: float = 2.0
    ties: bool = True
    tolerance: float = 1e-3
    max_steps: int = 200

    def __post_init__(self) -> None:
        numbers = (self.reliability[1], self.bias_sd, self.log_tie_sd, self.tolerance, self.max_steps)
        if not all(x > 0 and math.isfinite(x) for x in numbers) or not math.isfinite(self.reliability[0]):
            raise FeedbackError(f"{self}: expected standard deviations, a tolerance and steps above 0")


class VoteArrays(NamedTuple):
    """Votes as tensors [V]; a response's number is its place in ``items``, which lie prompt by prompt."""

    left: Tensor
    right: Tensor
    outcome: Tensor  # 0 left, 1 right, 2 tie
    annotator: Tensor
    weight: Tensor
    side: Tensor  # 1 where sides are known, 0 where not
    prompt: Tensor  # [items] number of the prompt
    place: Tensor  # [items] number within the prompt


@dataclass(frozen=True)
class PairEstimate:
    """What the votes say of one pair, asked as (first, second).

    Attributes:
        preferred: how likely a typical annotator (median reliability, no side bias) who does not say "tie" prefers the
            first, the uncertainty of the scores averaged over: the soft label.
        low, high: 95 % interval of that share, the scores' uncertainty alone.
        better: how sure the model is that the first is better at all, P(s_first > s_second).
        margin: expected difference of score in the typical annotator's logits: the unit of a reward model.
        margin_sd: its standard deviation.
    """

    preferred: float
    low: float
    high: float
    better: float
    margin: float
    margin_sd: float


@dataclass(frozen=True)
class AnnotatorFit:
    """The fitted model.

    Attributes:
        votes: what it was fitted to.
        items: [I] (prompt, response), prompt by prompt in order of first appearance.
        annotators: [A] in order of first appearance.
        scores: [I], mean zero for each prompt, prior standard deviation 1.
        parameters: [A, 3] a, b, log nu.
        parameters_sd: [A, 3].
        typical: a of the typical annotator: the median of a, each annotator with the weight of their votes.
        steps, converged: of EM.
    """

    votes: tuple[Vote, ...]
    items: tuple[Item, ...]
    annotators: tuple[str, ...]
    scores: np.ndarray
    parameters: np.ndarray
    parameters_sd: np.ndarray
    typical: float
    steps: int
    converged: bool
    settings: ModelSettings
    _covariance: Tensor  # [P, M, M] of each prompt's scores
    _arrays: VoteArrays

    def index(self) -> dict[Item, int]:
        return {item: i for i, item in enumerate(self.items)}

    def pairs(self, pairs: Sequence[tuple[Hashable, Hashable, Hashable]]) -> list[PairEstimate]:
        """Estimates of (prompt, first, second), voted on or not.

        Raises:
            FeedbackError: a response that no vote mentions.
        """
        number = self.index()
        unknown = [(p, r) for p, *both in pairs for r in both if (p, r) not in number]
        if unknown:
            raise FeedbackError(
                f"{len(unknown)} responses without a vote, the first {unknown[0]}: nothing is known of them"
            )
        first = torch.tensor([number[p, a] for p, a, _ in pairs], dtype=torch.long)
        second = torch.tensor([number[p, b] for p, _, b in pairs], dtype=torch.long)
        mean, sd = self.differences(first, second)
        # the sign of `typical` is kept: where most people contradict the rest, it says so
        margin, margin_sd = self.typical * mean, abs(self.typical) * sd
        z = NormalDist().inv_cdf(0.975)
        preferred = expected_sigmoid(margin, margin_sd)
        low, high = torch.sigmoid(margin - z * margin_sd), torch.sigmoid(margin + z * margin_sd)
        better = torch.special.ndtr(mean / sd)
        rows = torch.stack([preferred, low, high, better, margin, margin_sd], dim=1)
        return [PairEstimate(*row) for row in rows.tolist()]

    def differences(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of s_first - s_second, by numbers of items."""
        scores = torch.as_tensor(self.scores)
        return scores[first] - scores[second], _variance(self._covariance, self._arrays, first, second).sqrt()


def fit_annotators(votes: Sequence[Vote], settings: ModelSettings | None = None) -> AnnotatorFit:
    """Fit the model; deterministic.

    Args:
        votes: at least one. Several votes of one annotator on one pair are taken as independent.
        settings: None = the priors above.

    Raises:
        FeedbackError: no votes, or ties where ``settings.ties`` says there can be none.
    """
    settings = settings or ModelSettings()
    votes = tuple(votes)
    arrays, items, annotators = _arrays(votes, settings)
    scores = torch.zeros(len(items), dtype=torch.float64)
    parameters = _prior(settings)[0].repeat(len(annotators), 1)
    step, moved = 0, math.inf
    while step < settings.max_steps and moved > settings.tolerance:
        step += 1
        scores = fit_scores(scores, parameters, arrays, settings, max_iter=INNER)
        variance = _variance(
            torch.linalg.inv(_precision(scores, parameters, arrays)), arrays, arrays.left, arrays.right
        )
        mean = scores[arrays.left] - scores[arrays.right]

        def objective(p: Tensor, mean: Tensor = mean, variance: Tensor = variance) -> Tensor:
            return -expected_log_posterior(p, mean, variance, arrays, settings)

        updated = _minimise(objective, parameters, max_iter=INNER)
        moved = float((updated - parameters).abs().max())
        parameters = updated
    scores = fit_scores(scores, parameters, arrays, settings)
    theta_covariance, covariance = _uncertainty(scores, parameters, arrays, settings)
    sd = theta_covariance.diagonal().clamp(min=0).sqrt().reshape(-1, 3)
    amount = torch.zeros(len(annotators), dtype=torch.float64).index_add_(0, arrays.annotator, arrays.weight)
    return AnnotatorFit(
        votes=votes,
        items=items,
        annotators=annotators,
        scores=scores.numpy(),
        parameters=parameters.numpy(),
        parameters_sd=sd.numpy(),
        typical=_weighted_median(parameters[:, 0].tolist(), amount.tolist()),
        steps=step,
        converged=moved <= settings.tolerance,
        settings=settings,
        _covariance=covariance,
        _arrays=arrays,
    )


def fit_plain(votes: Sequence[Vote], settings: ModelSettings | None = None) -> AnnotatorFit:
    """Plain Bradley-Terry with ties: everybody is one and the same annotator without a side; the thing to compare with."""
    return fit_annotators([replace(v, annotator="everybody", sides_known=False) for v in votes], settings)


def vote_log_probabilities(difference: Tensor, parameters: Tensor, side: Tensor) -> Tensor:
    """log P(left, right, tie), [..., V, 3].

    Args:
        difference: [..., V] s_left - s_right.
        parameters: [V, 3] a, b, log nu of each vote's annotator.
        side: [V] 1 where sides are known.
    """
    z = parameters[:, 0] * difference + parameters[:, 1] * side
    return F.log_softmax(torch.stack([z / 2, -z / 2, parameters[:, 2].expand_as(z)], dim=-1), dim=-1)


def log_posterior(scores: Tensor, parameters: Tensor, arrays: VoteArrays, settings: ModelSettings) -> Tensor:
    """log P(votes | s, a, b, nu) + log prior, up to a constant; differentiable in both.

    Args:
        scores: [I]; parameters: [A, 3] a, b, log nu.
    """
    mean = scores[arrays.left] - scores[arrays.right]
    return _log_likelihood(mean, parameters, arrays) + _log_prior(parameters, settings) - scores.square().sum() / 2


def expected_log_posterior(
    parameters: Tensor, mean: Tensor, variance: Tensor, arrays: VoteArrays, settings: ModelSettings
) -> Tensor:
    """EM's objective: E over s_l - s_r ~ N(mean, variance), [V] each, of the log posterior, without the scores' prior."""
    nodes, weights = _hermite()
    likelihood = _log_likelihood(mean + variance.sqrt() * nodes[:, None], parameters, arrays, weights)
    return likelihood + _log_prior(parameters, settings)


def fit_scores(
    start: Tensor, parameters: Tensor, arrays: VoteArrays, settings: ModelSettings, *, max_iter: int = 200
) -> Tensor:
    """The scores' mode given the annotators, [I]; from ``start`` in at most ``max_iter`` steps of L-BFGS."""
    return _minimise(lambda s: -log_posterior(s, parameters, arrays, settings), start, max_iter=max_iter)


def expected_sigmoid(mean: Tensor, sd: Tensor) -> Tensor:
    """E sigmoid(x), x ~ N(mean, sd^2)."""
    nodes, weights = _hermite(31)
    return (torch.sigmoid(mean + sd * nodes[:, None]) * weights[:, None]).sum(dim=0)


def _log_likelihood(
    difference: Tensor, parameters: Tensor, arrays: VoteArrays, node_weights: Tensor | None = None
) -> Tensor:
    p = vote_log_probabilities(difference, parameters[arrays.annotator], arrays.side)
    index = arrays.outcome.expand(difference.shape).unsqueeze(-1)
    each = p.gather(-1, index).squeeze(-1) * arrays.weight
    return each.sum() if node_weights is None else (each * node_weights[:, None]).sum()


def _log_prior(parameters: Tensor, settings: ModelSettings) -> Tensor:
    mean, sd = _prior(settings)
    return -(((parameters - mean) / sd).square()).sum() / 2


def _prior(settings: ModelSettings) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a, b, log nu. Without ties nu is held at zero, as far as floats can tell."""
    tie = (0.0, settings.log_tie_sd) if settings.ties else (-60.0, 1e-3)
    rows = [settings.reliability, (0.0, settings.bias_sd), tie]
    mean, sd = torch.tensor(rows, dtype=torch.float64).T
    return mean, sd


def _minimise(function: Callable[[Tensor], Tensor], start: Tensor, *, max_iter: int) -> Tensor:
    x = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=max_iter,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = function(x)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return x.detach()


class _Curvature(NamedTuple):
    """Derivatives of -log P(vote) at the current point, times the vote's weight, [V]."""

    zz: Tensor
    zt: Tensor
    z: Tensor  # the first derivative


def _curvature(difference: Tensor, parameters: Tensor, arrays: VoteArrays) -> _Curvature:
    """With eta = (z/2, -z/2, t), -d2 log softmax = Cov(d eta): the same for every outcome."""
    p = vote_log_probabilities(difference, parameters[arrays.annotator], arrays.side).exp()
    left, right, tie = p.unbind(-1)
    seen = torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64)[arrays.outcome]
    each = ((left + right - (left - right) ** 2) / 4, -(left - right) * tie / 2)
    return _Curvature(*(arrays.weight * x for x in (*each, (left - right) / 2 - seen)))


def _precision(scores: Tensor, parameters: Tensor, arrays: VoteArrays) -> Tensor:
    """-Hessian of the log posterior in each prompt's scores, [P, M, M]; exact. Empty places keep the prior's 1."""
    prompts, m = int(arrays.prompt.max()) + 1, int(arrays.place.max()) + 1
    c = _curvature(scores[arrays.left] - scores[arrays.right], parameters, arrays)
    value = parameters[arrays.annotator, 0].square() * c.zz
    at, i, j = arrays.prompt[arrays.left], arrays.place[arrays.left], arrays.place[arrays.right]
    blocks = torch.eye(m, dtype=torch.float64).repeat(prompts, 1, 1)
    for x, y, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
        blocks = blocks.index_put((at, x, y), sign * value, accumulate=True)
    return blocks


def _variance(covariance: Tensor, arrays: VoteArrays, first: Tensor, second: Tensor) -> Tensor:
    at, i, j = arrays.prompt[first], arrays.place[first], arrays.place[second]
    return covariance[at, i, i] + covariance[at, j, j] - 2 * covariance[at, i, j]


def _uncertainty(
    scores: Tensor, parameters: Tensor, arrays: VoteArrays, settings: ModelSettings
) -> tuple[Tensor, Tensor]:
    """Covariance of the annotators' parameters [3A, 3A], and of each prompt's scores [P, M, M] with those uncertain."""
    theta = _inverse(_information(scores, parameters, arrays, settings), _prior(settings)[1].repeat(len(parameters)))
    given = torch.linalg.inv(_precision(scores, parameters, arrays))
    moves = _moves(given, scores, parameters, arrays)
    return theta, given + moves @ theta @ moves.transpose(1, 2)


def _moves(given: Tensor, scores: Tensor, parameters: Tensor, arrays: VoteArrays) -> Tensor:
    """How the scores' mode moves with the annotators' parameters, [P, M, 3A], by the implicit function theorem."""
    d = scores[arrays.left] - scores[arrays.right]
    c = _curvature(d, parameters, arrays)
    a, who, at = parameters[arrays.annotator, 0], 3 * arrays.annotator, arrays.prompt[arrays.left]
    cross = torch.zeros(*given.shape[:2], parameters.numel(), dtype=torch.float64)  # d2 log posterior / ds dtheta
    for x, value in enumerate((a * d * c.zz + c.z, a * c.zz * arrays.side, a * c.zt)):
        cross.index_put_((at, arrays.place[arrays.left], who + x), -value, accumulate=True)
        cross.index_put_((at, arrays.place[arrays.right], who + x), value, accumulate=True)
    return given @ cross


def _information(scores: Tensor, parameters: Tensor, arrays: VoteArrays, settings: ModelSettings) -> Tensor:
    """Minus the derivative of the marginal score of a, b, log nu (Oakes 1999, eq. 4), [3A, 3A].

    The marginal score is the expected complete-data score (Fisher's identity). What it is expected over moves with the
    parameters too: the mode by a Newton step, which is exact to first order from the mode, the variance with it.
    """
    theta = parameters.clone().requires_grad_()
    start = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_posterior(start, theta, arrays, settings), start, create_graph=True)
    blocks = _precision(scores, theta, arrays)
    right = torch.zeros(blocks.shape[:2], dtype=torch.float64).index_put((arrays.prompt, arrays.place), gradient)
    mode = scores + torch.linalg.solve(blocks, right)[arrays.prompt, arrays.place]
    variance = _variance(torch.linalg.inv(_precision(mode, theta, arrays)), arrays, arrays.left, arrays.right)
    own = theta.clone()  # only what the complete-data score is differentiated by
    objective = expected_log_posterior(own, mode[arrays.left] - mode[arrays.right], variance, arrays, settings)
    (score,) = torch.autograd.grad(objective, own, create_graph=True)
    rows = [torch.autograd.grad(s, theta, retain_graph=True)[0].flatten() for s in score.flatten()]
    return -torch.stack(rows)


def _inverse(information: Tensor, prior_sd: Tensor) -> Tensor:
    """Its inverse; a direction in which less than the prior's information is left by the approximation gets the prior's."""
    scaled = (information + information.T) / 2 * prior_sd[:, None] * prior_sd
    values, vectors = torch.linalg.eigh(scaled)
    return (vectors / values.clamp(min=1.0)) @ vectors.T * prior_sd[:, None] * prior_sd


def _hermite(nodes: int = 9) -> tuple[Tensor, Tensor]:
    """Nodes and weights for a standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.as_tensor(x), torch.as_tensor(w / w.sum())


def _arrays(votes: Sequence[Vote], settings: ModelSettings) -> tuple[VoteArrays, tuple[Item, ...], tuple[str, ...]]:
    if not votes:
        raise FeedbackError("no votes: nothing to fit")
    if not settings.ties and any(v.outcome == "tie" for v in votes):
        raise FeedbackError(
            f"{sum(v.outcome == 'tie' for v in votes)} votes are ties, but the settings say ties = False"
        )
    seen: dict[Hashable, dict[Hashable, int]] = {}
    annotators: dict[str, int] = {}
    for v in votes:
        responses = seen.setdefault(v.prompt, {})
        for key in (v.left, v.right):
            responses.setdefault(key, len(responses))
        annotators.setdefault(v.annotator, len(annotators))
    items = tuple((p, r) for p, responses in seen.items() for r in responses)
    number = {item: i for i, item in enumerate(items)}
    prompt = [i for i, responses in enumerate(seen.values()) for _ in responses]
    place = [j for responses in seen.values() for j in responses.values()]
    long, double = torch.long, torch.float64
    arrays = VoteArrays(
        left=torch.tensor([number[v.prompt, v.left] for v in votes], dtype=long),
        right=torch.tensor([number[v.prompt, v.right] for v in votes], dtype=long),
        outcome=torch.tensor([OUTCOMES.index(v.outcome) for v in votes], dtype=long),
        annotator=torch.tensor([annotators[v.annotator] for v in votes], dtype=long),
        weight=torch.tensor([v.weight for v in votes], dtype=double),
        side=torch.tensor([float(v.sides_known) for v in votes], dtype=double),
        prompt=torch.tensor(prompt, dtype=long),
        place=torch.tensor(place, dtype=long),
    )
    return arrays, items, tuple(annotators)


def _weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The value at which half of the weight is reached."""
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(np.asarray(weights)[order])
    return float(np.asarray(values)[order][np.searchsorted(cumulative, cumulative[-1] / 2)])
