"""What a stage of a pipeline can do. Each is a frozen dataclass of settings with ``run``, which fills a folder.

kitchen   the demo's small world        sample    responses to prompts          annotate  simulated annotators rank them
train     any method                    examine   a reward model on rankings    compare   two policies on held-out prompts
frontier  runs along their way, gold against distance                           report    the page, and a table
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pydantic import TypeAdapter, ValidationError

from palate.errors import ConfigError, DataError
from palate.settings_tree import closest

if TYPE_CHECKING:
    from palate.pipelines.recipe import Recipe, Step

Figures = dict[str, Any]


class _Stage(Protocol):
    def run(self, folder: Path, recipe: Recipe) -> Figures: ...


@dataclass(frozen=True)
class Kitchen:
    """Prompts, demonstrations of mixed quality and a tokenizer.

    Attributes:
        prompts: to train on; each has one demonstration.
        held_out: others, never trained on.
        seed: of everything drawn.
    """

    prompts: int = 3000
    held_out: int = 300
    seed: int = 0

    def run(self, folder: Path, recipe: Recipe) -> Figures:
        import random

        from palate.data.records import Demonstration, Prompt, write_records
        from palate.pipelines.kitchen import gold, mixed_response, split_prompts
        from palate.pipelines.kitchen.tokenizer import kitchen_tokenizer

        train, held_out = split_prompts(self.prompts, self.held_out, self.seed)
        rng = random.Random(f"demonstrations {self.seed}")
        responses = [mixed_response(prompt, rng) for prompt in train]
        write_records(
            folder / "demonstrations.jsonl", [Demonstration(p, r) for p, r in zip(train, responses, strict=True)]
        )
        for name, prompts in (("prompts", train), ("held_out", held_out)):
            write_records(folder / f"{name}.jsonl", [Prompt(p) for p in prompts])
        kitchen_tokenizer().save_pretrained(str(folder / "tokenizer"))
        mean = sum(gold(p, r) for p, r in zip(train, responses, strict=True)) / len(train)
        return {"prompts": len(train), "held out": len(held_out), "gold of demonstrations": mean}


@dataclass(frozen=True)
class Sample:
    """K responses to each prompt: responses.jsonl, {"prompt", "responses"} a line.

    Attributes:
        model: folder or hub name of the policy.
        prompts: file of prompts.
        samples_per_prompt: K.
        max_new_tokens: longest response, tokens.
        temperature: of the sampling.
        seed: of the sampling.
    """

    model: str
    prompts: str
    samples_per_prompt: int = 4
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0

    def run(self, folder: Path, recipe: Recipe) -> Figures:
        from palate.pipelines.answers import Speaker, read_prompts

        prompts, k = read_prompts(self.prompts), self.samples_per_prompt
        speaker = Speaker.load(self.model)
        tokens = speaker.answer(
            prompts,
            samples_per_prompt=k,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )
        texts = speaker.texts(tokens)
        lines = [{"prompt": p.prompt, "responses": texts[i * k : (i + 1) * k]} for i, p in enumerate(prompts)]
        _write_lines(folder / "responses.jsonl", lines)
        return {
            "prompts": len(prompts),
            "responses": len(texts),
            "words": sum(len(t.split()) for t in texts) / len(texts),
        }


@dataclass(frozen=True)
class Annotate:
    """Simulated annotators rank the responses of each prompt: rankings.jsonl.

    Attributes:
        responses: file made by ``sample``.
        gold: "module:function" of (prompts, responses): the preference that they all have.
        annotators: settings of each, see ``palate.feedback.simulated.SimulatedAnnotator``.
        per_prompt: how many of them rank each prompt.
        seed: of their noise.
    """

    responses: str
    gold: str
    annotators: list[dict[str, Any]]
    per_prompt: int = 1
    seed: int = 0

    def run(self, folder: Path, recipe: Recipe) -> Figures:
        from palate.data.records import Prompt, write_records
        from palate.feedback.simulated import SimulatedAnnotator, annotate, bayes_accuracy, gold_accuracy
        from palate.pipelines.answers import gold_function

        lines = _read_lines(Path(self.responses))
        texts = [line["responses"] for line in lines]
        prefer = gold_function(self.gold)
        gold = [prefer([line["prompt"]] * len(line["responses"]), line["responses"]) for line in lines]
        team = [_settings(SimulatedAnnotator, given, "annotators") for given in self.annotators]
        prompts = [Prompt(line["prompt"]) for line in lines]
        rankings = annotate(prompts, texts, gold, team, seed=self.seed, per_prompt=self.per_prompt)
        write_records(folder / "rankings.jsonl", rankings)
        return {
            "rankings": len(rankings),
            "ceiling": bayes_accuracy(gold, texts, team),
            "gold accuracy": gold_accuracy(gold, texts, team),
        }


@dataclass(frozen=True)
class Examine:
    """A reward model's accuracy, calibration and taste for length on rankings that it was not trained on.

    Attributes:
        reward: the reward model's folder.
        rankings: file of rankings (or comparisons).
    """

    reward: str
    rankings: str

    def run(self, folder: Path, recipe: Recipe) -> Figures:
        from palate.pipelines.examine import examine

        report = examine(self.reward, self.rankings)
        _write_json(folder / "reward_model.json", report.as_dict())
        figures: Figures = {
            "accuracy": report.accuracy.estimate,
            "pairs": report.pairs,
            "nll": report.nll,
            "ece": report.ece,
        }
        if report.length is not None:
            figures |= {
                "longer wins": report.length.longer_wins.estimate,
                "length correlation": report.length.correlation,
            }
        return figures


@dataclass(frozen=True)
class Compare:
    """Two policies on the same prompts: comparison.json, and samples.jsonl with one answer of each a prompt.

    Attributes:
        before, after: the policies' folders.
        prompts: file of prompts, held out.
        gold: "module:function" of (prompts, responses): the preference that counts.
        reward: folder of the reward model that ``after`` was trained on.
        samples_per_prompt: of each policy.
        max_new_tokens: longest response, tokens.
        seed: of the sampling.
    """

    before: str
    after: str
    prompts: str
    gold: str
    reward: str
    samples_per_prompt: int = 2
    max_new_tokens: int = 64
    seed: int = 0

    def run(self, folder: Path, recipe: Recipe) -> Figures:
        from palate.pipelines.answers import gold_function, read_prompts
        from palate.pipelines.compare import compare

        figures, entries = compare(
            self.before,
            self.after,
            read_prompts(self.prompts),
            gold_function(self.gold),
            self.reward,
            samples_per_prompt=self.samples_per_prompt,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )
        _write_json(folder / "comparison.json", figures)
        _write_lines(folder / "samples.jsonl", entries)
        return {
            "win rate": figures["win_rate"][0],
            "kl": figures["kl"][0],
            "gold before": figures["before"]["gold"][0],
            "gold after": figures["after"]["gold"][0],
        }


@dataclass(frozen=True)
class Frontier:
    """Runs that started from one model, measured at the checkpoints they kept and at their end: frontier.json.

    Attributes:
        reference: the model they started from; what the KL is measured to.
        runs: name -> folder of a training run.
        prompts: file of prompts, held out.
        gold: "module:function" of (prompts, responses): the preference that counts.
        samples_per_prompt: at every point.
        max_new_tokens: longest response, tokens.
        seed: of the sampling.
    """

    reference: str
    runs: dict[str, str]
    prompts: str
    gold: str
    samples_per_prompt: int = 1
    max_new_tokens: int = 64
    seed: int = 0

    def run(self, folder: Path, recipe: Recipe) -> Figures:
        from palate.pipelines.answers import read_prompts
        from palate.pipelines.frontier import trace

        found = trace(
            self.reference,
            self.runs,
            read_prompts(self.prompts),
            self.gold,
            samples_per_prompt=self.samples_per_prompt,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )
        _write_json(folder / "frontier.json", found)
        figures: Figures = {"points": 1 + sum(len(points) for points in found["runs"].values())}
        for name, points in found["runs"].items():
            figures |= {f"{name} gold": points[-1]["gold"][0], f"{name} kl": points[-1]["kl"][0]}
        return figures


@dataclass(frozen=True)
class Report:
    """The page of the whole pipeline, report.html, and a table for the terminal.

    Attributes:
        title: of the page.
        sft, reward, rl: names of the stages that trained.
        answers: the stage whose rankings ``examine`` read, for the ceiling.
        examine, compare: names of the stages that measured.
        direct: name of a stage that trained on the same preferences without a reward model, and
        compare_direct: of the one that compared it with ``sft``; "" = there is none.
        frontier: name of the stage that traced both; "" = there is none.
        samples: how many prompts to show with both answers.
    """

    title: str
    sft: str = "sft"
    reward: str = "reward"
    rl: str = "ppo"
    answers: str = "held_out_rankings"
    examine: str = "examine"
    compare: str = "compare"
    direct: str = ""
    compare_direct: str = ""
    frontier: str = ""
    samples: int = 8

    def run(self, folder: Path, recipe: Recipe) -> Figures:
        from palate.pipelines.story import write_story

        return write_story(self, folder, recipe)


class Kind(NamedTuple):
    """What the runner asks of a kind of stage."""

    doing: str  # said while it runs
    settings: Any  # the dataclass; None = training, whose settings are palate.config's


STAGES: Mapping[str, Kind] = {
    "kitchen": Kind("making the small world", Kitchen),
    "train": Kind("training", None),
    "sample": Kind("sampling responses", Sample),
    "annotate": Kind("annotators rank the responses", Annotate),
    "examine": Kind("examining the reward model", Examine),
    "compare": Kind("comparing two policies", Compare),
    "frontier": Kind("tracing gold against distance", Frontier),
    "report": Kind("writing the report", Report),
}


def check_stage(step: Step) -> None:
    """Refuse what can be seen to be wrong before anything runs.

    Raises:
        ConfigError: an unknown kind of stage or setting, or a value of the wrong type; with its place.
    """
    if step.do not in STAGES:
        near = closest(step.do, STAGES)
        hint = f' Did you mean "{near}"?' if near else ""
        raise ConfigError(
            f'{step.place}: stage "{step.name}": unknown do: {step.do!r}.{hint} Known: {", ".join(STAGES)}.'
        )
    settings = STAGES[step.do].settings
    if settings is None:
        _train_config(step, Path(step.name))
    else:
        _settings(settings, step.settings.values, f'{step.place}: stage "{step.name}"')


def run_stage_of(step: Step, folder: Path, recipe: Recipe, quiet: bool) -> Figures:
    """Run one stage into a folder; its figures."""
    settings = STAGES[step.do].settings
    if settings is None:
        return _train(step, folder, quiet)
    stage: _Stage = _settings(settings, step.settings.values, f'{step.place}: stage "{step.name}"')
    return stage.run(folder, recipe)


def _train(step: Step, folder: Path, quiet: bool) -> Figures:
    from palate.report.metrics import read_metrics
    from palate.stage import run_stage

    run_stage(_train_config(step, folder), quiet=quiet)
    figures: Figures = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        figures["steps"] = max(figures.get("steps", 0), line.get("step", 0))
        for metric in ("loss", "reward/accuracy", "score", "kl/reference"):
            if metric in line and not (metric == "loss" and "score" in line):
                figures[f"{metric} ({'held out' if line.get('split') == 'validation' else 'train'})"] = line[metric]
    return figures


def _train_config(step: Step, folder: Path) -> Any:
    from palate.config import config_from, long_forms
    from palate.settings_tree import Layer, merge

    if "out" in step.settings.values:
        raise ConfigError(
            f'{step.settings.place_of("out")}: stage "{step.name}": a stage has no "out" of its own. Remove it.'
        )
    return config_from(merge([long_forms(step.settings), Layer({"out": str(folder)}, {"out": "the pipeline"})]))


def _settings(cls: Any, given: Mapping[str, Any], place: str) -> Any:
    """A dataclass from a mapping."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            near = closest(key, known)
            hint = f' Did you mean "{near}"?' if near else ""
            raise ConfigError(f'{place}: unknown setting "{key}".{hint} Known: {", ".join(known)}.')
    try:
        return TypeAdapter(cls).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = "must be given" if first["type"] == "missing" else f"found {first['input']!r}; {first['msg'].lower()}"
        raise ConfigError(f"{place}: {key}: {problem}.") from None


def _write_lines(where: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with open(where, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _read_lines(where: Path) -> list[dict[str, Any]]:
    if not where.exists():
        raise DataError(f"{where}: no such file. Expected what a stage with do: sample writes.")
    with open(where, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write_json(where: Path, value: Any) -> None:
    where.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
