"""Pipelines as data: reading, references, overrides, resuming. The training in them has tests of its own."""

import json

import pytest

from palate.errors import ConfigError, DataError, RunError
from palate.pipelines import stages
from palate.pipelines.recipe import built_in, find_recipe, read_recipe
from palate.pipelines.runner import run_pipeline
from palate.pipelines.stages import check_stage

SMALL = """
name: small
description: two cheap stages
variables: {seed: 3, team: [{name: ann, temperature: 0.5}]}
stages:
  world: {do: kitchen, prompts: 20, held_out: 4, seed: "${seed}"}
  rankings:
    do: annotate
    responses: ${world}/responses.jsonl
    gold: palate.pipelines.kitchen:gold_reward
    annotators: ${team}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def responses(folder, prompts=6):
    """What a sampling stage would have written."""
    from random import Random

    from palate.pipelines.kitchen import draw_prompts, mixed_response

    rng = Random(0)
    lines = [{"prompt": p, "responses": [mixed_response(p, rng) for _ in range(3)]} for p in draw_prompts(prompts, 0)]
    (folder / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def with_responses(monkeypatch):
    """The kitchen stage, also writing responses, so that annotators have something to rank without a model."""
    plain = stages.Kitchen.run

    def run(self, folder, recipe):
        figures = plain(self, folder, recipe)
        responses(folder)
        return figures

    monkeypatch.setattr(stages.Kitchen, "run", run)


def test_the_quickstart_is_built_in_and_every_stage_of_it_is_in_order():
    assert "quickstart" in built_in()
    recipe = read_recipe("quickstart", overrides=["seed=1", "ppo.method.kl_coef=0.125"], out="somewhere")
    assert [s.do for s in recipe.steps].count("train") == 4
    for step in recipe.steps:
        check_stage(step)
    ppo = next(s for s in recipe.steps if s.name == "ppo").settings.values
    assert ppo["method"]["kl_coef"] == 0.125
    assert ppo["seed"] == 1
    assert ppo["model"] == "somewhere/sft/model"


def test_no_stage_of_the_quickstart_trains_on_held_out_prompts():
    for step in read_recipe("quickstart").steps:
        if step.do == "train":
            assert "held_out" not in json.dumps(step.settings.values)


def test_references_keep_the_type_of_a_variable_and_name_folders(small, tmp_path):
    recipe = read_recipe(small, out=tmp_path / "run")
    world, rankings = recipe.steps
    assert world.settings.values["seed"] == 3
    assert rankings.settings.values["annotators"] == [{"name": "ann", "temperature": 0.5}]
    assert rankings.settings.values["responses"] == str(tmp_path / "run" / "world" / "responses.jsonl")
    assert read_recipe(small, overrides=["seed=9", "world.prompts=7"]).steps[0].settings.values["seed"] == 9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("do: kitchen", "do: kitchn", 'small.yaml:6: stage "world": unknown do: \'kitchn\'. Did you mean "kitchen"?'),
        ("prompts: 20", "promts: 20", 'unknown setting "promts". Did you mean "prompts"?'),
        ("prompts: 20", "prompts: many", "prompts: found 'many'"),
        ("${world}/", "${wrld}/", '${wrld} is no variable and no earlier stage. Did you mean "world"?'),
        ("${world}/", "${rankings}/", "no earlier stage"),
        ("    gold: palate.pipelines.kitchen:gold_reward\n", "", "gold: must be given"),
        ("do: annotate", "per_prompt: 1", "does not say what to do"),
        ("description:", "descriptoin:", 'small.yaml:3: unknown key "descriptoin"'),
        ("seed: 3", "world: 3", '"world" is both a variable and a stage'),
    ],
)
def test_mistakes_in_the_file_are_named_before_anything_runs(small, tmp_path, old, new, message):
    text = small.read_text()
    assert old in text
    small.write_text(text.replace(old, new).replace('"${seed}"', "0" if "seed" in old else '"${seed}"'))
    with pytest.raises(ConfigError) as error:
        run_pipeline(small, out=tmp_path / "run", quiet=True)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_mistakes_in_a_training_stage_are_named_before_anything_runs(small, tmp_path):
    small.write_text(SMALL + "  sft: {do: train, method: sft, model: m, data: d, training: {learning_rat: 1}}\n")
    with pytest.raises(ConfigError, match="learning_rate"):
        run_pipeline(small, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_overrides_of_what_is_not_there_are_refused(small):
    with pytest.raises(ConfigError, match='"wrld" is neither a variable nor a stage. Did you mean "world"'):
        read_recipe(small, overrides=["wrld.prompts=3"])
    with pytest.raises(ConfigError, match="no pipeline 'quickstrt'. Did you mean \"quickstart\""):
        find_recipe("quickstrt")
    with pytest.raises(ConfigError, match="no such settings file"):
        read_recipe("none.yaml")


def test_stages_run_in_order_and_a_finished_one_is_kept(small, tmp_path, monkeypatch, capsys):
    with_responses(monkeypatch)
    first = run_pipeline(small, out=tmp_path / "run")
    assert first["stages"]["rankings"]["rankings"] == 6
    assert 0.5 < first["stages"]["rankings"]["ceiling"] <= 1
    assert (tmp_path / "run" / "world" / "tokenizer" / "tokenizer.json").exists()
    assert "2/2 rankings" in capsys.readouterr().out
    monkeypatch.setattr(stages.Kitchen, "run", None)  # would fail if it were called
    again = run_pipeline(small, out=tmp_path / "run")
    assert again == first
    assert capsys.readouterr().out.count("already done") == 2


def test_a_stage_that_was_cut_short_is_done_again_from_its_beginning(small, tmp_path, monkeypatch):
    with_responses(monkeypatch)
    plain = stages.Annotate.run

    def killed(self, folder, recipe):
        (folder / "rankings.jsonl").write_text("half a l")
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.Annotate, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(small, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "rankings").exists()
    monkeypatch.setattr(stages.Annotate, "run", plain)
    run_pipeline(small, out=tmp_path / "run", quiet=True)
    assert len((tmp_path / "run" / "rankings" / "rankings.jsonl").read_text().splitlines()) == 6
    assert not (tmp_path / "run" / "rankings.part").exists()


def test_a_folder_with_other_settings_is_refused(small, tmp_path, monkeypatch):
    with_responses(monkeypatch)
    run_pipeline(small, out=tmp_path / "run", quiet=True)
    with pytest.raises(RunError, match=r"prompts: 20 there, 21 here"):
        run_pipeline(small, out=tmp_path / "run", overrides=["world.prompts=21"], quiet=True)


def test_errors_of_a_stage_reach_the_user(small, tmp_path):
    """The kitchen writes no responses by itself."""
    with pytest.raises(DataError, match=r"responses.jsonl: no such file"):
        run_pipeline(small, out=tmp_path / "run", quiet=True)
