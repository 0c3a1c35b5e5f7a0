"""A tokenizer as the chat room uses it: ids of texts without special tokens, ids of a text that continues another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palate.errors import ModelError

# How much of a context's end is tokenised again together with what continues it. Tokens depend on a few characters
# before them; the context's own ids are never changed.
_CONTEXT = 64


class Tokenizing:
    """Texts to ids and back, at the tokenizer's own speed.

    Attributes:
        before, after: ids that the tokenizer puts around a text by itself.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        self.before, self.after = self._own_special_ids()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is not None:
            return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return _slow_ids(self.tokenizer, texts)

    def after_text(self, ids: Sequence[int]) -> str:
        """The text of ids that continue a text: some decoders eat the space before the first word they are given."""
        anchor = self.ids(["a"])[0]
        head, whole = self._decode(anchor), self._decode([*anchor, *ids])
        return whole[len(head) :] if whole.startswith(head) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def continuations(self, contexts: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text as it continues its context, without changing the context's own ids."""
        tails = [context[-_CONTEXT:] for context in contexts]
        place = {tail: i for i, tail in enumerate(dict.fromkeys(tails))}
        heads = self.ids(list(place))
        joined = self.ids([tail + text for tail, text in zip(tails, texts, strict=True)])
        found = []
        for tail, text, ids in zip(tails, texts, joined, strict=True):
            head = heads[place[tail]]
            found.append(ids[len(head) :] if ids[: len(head)] == head else self._alone(text))
        return found

    def places(
        self, contexts: Sequence[str], texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> list[list[tuple[int, int]]]:
        """Where in its text each of the ids that ``continuations`` found stands: [start, end) in characters.

        The tokens of a character that is several tokens all stand at that character.

        Raises:
            ModelError: a tokenizer written in Python, which does not say where its tokens come from.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(self.tokenizer).__name__} does not say which characters its tokens stand for, which records "
                'with marked segments need. Load the model\'s "fast" tokenizer (a folder with tokenizer.json).'
            )
        tails = [context[-_CONTEXT:] for context in contexts]
        found = []
        for tail, text, own in zip(tails, texts, ids, strict=True):
            # The same strings as in ``continuations``, in the same order; the text's own ids are the last.
            for before in (tail, "\n", "a", ".", ""):
                whole = self.tokenizer(
                    before + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
                )
                first = len(whole["input_ids"]) - len(own)
                if first >= 0 and whole["input_ids"][first:] == list(own):
                    break
            shift = len(before)
            offsets = whole["offset_mapping"][first:]
            found.append([(max(start - shift, 0), max(end - shift, 0)) for start, end in offsets])
        return found

    def _alone(self, text: str) -> list[int]:
        """The ids of a text whose first characters would merge with what stands before it.

        It is put after characters with which it does not merge, because some tokenizers write a space before the
        first word of whatever they are given.
        """
        for anchor in ("\n", "a", "."):
            head, ids = self.ids([anchor, anchor + text])
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self.ids([text])[0]

    def literal(self, ids: Sequence[int]) -> str:
        return "".join(self.tokenizer.convert_ids_to_tokens(list(ids)))

    def _own_special_ids(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before and after a text by itself."""
        bare = self.ids(["a"])[0]
        full = list(self.tokenizer("a")["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []


def _backend(tokenizer: Any) -> Any:
    """The library under a fast tokenizer, which leaves out offsets and so takes two thirds of the time.

    None where it would cut or pad by itself, or does not give the tokenizer's own ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation is not None or backend.padding is not None:
        return None
    probe = [" A probe,\n\n with 2 lines.", "探针"]
    same = [e.ids for e in backend.encode_batch_fast(probe, add_special_tokens=False)] == _slow_ids(tokenizer, probe)
    return backend if same else None


def _slow_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    # verbose: no warning about lengths; what is too long is cut and counted by ``collate``.
    found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = found["input_ids"]
    return ids


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    for i, (one, two) in enumerate(zip(first, second, strict=False)):
        if one != two:
            return i
    return min(len(first), len(second))
