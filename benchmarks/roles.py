"""What four roles cost on each rung of sharing: LoRA PPO on a random Llama of 53 M parameters, a fresh process a rung.

    python benchmarks/roles.py --threads 2 --rounds 2

Rows are random tokens: bytes and seconds depend on shapes alone. One step is ``prepare`` (old and reference log-probs,
scores, values) and one update of policy and value, on 8 rows of 96 + 32 tokens. Columns:

* weights: all different storages under the parameters of the four roles;
* state: gradients and AdamW's moments, counted after a step;
* of least: weights and state together, divided by the trunk's own weights plus what the rung's adapters and heads weigh with
  their state: 1.00 is nothing but one trunk and what is trained or read on it;
* peak while loading, peak in steps: resident memory above that after all imports (the kernel's high-water mark, reset
  between the two); the latter has activations in it. Weights are mapped from the file: the pages of a copy that is compared
  with the trunk and let go count while they are mapped, though the kernel may drop them at any time;
* prepare, update: medians over steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUNGS = ("separate", "reference", "trunk", "value_head")
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 14, "num_attention_heads": 8}
VOCABULARY, ROWS, PROMPT, RESPONSE, STEPS = 8192, 8, 96, 32, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="every other one goes backwards")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=RUNGS)
    parser.add_argument("--measure", nargs=2, metavar=("RUNG", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--make", metavar="FOLDER", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measured(chosen.measure[0], Path(chosen.measure[1]), chosen.threads)))
    elif chosen.make:
        make(Path(chosen.make))
    else:
        print(table(all_of_them(chosen.rungs, chosen.threads, chosen.rounds)))


def all_of_them(rungs: tuple[str, ...], threads: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every rung in processes of its own, in turns."""
    found: dict[str, list[dict[str, Any]]] = {rung: [] for rung in rungs}
    with tempfile.TemporaryDirectory() as folder:
        _again("--make", folder)
        for number in range(rounds):
            for rung in rungs if number % 2 == 0 else reversed(rungs):
                output = _again("--measure", rung, folder, "--threads", str(threads))
                found[rung].append(json.loads(output.splitlines()[-1]))
    return found


def _again(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def make(folder: Path) -> None:
    """A base, and a reward that is an adapter on it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from palate.models.load import LoraSettings, load_scalar, new_policy, save_model

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", eos_token="w1", pad_token="w2")
    save_model(new_policy({"architecture": "llama"} | SHAPE, tokenizer, 0), tokenizer, folder / "base")
    save_model(load_scalar(folder / "base", lora=LoraSettings()), tokenizer, folder / "reward")


def measured(rung: str, folder: Path, threads: int) -> dict[str, Any]:
    """Bytes and seconds of one rung, in this process."""
    import torch

    torch.set_num_threads(threads)
    import peft  # noqa: F401  # imported now, so that it is no part of what is measured

    from palate.config import load_settings
    from palate.data.chat import Chat
    from palate.methods.ppo import PPO
    from palate.models.load import load_tokenizer
    from palate.models.roles import AdapterOff
    from palate.stage.roles import bill, load_roles, load_trained
    from palate.training.optimizer import make_optimizer, trained_parameters
    from palate.training.settings import TrainingSettings

    torch.ones(8, 8, requires_grad=True).matmul(torch.ones(8, 8)).sum().backward()
    before = resident("VmRSS")
    given = {"model": str(folder / "base"), "reward": str(folder / "reward"), "sharing": rung, "lora": True}
    config = load_settings("ppo", settings=given | {"data": "none", "out": "none", "device": "cpu"})
    tokenizer = load_tokenizer(folder / "base")
    models = load_roles(config, load_trained(config, tokenizer), Chat(tokenizer))
    loading = resident("VmHWM") - before
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    method, batch = PPO(), rows()
    parameters = trained_parameters(models, method)
    optimizer = make_optimizer(parameters, TrainingSettings(learning_rate=1e-4))
    times: dict[str, list[float]] = {"prepare": [], "update": []}
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        with torch.no_grad():
            prepared = method.prepare(models, batch)
        middle = time.perf_counter()
        loss = method.loss(models, prepared)["loss"]
        (loss.total / loss.count).backward()
        optimizer.step()
        times["prepare"].append(middle - begin)
        times["update"].append(time.perf_counter() - middle)
        del prepared, loss
    steps = resident("VmHWM") - before
    trained = [p for named in parameters.values() for p in named.values()]
    state = sum(_bytes(p.grad, *(optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq"))) for p in trained)
    roles = [r.policy if isinstance(r, AdapterOff) else r for r in vars(models).values()]
    storages = {p.untyped_storage().data_ptr(): p for role in roles for p in role.parameters()}
    weights = _bytes(*storages.values())
    lines = bill(models, method.trains)
    assert (weights, state) == (sum(line.weights for line in lines), sum(line.training for line in lines))
    policy: Any = models.policy
    trunk = _bytes(*(p for p in policy.parameters() if not p.requires_grad))
    ours = {id(p): p for role in roles for name, p in role.named_parameters() if "lora_" in name or "score" in name}
    return {
        "weights": weights,
        "state": state,
        "of least": (weights + state) / (trunk + _bytes(*ours.values()) + state),
        "loading": loading,
        "steps": steps,
        **{name: statistics.median(seconds[1:]) for name, seconds in times.items()},
    }


def rows() -> Any:
    """Random rows, each a group of its own."""
    import torch

    from palate.types import Tokens

    ids = torch.randint(3, VOCABULARY, (ROWS, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(0))
    response = (torch.arange(PROMPT + RESPONSE) >= PROMPT).expand(ROWS, -1)
    finished = torch.ones(ROWS, dtype=torch.bool)
    return Tokens(ids, torch.ones_like(response), response, torch.arange(ROWS), {"finished": finished})


def _bytes(*tensors: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the rounds."""
    lines = [
        "| sharing | weights, MB | state, MB | of least | peak while loading, MB | peak in steps, MB | prepare, s | update, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rung, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        sizes = (f"{middle[key] / 1e6:.1f}" for key in ("weights", "state"))
        peaks = (f"{middle[key] / 1e6:.0f}" for key in ("loading", "steps"))
        seconds = (f"{middle[key]:.2f}" for key in ("prepare", "update"))
        lines.append(f"| `{rung}` | " + " | ".join([*sizes, f"{middle['of least']:.2f}", *peaks, *seconds]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
