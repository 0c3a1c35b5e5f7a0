"""The machine's fp32 matrix-multiply rate with the threads given, in GFLOP/s: ``python peak.py THREADS``.

The best of several short rounds over 1,024 and 2,048 square: a ceiling, and by its swing a sign of how quiet the
machine is.
"""

from __future__ import annotations

import json
import sys
import time


def rate(size: int, seconds: float) -> float:
    """GFLOP/s of ``a @ b`` for square fp32 matrices over about this many seconds."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    count, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        torch.mm(a, b, out=out)
        count += 1
    return 2 * size**3 * count / spent / 1e9


if __name__ == "__main__":
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    rounds = [rate(size, 0.25) for _ in range(3) for size in (1024, 2048)]
    print(json.dumps({"peak": max(rounds), "rounds": rounds}))
