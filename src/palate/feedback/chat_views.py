"""From battles and chats to records: votes as comparisons, thumbs as judgements, and what people did as noisy judgements.

A comparison has one prompt. At the first turn of a battle both sides answer the same; later each side answers its own
history, and the loser's text may be an answer to something else. So later turns are left out, with a count, unless
``histories="winner"`` asks for them with the chosen side's conversation as prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from palate.data.kinds import Comparison, Judgement, PromptText
from palate.errors import ConfigError
from palate.feedback.conversations import SIDES, Answered, Conversation, conversations
from palate.feedback.store import Store
from palate.feedback.views import Made

# What is assumed of a signal before enough thumbs stand beside it: the share of good answers among those with it.
# Assumptions, not measurements; dwelling says nothing until it was measured.
ASSUMED = {"copy": 0.7, "regenerate": 0.3}
ENOUGH = 20  # answers with both the signal and a thumb, from which its share is measured


@dataclass(frozen=True)
class NoisyJudgement:
    """A judgement that nobody gave: what somebody did with an answer points to it.

    Attributes:
        judgement: desirable when the probability that the answer was good is above 1/2.
        probability: that ``desirable`` is right, in (1/2, 1).
        signals: "copy", "regenerate", "dwell_long", "dwell_short".
    """

    judgement: Judgement
    probability: float
    signals: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """What a signal says: the share of good answers among those with it.

    Attributes:
        share: in (0, 1).
        n: answers with the signal and a thumb that it was measured on; 0 = assumed.
    """

    share: float
    n: int


def prompt_of(conversation: Conversation, turn: int, side: int) -> PromptText:
    """What this side answered at this turn: the conversation up to there; one message alone as its text."""
    messages = conversation.history(side, turn)
    return messages[0]["content"] if len(messages) == 1 else messages


def battles(
    store: Store, *, ties: Literal["drop", "half"] = "drop", histories: Literal["same", "winner"] = "same"
) -> Made:
    """One comparison for each vote that prefers a side.

    Args:
        ties: "half" gives a tie the probability 1/2 ("both bad" stays out), as in ``views.comparisons``.
        histories: "same" takes turns at which both sides had heard the same; "winner" all of them, with the chosen
            side's conversation as prompt (a tie's left one).
    """
    made = Made()
    for conversation in conversations(store, "battle"):
        for each in conversation.current:
            reason = _why_not(conversation, each, ties, histories)
            if reason:
                made.left_out[reason] += 1
                continue
            chosen = SIDES.index(each.vote) if each.vote in SIDES else 0
            facts: dict[str, Any] = {"probability": 0.5} if each.vote == "tie" else {}
            made.records.append(
                Comparison(
                    prompt_of(conversation, each.turn, chosen),
                    each.answers[chosen],
                    each.answers[1 - chosen],
                    annotator=conversation.annotator,
                    source=f"{store.path.name}:{each.vote_seq}",
                    **facts,
                )
            )
    return made


def thumbs(store: Store) -> Made:
    """One judgement for each answer with a thumb, answers that were made anew included."""
    made = Made()
    for conversation, each in _chat_answers(store):
        if each.thumb is None:
            made.left_out["answers without a thumb"] += 1
        elif not each.answers[0]:
            made.left_out["empty answers"] += 1
        else:
            made.records.append(_judgement(store, conversation, each, each.thumb, each.thumb_seq))
    return made


def signals(store: Store, *, shares: Mapping[str, Share] | None = None, least: float = 0.5) -> Made:
    """Noisy judgements (``NoisyJudgement``) of answers that have no thumb but were copied, made anew, or dwelt on.

    With q_s the share of good answers among those with signal s and q their share at all, the signals of an answer are put
    together as if independent given its goodness (naive Bayes):

        logit P(good) = logit q + sum_s (logit q_s - logit q)

    Args:
        shares: of each signal and of "all"; None = ``measured_shares`` of this store.
        least: leave out those with a lower probability; 1/2 to 1.
    Raises:
        ConfigError: ``least`` is out of range.
    """
    if not 0.5 <= least < 1:
        raise ConfigError(f"the least probability is {least}. Expected 0.5 or more and below 1.")
    given, made = list(_chat_answers(store)), Made()
    seen = _signals_of(given)
    known = measured_shares(store) if shares is None else shares
    base = _logit(known["all"].share)
    for conversation, each in given:
        names = tuple(name for name in seen[each.seq] if name in known)
        if each.thumb is not None:
            made.left_out["answers with a thumb"] += 1
        elif not names:
            made.left_out["answers without a signal that says anything"] += 1
        elif not each.answers[0]:
            made.left_out["empty answers"] += 1
        else:
            good = 1 / (1 + math.exp(-(base + sum(_logit(known[name].share) - base for name in names))))
            probability = max(good, 1 - good)
            if good == 0.5 or probability < least:
                made.left_out["answers whose signals are not sure enough"] += 1
                continue
            judgement = _judgement(store, conversation, each, good > 0.5, each.seq)
            made.records.append(NoisyJudgement(judgement, probability, names))
    return made


def measured_shares(store: Store) -> dict[str, Share]:
    """How often the answers with a signal got a thumb up, where both are known; "all" = over all thumbs.

    (ups + 1) / (n + 2). Below ``ENOUGH`` answers it is what ``ASSUMED`` says (1/2 for "all"), or the signal is left out.
    """
    given = [(conversation, each) for conversation, each in _chat_answers(store)]
    seen = _signals_of(given)
    ups: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for _, each in given:
        if each.thumb is not None:
            for name in (*seen[each.seq], "all"):
                counts[name] += 1
                ups[name] += each.thumb
    found = {"all": Share(0.5, 0)} | {name: Share(share, 0) for name, share in ASSUMED.items()}
    return found | {name: Share((ups[name] + 1) / (n + 2), n) for name, n in counts.items() if n >= ENOUGH}


def noisy_line(noisy: NoisyJudgement) -> dict[str, Any]:
    """As JSON: a judgement that says how sure it is, so that nobody takes it for one that was given."""
    from palate.data.formats.palate import to_json

    return to_json(noisy.judgement) | {"probability": round(noisy.probability, 4), "signals": list(noisy.signals)}


def _why_not(conversation: Conversation, each: Answered, ties: str, histories: str) -> str | None:
    """Why a turn gives no comparison, or None."""
    if each.vote is None:
        return "turns without a vote"
    if each.vote == "both_bad":
        return "both bad"
    if each.vote == "tie" and ties == "drop":
        return "ties"
    if each.answers[0] == each.answers[1]:
        return "turns with equal answers"
    if histories == "same" and conversation.history(0, each.turn) != conversation.history(1, each.turn):
        return "later turns, where each side had its own history"
    return None


def _chat_answers(store: Store) -> Iterator[tuple[Conversation, Answered]]:
    for conversation in conversations(store, "chat"):
        for each in conversation.turns:
            yield conversation, each


def _signals_of(given: Iterable[tuple[Conversation, Answered]]) -> dict[int, list[str]]:
    """The signals of each answer, by its event.

    Dwelling is long or short beside the same person's median of seconds a character, from their third answer on.
    """
    given = list(given)
    paces: dict[str, list[float]] = {}
    for conversation, each in given:
        if each.dwell is not None and each.answers[0]:
            paces.setdefault(conversation.annotator, []).append(each.dwell / len(each.answers[0]))
    middle = {annotator: median(pace) for annotator, pace in paces.items() if len(pace) >= 3}
    last = {(c.id, each.turn): each.version for c, each in given}
    found: dict[int, list[str]] = {}
    for conversation, each in given:
        names = ["copy"] if each.copies else []
        names += ["regenerate"] if each.version < last[conversation.id, each.turn] else []
        if each.dwell is not None and each.answers[0] and conversation.annotator in middle:
            long = each.dwell / len(each.answers[0]) > middle[conversation.annotator]
            names.append("dwell_long" if long else "dwell_short")
        found[each.seq] = names
    return found


def _judgement(store: Store, conversation: Conversation, each: Answered, good: bool, seq: int) -> Judgement:
    messages = list(conversation.history(0, each.turn))
    messages[-1] = {"role": "user", "content": each.text}
    prompt: PromptText = messages[0]["content"] if len(messages) == 1 else tuple(messages)
    return Judgement(prompt, each.answers[0], good, annotator=conversation.annotator, source=f"{store.path.name}:{seq}")


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
