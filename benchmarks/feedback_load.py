"""A labelling server under load that is killed again and again: nothing acknowledged is lost, nothing is there twice.

    python benchmarks/feedback_load.py                     20 annotators, 1,700 items with 3 places, 10 x kill -9
    python benchmarks/feedback_load.py --items 100 --annotators 6 --kills 3

Annotators are threads of this process that speak HTTP like the page: they keep an answer until it is acknowledged and
send it again, with the same key, when the connection breaks. Some answers are sent twice on purpose, some are undone
and given again. The server is a process of its own, killed with SIGKILL at random moments and started again. Afterwards
every acknowledged answer is looked for in the log, and the log is verified. Exit code 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import secrets
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2

from palate.feedback.items import Candidate, add_items
from palate.feedback.store import Store
from palate.feedback.task import task_of
from palate.feedback.upkeep import verify

DISTRIBUTION = {"gold_share": 0.05, "repeat_share": 0.05, "repeat_after": 5, "random_share": 0.1}
QUESTION = {"id": "better", "type": "compare", "strengths": 3, "tie": True}
RESEND, UNDO = 0.05, 0.02  # shares of answers that are sent twice, and that are undone and given again
PATIENCE = 120.0  # seconds without an answer after which a client gives up


class Server:
    """The server's process, on one port through all its lives."""

    def __init__(self, store: Path, tokens: Path) -> None:
        self.store, self.port, self.kills = store, 0, 0
        self.process = self._start("--token-file", str(tokens))

    def _start(self, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "palate", "label", "serve", str(self.store), "--json", "--rate", "1000"]
        process = subprocess.Popen(
            [*command, "--port", str(self.port), *more], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        self.url = json.loads(line)["url"]
        self.port = int(self.url.rpartition(":")[2])
        return process

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.kills += 1
        self.process = self._start()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


class Ledger:
    """What was acknowledged, kept by the clients."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answers: dict[str, tuple[str, str]] = {}  # key -> (presentation, text of the choice)
        self.undone: dict[str, str] = {}  # key of the undo -> presentation
        self.late: set[str] = set()
        self.seconds: list[float] = []  # of answers that went through at the first try
        self.next_seconds: list[float] = []
        self.retries = 0
        self.failed: list[str] = []


class Annotator(threading.Thread):
    """One simulated annotator."""

    def __init__(self, server: Server, ledger: Ledger, name: str, token: str, seed: int, think: float) -> None:
        super().__init__(name=name)
        self.server, self.ledger, self.token, self.think = server, ledger, token, think
        self.rng = random.Random(seed)

    def run(self) -> None:
        try:
            self._work()
        except (httpx2.HTTPError, AssertionError, KeyError, ValueError) as error:
            with self.ledger.lock:
                self.ledger.failed.append(f"{self.name}: {error!r}")

    def _work(self) -> None:
        headers = {"origin": self.server.url}
        with httpx2.Client(base_url=self.server.url, headers=headers, timeout=30.0) as client:
            assert client.post("/api/login", json={"token": self.token}).status_code == 200
            while True:
                shown, seconds = self._post(client, "/api/next", {})
                if shown.get("done"):
                    if "every item" in shown["why"]:
                        return
                    time.sleep(0.2)
                    continue
                if seconds is not None:
                    with self.ledger.lock:
                        self.ledger.next_seconds.append(seconds)
                time.sleep(self.rng.expovariate(1 / self.think) if self.think else 0)
                self._answer(client, shown)
                if self.rng.random() < UNDO:
                    key = secrets.token_hex(16)
                    self._post(client, "/api/undo", {"key": key, "presentation": shown["presentation"]})
                    with self.ledger.lock:
                        self.ledger.undone[key] = shown["presentation"]

    def _answer(self, client: httpx2.Client, shown: dict[str, Any]) -> None:
        choice = self.rng.choice(shown["responses"])
        key = secrets.token_hex(16)
        body = {"key": key, "presentation": shown["presentation"], "seconds": 1.5, "changed": True}
        body["values"] = {"better": {"choice": choice["id"], "strength": self.rng.randint(1, 3)}}
        for _ in range(1 + (self.rng.random() < RESEND)):
            said, seconds = self._post(client, "/api/answer", body)
            with self.ledger.lock:
                if said.get("recorded"):
                    self.ledger.late.add(key)
                    return
                assert said["event"] == key, said
                self.ledger.answers[key] = (shown["presentation"], choice["text"])
                if seconds is not None:
                    self.ledger.seconds.append(seconds)

    def _post(self, client: httpx2.Client, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
        """The answer to a request that is repeated until there is one, and its seconds if the first try went through."""
        begin = time.monotonic()
        first = True
        while True:
            started = time.perf_counter()
            try:
                response = client.post(path, json=body)
                if response.status_code == 200 or response.json().get("recorded"):
                    return response.json(), time.perf_counter() - started if first else None
                raise AssertionError(f"{path}: {response.status_code} {response.text}")
            except httpx2.TransportError:
                if time.monotonic() - begin > PATIENCE:
                    raise
                first = False
                with self.ledger.lock:
                    self.ledger.retries += 1
                time.sleep(0.05)


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        result = load(Path(folder), given)
    print(json.dumps(result, indent=None if given.json else 1))
    bad = [name for name in ("lost", "doubled", "wrong_overlap", "problems", "failed") if result[name]]
    raise SystemExit(f"wrong: {', '.join(bad)}" if bad else 0)


def load(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    path, tokens = folder / "feedback.db", folder / "tokens"
    task = task_of({"questions": [QUESTION], "distribution": {"overlap": given.overlap, **DISTRIBUTION}})
    known = {"better": {"choice": 0, "strength": 1}}
    with Store.create(path, task) as store:
        add_items(store, [Candidate(f"prompt {i}", (f"a {i}", f"b {i}")) for i in range(given.items)])
        gold = [
            Candidate(f"question {i}", (f"a {i}", f"b {i}"), kind="gold", gold=known) for i in range(given.items // 10)
        ]
        add_items(store, gold)
    secret = {f"n{i}": secrets.token_hex(32) for i in range(given.annotators)}
    tokens.touch(mode=0o600)
    tokens.write_text("".join(f"{name} annotator {token}\n" for name, token in secret.items()))
    server, ledger = Server(path, tokens), Ledger()
    team = [Annotator(server, ledger, n, t, given.seed + i, given.think) for i, (n, t) in enumerate(secret.items())]
    begin = time.perf_counter()
    for each in team:
        each.start()
    kill_at_random(server, ledger, team, given)
    for each in team:
        each.join()
    seconds = time.perf_counter() - begin
    server.stop()
    return {
        "annotators": given.annotators,
        "items": given.items,
        "overlap": given.overlap,
        "kills": server.kills,
        "acknowledged": len(ledger.answers),
        "undone": len(ledger.undone),
        "late": len(ledger.late),
        "retries": ledger.retries,
        **check(path, ledger, given.overlap),
        "failed": ledger.failed,
        "seconds": round(seconds, 1),
        "answers_per_second": round(len(ledger.answers) / seconds, 1),
        "answer_ms": percentiles(ledger.seconds),
        "next_ms": percentiles(ledger.next_seconds),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}",
    }


def kill_at_random(server: Server, ledger: Ledger, team: list[Annotator], given: argparse.Namespace) -> None:
    """Kill the server at random moments spread over the work."""
    rng, total = random.Random(given.seed), given.items * given.overlap
    marks = sorted(rng.uniform(0.03, 0.95) * total for _ in range(given.kills))
    for mark in marks:
        while len(ledger.answers) < mark and any(each.is_alive() for each in team):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        server.kill()


def check(path: Path, ledger: Ledger, overlap: int) -> dict[str, Any]:
    """Every acknowledged answer against the events of the store, by a reading of the log that knows no other table."""
    with Store.open(path) as store:
        found = verify(store)
        events = list(store.events())
    by_key = {event.id: event for event in events}
    items = {event.body["item"]: event.body for event in events if event.kind == "item"}
    shown = {event.body["presentation"]: event.body for event in events if event.kind == "presented"}
    lost = [key for key in ledger.undone if by_key.get(key) is None or by_key[key].kind != "undo"]
    for key, (presentation, text) in ledger.answers.items():
        event = by_key.get(key)
        if event is None or event.kind != "answer" or event.body["presentation"] != presentation:
            lost.append(key)
            continue
        number = event.body["values"]["better"]["choice"]
        if items[event.body["item"]]["responses"][number]["text"] != text:
            lost.append(key)
    in_force: dict[str, str] = {}  # presentation -> key
    doubled = [event.id for event in events if event.kind == "answer" and event.id not in ledger.answers]
    for event in events:
        if event.kind == "answer":
            if event.body["presentation"] in in_force:
                doubled.append(event.id)
            in_force[event.body["presentation"]] = event.id
        elif event.kind == "undo":
            in_force.pop(event.body["presentation"], None)
    tasks = [by_key[key] for p, key in in_force.items() if shown[p]["purpose"] == "task"]
    places = Counter(event.body["item"] for event in tasks)
    twice = [pair for pair, n in Counter((event.actor, event.body["item"]) for event in tasks).items() if n > 1]
    wanted = [name for name, body in items.items() if body["kind"] == "task"]
    return {
        "events": found.events,
        "lost": len(lost),
        "doubled": len(doubled) + len(twice),
        "wrong_overlap": sum(places[name] != overlap for name in wanted),
        "problems": found.problems,
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, 99th percentile, largest."""
    ordered = sorted(seconds) or [0.0]
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {
        "n": len(seconds),
        "median": round(1e3 * statistics.median(ordered), 2),
        "p99": round(1e3 * p99, 2),
        "max": round(1e3 * ordered[-1], 2),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotators", type=int, default=20)
    parser.add_argument("--items", type=int, default=1700)
    parser.add_argument("--overlap", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--think", type=float, default=0.0, help="mean seconds between being shown and answering")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", default=None, help="where the store lies while it is used; decides what a COMMIT costs"
    )
    parser.add_argument("--json", action="store_true", help="one line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
