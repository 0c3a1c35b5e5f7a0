"""The machine's matrix-multiply rate, in GFLOP/s: ``python peak.py THREADS [DEVICE DTYPE]``, e.g. ``2 cpu float32``.

The best of several short rounds over square matrices: a ceiling, and by its swing a sign of how quiet the machine is.
"""

from __future__ import annotations

import json
import sys
import time

SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}


def rate(size: int, seconds: float, device: str, dtype: str) -> float:
    """GFLOP/s of ``a @ b`` for square matrices over about this many seconds."""
    import torch

    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = a @ b
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    count, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        torch.mm(a, b, out=out)
        wait()
        count += 1
    return 2 * size**3 * count / spent / 1e9


if __name__ == "__main__":
    import torch

    threads, device, dtype = (*sys.argv[1:], "cpu", "float32")[:3] if len(sys.argv) < 4 else sys.argv[1:4]
    torch.set_num_threads(int(threads))
    rounds = [rate(size, 0.25, device, dtype) for _ in range(3) for size in SIZES[device]]
    print(json.dumps({"peak": max(rounds), "rounds": rounds}))
