"""What a program can verify, as a reward: 1 for right, 0 for wrong, and no model to be fooled.

The record says what is right: a field of the prompt's record ("answer", "tests"), which must be there and readable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from palate.errors import DataError
from palate.models.rewards.answers import NumberCheck
from palate.models.rewards.formats import JsonCheck, RegexCheck
from palate.models.rewards.programs import CodeCheck
from palate.models.samples import Sample, finite, read_samples
from palate.types import Scored, Tokens

if TYPE_CHECKING:
    from palate.data.chat import Chat


class Check(Protocol):
    """A way to verify responses."""

    @property
    def field(self) -> str | None:
        """The field of the record that says what is right; None for a check that needs none."""

    def read(self, value: Any) -> Any:
        """The field's value as the check wants it.

        Raises:
            ValueError: it says nothing that can be checked; the text says what was expected.
        """

    def judge(self, samples: Sequence[Sample], wanted: Sequence[Any]) -> list[float]:
        """One number in [0, 1] for each sample; ``wanted`` is what ``read`` made of each field."""


CHECKS: Mapping[str, type[Any]] = {"number": NumberCheck, "regex": RegexCheck, "json": JsonCheck, "code": CodeCheck}


class CheckReward:
    """One of ``CHECKS`` as reward.

    Args:
        check: "number", "regex", "json" or "code".
        chat: the policy's, to decode with.
        name: in metrics and errors.
        options: the check's own.
    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(self, check: str, chat: Chat, *, name: str | None = None, **options: Any) -> None:
        self.check: Check = CHECKS[check](**options)
        self.chat, self.name = chat, name or check

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Scored:
        """Scores [N], each in [0, 1].

        Raises:
            DataError: a record lacks the field, or it cannot be read. ModelError: the check itself cannot be made.
        """
        samples = read_samples(tokens, self.chat)
        wanted = [self._wanted(sample.fields, sample.source) for sample in samples]
        scores = torch.tensor(self.check.judge(samples, wanted), dtype=torch.float32)
        return Scored(finite(scores, samples, self.name).to(tokens.ids.device), {})

    def check_records(self, records: Sequence[Any]) -> None:
        """Whether every record says what is right.

        Raises:
            DataError: one does not, with ``file:line``.
        """
        for record in records:
            self._wanted(getattr(record, "fields", None) or {}, getattr(record, "source", ""))

    def _wanted(self, fields: Mapping[str, Any], source: str) -> Any:
        name = self.check.field
        if name is None:
            return None
        where = f"{source}: " if source else ""
        if fields.get(name) is None:
            found = ", ".join(f'"{key}"' for key in fields) or "no field beside the prompt"
            raise DataError(
                f'{where}reward "{self.name}" reads the field "{name}", and this record has none. Found: {found}. Name '
                "the right field in the reward's settings, or add it to every record."
            )
        try:
            return self.check.read(fields[name])
        except ValueError as error:
            raise DataError(f'{where}reward "{self.name}" cannot use the field "{name}": {error}') from None
