"""What a start does not pay for: libraries that are not needed before the first step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from palate.models.load import save_model
from tiny import tiny, tokenizer_of

CODE = """
import sys
import palate.training.loop as loop
from palate.cli import main

def first_step(*given):
    found = {"datasets", "pyarrow", "pandas", "matplotlib", "peft", "scipy", "sklearn", "bitsandbytes", "torchao"}
    print("imported:", sorted(found & set(sys.modules)))
    raise SystemExit(0)

loop._batch = first_step
sys.argv = ["palate", *sys.argv[1:]]
main()
"""


def test_the_first_step_needs_no_library_for_tables_plots_or_adapters(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, tmp_path / "base")
    lines = [f'{{"prompt": "a {letter} ", "chosen": "c d e", "rejected": "e f"}}\n' for letter in "bcdefgh"]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    for method in ("dpo", "reward"):
        command = ["train", method, "--model", "base", "--data", "a.jsonl", "--out", f"runs/{method}", "--quiet"]
        done = subprocess.run(
            [sys.executable, "-c", CODE, *command], check=False, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout.strip().endswith("imported: []"), done.stdout + done.stderr
