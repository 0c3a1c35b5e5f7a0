"""Runs that are killed with SIGKILL, again and again, and then finished: a script, so that forking is safe.

    python killed_runs.py FOLDER        prints one JSON object: {"sft": {"moment": "what differs" or ""}, ...}

Every run is a process of its own, forked from this one, which builds models and never trains them. A *moment* is a
place in the code where the process kills itself; "time" kills it from outside after random delays.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from batches import scalar_of
from palate.data.chat import Chat
from palate.data.collate import collate, encode_records
from palate.data.records import Comparison, Demonstration, Prompt
from palate.generation import decode
from palate.generation.settings import SamplingSettings
from palate.methods.grpo import GRPO
from palate.methods.nash_md import NashMD
from palate.methods.ppo import PPO
from palate.methods.reward import RewardModel
from palate.methods.sft import SFT
from palate.models.adapters import add_lora
from palate.models.roles import AdapterOff, frozen_copy
from palate.models.sharing import stand_on, value_head_on
from palate.training import checkpoint, log
from palate.training.loop import Run, train
from palate.training.rollouts import Rollout
from palate.training.settings import TrainingSettings
from palate.types import Models
from tiny import LORA, tiny, tokenizer_of

torch.set_num_threads(1)  # before the first product: a process with worker threads cannot be forked
LETTERS = "abcdefghijklmnop"
STEPS = 7


def text(seed, length):
    return " ".join(random.Random(seed).choices(LETTERS, k=length))


def records(kind, count=10):
    prompts = [text(n, 2 + n % 4) for n in range(count)]
    if kind == "demonstrations":
        return [Demonstration(p, text(p, 1 + n % 5)) for n, p in enumerate(prompts)]
    if kind == "comparisons":
        return [Comparison(p, text(p + "w", 4), text(p + "l", 3)) for p in prompts]
    return [Prompt(p) for p in prompts]


def build(name):
    chat = Chat(tokenizer_of())
    ppo = PPO(epochs=2, minibatches=2, adaptive_kl_target=0.5, adaptive_kl_horizon=50.0, normalise_scores=True)
    method = {
        "sft": SFT(),
        "reward": RewardModel(centring=0.01),
        "ppo": ppo,
        "ppo_trunk": ppo,
        "ppo_value_head": ppo,
        "grpo": GRPO(epochs=2, minibatches=2),
        "nash_md": NashMD(mixture=0.5),
    }[name.removesuffix(" ahead")]
    items, _ = encode_records(records(method.reads), method.reads, chat, max_length=24)
    policy, reward = tiny("llama"), scalar_of(tiny("llama"), seed=1)
    models = Models(reward=reward) if name == "reward" else Models(policy=policy)
    if name in ("ppo_trunk", "ppo_value_head"):
        models = on_one_trunk(policy, reward, name)
    elif method.reads == "prompts":
        models = Models(policy, frozen_copy(policy), frozen_copy(reward), reward if name.startswith("ppo") else None)
    best = {"sft": "loss", "reward": "reward/accuracy"}.get(name, "score")
    return Run(
        folder=Path(),
        method=method,
        models=models,
        settings=TrainingSettings(
            learning_rate=3e-3,
            max_steps=STEPS,
            batch_size=3,
            tokens_per_microbatch=30,
            eval_every=2,
            save_every=2,
            keep_last=1,
            patience=50,
            best_metric=best,
            best_is="lowest" if name == "sft" else "highest",
            samples_every=2,
            rollouts_ahead=int(name.endswith(" ahead")),
        ),
        items=items[:7],
        validation=items[7:],
        collate=None if method.reads == "prompts" else lambda items: collate(items, method.reads),
        rollout=rollout_of(method, models, chat) if method.reads == "prompts" else None,
        starts_at_reference=method.reads == "prompts",
    )


def on_one_trunk(policy, reward, name):
    """Adapters and heads on the policy's trunk; the value its own adapter, or a head on the policy."""
    policy = add_lora(policy, LORA, seed=0, scalar=False)
    scored, valued = (add_lora(scalar_of(tiny("llama"), seed=n), LORA, seed=n, scalar=True) for n in (1, 2))
    for model in (scored, valued):
        stand_on(model, policy, "scalar")
    value = value_head_on(policy, seed=1) if name == "ppo_value_head" else valued
    return Models(policy, AdapterOff(policy), scored.requires_grad_(False), value)


def rollout_of(method, models, chat):
    whose = getattr(method, "drawn_by", ("policy",))
    settings = SamplingSettings(max_new_tokens=6)
    return Rollout(models.policy, chat, settings, 2, whose, models.reference, getattr(method, "mixture", 0.0))


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(function, number, then):
    """``function``, but its ``number``-th call (from 1) is ``then``'s."""
    calls = 0

    def counted(*args, **keywords):
        nonlocal calls
        calls += 1
        return (then if calls == number else function)(*args, **keywords)

    return counted


def half_a_file(tensors, path):
    checkpoint_save(tensors, path)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    die()


def half_a_line(folder, name, *entries):
    with open(folder / name, "a", encoding="utf-8") as file:
        file.write('{"step": 3, "spl')
    die()


def removed_in_part(path):
    next(Path(path).iterdir()).unlink()
    die()


checkpoint_save, append, draw = checkpoint.save_file, log.append, decode.draw
rename, remove = Path.rename, checkpoint.shutil.rmtree


def after_rename(path, target):
    rename(path, target)
    die()


def in_remove_old(folder, *rest):
    """The removal of the first old checkpoint that there is to remove is cut short."""
    checkpoint.shutil.rmtree = removed_in_part
    keep_to_the_rule(folder, *rest)
    checkpoint.shutil.rmtree = remove


keep_to_the_rule = checkpoint.remove_old


def arm(moment):
    """Prepare this process's end."""
    kind, _, number = moment.partition(" ")
    number = int(number or 1)
    if kind in ("weights", "stored"):
        checkpoint.save_file = at_call(checkpoint_save, number, half_a_file)
    if kind == "rename":
        Path.rename = at_call(rename, number, die)
    if kind == "renamed":
        Path.rename = at_call(rename, number, after_rename)
    if kind == "removing":
        checkpoint.remove_old = in_remove_old
    if kind == "line":
        log.append = at_call(append, number, half_a_line)
    if kind == "rollout":
        decode.draw = at_call(draw, number, die)
    if kind == "backward":
        torch.Tensor.backward = at_call(torch.Tensor.backward, number, die)


NAMES = ("sft", "reward", "ppo", "ppo_trunk", "ppo_value_head", "grpo", "nash_md", "ppo ahead", "grpo ahead")
RUNS = {name: build(name) for name in NAMES}


def process(name, folder, moment="", seconds=None):
    """Train in a new process, to its end or its death; True when it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            arm(moment)
            RUNS[name].folder = folder
            for _ in train(RUNS[name]):
                pass
            code = 0
        finally:  # whatever happens, the process must not return into this script
            if code:
                traceback.print_exc()
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"{name}, {moment}: the run failed"
    return not os.WIFSIGNALED(status)


def contents(folder):
    """Every file that a run leaves: name -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def difference(name, folder, wanted, moments):
    """Kill at each of the moments, finish, compare."""
    for number, (moment, seconds) in enumerate(moments):
        ended = process(name, folder, moment, seconds)
        if ended and seconds is None:
            return f"was not killed at {moment!r} ({number})"
    assert process(name, folder)
    found = contents(folder)
    return ", ".join(sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k)))


def main(root):
    results = {}
    for name, run in RUNS.items():
        started = time.perf_counter()
        assert process(name, root / name / "whole")
        duration = time.perf_counter() - started
        wanted = contents(root / name / "whole")
        assert f"checkpoints/step-{STEPS}/weights.safetensors" in wanted and "metrics.jsonl" in wanted
        moments = ["weights 2", "rename 2", "renamed 2", "removing", "line 3", "backward 6"]
        if name not in ("sft", "reward", "ppo", "ppo ahead"):  # checkpoints are written as ppo's are
            moments = ["backward 6"]
        moments += ["rollout 3", "rollout 40"] if run.rollout else []
        moments += ["stored 3"] if name == "ppo ahead" else []  # the third file of a checkpoint: the batch drawn ahead
        cases = {moment: [(moment, None)] for moment in moments}
        cases["one after the other"] = [(moment, None) for moment in ("weights 3", "line 3", "rename 1")]
        clock = random.Random(name)
        cases["time"] = [("", clock.uniform(0, duration)) for _ in range(4)]
        results[name] = {
            case: difference(name, root / name / str(number), wanted, moments)
            for number, (case, moments) in enumerate(cases.items())
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
