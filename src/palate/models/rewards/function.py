"""A Python function as reward: what a task can check, count or look up needs no model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from palate.errors import ConfigError, ModelError, PalateError
from palate.models.samples import Sample, finite, read_samples
from palate.types import Scored, Tokens

if TYPE_CHECKING:
    from palate.data.chat import Chat


class FunctionReward:
    """A Python function as reward.

    Args:
        function: ``f(prompts, responses, **fields) -> numbers``. ``prompts``: each row's prompt as its record has it (a
            string or a conversation), ``responses``: list of str, ``fields``: a list for every field of the prompts'
            records (None where a record lacks it). It is given what it has parameters for, all of them when it takes
            ``**fields``, and returns one finite number a row (list, array or tensor).
        chat: the policy's, to decode with.
        name: in metrics and errors; the function's own by default.
    """

    def __init__(self, function: Callable[..., Any], chat: Chat, name: str | None = None) -> None:
        self.function, self.chat = function, chat
        self.name = str(name or getattr(function, "__name__", type(function).__name__))

    def __call__(self, tokens: Tokens) -> Scored:
        """Scores [N], reward units.

        Raises:
            ModelError: the function raised, returned another number of scores, or something that is no finite number;
                the sample is shown.
        """
        samples = read_samples(tokens, self.chat)
        if not samples:
            return Scored(tokens.ids.new_zeros(0, dtype=torch.float32), {})
        return Scored(self.of_samples(samples).to(tokens.ids.device), {})

    def of_samples(self, samples: Sequence[Sample]) -> Tensor:
        """Numbers [N], of at least one sample; raises as ``__call__``."""
        try:
            returned = self._call(samples)
        except PalateError:
            raise
        except Exception as error:
            sample = self._culprit(samples)
            raise ModelError(f'reward "{self.name}" raised {type(error).__name__}: {error}{sample.show()}') from error
        return self._numbers(returned, samples)

    def _call(self, samples: Sequence[Sample]) -> Any:
        names = list(dict.fromkeys(name for sample in samples for name in sample.fields))
        columns: dict[str, list[Any]] = {name: [sample.fields.get(name) for sample in samples] for name in names}
        columns |= {"prompts": [s.prompt for s in samples], "responses": [s.response for s in samples]}
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # a built-in: it says itself what it does not take
            return self.function(columns["prompts"], columns["responses"])
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            columns = {name: column for name, column in columns.items() if name in parameters}
        wanted = [
            p.name
            for p in parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in columns
        ]
        if wanted:
            raise ConfigError(
                f'reward "{self.name}" has a parameter "{wanted[0]}", but the prompts\' records have no such field. Found: '
                f"{', '.join(['prompts', 'responses', *names])}. Rename it, give it a default, or add the field."
            )
        return self.function(**columns)

    def _culprit(self, samples: Sequence[Sample]) -> Sample:
        """The first sample that fails alone; the first of the batch when none does."""
        for sample in samples:
            try:
                self._call([sample])
            except Exception:  # noqa: BLE001  # whatever it was: it is reported by the caller
                return sample
        return samples[0]

    def _numbers(self, returned: Any, samples: Sequence[Sample]) -> Tensor:
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        count = len(values) if isinstance(values, Sequence) and not isinstance(values, str) else None
        if count != len(samples):
            found = type(returned).__name__ if count is None else f"{count} scores"
            raise ModelError(
                f'reward "{self.name}" returned {found} for {len(samples)} responses; one number for each was expected.'
                + samples[0].show()
            )
        scores = torch.zeros(len(samples), dtype=torch.float64)
        for i, (value, sample) in enumerate(zip(values, samples, strict=True)):
            try:
                scores[i] = float(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ModelError(
                    f'reward "{self.name}" returned {value!r:.100}; a number was expected.{sample.show()}'
                ) from error
        return finite(scores.float(), samples, self.name)
