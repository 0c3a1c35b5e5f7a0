"""A service that scores: texts go there as JSON, numbers come back.

    POST url   {"prompts": [...], "responses": [...], "fields": {"answer": [...], ...}}
    200        {"scores": [0.3, -1.2, ...]}

``prompts`` are as the records have them (a string or a list of messages), ``fields`` the records' other fields, null
where a record has none. Scores are in the order of the responses. What may pass (no connection, no answer in time, 429, 5xx)
is tried again, with a line about it; what will not pass (another 4xx, an answer that is no scores) stops at once. There
is a limit on all of it together, so that a run never waits in silence.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import threading
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import torch

from palate.errors import ConfigError, DataError, ModelError
from palate.models.samples import Sample, finite, read_samples
from palate.types import Scored, Tokens

if TYPE_CHECKING:
    from palate.data.chat import Chat

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two attempts: 1, 2, 4, ... up to this


class EndpointReward:
    """A service as reward.

    Args:
        url: where to POST; http or https. It stands in the run's config.yaml: no secret belongs in it.
        chat: the policy's, to decode with.
        name: in metrics and errors.
        timeout: seconds for one attempt, from connecting to the last byte of the answer.
        retries: further attempts for one request, >= 0.
        batch: responses in one request, >= 1.
        total: seconds for one request with all its attempts and waits.
        token_from: environment variable with a bearer token, which is sent and never written down.
    Raises:
        ConfigError: an option out of range, or no such variable.
    """

    def __init__(
        self,
        url: str,
        chat: Chat,
        *,
        name: str = "endpoint",
        timeout: float = 30.0,
        retries: int = 3,
        batch: int = 32,
        total: float = 300.0,
        token_from: str | None = None,
    ) -> None:
        try:
            parts = urlsplit(url)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is none
            fits = False
        if not fits:
            raise ConfigError(f'reward: url "{url}" is no http or https address.')
        if parts.username or parts.password:
            raise ConfigError(
                "reward: the url holds a user or password, and would stand in config.yaml. Put a token in an environment "
                "variable and name it: token_from: MY_TOKEN."
            )
        for key, value in (("timeout", timeout), ("total", total)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"reward: {key} is {value!r}; expected seconds above 0.")
        for key, count, low in (("retries", retries, 0), ("batch", batch, 1)):
            if isinstance(count, bool) or not isinstance(count, int) or count < low:
                raise ConfigError(f"reward: {key} is {count!r}; expected a whole number of at least {low}.")
        self.headers = {"content-type": "application/json"}
        if token_from is not None:
            if not os.environ.get(token_from):
                raise ConfigError(f"reward: the environment variable {token_from} (token_from) is not set.")
            self.headers["authorization"] = f"Bearer {os.environ[token_from]}"
        self.url, self.chat, self.name = url, chat, name
        self.timeout, self.retries, self.batch, self.total = timeout, retries, batch, total

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Scored:
        """Scores [N], in the service's units.

        Raises:
            ModelError: no usable answer, with the first sample that it is about.
        """
        samples = read_samples(tokens, self.chat)
        parts = [samples[i : i + self.batch] for i in range(0, len(samples), self.batch)]
        scores = _in_a_loop_of_its_own(self._ask_all(parts)) if parts else []
        return Scored(torch.tensor(scores, dtype=torch.float32, device=tokens.ids.device), {})

    async def _ask_all(self, parts: Sequence[Sequence[Sample]]) -> list[float]:
        import httpx2

        async with httpx2.AsyncClient(headers=self.headers, timeout=None) as client:
            return [score for part in parts for score in await self._ask(client, part)]

    async def _ask(self, client: Any, samples: Sequence[Sample]) -> list[float]:
        """One request, tried again while there is hope and time."""
        import httpx2

        body = self._body(samples)
        deadline = time.monotonic() + self.total
        for attempt in range(self.retries + 1):
            left = deadline - time.monotonic()
            try:
                async with asyncio.timeout(min(self.timeout, left)):
                    answer = await client.post(self.url, content=body)
            except TimeoutError:
                problem, wait = f"no answer within {min(self.timeout, left):.3g} s", None
            except httpx2.RequestError as error:
                problem, wait = f"{type(error).__name__}: {error}".rstrip(": "), None
            else:
                if answer.status_code == 200:
                    return self._scores(answer, samples)
                problem, wait = _status(answer), _retry_after(answer)
                if answer.status_code != 429 and answer.status_code < 500:
                    self._fail(f"refused: {problem}", samples, "Correct the address, or the service.")
            if attempt == self.retries:
                break
            pause = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) if wait is None else wait
            if time.monotonic() + pause >= deadline:
                problem += f"; another attempt in {pause:.3g} s would be beyond the total of {self.total:g} s"
                break
            _say(
                f'reward "{self.name}": {self.url}: {problem}; attempt {attempt + 2} of {self.retries + 1} in {pause:.3g} s.'
            )
            await asyncio.sleep(pause)
        self._fail(
            f"gave no scores in {attempt + 1} attempt{'s' * (attempt > 0)}: {problem}",
            samples,
            "Is the service running? The same command resumes the run.",
        )

    def _body(self, samples: Sequence[Sample]) -> bytes:
        names = dict.fromkeys(name for sample in samples for name in sample.fields)
        content = {
            "prompts": [sample.prompt for sample in samples],
            "responses": [sample.response for sample in samples],
            "fields": {name: [sample.fields.get(name) for sample in samples] for name in names},
        }
        try:
            # Half a surrogate pair can be decoded from tokens, and cannot be sent as UTF-8; escaped it can.
            return json.dumps(content, allow_nan=False).encode("ascii")
        except (TypeError, ValueError) as error:
            where = f"{samples[0].source}: " if samples[0].source else ""
            raise DataError(f'{where}reward "{self.name}" sends a record\'s fields as JSON: {error}.') from None

    def _scores(self, answer: Any, samples: Sequence[Sample]) -> list[float]:
        """The answer's scores, checked."""
        try:
            content = json.loads(answer.content)
        except (ValueError, RecursionError):
            self._fail(f"answered with something that is no JSON: {_excerpt(answer)}", samples)
        scores = content.get("scores") if isinstance(content, dict) else None
        if not isinstance(scores, list):
            self._fail(f'answered without a list "scores": {_excerpt(answer)}', samples)
        if len(scores) != len(samples):
            self._fail(f"gave {len(scores)} scores for {len(samples)} responses; one for each was expected", samples)
        for i, score in enumerate(scores):
            if not isinstance(score, int | float):
                self._fail(f"gave the score {score!r:.100}; a number was expected", samples[i:])
        # A number of hundreds of digits is no float; as one it is infinite, and refused like any other.
        values = [(math.inf if score > 0 else -math.inf) if abs(score) > 1e300 else float(score) for score in scores]
        finite(torch.tensor(values, dtype=torch.float64).float(), samples, self.name)
        return values

    def _fail(self, what: str, samples: Sequence[Sample], remedy: str = "") -> NoReturn:
        raise ModelError(f'reward "{self.name}": {self.url} {what}. {remedy}'.rstrip() + samples[0].show())


def _say(text: str) -> None:
    """A warning that is shown every time, not only the first."""
    warnings.warn_explicit(text, UserWarning, __file__, 0)


def _status(answer: Any) -> str:
    return f"status {answer.status_code}: {_excerpt(answer)}"


def _excerpt(answer: Any, limit: int = 300) -> str:
    text = answer.content[: 4 * limit].decode("utf-8", "replace")
    return repr(text if len(text) <= limit else f"{text[:limit]} ...")


def _retry_after(answer: Any) -> float | None:
    """Seconds that the service asks to wait: a number, or a date; None where it does not say."""
    said = answer.headers.get("retry-after", "").strip()
    if said.isdigit():
        return float(said[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _in_a_loop_of_its_own(work: Any) -> Any:
    """What the coroutine returns or raises; in a thread, because a notebook has a loop of its own in this one."""
    found: dict[str, Any] = {}

    def run() -> None:
        try:
            found["value"] = asyncio.run(work)
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            found["error"] = error

    thread = threading.Thread(target=run, name="palate-endpoint", daemon=True)
    thread.start()
    thread.join()
    if "error" in found:
        raise found["error"]
    return found["value"]
