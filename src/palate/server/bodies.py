"""What a page may send: every field by name, with its kind and its size. Anything else is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from palate.feedback.conversations import LONGEST_TEXT
from palate.feedback.queue import LONGEST_REASON

Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{16,64}$")]  # of a request: sent again, it is done once
Name = Annotated[str, Field(max_length=100)]
Number = Annotated[int, Field(ge=1, le=10_000)]
Seconds = Annotated[float, Field(ge=0, lt=1e7)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Empty(_Body):
    """{}"""


class LogIn(_Body):
    token: str = Field(max_length=200)


class NewPerson(_Body):
    name: Name
    role: str


# -- about an item that was shown


class Presented(_Body):
    key: Key
    presentation: Name


class Given(Presented):
    values: dict[str, Any]
    seconds: Seconds | None = None
    changed: bool = True


class Decided(Presented):
    values: dict[str, Any]


class Skip(Presented):
    reason: str = Field("", max_length=LONGEST_REASON)


class Flag(Presented):
    text: str = Field(max_length=LONGEST_REASON)


# -- about a conversation with models


class Begin(_Body):
    key: Key


class _Talked(_Body):
    key: Key
    conversation: Name


class Said(_Talked):
    text: str | None = Field(None, max_length=LONGEST_TEXT)
    again: bool = False


class Voted(_Talked):
    turn: Number
    choice: Literal["left", "right", "tie", "both_bad"]
    seconds: Seconds | None = None


class Thumbed(_Talked):
    turn: Number
    version: Number = 1
    up: bool | None


class Signalled(_Talked):
    turn: Number
    version: Number = 1
    signal: Literal["copy", "dwell"]
    seconds: Seconds | None = None
