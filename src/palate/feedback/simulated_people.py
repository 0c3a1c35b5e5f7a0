"""Simulated annotators who act through the HTTP interface, like people through the page.

They serve to try a protocol before anybody is paid, and to test a server with answers whose truth is known.

What an annotator sees of each response i, in the order of the screen, and says (all noise by seed, name and texts):

    x_i = (gold_i + length_bias * words_i + side_bias * [i is shown first]) / temperature + Gumbel noise
    attentive with probability reliability * exp(-fatigue * answers given / 100), else x_i is noise alone

So rankings are Plackett-Luce and comparisons Bradley-Terry (``feedback.simulated``), with a side, a taste for length
and fatigue. The gold preference is a Python function or scores from a file; the server never tells any.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from palate.errors import ConfigError, DataError, FeedbackError
from palate.feedback.hidden import visible

if TYPE_CHECKING:
    import httpx2

Gold = Callable[[list[Any], list[str]], Sequence[float]]
PATIENCE = 30.0  # seconds without a connection after which it gives up
SECONDS = 20.0  # median time that an annotator says to have spent


@dataclass(frozen=True)
class Character:
    """How an annotator answers.

    Attributes:
        temperature: noise in units of gold, >= 0; 0 = none.
        reliability: share of items looked at, in [0, 1], while not tired.
        side_bias: units of gold given to the response shown first.
        length_bias: units of gold per word.
        fatigue: by how much reliability has fallen after 100 answers, in natural units of the logarithm, >= 0.
        tie_width: differences of x below it are ties, >= 0.
    """

    temperature: float = 1.0
    reliability: float = 1.0
    side_bias: float = 0.0
    length_bias: float = 0.0
    fatigue: float = 0.0
    tie_width: float = 0.0

    def __post_init__(self) -> None:
        positive = (self.temperature, self.fatigue, self.tie_width)
        if not (all(x >= 0 and math.isfinite(x) for x in positive) and 0 <= self.reliability <= 1):
            raise FeedbackError(f"{self}: expected temperature, fatigue and tie_width >= 0, reliability in [0, 1].")

    def attention(self, given: int) -> float:
        """Probability of looking after ``given`` answers."""
        return self.reliability * math.exp(-self.fatigue * given / 100)


@dataclass
class Acted:
    """What they did.

    Attributes:
        answers: acknowledged, by name.
        late: that came too late to count.
        done: the server had nothing more for anybody.
        seconds: of the whole.
    """

    answers: Counter[str] = field(default_factory=Counter)
    late: int = 0
    done: bool = False
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "answers": sum(self.answers.values()),
            "annotators": dict(self.answers),
            "late": self.late,
            "done": self.done,
            "seconds": round(self.seconds, 3),
        }


def impressions(
    character: Character, gold: Sequence[float], texts: Sequence[str], names: Sequence[Any], *, given: int
) -> list[float]:
    """x of each response, in the order of the screen: [K].

    Args:
        gold: [K].
        texts: [K] as shown.
        names: what the noise depends on besides the texts: seed, annotator, prompt.
        given: answers that the annotator gave before.
    """
    attentive = _uniform(*names, "attention", sorted(texts), given) < character.attention(given)
    found = []
    for place, (value, text) in enumerate(zip(gold, texts, strict=True)):
        noise = -math.log(-math.log(_uniform(*names, "noise", text)))
        seen = value + character.length_bias * len(text.split()) + character.side_bias * (place == 0)
        if not attentive:
            found.append(noise)
        else:
            found.append(seen / character.temperature + noise if character.temperature else seen)
    return found


def answer_values(
    questions: Sequence[Mapping[str, Any]], ids: Sequence[str], x: Sequence[float], tie: float = 0.0
) -> Any:
    """Values for every question of a task, in a presentation's ids, by the impressions ``x`` of its responses."""
    values: dict[str, Any] = {}
    order = sorted(range(len(ids)), key=lambda i: -x[i])
    for question in questions:
        kind, name = question["type"], question["id"]
        if kind == "compare":
            by = x[order[0]] - x[order[1]]
            strength = min(question["strengths"], 1 + int(by // 1.0))
            tied = question["tie"] and by <= tie and (tie > 0 or by == 0)
            values[name] = {"choice": "tie"} if tied else {"choice": ids[order[0]], "strength": strength}
        elif kind == "rank":
            values[name] = [[ids[i] for i in tier] for tier in _tiers(order, x, tie if question["ties"] else -1.0)]
        elif kind == "rating":
            scale = question["scale"]
            values[name] = {
                key: 1 + min(scale - 1, int(scale / (1 + math.exp(-v / 2)))) for key, v in zip(ids, x, strict=True)
            }
        elif kind == "accept":
            values[name] = {key: v > 0 for key, v in zip(ids, x, strict=True)}
        elif kind == "text" and question["required"]:
            values[name] = "simulated"
    return values


def simulate(
    url: str,
    tokens: Mapping[str, str],
    gold: Gold,
    characters: Mapping[str, Character],
    *,
    answers: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    client: Callable[[], Any] | None = None,
) -> Acted:
    """Log everybody in and have them answer in turn, until so many answers are acknowledged or nothing is left.

    Args:
        url: of the server.
        tokens: login token of each annotator; they work once.
        gold: ``f(prompts, responses)`` -> numbers.
        characters: of each annotator.
        answers: in all.
        seed: of every noise.
        progress: called with (answers so far, answers).
        client: makes the connection of an annotator, an ``httpx2.Client``; None = one to ``url``.
    Raises:
        FeedbackError: a login is refused, or an answer is.
        ConfigError: nobody listens there.
    """
    began, acted = time.monotonic(), Acted()
    people = [
        _Person(name, token, characters[name], url, (client or (lambda: _client(url)))(), seed)
        for name, token in tokens.items()
    ]
    try:
        for person in people:
            person.log_in()
        working = list(people)
        while working and sum(acted.answers.values()) < answers:
            for person in list(working):
                if sum(acted.answers.values()) >= answers:
                    break
                outcome = person.act(gold)
                if outcome == "done":
                    working.remove(person)
                elif outcome == "late":
                    acted.late += 1
                else:
                    acted.answers[person.name] += 1
                    if progress is not None:
                        progress(sum(acted.answers.values()), answers)
        acted.done = not working
    finally:
        for person in people:
            person.http.close()
    acted.seconds = time.monotonic() - began
    return acted


def gold_of(where: str) -> Gold:
    """A gold preference: "module:function", "file.py:function", or a JSONL file of responses with scores.

    The file's lines are {"prompt", "responses", "scores"} or {"prompt", "response", "score"}.

    Raises:
        ConfigError: no such function. DataError: the file has no scores.
    """
    if where.split(":")[0].endswith((".jsonl", ".json", ".jsonl.gz")) and Path(where).exists():
        return _scores(where)
    from palate.models.rewards import find_function

    return find_function(where)


class _Person:
    """One annotator at their page."""

    def __init__(self, name: str, token: str, character: Character, url: str, http: httpx2.Client, seed: int) -> None:
        self.name, self.token, self.character, self.url, self.http, self.seed = name, token, character, url, http, seed
        self.given = 0
        self.questions: list[dict[str, Any]] = []
        self.seen: Counter[str] = Counter()

    def log_in(self) -> None:
        self.post("/api/login", {"token": self.token})
        self.questions = self.get("/api/me")["task"]["questions"]

    def act(self, gold: Gold) -> str:
        """Answer one item: "answered", "late", or "done" when there is none."""
        shown = self.post("/api/next", {})
        if shown.get("done"):
            return "done"
        prompt, texts = _prompt(shown["prompt"]), [each["text"] for each in shown["responses"]]
        values = [float(v) for v in gold([prompt] * len(texts), list(texts))]
        if len(values) != len(texts) or not all(map(math.isfinite, values)):
            raise FeedbackError(f"gold gave {values} for {len(texts)} responses. Expected one finite number each.")
        about = repr((prompt, sorted(texts)))
        names = (self.seed, self.name, prompt, self.seen[about])
        x = impressions(self.character, values, texts, names, given=self.given)
        self.seen[about] += 1
        self.given += 1
        said = answer_values(self.questions, [each["id"] for each in shown["responses"]], x, self.character.tie_width)
        seconds = SECONDS * math.exp(0.5 * _normal(*names, "seconds", sorted(texts)))
        key = hashlib.sha256(repr((self.seed, self.name, shown["presentation"])).encode()).hexdigest()[:40]
        body = {"key": key, "presentation": shown["presentation"], "values": said, "seconds": round(seconds, 1)}
        return "late" if self.post("/api/answer", body | {"changed": True}).get("recorded") else "answered"

    def get(self, path: str) -> Any:
        return self._send("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._send("POST", path, body)

    def _send(self, method: str, path: str, body: Any) -> Any:
        """Send until an answer comes; the same key makes repeating harmless."""
        import httpx2

        until = time.monotonic() + PATIENCE
        while True:
            try:
                response = self.http.request(method, path, json=body)
            except httpx2.TransportError as error:
                if time.monotonic() > until or not self.questions:
                    raise ConfigError(
                        f"{self.url}: no server answers there: {error}. Start it with: palate label serve"
                    ) from None
                time.sleep(0.2)
                continue
            if response.status_code == 429:
                time.sleep(min(30, int(response.headers.get("retry-after", "1"))))
                continue
            if response.status_code == 200:
                return response.json()
            said = _json(response)
            if response.status_code == 409 and said.get("recorded"):
                return said
            why = f"{said.get('error', '')} {said.get('do', '')}"
            raise FeedbackError(f"{self.name}: the server refused {path} ({response.status_code}): {why}")


def _client(url: str) -> Any:
    import httpx2

    return httpx2.Client(base_url=url, headers={"origin": url.rstrip("/")}, timeout=30.0)


def _json(response: Any) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _prompt(shown: Sequence[Mapping[str, Any]]) -> Any:
    """A prompt as a gold function gets it: the text of a single message, else messages."""
    if len(shown) == 1:
        return shown[0]["text"]
    return [{"role": each["role"], "content": each["text"]} for each in shown]


def _tiers(order: Sequence[int], x: Sequence[float], width: float) -> list[list[int]]:
    """Places in order; a response within ``width`` of the first of its tier belongs to it."""
    tiers: list[list[int]] = []
    for i in order:
        if tiers and x[tiers[-1][0]] - x[i] <= width:
            tiers[-1].append(i)
        else:
            tiers.append([i])
    return tiers


def _scores(where: str) -> Gold:
    from palate.data.files import rows

    known: dict[str, float] = {}
    for source, row in rows(where):
        texts = row.get("responses") or [row.get("response")]
        scores = row.get("scores") or [row.get("score")]
        if len(texts) != len(scores) or None in texts or None in scores:
            raise DataError(
                f'{source}: expected "responses" and "scores" of the same length, or "response" and "score".'
            )
        known |= {visible(str(text)): float(score) for text, score in zip(texts, scores, strict=True)}

    def gold(prompts: list[Any], responses: list[str]) -> list[float]:
        missing = [text for text in responses if text not in known]
        if missing:
            raise DataError(f"{where}: no score of the response {missing[0][:60]!r}, which was shown.")
        return [known[text] for text in responses]

    return gold


def _uniform(*names: Any) -> float:
    """In (0, 1), by the names alone."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return (int.from_bytes(digest[:7], "big") + 0.5) / 2**56


def _normal(*names: Any) -> float:
    return float(np.sqrt(-2 * np.log(_uniform(*names, 1))) * np.cos(2 * np.pi * _uniform(*names, 2)))
