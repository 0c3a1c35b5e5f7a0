"""The labelling server killed with SIGKILL while people answer; the larger run is benchmarks/feedback_load.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx2")
ROOT = Path(__file__).resolve().parents[1]


def test_nothing_acknowledged_is_lost_or_doubled_when_the_server_is_killed(tmp_path) -> None:
    """6 annotators, 100 items with 3 places, 3 x kill -9: 300 places filled, each exactly once, chain whole."""
    command = [sys.executable, str(ROOT / "benchmarks" / "feedback_load.py"), "--json", "--folder", str(tmp_path)]
    command += ["--annotators", "6", "--items", "100", "--overlap", "3", "--kills", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert {name: found[name] for name in ("kills", "lost", "doubled", "wrong_overlap", "problems", "failed")} == {
        "kills": 3,
        "lost": 0,
        "doubled": 0,
        "wrong_overlap": 0,
        "problems": [],
        "failed": [],
    }
    assert found["acknowledged"] >= 300 and found["retries"] >= 1
