"""A table of annotators: what the fitted model says of each, and a flag where something is wrong, with the evidence.

A flag is a reason to look at somebody's answers, and not a verdict. Each is a statement that holds with
``certainty`` standard errors to spare; with 2, about one honest annotator in 44 who *sits on the border* is flagged
wrongly, and the borders are far from honest work:

    adversary           a < 0: what the others find better, this one finds worse. Scale read the wrong way round?
    answers at random   a may be zero, and is less than half the typical annotator's
    clicks one side     of two equal responses takes the same side 2 times of 3 or more, and the side moves this one more
                        than one standard deviation of quality does
    leans to one side   the same, but quality moves this one more
    too fast            the median vote takes less than a third of the median annotator's, 10 timed votes or more

The model makes the first four small in their effect by itself: a low a is a small weight, and b is taken off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import torch

from palate.errors import FeedbackError
from palate.evaluation.statistics import Interval, wilson
from palate.feedback.annotator_model import AnnotatorFit, fit_scores
from palate.feedback.columns import padded, wide

LEAN = math.log(2)  # in logits: 2 of 3
SLOWEST_TOO_FAST = 1 / 3
TIMED_VOTES = 10


@dataclass(frozen=True)
class Flag:
    """What is wrong, and the numbers that say so."""

    name: str
    evidence: str


@dataclass(frozen=True)
class AnnotatorRow:
    """One annotator.

    Attributes:
        name: of the annotator.
        votes: how many; ``evidence`` is their total weight, which is less where they come from rankings.
        reliability, reliability_sd: a, logits per standard deviation of quality. 0 = random, below 0 = contrary.
        left_bias, left_bias_sd: b, logits for the left; None where no sides are known.
        tie_rate: share of votes that are ties.
        agreement: share of decided votes on the side of the consensus *of the others* (scores fitted without this
            annotator's votes), with Wilson's interval; None where the others say nothing about this one's pairs.
        compared: how many votes that is of.
        seconds, median_seconds: of the timed votes, or None.
        flags: see the module.
    """

    name: str
    votes: int
    evidence: float
    reliability: float
    reliability_sd: float
    left_bias: float | None
    left_bias_sd: float | None
    tie_rate: float
    agreement: Interval | None
    compared: int
    seconds: float | None
    median_seconds: float | None
    flags: tuple[Flag, ...] = ()


def annotator_table(fit: AnnotatorFit, *, certainty: float = 2.0) -> list[AnnotatorRow]:
    """One row for each annotator, those with flags first, then by reliability, the lowest first.

    Args:
        fit: of ``fit_annotators``.
        certainty: standard errors by which a flag's statement must hold, > 0.
    """
    if not certainty > 0:
        raise FeedbackError(f"certainty {certainty}: expected standard errors above 0, e.g. 2")
    times = [[v.seconds for v in fit.votes if v.annotator == name and v.seconds is not None] for name in fit.annotators]
    medians = [median(t) for t in times if len(t) >= TIMED_VOTES]
    usual = median(medians) if len(medians) > 1 else None
    rows = [_row(fit, k, times[k], usual, certainty) for k in range(len(fit.annotators))]
    return sorted(rows, key=lambda row: (not row.flags, row.reliability, row.name))


def format_table(rows: Sequence[AnnotatorRow]) -> str:
    """The table as text, flags and their evidence below it."""
    width = max([9, *(wide(r.name) for r in rows)])
    lines = [f"{'annotator':<{width}}  votes  reliability    left bias      ties    agrees with the others  seconds"]
    for r in rows:
        bias = "             " if r.left_bias is None else f"{r.left_bias:+5.2f} ± {r.left_bias_sd:4.2f} "
        agrees = "" if r.agreement is None else f"{r.agreement.percent()}"
        seconds = "" if r.seconds is None else f"{r.seconds:7.1f}"
        reliability = f"{r.reliability:+5.2f} ± {r.reliability_sd:4.2f} "
        lines.append(
            f"{padded(r.name, width)}  {r.votes:5d}  {reliability}  {bias}  {100 * r.tie_rate:4.0f} %  {agrees:<22}  {seconds}"
        )
    lines.extend(f"{r.name}: {flag.name}. {flag.evidence}" for r in rows for flag in r.flags)
    return "\n".join(line.rstrip() for line in lines)


def _row(fit: AnnotatorFit, k: int, times: list[float], usual: float | None, certainty: float) -> AnnotatorRow:
    name = fit.annotators[k]
    votes = [v for v in fit.votes if v.annotator == name]
    a, b, _ = (float(x) for x in fit.parameters[k])
    a_sd, b_sd, _ = (float(x) for x in fit.parameters_sd[k])
    sides = any(v.sides_known for v in votes)
    agree, compared = _agreement(fit, k)
    agreement = wilson(agree, compared) if compared else None
    row = AnnotatorRow(
        name=name,
        votes=len(votes),
        evidence=sum(v.weight for v in votes),
        reliability=a,
        reliability_sd=a_sd,
        left_bias=b if sides else None,
        left_bias_sd=b_sd if sides else None,
        tie_rate=sum(v.outcome == "tie" for v in votes) / len(votes),
        agreement=agreement,
        compared=compared,
        seconds=fmean(times) if times else None,
        median_seconds=median(times) if times else None,
    )
    flags = [
        _reliability_flag(row, fit.typical, certainty),
        _side_flag(row, fit, certainty),
        _speed_flag(row, times, usual),
    ]
    return replace(row, flags=tuple(f for f in flags if f))


def _reliability_flag(row: AnnotatorRow, typical: float, certainty: float) -> Flag | None:
    low, high = (row.reliability + s * certainty * row.reliability_sd for s in (-1, 1))
    agrees = "" if row.agreement is None else f"; agrees with the others in {row.agreement.percent()} of {row.compared}"
    numbers = f"reliability {row.reliability:.2f} ± {row.reliability_sd:.2f} (typical {typical:.2f}){agrees}."
    if high < 0:
        return Flag("adversary", numbers)
    if low <= 0 and high < typical / 2:
        return Flag("answers at random", numbers)
    return None


def _side_flag(row: AnnotatorRow, fit: AnnotatorFit, certainty: float) -> Flag | None:
    if row.left_bias is None or row.left_bias_sd is None:
        return None
    if abs(row.left_bias) - certainty * row.left_bias_sd <= LEAN:
        return None
    side = "left" if row.left_bias > 0 else "right"
    sided = [v for v in fit.votes if v.annotator == row.name and v.sides_known and v.outcome != "tie"]
    there = sum(v.outcome == side for v in sided)
    share = 1 / (1 + math.exp(-abs(row.left_bias)))
    evidence = (
        f"bias {row.left_bias:+.2f} ± {row.left_bias_sd:.2f}: of two equal responses the {side} one in "
        f"{100 * share:.0f} %; in fact {there} of {len(sided)} decided votes went {side}."
    )
    return Flag("clicks one side" if abs(row.left_bias) > abs(row.reliability) else "leans to one side", evidence)


def _speed_flag(row: AnnotatorRow, times: list[float], usual: float | None) -> Flag | None:
    if usual is None or row.median_seconds is None or len(times) < TIMED_VOTES:
        return None
    if row.median_seconds >= usual * SLOWEST_TOO_FAST:
        return None
    evidence = f"median {row.median_seconds:.1f} s over {len(times)} votes; the median annotator's is {usual:.1f} s."
    return Flag("too fast", evidence)


def _agreement(fit: AnnotatorFit, k: int) -> tuple[float, int]:
    """Decided votes of annotator k on the side of the scores fitted without k, and how many could be compared."""
    arrays = fit._arrays
    mine = arrays.annotator == k
    others = arrays._replace(weight=arrays.weight.masked_fill(mine, 0.0))
    scores = fit_scores(torch.as_tensor(fit.scores), torch.as_tensor(fit.parameters), others, fit.settings)
    difference = (scores[arrays.left] - scores[arrays.right])[mine]
    outcome = arrays.outcome[mine]
    # without others' votes the scores go to their prior mean, as far as the optimiser takes them
    said = (outcome != 2) & (difference.abs() > 1e-4)
    return float(((difference > 0) == (outcome == 0))[said].sum()), int(said.sum())
