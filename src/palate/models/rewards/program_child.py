"""Run by ``programs.run_tests`` in a process of its own: shut in, limited, and then a stranger's code. Standard library only.

Reads a job from standard input; reports on standard output, a JSON object a line, each behind a token that only the
parent knows.
"""

import ctypes
import json
import os
import resource
import sys
import types
from typing import Any

NEW_USER, NEW_NETWORK, NEW_PROCESSES = 0x10000000, 0x40000000, 0x20000000
FILE_BYTES = 16 << 20
PROCESSES = 64


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    alone = shut_in()
    if alone:  # the new namespace begins with the next process, and ends with it
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
    limit(job)
    tell = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)

    def say(**facts: object) -> None:
        os.write(tell, (job["token"] + json.dumps(facts) + "\n").encode())

    say(ready=alone)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    problem = attempt(job["code"], module, "the code")
    if problem:
        say(passed=False, problem=problem)
    else:
        for number, test in enumerate(job["tests"], start=1):
            problem = attempt(test, module, f"test {number}")
            say(passed=not problem, problem=problem)
    say(done=True)
    os._exit(0)  # whatever threads there are


def attempt(text: str, module: types.ModuleType, what: str) -> str:
    """Run Python text in the module's names; "" or what went wrong, in a line."""
    try:
        exec(compile(text, what, "exec"), module.__dict__)  # noqa: S102  # it is what this process is for
    except BaseException as error:  # noqa: BLE001  # SystemExit too: a program that ends itself has not passed
        return f"{what}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def shut_in() -> bool:
    """No network, and no process that outlives this one; False where the system does not allow it."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = NEW_NETWORK | NEW_PROCESSES
    return any(libc.unshare(flags) == 0 for flags in (wanted | NEW_USER, wanted))


def limit(job: dict[str, Any]) -> None:
    """Processor time, memory, size of files, number of processes; no memory dumps."""
    for name, most in (
        ("RLIMIT_CPU", job["seconds"]),
        ("RLIMIT_AS", job["bytes"]),
        ("RLIMIT_FSIZE", FILE_BYTES),
        ("RLIMIT_NPROC", PROCESSES),
        ("RLIMIT_CORE", 0),
    ):
        which = getattr(resource, name, None)
        if which is None:
            continue
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(which, (most, most))
        except (ValueError, OSError):  # macOS has limits that cannot be set
            continue


if __name__ == "__main__":
    main()
