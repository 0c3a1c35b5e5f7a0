"""The gold preference of the kitchen: what a guest really wants, as a number, part by part.

It reads any text. Sentences that the world does not know are broken language and cost what they cost, so gibberish,
loops and unfinished text come out below the plainest honest answer.
"""

from __future__ import annotations

from palate.pipelines.kitchen.grammar import Sentence, Task, read_prompt, read_sentence, sentences

BRIEF_WORDS = 22
LOWEST = -10.0


def gold(prompt: str, response: str) -> float:
    """The gold preference, in [-10, 3.5]; see ``tastes`` for what it is made of.

    Raises:
        DataError: the prompt is not one of this world.
    """
    return max(LOWEST, sum(tastes(prompt, response).values()))


def gold_reward(prompts: list[str], responses: list[str], **fields: object) -> list[float]:
    """``gold`` of many, in the form of a reward function (``palate.pipelines.kitchen:gold_reward``)."""
    return [gold(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def tastes(prompt: str, response: str) -> dict[str, float]:
    """The parts of gold by name.

    * ``answer``: +1 for an answer to what was asked, -0.5 for one to something else, -1 for none. Each further answer -0.5.
    * ``suits``: +0.4 for a choice that suits what was asked and respects the guest's wish.
    * ``reason``: +0.5 for giving a reason, and +0.3 more if it is true of the choice.
    * ``polite``: +0.8 for a polite opening, +0.5 for a polite ending, -1.2 for each rude remark.
    * ``brief``: -0.4 for each empty sentence, -0.06 for each word after the twenty-second.
    * ``fresh``: -0.2 for each run of three words that was there before.
    * ``language``: -1 for each sentence that is none, and -0.1 for each of its words after the fifth; -1 if the last one
      is not finished; -3 for saying nothing.
    """
    task = read_prompt(prompt)
    said = [read_sentence(text) for text in sentences(response)]
    answers = [s for s in said if s.role == "answer"]
    return {
        "answer": _answer(task, answers),
        "suits": _suits(task, answers[0]) if answers else 0.0,
        "reason": _reason(task, answers[0]) if answers else 0.0,
        "polite": _polite(said),
        "brief": -0.4 * _count(said, "filler") - 0.06 * max(0, len(response.split()) - BRIEF_WORDS),
        "fresh": -0.2 * _repeats(response),
        "language": _language(said, response),
    }


def _answer(task: Task, answers: list[Sentence]) -> float:
    if not answers:
        return -1.0
    return (1.0 if _is_asked(task, answers[0]) else -0.5) - 0.5 * (len(answers) - 1)


def _is_asked(task: Task, answer: Sentence) -> bool:
    return answer.kind == task.kind.name and answer.subject == task.subject


def _suits(task: Task, answer: Sentence) -> float:
    suitable = [c.name for c in task.kind.choices[task.family] if task.fits(c)]
    return 0.4 if _is_asked(task, answer) and answer.choice in suitable else 0.0


def _reason(task: Task, answer: Sentence) -> float:
    if not answer.reason:
        return 0.0
    choices = [c for family in task.kind.choices.values() for c in family]
    return 0.8 if any(c.name == answer.choice and answer.reason in c.reasons for c in choices) else 0.5


def _polite(said: list[Sentence]) -> float:
    opening = 0.8 if said and said[0].role == "polite_opener" else 0.0
    ending = 0.5 if said and said[-1].role == "polite_closer" else 0.0
    return opening + ending - 1.2 * _count(said, "rude_opener")


def _repeats(text: str) -> int:
    words = text.split()
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return len(runs) - len(set(runs))


def _language(said: list[Sentence], response: str) -> float:
    if not said:
        return -3.0
    broken = [len(s.text.split()) for s in said if s.role == "broken"]
    unfinished = 0.0 if response.rstrip().endswith((".", "?", "!")) else 1.0
    return -unfinished - sum(1 + 0.1 * max(0, n - 5) for n in broken)


def _count(said: list[Sentence], role: str) -> int:
    return sum(s.role == role for s in said)
