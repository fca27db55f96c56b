"""The arms of distillation at toy size: each is run and measured once; its costs, differences and signs."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r1zero.model.checkpoint import checkpoint_steps, save_checkpoint
from r1zero.model.config import preset
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.train.cli.main import main
from r1zero.train.log import read_metrics
from r1zero.train.recipes.demo_corpus import words
from r1zero.train.recipes.distill import (
    DistillConfig,
    check_flags,
    distill,
    is_right,
    one_per_problem,
    stages_of,
)
from r1zero.train.recipes.distill_results import ARMS, curve, difference, share_of_traces, verdict
from r1zero.train.run import read_record
from r1zero.train.task_flags import TaskFlags

from ..loop_cases import save_base
from ..run_cases import fails

TASK = TaskFlags(name="countdown", options=("n_numbers=2", "high=9"))


def config(folder, run="run", **changes) -> DistillConfig:
    # Random weights end an answer by chance, so 60 tokens leave some that were not cut off.
    small = dict(model="tiny", documents=60, pretrain_steps=2, traces=(2, 4), problems=16, own_samples=2,
                 sft_steps=2, batch_tokens=256, rl_steps=1, prompts_per_step=2, group_size=2,
                 max_new_tokens=60, eval_problems=3, eval_samples=2, device="cpu", task=TASK,
                 teacher=str(folder / "teacher"), teacher_base=str(folder / "base"))
    return DistillConfig(run=str(folder / run), **{**small, **changes})


def any_answer(line: str) -> bool:
    """Random weights are never right."""
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher and its base, of random weights, and a recipe in run/."""
    folder = tmp_path_factory.mktemp("distill")
    tokenizer = Tokenizer.from_words(words(TASK.make()))
    for seed, name in enumerate(("teacher", "base")):
        model = Transformer(preset("tiny", tokenizer.vocab_size, n_layers=3)).init_weights(seed)
        state = {"model_config": model.config.to_dict(), "tokenizer": tokenizer.to_dict(), "settings": {}}
        save_checkpoint(folder / name, 0, {"model": dict(model.named_parameters())}, state)
    distill(config(folder), any_answer)
    return folder


def test_every_arm_begins_where_it_says_and_is_measured_on_the_same_problems(folder):
    run = folder / "run"
    results = json.loads((run / "results.json").read_text())
    curve = {"right_2", "any_2", "any_4"}
    assert results["stages"].keys() == {*ARMS, *curve} and results["arms"].keys() == set(ARMS)
    begun = {name: read_record(run / name / "run.json")["config"] for name in {*ARMS, *curve} - {"teacher"}}
    bases = {name: c.get("base") for name, c in begun.items()}
    student = str(run / "student")
    assert bases == {"student": None, "sft_rl": str(run / "sft"), "large": str(folder / "base"),
                     **dict.fromkeys(("rl", "sft", "own", "on_policy", *curve), student)}
    data = {name: Path(begun[name]["data"][0]).name for name in ("sft", "own", "large", *curve)}
    assert data == {"sft": "right_4.jsonl", "large": "right_4.jsonl", "own": "own_right.jsonl",
                    **{name: f"{name}.jsonl" for name in curve}}
    assert begun["on_policy"]["teacher"] == str(folder / "teacher")
    assert [begun[name]["advantage"]["baseline"] for name in ("on_policy", "rl")] == ["teacher", "group"]
    asked = [[json.loads(row)["prompt"] for row in (run / f"eval_{name}.jsonl").read_text().splitlines()]
             for name in results["stages"]]
    assert asked == [asked[0]] * len(asked) and len(asked[0]) == 6
    assert (run / "distill.png").read_bytes().startswith(b"\x89PNG")


def test_the_cost_of_an_arm_is_that_of_all_that_it_took(folder):
    run = folder / "run"
    results = json.loads((run / "results.json").read_text())
    trained = {name: sum(row["tokens"] for row in read_metrics(run / name))
               for name in ("rl", "sft", "sft_rl")}
    sampled = json.loads((run / "traces.jsonl.summary.json").read_text())["tokens"]
    arms = results["arms"]
    assert arms["rl"]["sampled"] == arms["rl"]["trained"] == trained["rl"] > 0
    assert (arms["sft"]["sampled"], arms["sft"]["trained"]) == (sampled, trained["sft"])
    assert arms["sft_rl"]["sampled"] == sampled + trained["sft_rl"]
    assert arms["sft_rl"]["trained"] == trained["sft"] + trained["sft_rl"]
    seconds = [results["seconds"][name] for name in ("traces", "sft", "sft_rl")]
    assert arms["sft_rl"]["seconds"] == pytest.approx(sum(seconds))


def test_a_recipe_goes_on_where_it_stopped_and_not_with_other_flags(folder):
    path = folder / "run/sft_rl/checkpoints"
    before = path.stat().st_mtime_ns
    with fails(ValueError, "holds a recipe already; add --resume"):
        distill(config(folder), any_answer)
    with fails(ValueError, "begun with another --own-samples, --rl-steps; give what"):
        distill(config(folder, resume=True, rl_steps=3, own_samples=1), any_answer)
    results = folder / "run/results.json"
    values = json.loads(results.read_text())
    lost = values["stages"].pop("any_2")
    results.write_text(json.dumps(values))
    answers = {name: folder / f"run/eval_{name}.jsonl" for name in ("rl", "sft")}
    [gone, torn] = [each.read_text() for each in answers.values()]
    answers["rl"].unlink()
    distill(config(folder, resume=True), any_answer)
    again = json.loads(results.read_text())
    assert again["stages"] == values["stages"] | {"any_2": lost} and answers["rl"].read_text() == gone
    assert path.stat().st_mtime_ns == before
    # What was sampled twice counts twice.
    rows = [json.loads(row) for row in gone.splitlines()]
    counted = {name: again["sampled"][f"eval_{name}"] for name in ("rl", "teacher")}
    assert (counted["rl"]["tokens"], counted["rl"]["answers"]) == (2 * sum(r["n_tokens"] for r in rows), 12)
    assert counted["teacher"]["answers"] == 6 and again["seconds"]["eval_teacher"] > 0
    answers["sft"].write_text(torn[:-9])
    with fails(ValueError, "eval_sft.jsonl is torn: 5 of its 6 lines are JSON objects; remove it"):
        distill(config(folder, resume=True), any_answer)
    answers["sft"].write_text(torn)


def test_flags_may_change_until_something_was_made_with_them(folder):
    late = folder / "late"
    shutil.copytree(folder / "run/student", late / "student")
    results = json.loads((folder / "run/results.json").read_text())

    def changed(run: str, **changes) -> dict:
        return check_flags(config(folder, run, resume=True, **changes), folder / run)

    def write(stages: dict) -> None:
        (late / "results.json").write_text(json.dumps({"config": results["config"], "stages": stages}))

    # The student is pretrained, and nothing else.
    write({})
    other = dict(teacher=str(folder / "base"), teacher_base=None, problems=8, max_new_tokens=70, rl_steps=7,
                 on_policy=False, eval_problems=5, traces=(3,))
    assert changed("late", **other).items() >= {"problems": 8, "on_policy": False, "traces": [3]}.items()
    smaller = replace(TASK, options=("n_numbers=2", "high=8"))
    for flag, value in (("documents", 61), ("pretrain_steps", 3), ("student", str(folder / "base")),
                        ("task", smaller), ("seed", 1)):
        with fails(ValueError, f"late was begun with another --{flag.replace('_', '-')}; give what"):
            changed("late", **{flag: value, "rl_steps": 7})
    write({"student": {}})
    with fails(ValueError, "begun with another --eval-problems; give what"):
        changed("late", **other)
    # Everything is made, and more points of the curve may still be asked for.
    assert changed("run", traces=(2, 3, 4))["traces"] == [2, 3, 4]
    fixed = dict(teacher_base=None, on_policy=False, problems=15, sft_lr=1.0, traces=(4,))
    for flag, value in fixed.items():
        with fails(ValueError, f"run was begun with another --{flag.replace('_', '-')}; give what"):
            changed("run", **{flag: value})


def test_a_student_that_is_never_right_has_no_arm_of_its_own_and_a_teacher_that_is_not_is_told(folder):
    other = dict(student=str(folder / "run/student"), on_policy=False)
    with fails(ValueError, "none of the .* answers in .*traces.jsonl is right"):
        distill(config(folder, "wrong", **other))

    def teacher_alone(line: str) -> bool:
        return json.loads(line)["model"].startswith(str(folder / "teacher"))

    path = distill(config(folder, "weak", **other), teacher_alone)
    stages = json.loads(path.read_text())["stages"]
    assert "own" not in stages and "on_policy" not in stages and "student" in stages


def test_models_that_are_not_there_or_do_not_fit_are_refused_before_there_is_a_folder(
        folder, tmp_path, capsys):
    def refused(told: str, **changes):
        with fails(ValueError, told):
            distill(config(folder, "never", **changes))
        assert not (folder / "never").exists()

    for flag in ("teacher", "teacher_base", "student"):
        told = f"--{flag.replace('_', '-')} .*nowhere does not exist; give the folder of a model, or"
        with fails(ValueError, told):
            distill(replace(config(folder, "never"), **{flag: str(tmp_path / "nowhere")}))
    refused("another tokenizer than the student .*; add --no-on-policy",
            student=str(save_base(tmp_path / "bytes")))
    refused("--teacher .*bytes has another tokenizer than the student that is pretrained here",
            teacher=str(tmp_path / "bytes"))
    (tmp_path / "empty").mkdir()
    for flag in ("teacher", "teacher_base", "student"):
        refused(f"--{flag.replace('_', '-')}: .*empty", **{flag: str(tmp_path / "empty")})
    refused("--problems 5000 asks for 5,000 problems, but countdown .* different train problems; lower it",
            problems=5000)
    refused("--max-new-tokens is 253, but --teacher .*teacher has room for 252", max_new_tokens=253)
    refused("--traces is \\(2, 2\\), expected different numbers", traces=(2, 2))
    refused("--task arithmetic without --student", task=TaskFlags(name="arithmetic"))
    assert main(["distill", "--run", str(tmp_path / "x"), "--teacher", str(tmp_path / "gone")]) == 2
    assert "--teacher" in capsys.readouterr().err and not (tmp_path / "x").exists()


def line(index: int, sample: int, accuracy=1.0, form=1.0) -> str:
    return json.dumps({"index": index, "sample": sample, "parts": {"accuracy": accuracy, "format": form}})


def test_right_lines_are_right_and_well_formed_and_a_problem_counts_once():
    assert [is_right(line(0, 0, *parts)) for parts in ((1, 1), (1, 0), (0, 1))] == [True, False, False]
    lines = [line(*key) for key in ((0, 1), (0, 2), (3, 0), (5, 2), (5, 3))]
    assert one_per_problem(lines) == [lines[0], lines[2], lines[3]]


def test_the_curve_is_of_the_answers_that_there_were():
    share = [0.5, 0.4, 0.6]
    counts = {"right_4": 4, "any_4": 4, "right_64": 19, "any_64": 64}
    values = {"config": {"traces": [64, 4]}, "traces": counts,
              "stages": {name: {"accuracy": share} for name in ("sft", "right_4", "any_4", "any_64")}}
    assert curve(values) == [(4, (4, share), (4, share)), (64, (19, share), (64, share))]
    assert share_of_traces(64, 19, share) == "50.0 % [40, 60] of 19"
    assert share_of_traces(64, 64, share) == "50.0 % [40, 60]"


def test_a_difference_is_paired_by_problem_and_its_sign_is_said_either_way(tmp_path):
    # Two models that differ by a quarter on each problem, though the problems differ by far more.
    rng = np.random.default_rng(0)
    for name, plus in (("hard", 0), ("easy", 1)):
        rows = [{"index": i, "accuracy": float(k < 2 * (i % 2) + plus)} for i in range(40) for k in range(4)]
        rng.shuffle(rows)
        (tmp_path / f"eval_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert difference(tmp_path, "easy", "hard") == pytest.approx([0.25, 0.25, 0.25])

    def said(*points):
        return verdict({"better": "SFT", "than": "RL", "points": points})

    assert said(0.1, 0.05, 0.15) == "SFT beats RL: +10.0 points [+5.0, +15.0]"
    assert said(-0.1, -0.15, -0.05) == "RL beats SFT: +10.0 points [+5.0, +15.0]"
    between = said(-0.1, -0.25, 0.05)
    assert between == "SFT and RL do not differ beyond the interval: -10.0 points [-25.0, +5.0]"


def test_no_stage_is_of_another_seed_or_device(folder):
    stages = stages_of(config(folder, seed=3), folder)
    assert len({stage.name for stage in stages}) == len(stages) == 12
    assert {(stage.config.seed, stage.config.device) for stage in stages} == {(3, "cpu")}
    assert checkpoint_steps(folder / "run/rl") == [1]
