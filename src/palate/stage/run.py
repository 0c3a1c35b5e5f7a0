"""``run_stage``: the order in which a stage's parts are called; each part is elsewhere."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from palate.config import RunConfig
from palate.data.chat import Chat
from palate.data.collate import Item, collate
from palate.errors import ConfigError
from palate.generation.engines import Engine, engine_of
from palate.generation.sampler import sample
from palate.health.alarm import History, text
from palate.health.watch import FILE as ALARMS
from palate.health.watch import alarmed
from palate.models.attention import NOTE, caps_logits
from palate.models.heads import base_of
from palate.models.load import load_policy, load_tokenizer
from palate.models.precision import NOT_FASTER, has_bf16_units
from palate.models.save import save_model
from palate.report.metrics import read_metrics
from palate.report.page import report_run
from palate.resolve import FILLED, facts_of, require_all, resolved, with_device
from palate.run_folder import locked, open_run, write_text
from palate.settings_tree import flatten
from palate.stage import outcome
from palate.stage.chats import chat_of
from palate.stage.fingerprint import check_data
from palate.stage.offload import check_offload, put_to_rest, resting_roles
from palate.stage.progress import speaker, watched
from palate.stage.records import Sides, encode_sides, pretraining_items, read_sides
from palate.stage.reference_cache import items_with_reference
from palate.stage.reward_scale import adopted, with_reward_ready
from palate.stage.roles import bill, load_roles, load_trained, trained_role, where_from
from palate.stage.roles_table import RolesTable
from palate.stage.rollout import keeps_logprobs, rollout_of
from palate.stage.trackers import check_trackers, open_trackers
from palate.stage.user_cache import cache_folder
from palate.training import log
from palate.training.loop import Run, train
from palate.training.optimizer import check_optimizer
from palate.training.times import FILE as TIMES
from palate.training.times import summary, timed
from palate.types import Models

Say = Callable[[Any], None]


class Stage(NamedTuple):
    """Everything loaded, before the first step."""

    config: RunConfig
    chat: Chat
    models: Models
    items: Sides
    pretraining: list[Item]
    conversations: bool  # some prompt is a conversation
    account: list[str]  # what was read, cut and dropped, for the card
    origins: list[str]  # of records out of a store of feedback: which events, whose answers
    engine: Engine = sample  # what samples the policy; one for the whole run

    @property
    def trained(self) -> nn.Module:
        model: nn.Module = getattr(self.models, trained_role(self.config))
        return model


def run_stage(config: RunConfig, *, quiet: bool = False) -> Path:
    """Train one method to its end; returns the run's folder, with ``model/`` in it.

    The same settings on an unfinished folder resume it, on a finished one do nothing. Progress and tables go to standard
    error.

    Args:
        config: from ``load_config``; what depends on the model is filled in here.
        quiet: print nothing.
    Raises:
        ConfigError, DataError, ModelError, RunError: each says what to do.
    """
    say = speaker(quiet)
    config = with_device(config)
    require_all(config)
    config = adopted(config)
    check_trackers(config.trackers)
    check_offload(config)
    same_as_plain = check_optimizer(config.training, config.device)
    state = open_run(config, unresolved=FILLED)
    if state == "finished":
        say(
            f"{config.out}: this run is finished; its model is in {config.out / 'model'}. For another run, give another --out."
        )
        return config.out
    if same_as_plain:
        say(same_as_plain)
    with ExitStack() as held:
        if state == "unfinished":  # another process may be at it: say so before the models are loaded
            held.enter_context(locked(config.out))
        stage = load_stage(config, say)
        again = open_run(stage.config)
        if state == "new":
            held.enter_context(locked(config.out))
        if again == "unfinished":
            say(f"{config.out}: going on with an unfinished run.")
        _train(stage, say, quiet)
    return config.out


def _train(stage: Stage, say: Say, quiet: bool) -> None:
    """From the folder that is made to the card."""
    config = stage.config
    check_data(config.out, {**stage.items._asdict(), "pretraining": stage.pretraining})
    trackers = open_trackers(config.trackers, config.run_name, config.out, config.to_dict())
    witness = before = None
    if stage.models.policy is not None:
        shown = stage.items.validation or stage.items.train
        witness = outcome.Witness(config, stage.chat, shown, stage.models.reward, stage.engine)
        before = witness.responses(stage.models.policy, 0, "before")
    run = loop_run(reference_asked_once(stage, say))
    resting = put_to_rest(config, stage.models, say)
    run.awake = nullcontext if resting is None else resting.awake
    total = config.training.total_steps(len(stage.items.train))
    last: dict[str, dict[str, Any]] = {}
    try:
        history = History(total, flatten(config.to_dict()), prompts_held_out=len(stage.items.validation))
        stream = alarmed(timed(train(run), config.out), config.out, history, say)
        for metrics in watched(stream, total, config.run_name, quiet):
            last[metrics["split"]] = metrics
            for tracker in trackers:
                tracker.log(metrics)
    finally:
        for tracker in trackers:
            tracker.close()
        if resting is not None:
            resting.wake()
    say(f"stopped: {run.stopped}")
    if times := log.read(config.out, TIMES):
        say(summary(times))
    _finish(stage, run, witness, before, say)


def reference_asked_once(stage: Stage, say: Say) -> Stage:
    """The stage with the reference's log-probs in its items, where that is all that the method asks of it.

    The reference is let go then: ``models.reference`` is None unless the method asks for more.
    """
    config, models = stage.config, stage.models
    asks = getattr(config.method.settings, "asks_reference", None)
    cache = cache_folder(config.reference_cache, "reference")
    if asks is None or cache is None or models.reference is None:
        return stage
    sides = items_with_reference(models.reference, stage.items, config.out, cache, torch.device(config.device), say)
    if _is_let_go(config):
        models.reference = None
    return stage._replace(items=Sides(*sides))


def load_stage(config: RunConfig, say: Say) -> Stage:
    """Records, chat, items and roles; nothing is written."""
    where = config.model if isinstance(config.model, str) else None
    tokenizer = load_tokenizer(config.tokenizer or str(config.model))
    chat = chat_of(where, tokenizer, config.data.chat_template, config.data.system)
    for finding in chat.check():
        say(f"chat template: {finding}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        origins: list[str] = []
        sides = read_sides(config, origins.append)
    account: list[str] = []

    def noted(text: str) -> None:
        account.append(" ".join(text.split()))
        say(text)

    for warning in caught:
        noted(str(warning.message))
    for origin in origins:
        say(origin)
    say(where_from(config))
    if config.dtype != "float32" and torch.device(config.device).type == "cpu" and not has_bf16_units():
        say("warning: " + NOT_FASTER.format(dtype=config.dtype))
    if config.method.settings.reads == "prompts":
        _say_what_truncates(config, say)
    model = load_trained(config, tokenizer)
    if caps_logits(base_of(model).config):
        say(NOTE)
    config = resolved(config, facts_of(model))
    for key, reason in config.filled.items():
        say(f"{key} = {_value(config, key)}   ({reason})")
    items = encode_sides(config, sides, chat, noted, say)
    _check_held_out(config, items)
    models = load_roles(config, model, chat, say)
    config = with_reward_ready(config, models, items, chat, say)
    say(_bill_table(config, models))
    conversations = any(not isinstance(record.prompt, str) for record in sides.train)
    pretraining = pretraining_items(config, chat, noted, say)
    engine = engine_of(config.engine, max_length=_longest(config))
    return Stage(config, chat, models, items, pretraining, conversations, account, origins, engine)


def _longest(config: RunConfig) -> int | None:
    """Tokens of the longest row that is sampled: a conversation of several turns, or a prompt and its response."""
    prompt, whole = config.data.max_prompt_length, config.data.max_length
    rows = [whole, None if prompt is None else prompt + config.sampling.max_new_tokens]
    return max((length for length in rows if length is not None), default=None)


def _check_held_out(config: RunConfig, items: Sides) -> None:
    """Settings that look at held-out records need some.

    Raises:
        ConfigError: there are none.
    """
    for key in ("patience", "best_metric"):
        if getattr(config.training, key) and not items.validation:
            raise ConfigError(
                f"training.{key}: looks at held-out records, and none are held out. Give data.validation=FILE, a "
                "data.validation_fraction above 0, or more than one prompt."
            )


def _say_what_truncates(config: RunConfig, say: Say) -> None:
    """Filters of the sampler make another distribution than the one whose log-probabilities are trained."""
    if on := config.sampling.filters:
        say(
            f"warning: {', '.join(on)} cuts the distribution that responses are drawn from, but not the one that is trained: "
            "log-probabilities are of the whole softmax, and the KL may come out negative. Leave it out in training."
        )


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config.to_dict()
    for part in key.split("."):
        value = value[part]
    return value


def _bill_table(config: RunConfig, models: Models) -> RolesTable:
    """What each role holds in memory: weights, and for trained ones gradients and the optimizer's state."""
    title = f"roles of {config.method.name} on {config.device}, sharing={config.sharing}"
    lines = bill(models, config.method.settings.trains, config.training.optimizer, ahead=config.training.rollouts_ahead)
    rest = {role for role, stays in resting_roles(config, models).items() if not stays}
    notes = dict.fromkeys(rest, ", on the CPU but while it is asked")
    if _is_let_go(config):
        notes["reference"] = ", until its log-probs are known"
    return RolesTable(title, lines, notes)


def _is_let_go(config: RunConfig) -> bool:
    """Is the reference asked before the first step and never again?"""
    asks_rows = getattr(config.method.settings, "asks_reference", None) == "rows"
    return asks_rows and cache_folder(config.reference_cache, "reference") is not None


def loop_run(stage: Stage) -> Run:
    """What the loop is given."""
    config, chat, method = stage.config, stage.chat, stage.config.method.settings
    samples = method.reads == "prompts"
    if getattr(method, "ptx_coef", 0.0) and not stage.pretraining:
        raise ConfigError("method.ptx_coef mixes in a pre-training loss. Give the texts: data.pretraining=FILE.")
    rollout = None
    if samples:
        assert stage.models.policy is not None
        rollout = rollout_of(
            config,
            stage.models.policy,
            chat,
            samples_per_prompt=config.samples_per_prompt,
            drawn_by=getattr(method, "drawn_by", ("policy",)),
            reference=stage.models.reference,
            mixture=getattr(method, "mixture", 0.0),
            engine=stage.engine,
            keeps_logprobs=keeps_logprobs(config, stage.models.policy),
        )
        rollout.check_angles([*stage.items.train, *stage.items.validation])
    return Run(
        folder=config.out,
        method=method,
        models=stage.models,
        settings=config.training,
        items=stage.items.train,
        validation=stage.items.validation,
        collate=None if samples else lambda items: collate(items, method.reads),
        rollout=rollout,
        pretraining=stage.pretraining,
        collate_pretraining=lambda items: collate(items, "demonstrations").tokens,
        starts_at_reference="reference" in method.needs and config.reference in (None, config.model),
        dtype="float32" if config.dtype == "float32" else "bfloat16",
        device=torch.device(config.device),
    )


def _finish(stage: Stage, run: Run, witness: outcome.Witness | None, before: Any, say: Say) -> None:
    """Everything after the last step; it can be repeated, and gives the same files."""
    config, folder = stage.config, stage.config.out
    sections = {"Records": "\n".join(f"- {line}" for line in stage.account)}
    if "reward" in config.method.settings.trains:
        sections |= _finish_reward(stage, say)
    if witness is not None:
        assert stage.models.policy is not None
        last_step = max((line["step"] for line in read_metrics(folder / "metrics.jsonl")), default=0)
        outcome.write_samples(folder, before, witness.responses(stage.models.policy, last_step, "after"))
    _save(stage)
    last = {line.get("split", "train"): line for line in read_metrics(folder / "metrics.jsonl")}
    alarms = [text(alarm) for alarm in log.read(folder, ALARMS)]
    if alarms:
        sections["Alarms"] = "\n".join("- " + alarm.replace("\n", "\n ") for alarm in alarms)
        say(f"{len(alarms)} alarm{'s' * (len(alarms) > 1)} in {folder / ALARMS}; what each means: docs/health.md")
    report_run(folder)
    # The card is the sign that nothing is left to do: it is written last.
    sections = {"Why it stopped": str(run.stopped), **sections}
    write_text(folder / "card.md", outcome.card(config, sections, last, stage.origins))
    say(f"model: {folder / 'model'}   report: {folder / 'report.html'}")


def _finish_reward(stage: Stage, say: Say) -> dict[str, str]:
    """Normalise the reward and judge it on what was held out."""
    config, model, method = stage.config, stage.trained, stage.config.method.settings
    sections: dict[str, str] = {}
    # Judged before it is normalised: likelihood and calibration belong to the scale that it was trained on.
    report = outcome.held_out_report(model, stage.items.validation, method.reads, config.training.seed)
    if report is not None:
        text = (
            f"accuracy {report.accuracy} on {report.pairs} held-out pairs, NLL {report.nll:.3f}, ECE {report.ece:.3f}"
        )
        if report.length is not None:
            text += f'; "the longer one wins" has {report.length.longer_wins}'
        say(f"held out: {text}")
        sections["Held-out pairs"] = text[0].upper() + text[1:] + "."
        write_text(config.out / "evaluation.json", json.dumps(report.as_dict(), indent=1) + "\n")
    reference = None
    if config.reference is not None:
        reference = load_policy(config.reference, dtype=config.dtype, device=config.device, trainable=False)
    batches, source = outcome.reference_responses(config, stage.chat, stage.items.train, reference)
    outcome.normalise_reward(model, batches)
    sections["Normalisation"] = f"Scores have mean 0 and standard deviation 1 on {source}."
    return sections


def _save(stage: Stage) -> None:
    tokenizer = stage.chat.tokenizer
    if stage.conversations and tokenizer.chat_template is None:
        tokenizer.chat_template = stage.chat.conversation_template
    model: Any = stage.trained
    stops = list(stage.chat.stop_token_ids)
    if stops:  # a reward has no generation config: its own config says where responses end
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.config.eos_token_id = stops[0] if len(stops) == 1 else stops
    save_model(model, tokenizer, stage.config.out / "model", overwrite=True, stop_token_ids=stops)
