"""Small help for talking to transformers and to people."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' own reports off: what is missing in a folder is said by our errors."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that begins with a space, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, as a sentence."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text if text.endswith(".") else text + "."
