"""The smallest whole loop at toy size: every stage is run, asked and measured, once."""
import json
import re
from dataclasses import replace

import pytest

from r1zero.train.cli.main import main
from r1zero.train.log import read_metrics
from r1zero.train.machine import devices_here
from r1zero.train.recipes.minimal import PROBES, MinimalConfig, Results, stages_of, table
from r1zero.train.run import read_record

SMALL = ["--model", "tiny", "--documents", "60", "--pretrain-steps", "2", "--sft-steps", "2",
         "--rl-steps", "1", "--eval-problems", "4", "--device", "cpu", "--seed", "5"]


def recipe(folder, *flags: str) -> int:
    return main(["recipe", "minimal", "--run", str(folder), *SMALL, *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minimal") / "recipe"
    assert recipe(folder) == 0
    return folder


def test_every_stage_is_asked_and_measured_on_the_same_sums(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results["stages"]) == ["random", "base", "sft", "rl"]
    assert [stage["steps"] for stage in results["stages"].values()] == [0, 2, 2, 1]
    prompts = []
    for name, stage in results["stages"].items():
        assert tuple(stage["probes"]) == PROBES and stage["eval"]["n_problems"] == 4
        rows = (finished / f"eval_{name}.jsonl").read_text().splitlines()
        prompts.append([json.loads(row)["prompt"] for row in rows])
    assert prompts == [prompts[0]] * 4
    assert results["seconds"].keys() == {"base", "sft", "rl"} and results["config"]["seed"] == 5


def test_each_stage_is_a_run_that_goes_on_from_the_one_before(finished):
    bases = {name: read_record(finished / name / "run.json")["config"].get("base") for name in ("sft", "rl")}
    assert bases == {"sft": str(finished / "base"), "rl": str(finished / "sft")}
    assert [len(read_metrics(finished / name)) for name in ("base", "sft", "rl")] == [2, 2, 1]


def test_a_reward_that_the_sums_do_not_have_is_refused_before_anything_is_made(tmp_path, capsys):
    assert recipe(tmp_path / "x", "--rewards.coherence-weight", "0.5") == 2
    assert "--rewards.coherence-weight is 0.5" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_finished_recipe_is_neither_overwritten_nor_done_again_and_shows_its_table(finished, capsys):
    weights = finished / "sft" / "checkpoints" / "step_00000002" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert recipe(finished) == 2 and "--resume" in capsys.readouterr().err
    assert recipe(finished, "--resume") == 0
    out = capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before
    stages = ("random weights", "after pretraining", "after fine-tuning", "after GRPO")
    assert all(f"--- {stage} ---" in out and f"\n{stage} " in out for stage in stages)
    assert all(out.count(f"  {prompt}  ->") == 4 for prompt in PROBES)


OTHER = [(["--rewards.format-weight", "0.5"], "--rewards.format-weight"), (["--seed", "6"], "--seed"),
         (["--documents", "61"], "--documents"), (["--sft-steps", "0"], "--sft-steps is 0, but .* after 2"),
         (["--pretrain-steps", "3"], "--pretrain-steps is 3, but later stages")]


@pytest.mark.parametrize("flags, said", OTHER)
def test_a_finished_recipe_is_not_shown_under_other_flags(finished, capsys, flags, said):
    files = [finished / "pairs.jsonl", finished / "results.json"]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    kept = list(SMALL)
    if flags[0] in kept:
        at = kept.index(flags[0])
        kept[at:at + 2] = []
    assert main(["recipe", "minimal", "--run", str(finished), *kept, *flags, "--resume"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before


def test_on_another_number_of_sums_a_finished_recipe_is_measured_anew(tmp_path):
    config = MinimalConfig(eval_problems=8)
    results = Results(tmp_path, config)
    results.stages["rl"] = {"steps": 30, "eval": {"n_problems": 4}}
    assert not results.is_measured("rl", 30) and not results.is_measured("base", 30)
    results.stages["rl"]["eval"]["n_problems"] = 8
    assert results.is_measured("rl", 30) and not results.is_measured("rl", 31)


@pytest.mark.skipif("cuda" in devices_here(), reason="here --device cuda is right")
def test_a_device_that_is_not_there_leaves_no_folder(tmp_path, capsys):
    assert main(["recipe", "minimal", "--run", str(tmp_path / "x"), "--device", "cuda"]) == 2
    assert "--device cuda was given" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_without_fine_tuning_grpo_goes_on_from_the_base(tmp_path):
    names = {n: [name for name, *_ in stages_of(MinimalConfig(sft_steps=n), tmp_path)] for n in (0, 1)}
    assert names == {0: ["base", "rl"], 1: ["base", "sft", "rl"]}
    *_, (_, _, rl) = stages_of(MinimalConfig(sft_steps=0), tmp_path)
    assert rl.base == str(tmp_path / "base")


def test_the_table_has_a_row_per_stage_that_was_measured():
    result = {"accuracy": 0.5, "accuracy_95": [0.4, 0.6], "format_rate": 0.9, "mean_tokens": 12.0}
    stage = {"eval": result, "last_number": 0.55, "worked_out": 0.25, "capitals": 1.0}
    lines = table({"base": stage}).splitlines()
    assert len(lines) == 2 and "right [95 %]" in lines[0]
    assert lines[1].split()[-8:] == ["50%", "[40%,", "60%]", "55%", "90%", "25%", "12.0", "100%"]


@pytest.mark.parametrize("flags", [{"pretrain_steps": 0}, {"sft_steps": -1}, {"rl_steps": 0},
                                   {"documents": 0}, {"eval_problems": 0}, {"seed": -1}, {"model": "huge"}])
def test_flags_out_of_range_are_refused(flags):
    with pytest.raises(ValueError, match=next(iter(flags)).replace("_", "-")):
        MinimalConfig(**flags)


def test_the_control_is_a_stage_of_its_own_that_begins_where_grpo_began(tmp_path, capsys):
    config = MinimalConfig(control="random")
    (_, _, rl), (name, _, control) = stages_of(config, tmp_path)[-2:]
    assert name == "control" and control == replace(rl, run=str(tmp_path / "control"), control="random")
    assert recipe(tmp_path / "none", "--control", "typo") == 2 and not (tmp_path / "none").exists()
    assert "control is 'typo', expected none or permute or random" in capsys.readouterr().err
