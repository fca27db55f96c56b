"""The recipes on open models: their flags, their facts, and one of them at toy size from end to end."""
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from r1zero.eval.tasks.catalogue import find_task, option_types
from r1zero.model.config import preset
from r1zero.model.huggingface import write_model
from r1zero.model.lora import LoRAConfig
from r1zero.model.memory import predict
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.train.cli.flags import parse_flags
from r1zero.train.cli.main import COMMANDS, main
from r1zero.train.compute_flags import ComputeFlags
from r1zero.train.recipes import open_model_table
from r1zero.train.recipes.open_model_table import RECIPES, markdown_table
from r1zero.train.recipes.open_models import (
    check_data,
    measured_with,
    predicted,
    setup_of_recipe,
    stages_of,
    table,
)
from r1zero.train.run import read_record

from ..loop_cases import save_base

NAMES = [recipe.facts.name for recipe in RECIPES]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A toy that stands for the open model: it knows the toy form of Countdown."""
    return save_base(tmp_path_factory.mktemp("open"))


def flags(folder, base):
    return ["recipe", "countdown-qwen2.5-1.5b", "--base", str(base), "--run", str(folder), "--steps", "1",
            "--options", "template=plain", "n_numbers=3", "high=9", "--prompts-per-step", "2",
            "--group-size", "2", "--max-new-tokens", "12", "--eval-problems", "3", "--eval-samples", "1",
            "--device", "cpu"]


@each_recipe
def test_every_recipe_is_a_command_and_its_options_are_the_tasks(recipe):
    command = COMMANDS[f"recipe {recipe.facts.name}"]
    assert getattr(open_model_table, command.config) is recipe
    config = recipe(base="x")
    known = option_types(find_task(recipe.task))
    assert all(option.partition("=")[0] in known for option in config.task_options)
    assert any(option.startswith("template=") for option in config.task_options)
    assert ("path" in known) == (config.data is not None) == bool(recipe.facts.fetch)
    assert [stage.control for stage in stages_of(config)] == ["none", "random"]
    assert config.run == f"runs/{recipe.facts.name}"


@each_recipe
def test_the_shape_that_memory_is_predicted_for_is_the_models(recipe):
    """As the hub counts them."""
    expected = {"Qwen2.5-1.5B": 1_543_714_304, "Qwen2.5-3B": 3_085_938_688, "Qwen2.5-0.5B": 494_032_768,
                "SmolLM2-360M": 361_821_120, "Qwen3-0.6B": 596_049_920, "OLMo-2-0425-1B": 1_484_916_736}
    name = recipe.facts.model.rpartition("/")[2].removesuffix("-Base").removesuffix("-Instruct")
    assert recipe.facts.parameters == expected[name]


def test_a_recipe_says_what_it_takes_with_the_flags_that_are_given(capsys):
    """One case by hand: masters, gradients, moments in fp32, reference and engine's copy in bf16."""
    recipe = open_model_table.GSM8KQwen05B
    setup = setup_of_recipe(recipe())
    assert (setup.rows, setup.longest, setup.on_gpu, setup.dtype) == (128, 768 + 384, True, torch.bfloat16)
    found, n = predict(setup), recipe.facts.parameters
    matrices = found.weights + found.gradients + found.moments + found.reference + found.engine_copy
    assert matrices == pytest.approx((4 + 4 + 8 + 2 + 2) * n, rel=1e-3)
    words = ["--lora.rank", "8", "--recompute", "--optim.moments", "bf16", "--micro-tokens", "2048"]
    assert main(["recipe", recipe.facts.name, "--explain", *words]) == 0
    smaller = parse_flags("recipe", recipe, words)
    assert f"predicted: {predicted(smaller)}\n" in capsys.readouterr().out
    assert smaller.lr == 10 * recipe().lr and predict(setup_of_recipe(smaller)).peak < 0.2 * found.peak
    offloaded = setup_of_recipe(recipe(ref_offload=True, kl_coef=0.0))
    assert offloaded.reference == "cpu"  # the log compares with it all the same
    assert main(["recipe", recipe.facts.name, "--lora.rank", "8", "--ref-offload"]) == 2
    assert "--ref-offload with --lora.rank" in capsys.readouterr().err


@each_recipe
def test_the_two_stages_differ_in_the_rewards_alone(recipe):
    rl, control = stages_of(recipe(base="x"))
    differ = {f.name for f in fields(rl) if getattr(rl, f.name) != getattr(control, f.name)}
    assert differ == {"run", "control"}


@each_recipe
def test_both_stages_save_memory_as_the_flags_say(recipe):
    changed = {"lora": LoRAConfig(4), "recompute": True}
    for stage in stages_of(recipe(base="x", moments="bf16", **changed)):
        assert (stage.lora, stage.recompute, stage.optim.moments) == (LoRAConfig(4), True, "bf16")
    assert all(stage.ref_offload for stage in stages_of(recipe(base="x", ref_offload=True)))


@each_recipe
def test_both_stages_compute_as_the_flags_say(recipe):
    changed = {"dtype": "fp16", "fp32_head": True, "onednn": True}
    assert changed.keys() == {f.name for f in fields(ComputeFlags)}
    for stage in stages_of(recipe(base="x", **changed)):
        assert {name: getattr(stage, name) for name in changed} == changed


def test_an_option_takes_the_place_of_the_recipes_own_of_that_name_alone():
    recipe = open_model_table.GSM8KQwen05B
    options = recipe(base="x", options=("skip_held_out=true",)).task_flags().options
    assert options == ("template=eight_shot", "skip_held_out=true", "test=gsm8k_test.jsonl")
    options = recipe(base="x", options=("template=chat",)).task_flags().options
    assert options == ("template=chat", "test=gsm8k_test.jsonl")


def test_a_base_is_measured_anew_if_the_task_the_files_or_the_precision_changed(tmp_path):
    """Else the table would compare a base on one task with a trained model on another."""
    base, data = tmp_path / "base", tmp_path / "d.jsonl"
    base.mkdir()
    data.write_text("1")
    (base / "config.json").write_text("{}")
    recipe = open_model_table.GSM8KQwen05B
    common = dict(base=str(base), data=str(data), test=str(data))
    first = measured_with(recipe(**common), "base")
    assert measured_with(recipe(**common, steps=7), "base") == first  # it is the same for any number of steps
    assert measured_with(recipe(**common, steps=7), "rl") != measured_with(recipe(**common), "rl")
    for change in ({"options": ("template=chat",)}, {"dtype": "fp16"}, {"onednn": True}, {"chat": True},
                   {"eval_temperature": 0.5}, {"eval_max_new_tokens": 9}, {"seed": 3}, {"eval_samples": 2}):
        assert measured_with(recipe(**common, **change), "base") != first, change
    data.write_text("22")
    second = measured_with(recipe(**common), "base")
    (base / "config.json").write_text("{ }")
    assert first != second != measured_with(recipe(**common), "base")


@each_recipe
def test_explaining_a_recipe_needs_no_files_and_makes_none(recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", recipe.facts.name, "--explain"]) == 0
    said = capsys.readouterr().out
    for text in (recipe.facts.model, recipe.facts.expected, "predicted", *recipe.facts.all_commands):
        assert text in said
    assert main(["recipe", recipe.facts.name]) == 2
    assert "--base must be given" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_model_than_the_recipes_is_told_to_be_one(tmp_path, capsys):
    """It may be trained, but what others have published is not for it."""
    base = tmp_path / "open"
    write_model(base, Transformer(preset("tiny", 258)).init_weights(0), Tokenizer.bytes())
    check_data(RECIPES[0](base=str(base)))
    assert "it is another model" in capsys.readouterr().err


def test_a_missing_model_or_file_is_told_with_the_commands_that_fetch_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", "gsm8k-qwen2.5-0.5b", "--base", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "nowhere, gsm8k_train.jsonl, gsm8k_test.jsonl not found here" in error
    assert "hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B" in error and "curl -L" in error
    assert not list(tmp_path.iterdir())


def test_a_recipe_measures_the_base_and_both_trained_models(tmp_path, base, capsys):
    folder = tmp_path / "recipe"
    assert main(flags(folder, base)) == 0
    said = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert list(results["measured"]) == ["base", "rl", "control"]
    assert all(found["n_problems"] == 3 for found in results["measured"].values())
    assert table(results["measured"]) in said and RECIPES[0].facts.expected in said
    controls = [read_record(folder / name / "run.json")["config"]["control"] for name in ("rl", "control")]
    assert controls == ["none", "random"]
    prompts = [[json.loads(row)["prompt"] for row in (folder / f"eval_{name}.jsonl").read_text().splitlines()]
               for name in results["measured"]]
    assert prompts == [prompts[0]] * 3

    # A finished recipe is neither overwritten nor measured again.
    before = (folder / "results.json").read_text()
    assert main(flags(folder, base)) == 2 and "--resume" in capsys.readouterr().err
    assert main([*flags(folder, base), "--resume"]) == 0
    after = json.loads((folder / "results.json").read_text())
    assert after["measured"] == json.loads(before)["measured"]
    # Another task, or other settings, are no resume.
    assert main([*flags(folder, base), "--resume", "--eval-temperature", "0.5", "--lr", "2e-6"]) == 2
    assert json.loads((folder / "results.json").read_text()) == after
    assert main([*flags(folder, base), "--resume", "--lr", "1e-3"]) == 2
    assert "lr" in capsys.readouterr().err


BAD_FLAGS = [
    (["--lr", "-1"], "lr -1.0"), (["--micro-tokens", "0"], "--micro-tokens is 0"),
    (["--control", "typo"], "--control is 'typo'"), (["--seed", "-1"], "seed is -1"),
]


@pytest.mark.parametrize("bad,said", BAD_FLAGS)
def test_a_bad_flag_is_told_before_anything_is_made(bad, said, tmp_path, base, capsys):
    assert main([*flags(tmp_path / "x", base), *bad]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_prompts_that_leave_no_room_are_told_before_the_base_is_measured(tmp_path, base, capsys):
    """R1-Zero's template alone is longer than the toy's context."""
    argv = flags(tmp_path / "x", base)
    argv[argv.index("template=plain")] = "template=r1_zero"
    assert main(argv) == 2
    assert "a prompt of --task countdown has up to" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_readme_has_the_table_of_the_recipes():
    readme = Path(__file__).parents[3] / "README.md"
    assert markdown_table() in readme.read_text(encoding="utf-8")
