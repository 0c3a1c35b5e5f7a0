"""The number that a text gives as its answer, or none: where there is room for doubt, nothing is guessed.

Where the answer is looked for:

* after the last mark, "####" (the rest of its line, as in GSM8K) or \\boxed{...}: whatever stands there must be one number,
  with at most a unit, "x =" or "answer:" around it. A mark without one is no answer, whatever else the text says;
* without a mark, the text's last number, if it is not part of an expression that is still to be computed.

What a number is: 72  -3  +4  1,234.50  .5  3/4  2 1/2  1.5e3  1.5 x 10^3  $10  10%  12 km  5 million; LaTeX's \\frac{3}{4}
and 1{,}000, and U+2212 as minus. Units, currencies and the percent sign are left out: 50% is 50, never 0.5.

What is none: 1,23  1 000 (one number, or two?)  3.14.15  12:30  3-4  1/2/2023  10^3  3\\pi  5k  2nd  B12  negative 5
- 5 (a list's dash, or a minus?).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import takewhile
from typing import Any

from palate.errors import ConfigError
from palate.models.samples import Sample

LONGEST = 300  # digits of a number, and size of an exponent: beyond, it is none
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

# -- the text, made plain ------------------------------------------------------------------------------------------------

_PLAIN = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # full-width forms
    | {
        "\u2010": "-",
        "\u2011": "-",
        "\u2212": "-",
        "\u2044": "/",
        "\u00d7": "*",
        "\u00b7": "*",
        "\u22c5": "*",
        "\u00f7": ":",
        "`": " ",
        "\u00b0": " ",
    }
    | {  # as LaTeX has them: something is still to be computed, or no single number
        "\u221a": " \\sqrt ",
        "\u03c0": "\\pi ",
        "\u00b1": " \\pm ",
        "\u2260": " \\ne ",
        "\u2264": " \\le ",
        "\u2265": " \\ge ",
    }
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad")  # characters without width
    | dict.fromkeys("\u20ac\u00a3\u00a5\u20b9\u00a2", "$")  # any currency
)
_GAPS = "\u00a0\u202f\u2009"  # spaces that group digits
_VULGAR = {"\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3", "\u215b": "1/8"}
_VULGAR |= {"\u215c": "3/8", "\u215d": "5/8", "\u215e": "7/8"} | {chr(0x2155 + i): f"{i + 1}/5" for i in range(4)}
_VULGAR |= {"\u2159": "1/6", "\u215a": "5/6"}
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-")
_LATEX: list[tuple[str, str]] = [
    (r"(?<=\d)\s*(?=\\[dt]?frac)", " "),
    (r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2 "),
    (r"\\[dt]?frac\s*(\d)\s*(\d)(?!\d)", r"\1/\2 "),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d)(?:,?\\[,;:!]|\{,\})(?=\d{3}(?!\d))", ","),
    (r"\^\s*\{?\s*\\circ\s*\}?", " "),
    (r"\\([$%])", r"\1"),
    (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
    (r"\\(?:approx|quad|qquad|implies|Rightarrow|rightarrow|to|therefore|left|right)(?![A-Za-z])", " "),
    (r"\\[\[\]();,:! ]", " "),
]
_EMPHASIS = re.compile(r"(?<![\w*)])(\*\*?)(?![\s*])([^*\n]+?)(?<!\s)\1(?![\w*(])")
_SCIENTIFIC = re.compile(r"(?<=\d)\s*[*xX]\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?")
_GROUPED = re.compile("(?<![\\w.,])(\\d{1,3})(?:(?: \\d{3})+|(?:['\u2019]\\d{3})+)(?!\\d)")  # one number, or two?
_CURRENCY = re.compile(r"\b(?:US|CA|AU|NZ|HK|C|A|R|Rs)\.?(?=\$|\d)")


def _plain(text: str) -> str:
    """One way of writing for each thing, and white space between all that does not belong together."""
    for gap in _GAPS:
        text = re.sub(rf"(?<=\d){gap}(?=\d{{3}}(?!\d))", ",", text)
    for sign, fraction in _VULGAR.items():
        text = re.sub(rf"(?<=\d)\s*{sign}", f" {fraction} ", text).replace(sign, f"{fraction} ")
    text = re.sub(
        "10([\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+)", lambda m: f"10^{m[1].translate(_RAISED)}", text
    )
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+", lambda m: f"^{m[0].translate(_RAISED)}", text)
    text = text.translate(_PLAIN)
    for pattern, new in _LATEX if "\\" in text or "{," in text else ():
        text = re.sub(pattern, new, text)
    text = _GROUPED.sub(r"\1_000", text)
    text = re.sub(r"</?[A-Za-z]\w*\s*/?>", " ", text.replace("$$", " "))  # <answer>72</answer>
    text = _EMPHASIS.sub(r"\2", text)
    text = _SCIENTIFIC.sub(r"e\1", text)
    text = _CURRENCY.sub("", text)
    text = re.sub(r"(?<=\d)\(\s*(?=[\d(])|\)\s*\(", " * ", text)  # 3(4) is a product
    text = re.sub(r"(?<=[A-Za-z])\s*\^\s*\{?\d\}?", " ", text)  # of a unit: m^2
    text = re.sub(r"(?<=[A-Za-z]):", ": ", text)
    text = re.sub(r"[=~\u2248]", " = ", text)
    return re.sub(r"[^\x21-\x7e\u2013\u2014]|[(){}\[\]\"'<>|&;?!#@]", " ", text)


# -- one word ------------------------------------------------------------------------------------------------------------

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_WORD = re.compile(
    rf"""(?P<sign>[-+]?)\$?(?P<sign_after>[-+]?)
    (?P<number>{_DIGITS})(?:[eE](?P<power>[-+]?\d+)|/(?P<below>{_DIGITS}))?
    (?P<unit>[-/]?[$%A-Za-z][-$%A-Za-z./]*)?""",
    re.VERBOSE,
)
_NO_UNIT = {"k", "K", "M", "B", "bn", "mn", "mil", "x", "y", "z", "n", "i", "pi", "e", "E"}  # 5k? 5x?
_ORDINAL = {"st", "nd", "rd", "th"}
_SCALE_SIGNS = {"k", "K", "M", "B", "bn", "mn", "mil"}  # 5 k? 5 M?
_IN_WORDS = {"negative", "minus", "plus", "times", "sqrt", "log", "ln"}
_OPERATORS = {"+", "-", "*", "/", "^", "**"}


def _is_numeric(word: str) -> bool:
    """Is it meant as a number? B12, COVID-19 and 2nd are words."""
    if not any(c.isdigit() for c in word) or word[0].isalpha() or word[0] == "_":
        return False
    found = _WORD.fullmatch(word)
    return found is None or found["unit"] not in _ORDINAL


def _value(word: str) -> Fraction | None:
    """What a word says as a number, or None."""
    found = _WORD.fullmatch(word)
    if found is None or len(word) > LONGEST or (found["sign"] and found["sign_after"]):
        return None
    if (found["unit"] or "").strip("-/.") in _NO_UNIT:
        return None
    power, below = int(found["power"] or 0), _fraction(found["below"] or "1")
    if abs(power) > LONGEST or below == 0:
        return None
    value = _fraction(found["number"]) * Fraction(10) ** power / below
    return -value if "-" in found["sign"] + found["sign_after"] else value


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


# -- one number among words ----------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    words = [word.rstrip(".,:").lstrip(",:") or word for word in _plain(text).split()]
    return [word for word in words if word not in (".", ",", "$", "$.", "$,")]


def _number_at(words: Sequence[str], at: int) -> tuple[Fraction | None, int]:
    """(the number whose last word stands at a place or None, how many words it takes): 2 1/2 and 5 million take two."""
    value = _value(words[at])
    if value is None:
        return None, 1
    before, after = words[:at], list(words[at + 1 :])
    took = 1
    if re.fullmatch(r"\d+/\d+", words[at]) and value < 1 and before and re.fullmatch(r"-?\d+", before[-1]):
        whole = Fraction(before[-1])
        value, before, took = whole - value if before[-1][0] == "-" else whole + value, before[:-1], 2
    scales = [word.lower().rstrip("s.") for word in after[:3]]
    scales = [*takewhile(SCALES.__contains__, scales)]  # 5 hundred thousand
    if len(scales) > 2:
        return None, took
    value, after = value * math.prod(SCALES[scale] for scale in scales), after[len(scales) :]
    return (None, took) if _in_an_expression(before, after) else (value, took)


def _in_an_expression(before: Sequence[str], after: Sequence[str]) -> bool:
    """Is the number something to compute with, not a result?"""
    if before:
        last, number_before = before[-1], len(before) > 1 and any(c.isdigit() for c in before[-2])
        if last in _OPERATORS or last[-1] in "+*/^" or last.startswith("\\") or last.lower() in _IN_WORDS:
            return True
        if number_before and last in ("x", "X", ":", "\u2013", "\u2014"):
            return True
    if after:
        first = after[0]
        if first[0] in "+*/^\\" or (first in ("x", "X", "-") and any(c.isdigit() for c in "".join(after[1:2]))):
            return True
        if first in _SCALE_SIGNS or first.lower() in ("squared", "cubed"):
            return True
        if [word.lower() for word in after[:2]] == ["and", "a"] and after[2:3] in (["half"], ["third"], ["quarter"]):
            return True
    return False


def _only(text: str) -> Fraction | None:
    """The number of a text that says one, with at most a unit, "x =" or "answer:" around it; else None."""
    text = re.sub(r"^\W*(?:the\s+)?(?:final\s+)?answer\b\s*(?:is\b)?", "", text.strip(), flags=re.IGNORECASE)
    words = _words(text)
    if words[1:2] == ["="] and re.fullmatch(r"[A-Za-z]\w*", words[0]):
        words = words[1:]
    while words and words[0] in ("=", "$", ":"):
        words = words[1:]
    places = [i for i, word in enumerate(words) if _is_numeric(word)]
    if not places:
        return None
    value, took = _number_at(words, places[-1])
    if "=" in words or len(places) != took or places != list(range(took)):
        return None
    return value


def _last(text: str) -> Fraction | None:
    """The last number of a text, if it is a result; else None."""
    words = _words(text)
    places = [i for i, word in enumerate(words) if _is_numeric(word)]
    return _number_at(words, places[-1])[0] if places else None


# -- an answer -----------------------------------------------------------------------------------------------------------


def answer_in(text: str, *, finished: bool = True, marked: bool = False) -> Fraction | None:
    """The number that a response gives as its answer, exactly; None where it gives none, or leaves room for doubt.

    Args:
        text: the response.
        finished: it ended by itself; else a number at its very end may lack digits, and is none.
        marked: only after a mark.

    >>> answer_in("Half of 48 is 24, and 48+24 = 72 clips."), answer_in("#### 1,000"), answer_in("5 or so: 3-4")
    (Fraction(72, 1), Fraction(1000, 1), None)
    """
    hashes, box = text.rfind("####"), text.rfind("\\boxed")
    cut_off = not finished and re.search(r"[\d.,/]\s*$", text) is not None
    if box > hashes:
        inside = _braces(text[box + len("\\boxed") :])
        return None if inside is None else _only(inside)
    if hashes >= 0:
        line, more, _ = text[hashes:].lstrip("#").partition("\n")
        return None if cut_off and not more else _only(line)
    return None if marked or cut_off else _last(text)


def _braces(text: str) -> str | None:
    """What stands between the first brace, with which the text begins, and its partner; None without either."""
    text, depth = text.lstrip(), 0
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return text[1:i] if i else None
    return None


class NumberCheck:
    """1 where the response's number is the record's.

    Args:
        answer: the field with the right answer: a number, or a text that says one, also as "... #### 72".
        marked: only a number after a mark counts, "####" or \\boxed{...}; else the last number does where there is none.
        tolerance: how far the two may lie apart; 0 = they are equal, as fractions, not as floats.
    """

    def __init__(self, answer: str = "answer", marked: bool = False, tolerance: float = 0) -> None:
        if not isinstance(marked, bool):
            raise ConfigError(f"reward: marked is {marked!r}; expected true or false.")
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < float("inf"):
            raise ConfigError(f"reward: tolerance is {tolerance!r}; expected a number of at least 0.")
        self.field, self.marked, self.tolerance = str(answer), marked, Fraction(str(tolerance))

    def read(self, value: Any) -> Fraction:
        found = None
        if isinstance(value, str):
            found = answer_in(value, marked=True) if "####" in value or "\\boxed" in value else _only(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
            found = Fraction(str(value))
        if found is None:
            raise ValueError(f"{value!r:.200} is no single number. Expected one, as in 72, 1,000 or 3/4.")
        return found

    def judge(self, samples: Sequence[Sample], wanted: Sequence[Any]) -> list[float]:
        found = [answer_in(sample.response, finished=sample.finished, marked=self.marked) for sample in samples]
        return [
            float(value is not None and abs(value - right) <= self.tolerance)
            for value, right in zip(found, wanted, strict=True)
        ]
