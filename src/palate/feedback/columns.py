"""Text in columns of a terminal, where a Chinese character is two wide."""

from __future__ import annotations

import unicodedata


def wide(text: str) -> int:
    """How many columns a text takes: ``wide("微调") == 4``."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def padded(text: str, width: int) -> str:
    """The text with spaces after it, ``width`` columns in all."""
    return text + " " * (width - wide(text))
