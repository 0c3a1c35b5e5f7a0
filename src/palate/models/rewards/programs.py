"""Code that is judged by its tests, each response in a process of its own.

This protects against accidents: endless loops, runaway memory, files left behind, a program that ends early, output
without end, and (on Linux, where the system lets an ordinary process have namespaces) the network and processes that
stay. It is no protection against code that means harm: it runs as your user and can read and write your files. Train on
code in a container or a machine that you can lose.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from palate.errors import ConfigError, ModelError
from palate.models.rewards.formats import fenced_blocks
from palate.models.samples import Sample

CHILD = Path(__file__).with_name("program_child.py")
MOST_OUTPUT = 1 << 20  # bytes that are read from the process; more and it is stopped
START = 20.0  # seconds of wall-clock time that the process may take to start, on a busy machine too
SLACK = 3.0  # times ``timeout``: the wall-clock limit, for programs that wait instead of working


class Tested(NamedTuple):
    """How a program did.

    Attributes:
        passed: tests passed.
        total: tests there were.
        problem: the first thing that went wrong, in a line; "" when nothing did.
        alone: it could not reach the network, and nothing it started has outlived it.
    """

    passed: int
    total: int
    problem: str
    alone: bool


class CodeCheck:
    """1 where a response's code passes all tests of its record.

    The code is the last closed ``` block of the response; a response without any ``` is code as a whole; one that was
    not closed is none.

    Args:
        tests: the field with the tests: Python text, or a list of Python texts, each of which is one test. A test fails
            when it raises.
        give: "all" = 1 if every test is passed, else 0; "share" = the share of tests that are.
        timeout: seconds of processor time for the program with all its tests, 1 to 600; it may take three times as
            long by the clock.
        memory: MiB of address space, at least 64.
    """

    def __init__(self, tests: str = "tests", give: str = "all", timeout: int = 5, memory: int = 512) -> None:
        if os.name != "posix":
            raise ConfigError("reward: check: code needs a POSIX system (Linux, macOS): it limits time and memory.")
        if give not in ("all", "share"):
            raise ConfigError(f'reward: give "{give}" is not known. Choose: all, share.')
        for name, value, low, high in (("timeout", timeout, 1, 600), ("memory", memory, 64, 1 << 20)):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"reward: {name} is {value!r}; expected a whole number from {low} to {high}.")
        self.field, self.give, self.timeout, self.memory = str(tests), give, timeout, memory
        self._warned = False

    def read(self, value: Any) -> list[str]:
        tests = [value] if isinstance(value, str) else value
        if not isinstance(tests, list | tuple) or not tests or not all(isinstance(t, str) and t.strip() for t in tests):
            raise ValueError(f"{value!r:.200} is no test. Expected Python text, or a list of Python texts.")
        return list(tests)

    def judge(self, samples: Sequence[Sample], wanted: Sequence[Any]) -> list[float]:
        """As many at a time as there are processors.

        Raises:
            ModelError: a process could not be started at all.
        """

        def one(sample: Sample, tests: list[str]) -> Tested:
            code = code_in(sample.response)
            if code is None:
                return Tested(0, len(tests), "no code", True)
            return run_tests(code, tests, timeout=self.timeout, memory=self.memory)

        with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
            done = list(pool.map(one, samples, wanted))
        if not self._warned and not all(tested.alone for tested in done):
            self._warned = True
            warnings.warn(
                "reward: check: code: this system does not let a process have namespaces: code that is tested can reach "
                "the network, and may leave processes behind.",
                stacklevel=2,
            )
        if self.give == "share":
            return [tested.passed / tested.total for tested in done]
        return [float(tested.passed == tested.total) for tested in done]


def code_in(response: str) -> str | None:
    """The code of a response, or None."""
    if "```" not in response:
        return response if response.strip() else None
    blocks = fenced_blocks(response)
    closed = sum(line.lstrip().startswith("```") for line in response.splitlines()) % 2 == 0
    return blocks[-1] if blocks and closed and blocks[-1].strip() else None


def run_tests(code: str, tests: Sequence[str], *, timeout: int = 5, memory: int = 512) -> Tested:
    """Run a program and then its tests in a fresh process: isolated Python, no environment, a folder that is removed.

    Args:
        code: Python text.
        tests: Python texts, each run after the code, in its names.
        timeout: seconds of processor time of each process, all tests together; three times that by the clock.
        memory: MiB of address space.
    Raises:
        ModelError: the process did not start; whatever the code does is a ``Tested``.
    """
    token = secrets.token_hex(16)
    job = {"code": code, "tests": list(tests), "token": token, "seconds": timeout, "bytes": memory << 20}
    with tempfile.TemporaryDirectory(prefix="palate-code-", ignore_cleanup_errors=True) as folder:
        errors_at = Path(folder, "errors")
        work = Path(folder, "work")
        work.mkdir()
        with open(errors_at, "wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "utf8", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=work,
                env={"HOME": str(work), "TMPDIR": str(work), "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        try:
            lines = _told(process, json.dumps(job).encode(), token, SLACK * timeout)
        finally:
            _end(process)
        if not lines or "ready" not in lines[0]:
            said = errors_at.read_text(encoding="utf-8", errors="replace").strip()[-500:]
            raise ModelError(
                f"reward: check: code: a process for the tests did not start within {START:g} s, with {memory} MiB of memory. "
                f"Give it more (memory: {4 * memory}), or look at what it said: {said or 'nothing'}"
            )
    return _tested(lines, len(tests))


def _told(process: subprocess.Popen[bytes], job: bytes, token: str, seconds: float) -> list[dict[str, Any]]:
    """What the child reports, line by line, until it is done, ends, says too much, or its time is over."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(job)
        process.stdin.close()
    except BrokenPipeError:
        return []
    lines: list[dict[str, Any]] = []
    read, rest, deadline = 0, b"", time.monotonic() + START
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while read <= MOST_OUTPUT and selector.select(max(0.0, deadline - time.monotonic())):
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            read += len(chunk)
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                if not line.startswith(token.encode()):  # the program found its way to our pipe
                    continue
                lines.append(json.loads(line[len(token) :]))
                if "ready" in lines[-1]:
                    deadline = time.monotonic() + seconds
                if "done" in lines[-1]:
                    return lines
    return lines


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all of its group, at once."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass


def _tested(lines: Sequence[dict[str, Any]], total: int) -> Tested:
    alone = bool(lines[0]["ready"])
    problems = [line["problem"] for line in lines if line.get("problem")]
    passed = sum(bool(line.get("passed")) for line in lines)
    if "done" not in lines[-1]:
        problems.append("ended or stopped before its tests were done")
    return Tested(passed, total, problems[0] if problems else "", alone)
