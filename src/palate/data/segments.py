"""What was changed in a correction: spans of characters found by a diff of words, and the tokens that stand there.

A span is (start, end) in characters, end excluded; start == end is a *seam*, where something is missing that the other
text has. The diff is of whole words, with each mark of punctuation and each Chinese or Japanese character as a word of
its own. It keeps pure insertions and deletions, the commonest corrections: what was taken out is a span of the one
text and a seam of the other.

The token that a seam changes is the one after it. The tokens before the first difference are the same in both texts,
predicted from the same prefix, and cancel in any comparison of the two as long as they weigh the same on both sides;
the token after the seam is where the text went on instead of saying what was taken out. At the end of a text that is
the end-of-text token: to stop there is the correction. Everywhere else the end of text is unchanged.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from difflib import SequenceMatcher

from palate.data.kinds import Comparison, SegmentedComparison, Spans, at
from palate.errors import DataError

Place = tuple[int, int]  # start and end of a word in its text

# Scripts that put no space between words: Han, Hiragana, Katakana.
_ALONE = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_LETTERS = rf"(?:(?![{_ALONE}])\w)+"
_WORD = re.compile(rf"[{_ALONE}]|{_LETTERS}(?:['’.,]{_LETTERS})*|[^\w\s]")  # don't, 3.5 and 1,000 are words


def changed_spans(chosen: str, rejected: str) -> tuple[Spans, Spans]:
    """What differs between two texts: spans of the one, and as many of the other, in order.

    Without its spans either text is the same. Exchanging the texts exchanges the spans.

    Raises:
        DataError: the texts are equal.

    >>> changed_spans("Two red cats sat.", "Two cats sat down.")
    (((3, 7), (16, 16)), ((3, 3), (12, 17)))
    """
    if chosen == rejected:
        raise DataError("the two texts are equal: nothing was changed.")
    # SequenceMatcher treats its two sides differently; in a fixed order, who was chosen makes no difference.
    one, two = sorted((chosen, rejected))
    first, second = ([match.span() for match in _WORD.finditer(text)] for text in (one, two))
    same = _equal_words([one[a:b] for a, b in first], [two[a:b] for a, b in second])
    kept = [(first[i], second[j]) for i, j in _latest(same, (one, first), (two, second))]
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []
    end_one = end_two = 0
    for (start_one, next_one), (start_two, next_two) in [*kept, ((len(one),) * 2, (len(two),) * 2)]:
        here, there = one[end_one:start_one], two[end_two:start_two]
        if here != there:
            left, right = _shared_space(here, there)
            found.append(((end_one + left, start_one - right), (end_two + left, start_two - right)))
        end_one, end_two = next_one, next_two
    spans = tuple(a for a, _ in found), tuple(b for _, b in found)
    return spans if chosen == one else (spans[1], spans[0])


def _equal_words(one: Sequence[str], two: Sequence[str]) -> list[tuple[int, int]]:
    """Numbers of words that are equal in two texts, in order.

    Those that both begin and end with first: SequenceMatcher takes the longest stretch, which where words are repeated need
    not be at its place, and says more than was done.
    """
    begin = _common(one, two)
    end = _common(one[begin:][::-1], two[begin:][::-1])
    middle = one[begin : len(one) - end], two[begin : len(two) - end]
    blocks = SequenceMatcher(None, *middle, autojunk=False).get_matching_blocks()
    return [
        *((k, k) for k in range(begin)),
        *((begin + i + k, begin + j + k) for i, j, n in blocks for k in range(n)),
        *((len(one) - k, len(two) - k) for k in range(end, 0, -1)),
    ]


def _common(one: Sequence[str], two: Sequence[str]) -> int:
    """How many words two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _latest(
    same: Sequence[tuple[int, int]], one: tuple[str, Sequence[Place]], two: tuple[str, Sequence[Place]]
) -> list[tuple[int, int]]:
    """Equal words with what one text alone has as far to the right as it goes.

    Of ``a, b, c`` without ``b`` either ``, b`` or ``b,`` may be said to be missing. The texts part at ``b``: it is the first
    word that is changed, and ``c`` the word after the seam.

    Args:
        same: numbers of equal words, in order.
        one, two: a text and where its words are.
    """
    (text_one, first), (text_two, second) = one, two
    found: list[tuple[int, int]] = []
    i = j = -1  # the equal words before
    for next_i, next_j in same:
        at_one, at_two = first[i + 1], second[j + 1]  # where the texts go on
        one_alone = (next_i > i + 1) != (next_j > j + 1)
        ends = first[i][1] if i >= 0 else 0, second[j][1] if j >= 0 else 0
        # The white space before is compared, too.
        if one_alone and text_one[ends[0] : at_one[1]] == text_two[ends[1] : at_two[1]]:
            next_i, next_j = i + 1, j + 1
        found.append((next_i, next_j))
        i, j = next_i, next_j
    return found


def _shared_space(one: str, two: str) -> tuple[int, int]:
    """How much white space two texts begin and end with in common; at the end first, so that a word keeps its space."""
    length = min(len(one), len(two))
    right = 0
    while right < length and one[-1 - right] == two[-1 - right] and one[-1 - right].isspace():
        right += 1
    left = 0
    while left < length - right and one[left] == two[left] and one[left].isspace():
        left += 1
    return left, right


def found_spans(record: SegmentedComparison) -> tuple[Spans, Spans]:
    """The spans of chosen and rejected: the record's own, and those of the diff for a side that has none.

    Raises:
        DataError: the diff is needed and the texts are equal.
    """
    if record.chosen_spans is not None and record.rejected_spans is not None:
        return record.chosen_spans, record.rejected_spans
    try:
        chosen, rejected = changed_spans(record.chosen, record.rejected)
    except DataError as error:
        raise DataError(at(record.source, str(error))) from None
    return (
        chosen if record.chosen_spans is None else record.chosen_spans,
        rejected if record.rejected_spans is None else record.rejected_spans,
    )


def comparison_to_correction(comparison: Comparison) -> SegmentedComparison:
    """A comparison whose changed spans are what a diff finds.

    Raises:
        DataError: it has a margin or a probability, for which a correction has no place.
    """
    for name in ("margin", "probability"):
        if getattr(comparison, name) is not None:
            message = f'a comparison with a "{name}" cannot be read as a correction, which has no place for it. '
            raise DataError(
                at(comparison.source, message + 'Train with method "dpo" or "reward", or remove the field.')
            )
    return SegmentedComparison(
        comparison.prompt,
        comparison.chosen,
        comparison.rejected,
        annotator=comparison.annotator,
        source=comparison.source,
    )


def correction_to_comparison(correction: SegmentedComparison) -> Comparison:
    """A correction without its spans.

    >>> correction_to_comparison(SegmentedComparison("Hi", "a b", "a", ((1, 3),), ())).chosen
    'a b'
    """
    return Comparison(
        correction.prompt,
        correction.chosen,
        correction.rejected,
        annotator=correction.annotator,
        source=correction.source,
    )


# --- from characters to tokens ------------------------------------------------------------------------------------


def changed_tokens(places: Sequence[tuple[int, int]], spans: Spans, then: int = 0) -> list[bool]:
    """Which tokens stand in a span, or after a seam.

    Args:
        places: (start, end) of each token in the text, in order; white space between two belongs to the second.
        spans: of the text.
        then: tokens that follow the text and stand for none of it: its end. The first is changed by a seam at the end.
    Returns:
        One for each token, those that follow included.
    """
    found = [False] * (len(places) + then)
    for start, end in spans:
        if start == end:
            after = next((i for i, (_, stop) in enumerate(places) if stop > start), len(places))
            if after < len(found):
                found[after] = True
            continue
        before = 0
        for i, (begin, stop) in enumerate(places):
            found[i] = found[i] or (min(begin, before) < end and stop > start)
            before = max(before, stop)
    return found


def moved_spans(spans: Spans, response: str, written: str, opening: str = "") -> Spans:
    """Spans of a response as spans of what a chat template wrote for it.

    The template may put text around the response and change its white space; its other characters stand in ``written``
    one after the other, but for a beginning that the prompt has written already.

    Args:
        opening: what stands before the response in ``written``, if it does.

    >>> moved_spans(((0, 2), (4, 7)), "  one two", "> one two!", "> ")
    ((2, 2), (4, 7))
    """
    here = [i for i, character in enumerate(response) if not character.isspace()]
    there = [i for i, character in enumerate(written) if not character.isspace()]
    own, whole = "".join(response[i] for i in here), "".join(written[i] for i in there)
    before = len(opening) if written.startswith(opening) else 0
    lost = 0
    while (first := whole.find(own[lost:], bisect_left(there, before))) < 0:
        lost += 1

    def place(position: int) -> int:
        """Where a gap between two characters of the response is."""
        count = bisect_left(here, position)  # characters before it, without white space
        after = first + max(count - lost, 0)
        low = there[after - 1] + 1 if count > lost else 0
        high = there[after] if after < len(there) else len(written)
        if count > lost:
            return min(low + position - here[count - 1] - 1, high)
        return max(high - (here[count] - position), before) if lost <= count < len(here) else high

    return tuple((place(start), place(end)) for start, end in spans)
