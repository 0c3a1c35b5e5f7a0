"""Characters that are not seen and change what is seen: made visible, one for one, so that offsets stay what they are.

A model's text may hold controls of writing direction, which can show a sentence in another order than it is stored
(Boucher and Anderson 2021, arXiv:2111.00169), and zero-width characters, which hide text or split words.
"""

from __future__ import annotations

import re
import unicodedata

SHOWN_DIRECTION = "\u21c4"  # two arrows
SHOWN_NOTHING = "\u2423"  # an open box
DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
# Control and format characters without the line ends and tab, and without the few that are seen (Arabic number signs);
# then fillers, which are letters by category and have no ink.
_HIDDEN = re.compile(
    f"[{DIRECTION}]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u180e\u200b-\u200d\u2060-\u2065\u206a-\u206f\ufeff"
    "\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f\u115f\u1160\u3164\uffa0\u2800]"
)
_DIRECTION = re.compile(f"[{DIRECTION}]")
_JOINERS = "\u200c\u200d"


def visible(text: str) -> str:
    """The text with each hidden character replaced by a visible one; of the same length in code points.

    Joiners between two characters beyond ASCII are kept: there they do their work (Persian, Indic scripts, emoji).

    >>> visible("pay\\u200b 10\\u202e")
    'pay␣ 10⇄'
    """
    return text if text.isascii() and text.isprintable() else _HIDDEN.sub(_shown, text)


def name_of(character: str) -> str:
    """As in "U+202E RIGHT-TO-LEFT OVERRIDE"."""
    return f"U+{ord(character):04X} {unicodedata.name(character, 'control character')}"


def _shown(found: re.Match[str]) -> str:
    character, i, text = found.group(), found.start(), found.string
    if _DIRECTION.match(character):
        return SHOWN_DIRECTION
    if character in _JOINERS and 0 < i < len(text) - 1 and not text[i - 1].isascii() and not text[i + 1].isascii():
        return character
    return SHOWN_NOTHING
