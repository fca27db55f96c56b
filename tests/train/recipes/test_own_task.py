"""The task to copy: its problems and its text are right, and it goes from text to a trained model."""

import json
import re
import shutil
import sys

import pytest

from r1zero.eval.response import Sample, grade_response
from r1zero.eval.tasks.own import check_task, load_task
from r1zero.train.cli.main import main
from r1zero.train.log import read_metrics
from r1zero.train.recipes import own_task
from r1zero.train.recipes.own_task import Largest, Numbers, document, short_thoughts, write_corpus

NAME = "r1zero.train.recipes.own_task"
TINY = ["--device", "cpu", "--steps", "2"]
STEP = ["--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "8"]


def test_it_keeps_the_outline_and_its_splits_are_apart():
    task = Largest(high=20)
    assert load_task(f"{NAME}:Largest") is Largest
    check_task(task, "largest")
    splits = [{tuple(sorted(p.numbers)) for p in task.problems(split, 200)} for split in ("train", "test")]
    assert not splits[0] & splits[1] and all(len(split) > 50 for split in splits)
    with pytest.raises(ValueError, match="n_numbers is 1"):
        Largest(n_numbers=1)


def test_its_text_has_the_form_and_is_right_as_often_as_chance():
    task = Largest()
    graded = []
    for index in range(300):
        problem, text = task.problem("train", index), document(task, index)
        assert text.startswith(task.prompt(problem))
        graded.append(grade_response(task, Sample(problem, text.removeprefix(task.prompt(problem)))))
    assert all(one.format for one in graded) and 70 < sum(one.accuracy for one in graded) < 130


@pytest.mark.parametrize(
    "response, accuracy",
    [
        ("<think>8</think><answer> 8 </answer>", 1),
        ("<answer>8</answer>largest of 1 9 2: <answer>9</answer>", 1),
        ("<answer>5</answer>", 0),
        ("8", 0),
        ("<answer>08</answer>", 0),
        ("<answer>\ud800</answer>", 0),
    ],
)
def test_its_grader(response, accuracy):
    assert Largest.grade(Largest.problem_from_text("3 8 5"), response).accuracy == accuracy


def test_its_reward_is_one_number_per_sample():
    samples = [
        Sample(Numbers((3, 8)), text)
        for text in ("<answer>8</answer>", f"<think>{'x' * 20}</think>", f"<think>{'x' * 99}</think>")
    ]
    assert short_thoughts(samples) == [1.0, 0.5, 0.0]


def test_from_its_text_to_an_evaluation_as_a_copy_in_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # As its docstring says of a copy.
    source = re.sub(r"^from \.\.\.", "from r1zero.", open(own_task.__file__).read(), flags=re.MULTILINE)
    (tmp_path / "copied_task.py").write_text(source)
    write_corpus("corpus.jsonl", 60)
    assert (
        main(
            [
                "pretrain",
                "--run",
                "base",
                "--data",
                "corpus.jsonl",
                "--tokenizer",
                "bytes",
                "--model",
                "tiny",
                "--seq-len",
                "64",
                "--batch-tokens",
                "128",
                *TINY,
            ]
        )
        == 0
    )
    own = ["--task", "copied_task:Largest", "--options", "high=20"]
    rl = [
        "grpo",
        "--run",
        "rl",
        "--base",
        "base",
        *own,
        *STEP,
        "--eval-every",
        "2",
        "--eval-problems",
        "2",
        "--rewards.plugin",
        "copied_task:short_thoughts",
        "--rewards.plugin-weight",
        "0.1",
        "--device",
        "cpu",
    ]
    assert main([*rl, "--steps", "2"]) == 0 and main([*rl, "--steps", "3", "--resume"]) == 0
    metrics = read_metrics(tmp_path / "rl")
    assert len(metrics) == 3 and "eval_accuracy" in metrics[1]
    assert (
        json.loads((tmp_path / "rl/run.json").read_text())["config"]["task"]["name"] == "copied_task:Largest"
    )
    assert main(["eval", "--run", "rl", *own, "--n", "2", "--samples", "2", "--max-new-tokens", "8"]) == 0
    rows = (tmp_path / "rl/eval_Largest_step3.jsonl").read_text().splitlines()
    assert len(rows) == 4 and json.loads(rows[0])["prompt"].startswith("largest of ")
    assert main(["grade", "--task", "copied_task:Largest", "--input", "rl/eval_Largest_step3.jsonl"]) == 0
    # Other code is another task: the run says so, and goes on when it is told to.
    (tmp_path / "copied_task.py").write_text(source + "# changed\n")
    capsys.readouterr()
    assert main([*rl, "--steps", "4", "--resume"]) == 2
    assert "task (changed: " in capsys.readouterr().err
    assert main([*rl, "--steps", "4", "--resume", "--accept-changes"]) == 0
    shutil.rmtree(tmp_path / "rl")
