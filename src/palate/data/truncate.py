"""Making rows fit: the prompt's beginning is cut first, then the response's end, and each cut is counted."""

from __future__ import annotations

from palate.data.chat import Chat
from palate.data.kinds import PromptText
from palate.errors import ConfigError

HOW = ("left_prompt", "right", "drop")


def check_lengths(max_length: int, max_prompt_length: int | None, truncate: str) -> None:
    """Raises:
    ConfigError: lengths that leave no token for a prompt or for a response, or an unknown way to cut.
    """
    if max_length < 2:
        raise ConfigError(
            f"max_length is {max_length}. Expected at least 2: a token of a prompt and one of a response."
        )
    if max_prompt_length is not None and not 0 < max_prompt_length < max_length:
        raise ConfigError(
            f"max_prompt_length is {max_prompt_length} and max_length {max_length}. "
            "Expected 1 <= max_prompt_length < max_length, so that a response has room."
        )
    if truncate not in HOW:
        raise ConfigError(f'truncate is "{truncate}". Expected one of {", ".join(HOW)}.')


def prompt_room(length: int, longest: int, max_length: int, max_prompt_length: int | None, truncate: str) -> int:
    """How many tokens a prompt may keep.

    Args:
        length: tokens of the prompt.
        longest: tokens of its longest response; all responses of a prompt keep the same prompt.
    Returns:
        At least a quarter of ``max_length`` (or the whole prompt, when that is shorter): a response without its prompt
        teaches nothing.
    """
    room = length if max_prompt_length is None else min(length, max_prompt_length)
    if truncate == "left_prompt" and room + longest > max_length:
        room = min(room, max(max_length - longest, max_length // 4, 1))
    return room


def cut_prompt(
    chat: Chat, prompt: PromptText, ids: list[int], mask: list[bool], room: int
) -> tuple[list[int], list[bool]]:
    """A prompt's ids, and its mask, cut to ``room`` tokens at the beginning.

    A conversation loses its oldest turns, whole, and keeps its system message, so that what is left is written as the
    template writes conversations. What is still too long -- a plain text, one long turn -- loses tokens after the head
    that all prompts begin with (begin-of-text token, header of the first turn).
    """
    if not isinstance(prompt, str):
        for shorter in _without_oldest(prompt):
            found = chat.encode_many([shorter], [[]], every_turn=[any(mask)])[0]
            ids, mask = found.prompt, found.prompt_mask
            if len(ids) <= room:
                return ids, mask
    kept = 0
    while kept < min(len(chat.head), room // 2) and ids[kept] == chat.head[kept]:
        kept += 1
    start = len(ids) - (room - kept)
    return ids[:kept] + ids[start:], mask[:kept] + mask[start:]


def _without_oldest(prompt: tuple[dict[str, object], ...]) -> list[PromptText]:
    """The conversation without its oldest exchange, without its two oldest, ...; each begins with a user turn."""
    system = tuple(turn for turn in prompt[:1] if turn["role"] == "system")
    starts = [i for i, turn in enumerate(prompt) if turn["role"] == "user" and i > len(system)]
    return [(*system, *prompt[i:]) for i in starts]
