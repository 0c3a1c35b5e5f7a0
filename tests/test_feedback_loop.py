"""docs/feedback-loop.md, run as it is written: its files, its six commands, and what it says of them."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx2 = pytest.importorskip("httpx2")
from typer.testing import CliRunner

from palate.cli import app
from palate.feedback import views
from palate.feedback.store import Store
from palate.feedback.upkeep import verify

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "feedback-loop.md").read_text(encoding="utf-8")
FILES = {"prompts.jsonl": "json", "task.yaml": "yaml", "taste.py": "python"}


def commands() -> list[list[str]]:
    """The words of the page's commands, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.strip().splitlines()]
    assert all(line.startswith("palate ") for line in lines)
    return [shlex.split(line.removesuffix("&"))[1:] for line in lines]


def contents(name: str) -> str:
    """What the page says a file holds: the first block of its language after its name."""
    after = PAGE[PAGE.index(f"`{name}`") :]
    found = re.search(rf"```{FILES[name]}\n(.*?)```", after, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_page_has_six_commands() -> None:
    assert [words[:2] for words in commands()] == [
        ["sample", "--model"],
        ["label", "serve"],
        ["label", "simulate"],
        ["train", "reward"],
        ["train", "ppo"],
        ["sample", "--model"],
    ]


@pytest.mark.shared_data
@pytest.mark.slow
def test_the_six_commands_lead_from_responses_to_a_policy_and_round_again(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 prompts with 4 responses each, every one ranked by 3 of 5 annotators: 36 answers, all there are.

    The second round is another model's, so each of the 12 prompts gets a new item.
    """
    model = shared_data / "models" / "stories260k-hf"
    if not model.is_dir():
        pytest.skip(f"no {model.name} in the shared data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories260k").symlink_to(model)
    for name in FILES:
        (tmp_path / name).write_text(contents(name), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    first, serve, answer, reward, ppo, again = [[w.replace("8765", port) for w in words] for words in commands()]

    palate(first)
    server = _served(serve, f"http://127.0.0.1:{port}/login")
    try:
        palate(answer)
    finally:
        server.terminate()
        server.wait(timeout=30)
    with Store.open("feedback.db") as store:
        labels, last = views.labels(store), store.last()[1]
        assert len(labels) == 36 and len({label.annotator for label in labels}) == 5
        sources = [source for label in labels for source in label.sources]
        assert {source["settings"]["temperature"] for source in sources} == {0.7, 1.0}
        assert {source["model"] for source in sources} == {"stories260k"} and verify(store).problems == []

    palate(reward)
    card = Path("runs/reward/card.md").read_text(encoding="utf-8")
    assert last in card and "36 answers by 5 annotators, 5 of them simulated, about 12 items" in card
    palate(ppo)
    assert Path("runs/ppo/report.html").stat().st_size > 1000 and Path("runs/reward/report.html").exists()

    palate(again)
    with Store.open("feedback.db") as store, store.read() as tx:
        found = tx.all("SELECT prompt, responses FROM item ORDER BY seq")
        assert len(found) == 24 and len({prompt for prompt, _ in found}) == 12
        assert all("runs/ppo/model" in responses for _, responses in found[12:])


def palate(words: list[str]) -> Any:
    """A command in this process."""
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"palate {shlex.join(words)}\n{done.stdout}\n{done.stderr}\n{done.exception!r}"
    return done


def _served(words: list[str], url: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    server = subprocess.Popen(
        [sys.executable, "-m", "palate", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while True:
        try:
            httpx2.get(url, timeout=5)
            return server
        except httpx2.TransportError:
            if server.poll() is not None or time.monotonic() > until:
                server.kill()
                raise
            time.sleep(0.1)
