"""What answers the policy in a conversation of several turns: a tool, a simulated user, a game.

    def lookup(conversation, fields):
        asked = conversation[-1]["content"]                        # what the policy has just said
        if not asked.startswith("look up "):
            return None                                            # the conversation is over
        return fields["table"].get(asked.removeprefix("look up "), "not found")

An environment is a function, or a class of which every conversation gets an object of its own (its attributes are the
conversation's state). Either is called after each turn of the policy, by the names of its parameters, with

    prompt          as the record has it: a string or a conversation
    conversation    what was said since, a list of {"role": ..., "content": ...}; the last is the policy's turn
    fields          the record's other fields
    rng             a ``random.Random`` of this conversation, the same whenever the run is repeated or resumed

and returns what is said to the policy, None when the conversation is over, or a ``Turn``. It must depend on nothing else
(no clock, no random numbers of its own), or a resumed run is another run.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from palate.errors import ConfigError, ModelError, PalateError

ROLES = ("user", "tool", "system")
GIVEN = ("prompt", "conversation", "fields", "rng")


@dataclass(frozen=True)
class EnvironmentSettings:
    """What answers the policy, and how often.

    Attributes:
        function: "module:name" or "file.py:name", a function or a class (``palate.environment``).
        max_turns: turns of the policy in a conversation at most; >= 1. Each is ``sampling.max_new_tokens`` at most.
    """

    function: str
    max_turns: int = 4

    def __post_init__(self) -> None:
        if ":" not in self.function:
            raise ConfigError(
                f'environment.function: found "{self.function}", expected "module:name" or "file.py:name".'
            )
        if self.max_turns < 1:
            raise ConfigError(f"environment.max_turns: found {self.max_turns}, expected a whole number above 0.")


@dataclass(frozen=True)
class Turn:
    """What an environment says.

    Attributes:
        text: what the policy reads; None = nothing more is said, and the conversation is over.
        role: who says it, for the chat template: "user", "tool" or "system". Plain text has no roles.
        done: the conversation is over; the text is then noted, but no token of it is read or trained on.
        reward: earned with the policy's turn, reward units; the sum over the turns is what ``earned`` gives.
    """

    text: str | None = None
    role: str = "user"
    done: bool = False
    reward: float = 0.0

    @property
    def ends(self) -> bool:
        return self.done or self.text is None


def earned(prompts: Sequence[Any], responses: Sequence[str], environment_reward: Sequence[float]) -> list[float]:
    """The environment's own rewards as a reward function: ``reward: palate.environment:earned``."""
    return list(environment_reward)


class Environment:
    """A function or class that answers, asked by the names of its parameters.

    Args:
        answers: the function, or a class whose objects can be called.
        name: for errors; its own by default.
    Raises:
        ConfigError: it cannot be called, or has a parameter that nothing is known about.
    """

    def __init__(self, answers: Callable[..., Any], name: str = "") -> None:
        self.answers, self.name = answers, name or getattr(answers, "__name__", type(answers).__name__)
        called = answers.__call__ if isinstance(answers, type) else answers  # type: ignore[operator]
        try:
            parameters = list(inspect.signature(called).parameters.values())[isinstance(answers, type) :]
        except (TypeError, ValueError) as error:
            raise ConfigError(f'environment "{self.name}" cannot be called: {error}.') from None
        self._everything = any(p.kind == p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        unknown = [p.name for p in named if p.name not in GIVEN and p.default is p.empty]
        unknown += [p.name for p in parameters if p.kind == p.POSITIONAL_ONLY]
        if unknown:
            raise ConfigError(
                f'environment "{self.name}" has a parameter "{unknown[0]}". It is given, by name: {", ".join(GIVEN)}. '
                'Facts about the prompt are in fields: fields["answer"].'
            )
        self._wanted = {p.name for p in named}

    def begin(self) -> Callable[..., Any]:
        """What one conversation asks: the function, or a new object of the class."""
        return self.answers() if isinstance(self.answers, type) else self.answers

    def answer(
        self,
        one: Callable[..., Any],
        *,
        prompt: Any,
        conversation: Sequence[Mapping[str, str]],
        fields: Mapping[str, Any],
        rng: Random,
        source: str = "",
    ) -> Turn:
        """What is said to the policy now.

        Args:
            one: from ``begin``. source: "file:line" of the record.
        Raises:
            ModelError: the environment raised, or returned something else than a text, None or a ``Turn``; the sample
                is shown.
        """
        given = {"prompt": prompt, "conversation": [*conversation], "fields": fields, "rng": rng}
        if not self._everything:
            given = {name: value for name, value in given.items() if name in self._wanted}

        def wrong(what: str) -> ModelError:
            return ModelError(f'environment "{self.name}" {what}{_shown(prompt, conversation, fields, source)}')

        try:
            found = one(**given)
        except PalateError:
            raise
        except Exception as error:
            raise wrong(f"raised {type(error).__name__}: {error}") from error
        turn = found if isinstance(found, Turn) else Turn(found)
        if turn.text is not None and not isinstance(turn.text, str):
            raise wrong(f"returned {turn.text!r:.100}; a text, None (the conversation is over) or a Turn was expected.")
        if turn.role not in ROLES:
            raise wrong(f"speaks as {turn.role!r}; expected one of {', '.join(ROLES)}.")
        if not _is_finite(turn.reward):
            raise wrong(f"gave the reward {turn.reward!r:.100}; a finite number was expected.")
        if turn.text is not None and any("\ud800" <= c <= "\udfff" for c in turn.text):
            raise wrong("returned half a character (a surrogate); such text cannot be tokenised.")
        return turn


def find_environment(where: str) -> Environment:
    """The environment that "module:name" or "file.py:name" names; the current folder is searched too.

    Raises:
        ConfigError: there is none.
    """
    from palate.models.rewards.find import find_function

    try:
        return Environment(find_function(where))
    except ConfigError as error:  # the same search, in words of its own
        raise ConfigError(str(error).replace("reward: ", "environment: ", 1)) from None


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _shown(prompt: Any, conversation: Sequence[Mapping[str, str]], fields: Mapping[str, Any], source: str) -> str:
    from palate.models.samples import Sample

    before: Any = prompt
    if len(conversation) > 1:
        before = [{"content": prompt}] if isinstance(prompt, str) else [*prompt]
        before = [*before, *conversation[:-1]]
    return Sample(before, conversation[-1]["content"], "", True, fields, source).show()
