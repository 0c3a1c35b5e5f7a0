"""The loop: exact resume, checkpoints that survive, order, schedule, early stopping, guards."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from batches import batch_of, means_and_gradient, models_for, run_of, tokens, trained_of, weights_of
from palate.errors import ConfigError, DataError, ModelError, RunError
from palate.methods.ppo import PPO
from palate.methods.reward import RewardModel
from palate.methods.sft import SFT
from palate.training import checkpoint, log, loop
from palate.training.loop import evaluate, train
from palate.training.optimizer import make_optimizer, schedule, trained_parameters
from palate.training.order import batch_items, minibatch_rows, seeded
from palate.training.settings import TrainingSettings, steps_of
from palate.types import Mean, Models, groups
from resuming import everything, stopped_and_resumed

HERE = Path(__file__).resolve().parent
METHODS = [SFT(), RewardModel(), PPO(epochs=2, minibatches=2, adaptive_kl_target=1.0, normalise_scores=True)]


def name_of(method):
    return type(method).__name__


def entries(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def new_run(method, folder, **changes):
    """Seven steps over four prompts with models of its own; a checkpoint every two."""
    defaults = {"max_steps": 7, "save_every": 2, "eval_every": 3, "samples_every": 2, "tokens_per_microbatch": 25}
    return run_of(method, models_for(method), folder, validation=range(2), **defaults | changes)


def steps_in(folder):
    return [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(folder / "checkpoints")]


# --- resuming -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_stopped_anywhere_and_resumed_is_bit_identical(method, tmp_path):
    """The generator is dropped after some yields, once or three times in a row."""
    list(train(run := new_run(method, tmp_path / "whole")))
    wanted, weights = everything(tmp_path / "whole"), weights_of(run.models)
    for number, stops in enumerate([(1,), (4,), (3, 1, 4)]):
        folder = tmp_path / str(number)
        resumed = stopped_and_resumed(partial(new_run, method), folder, *stops)
        assert everything(folder) == wanted, stops
        assert all(torch.equal(value, weights[name]) for name, value in weights_of(resumed.models).items())
        assert resumed.method == run.method and resumed.stopped == run.stopped == "all 7 batches done"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What ``killed_runs.py`` found: it kills SFT, reward, PPO, GRPO and Nash-MD runs at many moments and finishes them; two
    of PPO share a trunk, two of all draw their batches ahead."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = [str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(HERE / "killed_runs.py"), str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "name", ["sft", "reward", "ppo", "ppo_trunk", "ppo_value_head", "grpo", "nash_md", "ppo ahead", "grpo ahead"]
)
def test_killed_runs_end_as_if_nothing_had_happened(killed, name):
    """kill -9 in a rollout, in a backward pass, while writing weights, metrics, renaming, removing, at random times:
    all weights, optimizer states, metrics.jsonl and samples.jsonl are those of the uninterrupted run."""
    assert killed[name] == dict.fromkeys(killed[name], "")
    moments = {moment.split()[0] for moment in killed[name]}
    assert {"backward", "one", "time"} <= moments
    written = {"weights", "rename", "renamed", "removing", "line"}
    assert name not in ("sft", "reward", "ppo", "ppo ahead") or written <= moments
    assert name in ("sft", "reward") or "rollout" in moments


def test_a_finished_run_is_left_as_it_is(tmp_path):
    list(train(new_run(SFT(), tmp_path)))
    before = everything(tmp_path)
    again = new_run(SFT(), tmp_path)
    assert list(train(again)) == [] and again.stopped == "all 7 batches done"
    assert everything(tmp_path) == before
    saved = load_file(tmp_path / "checkpoints" / "step-7" / "weights.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in trained_of(again.models, SFT()).items())


def test_a_finished_run_can_be_given_more_steps(tmp_path):
    list(train(new_run(SFT(), tmp_path)))
    more = list(train(run := new_run(SFT(), tmp_path, max_steps=9)))
    assert [m["step"] for m in more if m["split"] == "train"] == [8, 9] and run.stopped == "all 9 batches done"


# --- checkpoints ----------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(bytes(content))


DAMAGES = {
    "weights cut": lambda folder: truncate(folder / "weights.safetensors"),
    "optimizer cut": lambda folder: truncate(folder / "optimizer.safetensors"),
    "state cut": lambda folder: truncate(folder / "state.json"),
    "state empty": lambda folder: (folder / "state.json").write_text("{}"),
    "weights missing": lambda folder: (folder / "weights.safetensors").unlink(),
    "one bit of the weights": lambda folder: flip_a_bit(folder / "weights.safetensors"),
    "one bit of the optimizer": lambda folder: flip_a_bit(folder / "optimizer.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_is_written_anew(damage, tmp_path):
    list(train(new_run(SFT(), tmp_path / "whole")))
    steps = train(new_run(SFT(), tmp_path / "hurt"))
    for metrics in steps:
        if metrics["step"] == 5:
            break
    steps.close()
    folder = tmp_path / "hurt" / "checkpoints"
    assert steps_in(tmp_path / "hurt") == [2, 4]
    DAMAGES[damage](folder / "step-4")
    run = new_run(SFT(), tmp_path / "hurt")
    first = next(resumed := train(run))
    assert first["step"] == 3, "resumed from step 2"
    list(resumed)
    assert everything(tmp_path / "hurt") == everything(tmp_path / "whole")


def test_what_was_passed_over_is_said_and_no_readable_checkpoint_is_an_error(tmp_path):
    list(train(run := new_run(SFT(), tmp_path)))
    folder = tmp_path / "checkpoints"
    parameters = trained_parameters(run.models, run.method)
    optimizer = make_optimizer(parameters, run.settings)
    truncate(folder / "step-7" / "weights.safetensors")
    state = checkpoint.load_newest(folder, parameters, optimizer)
    assert state["step"] == 6 and "step-7" in state["skipped"][0]
    truncate(folder / "step-6" / "weights.safetensors")
    with pytest.raises(RunError, match="(?s)step-7.*step-6.*Remove"):
        list(train(new_run(SFT(), tmp_path)))


def test_a_leftover_of_a_kill_is_removed_and_strange_folders_are_not_checkpoints(tmp_path):
    list(train(new_run(SFT(), tmp_path)))
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-step-9").mkdir()
    (folder / "step-of-mine").mkdir()
    assert steps_in(tmp_path) == [6, 7]
    list(train(new_run(SFT(), tmp_path)))
    assert not (folder / ".tmp-step-9").exists() and (folder / "step-of-mine").exists()


@pytest.mark.parametrize("where", ["save_file", "sync_path"])
def test_a_full_disk_is_an_error_that_says_what_to_do_and_leaves_the_earlier_ones(where, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    steps = train(new_run(SFT(), tmp_path))
    with pytest.raises(RunError, match="(?s)step-4.*No space left.*Earlier checkpoints are intact"):
        for metrics in steps:
            if metrics["step"] == 3:
                monkeypatch.setattr(checkpoint, where, full)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.undo()
    list(train(new_run(SFT(), tmp_path)))
    list(train(new_run(SFT(), tmp_path.parent / "whole")))
    assert everything(tmp_path) == everything(tmp_path.parent / "whole")


def test_a_full_disk_while_writing_metrics_is_an_error_for_people_too(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "open", full, raising=False)
    with pytest.raises(RunError, match="metrics.jsonl cannot be written.*No space left"):
        next(train(new_run(SFT(), tmp_path)))


def test_weights_of_another_model_are_refused(tmp_path):
    list(train(new_run(SFT(), tmp_path)))
    other = new_run(SFT(), tmp_path)
    other.models.policy.add_module("more", torch.nn.Linear(2, 2))
    with pytest.raises(RunError, match="another model"):
        list(train(other))


def test_only_safetensors_and_json_are_written(tmp_path):
    list(train(new_run(PPO(), tmp_path)))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json", ".jsonl"}


def test_checkpoints_are_as_readable_as_other_files(tmp_path):
    list(train(new_run(SFT(), tmp_path)))
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "checkpoints").glob("*/*")}
    assert modes == {(tmp_path / "other").stat().st_mode}


def test_optimizer_state_and_method_come_back_exactly(tmp_path):
    method = METHODS[2]
    list(train(run := new_run(method, tmp_path)))
    fresh = new_run(method, tmp_path)
    parameters = trained_parameters(fresh.models, fresh.method)
    optimizer = make_optimizer(parameters, fresh.settings)
    state = checkpoint.load_newest(tmp_path / "checkpoints", parameters, optimizer)
    assert checkpoint.restored_method(method, state["method"]) == run.method != method
    saved = load_file(tmp_path / "checkpoints" / "step-7" / "optimizer.safetensors")
    assert len(saved) == 3 * sum(len(named) for named in parameters.values())
    for role, named in parameters.items():
        for name, p in named.items():
            assert all(
                torch.equal(optimizer.state[p][key], saved[f"{role}.{name}.{key}"]) for key in optimizer.state[p]
            )


# --- best, last, stopping -------------------------------------------------------------------------------------


def with_losses(monkeypatch, losses):
    """Evaluations that say these losses, one after the other."""
    said = iter(losses)
    monkeypatch.setattr(loop, "evaluate", lambda run: {"loss": next(said), "reward/accuracy": -1.0})


def test_the_newest_and_the_best_are_kept_and_the_best_is_what_the_model_ends_with(tmp_path, monkeypatch):
    with_losses(monkeypatch, [9.0, 3.0, 1.0, 2.0, 5.0, 4.0, 7.0, 8.0])
    run = new_run(SFT(), tmp_path, eval_every=1, save_every=1, keep_last=2, best_metric="loss")
    seen = {m["step"]: weights_of(run.models) for m in train(run) if m["split"] == "train"}
    assert steps_in(tmp_path) == [2, 6, 7] and run.best == {"step": 2, "value": 1.0}
    assert all(torch.equal(value, seen[2][name]) for name, value in weights_of(run.models).items())


def test_without_a_best_metric_the_last_weights_stay(tmp_path, monkeypatch):
    with_losses(monkeypatch, [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    run = new_run(SFT(), tmp_path, eval_every=1, save_every=1, keep_last=1)
    list(train(run))
    assert steps_in(tmp_path) == [7] and run.best == {}


@pytest.mark.parametrize("best_is, stopped_after", [("lowest", 4), ("highest", 3)])
def test_early_stopping_counts_evaluations_without_a_better_one(best_is, stopped_after, tmp_path, monkeypatch):
    with_losses(monkeypatch, [9.0, 5.0, 4.0, 4.0, 4.5, 3.0, 2.0, 1.0])
    run = new_run(SFT(), tmp_path, eval_every=1, patience=2, best_is=best_is)
    done = [m["step"] for m in train(run) if m["split"] == "train"]
    assert done[-1] == stopped_after and "has not improved" in run.stopped
    again = new_run(SFT(), tmp_path, eval_every=1, patience=2, best_is=best_is)
    assert list(train(again)) == [] and again.stopped == run.stopped


def test_an_unknown_best_metric_is_named_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="'acuracy'.*reward/accuracy"):
        list(train(new_run(RewardModel(), tmp_path, best_metric="acuracy")))


def test_evaluation_is_one_average_over_all_items_and_changes_nothing(tmp_path):
    for method in (SFT(), RewardModel()):
        run = new_run(method, tmp_path / name_of(method))
        run.validation, before = range(4), weights_of(run.models)
        found = evaluate(replace(run, settings=replace(run.settings, batch_size=3, tokens_per_microbatch=20)))
        wanted, _ = means_and_gradient(method, run.models, batch_of(method.reads))
        assert found == pytest.approx(wanted, abs=1e-5)
        assert all(torch.equal(value, before[name]) for name, value in weights_of(run.models).items())


# --- gradients and steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SFT(), RewardModel()], ids=name_of)
def test_a_step_is_adamw_on_the_gradient_of_the_average(method, tmp_path):
    """The first step of Adam is lr g / (|g| + eps), with the gradient g scaled down to norm 1."""
    run = run_of(method, models_for(method), tmp_path, batch_size=4, max_steps=1, tokens_per_microbatch=20, warmup=0)
    before = weights_of(run.models)
    _, gradient = means_and_gradient(method, run.models, batch_of(method.reads))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
    (metrics,) = train(run)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, p in trained_of(run.models, method).items():
        g = gradient[name].double() * min(1.0, 1 / norm)
        moved = p.detach().double() - before[name].double()
        clear = g.abs() > 1e-6  # where |g| is near eps, rounding decides
        assert torch.allclose(moved[clear], (-1e-2 * g / (g.abs() + 1e-8))[clear], atol=2e-5), name


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_microbatch_size_does_not_change_a_run(method, tmp_path):
    runs = [new_run(method, tmp_path / str(size), tokens_per_microbatch=size) for size in (1, 10**6)]
    for metrics in zip(*(train(run) for run in runs), strict=True):
        assert metrics[0].pop("split") == metrics[1].pop("split")
        keep = [{k: v for k, v in m.items() if not k.startswith("time/") and k != "tokens/second"} for m in metrics]
        assert keep[0] == pytest.approx(keep[1], rel=2e-3, abs=2e-4)


def test_weight_decay_is_for_matrices_and_the_value_model_has_its_own_rate():
    models = models_for(PPO())
    optimizer = make_optimizer(
        trained_parameters(models, PPO()),
        TrainingSettings(learning_rate=1e-3, value_learning_rate=5e-3, weight_decay=0.1),
    )
    for group in optimizer.param_groups:
        values = {id(p) for p in models.value.parameters()}
        assert group["peak"] == (5e-3 if id(group["params"][0]) in values else 1e-3)
        decays = group["weight_decay"] > 0
        assert all(p.ndim >= 2 for p in group["params"]) or not decays
    embeddings = {id(m.base_model.embed_tokens.weight) for m in (models.policy, models.value)}
    without = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert embeddings <= without
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(
        len(list(m.parameters())) for m in (models.policy, models.value)
    )


def schedule_of(total=10, **changes):
    given = TrainingSettings(**{"warmup": 2, "final_learning_rate": 0.1} | changes)
    return [schedule(step, total, given) for step in range(total)]


def test_schedules():
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert schedule_of(schedule="cosine") == pytest.approx([0.5, 1.0, *cosine])
    linear = [1 - 0.9 * k / 8 for k in range(8)]
    assert schedule_of(schedule="linear") == pytest.approx([0.5, 1.0, *linear])
    assert schedule_of(schedule="constant") == [0.5, 1.0] + [1.0] * 8
    assert schedule_of(schedule="linear", warmup=0, final_learning_rate=0.0) == pytest.approx(
        [1 - k / 10 for k in range(10)]
    ), "OpenAI's decay: the share of the run that is left"
    assert schedule_of(schedule="constant", warmup=0.3)[:3] == pytest.approx([1 / 3, 2 / 3, 1])


def test_steps_are_numbers_or_shares():
    assert [steps_of(x, 200) for x in (0, 0.1, 1, 7, 0.0001)] == [0, 20, 1, 7, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0},
        {"schedule": "cosin"},
        {"epochs": 0},
        {"batch_size": 0},
        {"max_steps": 0},
        {"warmup": -1},
        {"final_learning_rate": 2},
        {"best_is": "best"},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"training.{next(iter(wrong))}"):
        TrainingSettings(**wrong)


# --- order ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 3), st.integers(0, 5))
def test_every_item_is_seen_once_an_epoch_and_all_steps_cover_all_epochs(items, batch_size, epochs, seed):
    total = TrainingSettings(batch_size=batch_size, epochs=epochs).total_steps(items)
    seen = [item for step in range(total) for item in batch_items(range(items), batch_size, step, seed)]
    assert len(seen) >= epochs * items > len(seen) - min(batch_size, items)
    for epoch in range(epochs):
        assert sorted(seen[epoch * items : (epoch + 1) * items]) == list(range(items))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(step, seed):
        return batch_items(range(50), 50, step, seed)

    assert order(0, 0) == order(0, 0) != list(range(50))
    assert len({tuple(order(step, seed)) for step in range(3) for seed in range(3)}) == 9


def test_seeded_streams_differ_in_every_number_and_in_their_order():
    numbers = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 0, 1), (5, -1, 3), (5, 3, -1), (-1,)]
    assert len({torch.rand(1, generator=seeded(*each)).item() for each in numbers}) == len(numbers)


@pytest.mark.parametrize("minibatches", [1, 2, 3, 4, 9])
def test_minibatches_are_whole_groups_each_once(minibatches):
    batch = tokens().select(torch.tensor([5, 0, 11, 3, 1, 6, 2, 10]))
    parts = minibatch_rows(batch, minibatches, 0, 1, 2)
    assert len(parts) == min(minibatches, 4)
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    for rows in parts:
        inside = set(batch.group[rows].tolist())
        assert sorted(rows.tolist()) == [i for i in range(8) if batch.group[i].item() in inside]
    others = [minibatch_rows(batch, 2, 0, 1, epoch)[0].tolist() for epoch in range(8)]
    assert len({tuple(rows) for rows in others}) > 1


# --- guards ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_with_the_batch_saved_and_no_step_made(tmp_path):
    run = new_run(SFT(), tmp_path)
    steps = train(run)
    while next(steps)["step"] != 2:
        pass
    with torch.no_grad():
        run.models.policy.lm_head.weight[3] = float("nan")
    before = weights_of(run.models)
    with pytest.raises(ModelError, match=r"(?s)Step 3: loss nan.*failed-batch-step-3\.safetensors.*learning_rate"):
        list(steps)
    saved = load_file(tmp_path / "failed-batch-step-3.safetensors")
    items = batch_items(run.items, 2, 2, run.settings.seed)
    wanted = run.collate(items)
    wanted = wanted.select(torch.cat(groups(wanted)))
    for name in ("ids", "attention_mask", "response_mask", "group", "finished"):
        assert torch.equal(saved[name], wanted.extras[name] if name == "finished" else getattr(wanted, name))
    now = weights_of(run.models)
    assert all(torch.equal(now[name].nan_to_num(7), value.nan_to_num(7)) for name, value in before.items())
    assert [m["step"] for m in entries(tmp_path) if m["split"] == "train"] == [1, 2] and steps_in(tmp_path) == [2]


def test_a_gradient_that_is_no_number_stops_too(tmp_path):
    class Broken(SFT):
        def loss(self, models, batch):
            found = super().loss(models, batch)
            bent = (models.policy.lm_head.weight[0, 0] * 0).sqrt()  # value 0, gradient inf * 0
            return found | {"loss": Mean(found["loss"].total + bent, found["loss"].count)}

    with pytest.raises(ModelError, match="Step 1: .*gradient norm of policy nan"):
        list(train(new_run(Broken(), tmp_path)))


def test_a_failed_ppo_batch_is_saved_with_what_prepare_made_of_it(tmp_path):
    run = new_run(PPO(), tmp_path)
    with torch.no_grad():
        run.models.value.score.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="failed-batch-step-1"):
        list(train(run))
    saved = load_file(tmp_path / "failed-batch-step-1.safetensors")
    assert {"ids", "response_mask", "sampler_logprobs", "logprobs", "advantages", "scores", "values"} <= saved.keys()


def test_a_batch_with_nothing_to_train_on_is_named(tmp_path):
    empty = replace(tokens(), response_mask=torch.zeros(12, 10, dtype=torch.bool))
    with pytest.raises(DataError, match="Step 1: no row"):
        list(train(run_of(SFT(), models_for(SFT()), tmp_path, empty)))
    with pytest.raises(DataError, match="nothing to train on"):
        list(train(replace(new_run(SFT(), tmp_path), items=[])))


# --- what is written ------------------------------------------------------------------------------------------


def test_metrics_are_one_object_a_step_with_the_fields_names(tmp_path):
    yielded = list(train(new_run(METHODS[2], tmp_path)))
    written = entries(tmp_path)
    assert [(m["step"], m["split"]) for m in written] == [(m["step"], m["split"]) for m in yielded]
    assert [m["step"] for m in written if m["split"] == "train"] == [1, 2, 3, 4, 5, 6, 7]
    assert [m["step"] for m in written if m["split"] == "validation"] == [0, 3, 6, 7]
    for found, said in zip(written, yielded, strict=True):
        times = {name for name in said if name.startswith("time/") or name == "tokens/second"}
        assert found == {name: value for name, value in said.items() if name not in times}
    names = {"loss", "loss/policy", "loss/value", "score", "kl/old", "kl/reference", "kl/sampler", "entropy"}
    names |= {"clip_fraction", "value/explained_variance", "length/response", "length/no_eos", "learning_rate"}
    assert names <= written[1].keys()
    samples = entries(tmp_path, "samples.jsonl")
    assert {s["step"] for s in samples} == {0, 2, 4, 6} and all(
        {"prompt", "response", "score"} <= s.keys() for s in samples
    )


def test_two_roles_have_gradient_norms_of_their_own(tmp_path):
    metrics = next(m for m in train(new_run(PPO(), tmp_path)) if m["split"] == "train")
    assert {"grad_norm/policy", "grad_norm/value"} <= metrics.keys()


def test_models_without_the_role_are_not_trained():
    models = Models(policy=models_for(SFT()).policy.requires_grad_(False))
    models.policy.lm_head.weight.requires_grad_(True)
    assert list(trained_parameters(models, SFT())["policy"]) == ["lm_head.weight"]
