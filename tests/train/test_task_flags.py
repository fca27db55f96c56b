"""Tasks from files and of the user's own on the command line: trained, held out, refused without a trace."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from r1zero.model.checkpoint import CheckpointError
from r1zero.train.cli.main import main
from r1zero.train.grpo import GRPOConfig
from r1zero.train.settings import check_settings, settings_of
from r1zero.train.task_flags import TaskFlags

from .loop_cases import save_base

TINY = [
    "--device",
    "cpu",
    "--steps",
    "2",
    "--prompts-per-step",
    "2",
    "--group-size",
    "2",
    "--max-new-tokens",
    "4",
]
MOODY = """
from dataclasses import dataclass
from r1zero.train.recipes.own_task import Largest

@dataclass(frozen=True)
class Moody(Largest):
    def problem(self, split, index):
        if index > 1:
            raise KeyError(index)
        return super().problem(split, index)

    @staticmethod
    def problem_from_record(record):
        return record["number"]

class Plain:
    pass

@dataclass(frozen=True)
class Empty(Largest):
    def size(self, split):
        return 0 if split == "train" else None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a base and files of problems."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    save_base(tmp_path / "base")
    rows = [{"prompt": f"{i}+1=", "answer": i + 1, "question": f"{i}+1?"} for i in range(20)]
    for name, part in (("my.jsonl", rows), ("train.jsonl", rows[:12]), ("test.jsonl", rows[12:])):
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in part))
    (tmp_path / "text.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "one"}\n')
    (tmp_path / "moody_task.py").write_text(MOODY)
    return tmp_path


def grpo(*flags: str) -> int:
    return main(["grpo", "--run", "rl", "--base", "base", *TINY, *flags])


def test_a_jsonl_file_is_trained_on_and_a_fifth_of_it_evaluated(folder, capsys):
    flags = ["--task", "jsonl", "--data", "my.jsonl", "--options", "grader=number"]
    assert grpo(*flags, "--eval-every", "2") == 0
    assert main(["eval", "--run", "rl", *flags, "--samples", "1", "--max-new-tokens", "4"]) == 0
    assert main(["grade", "--task", "jsonl", "--input", "rl/eval_jsonl_my_step2.jsonl"]) == 0
    rows = [json.loads(line) for line in (folder / "rl/eval_jsonl_my_step2.jsonl").read_text().splitlines()]
    assert 0 < len(rows) < 12 and rows[0]["problem"]["grader"] == "number"


def test_gsm8k_is_trained_on_with_a_test_file_whose_content_is_compared_on_resume(folder, capsys):
    flags = ["--task", "gsm8k", "--data", "train.jsonl", "--options", "test=test.jsonl", "template=plain"]
    assert grpo(*flags, "--eval-every", "2", "--control", "permute") == 0
    capsys.readouterr()
    (folder / "test.jsonl").write_text('{"question": "?", "answer": "1"}\n')
    assert (
        main(["grpo", "--run", "rl", "--base", "base", *TINY, "--control", "permute", *flags, "--resume"])
        == 2
    )
    assert "problems (changed: test.jsonl)" in capsys.readouterr().err


def test_a_test_file_that_moved_is_the_same_one_on_resume_and_other_options_are_others():
    flags = TaskFlags("gsm8k", ("template=plain", "test=a.jsonl"), data="train.jsonl")

    def check(*options, task=flags):
        config = GRPOConfig(run="r", base="b", task=replace(task, options=options))
        then, now = (settings_of(replace(config, task=each), set()) for each in (task, config.task))
        check_settings(then, now, config, Path("r"))

    check("template=plain", "test=moved/a.jsonl")
    check("template=plain")  # the files are compared, by their content
    with pytest.raises(CheckpointError, match="--options is"):
        check("template=r1_zero", "test=a.jsonl")
    with pytest.raises(CheckpointError, match="--options is"):  # the option of a task without a file
        check("test=2", task=TaskFlags("countdown", ("test=1",)))


def test_the_files_of_a_task():
    flags = TaskFlags("jsonl", ("test=b.jsonl", "seed=1"), data="a.jsonl")
    assert flags.files == ["a.jsonl", "b.jsonl"] and flags.source is None and flags.short_name == "jsonl"
    assert TaskFlags("jsonl", ("test=", "seed=1"), data="a.jsonl").files == ["a.jsonl"]
    assert TaskFlags().files == [] and TaskFlags("m:Mine").short_name == "Mine"


@pytest.mark.parametrize(
    "flags, why",
    [
        ("--task jsonl", "--task jsonl needs --data FILE"),
        ("--task jsonl --data test.jsonl --options grader=f1", "grader is 'f1'"),
        (
            "--task jsonl --data text.jsonl --options grader=number",
            "text.jsonl, line 2: \"answer\" is 'one', expected a",
        ),
        ("--task jsonl --data moody_task.py", "moody_task.py, line 2: not JSON"),
        ("--task gsm8k --data my.jsonl --eval-every 1", "holds none out of --data; add --options test=FILE"),
        ("--task gsm8k --data my.jsonl --options template=few", "template is 'few'"),
        ("--task gsm8k --data my.jsonl --options template=r1_zero", "and the base has room for"),
        ("--task moody_task:Nobody", "has no 'Nobody'"),
        ("--task moody_task:Plain", "is no dataclass"),
        ("--task moody_task:Empty", "has no train problems"),
        ("--task absent_module:Task", "there is no module absent_module"),
        ("--task moody_task:Moody --options tall=1", "has no option 'tall'; it has: n_numbers, high"),
        (
            "--task moody_task:Moody --data my.jsonl",
            "--data is for a task that reads its problems from a file",
        ),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_on_one_line_and_leaves_no_run_folder(
    flags, why, folder, capsys
):
    assert grpo(*flags.split()) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1 and not (folder / "rl").exists()


def test_what_a_task_raises_later_is_told_as_its_own_fault(folder, capsys):
    assert grpo("--task", "moody_task:Moody") == 2
    assert "moody_task:Moody raised KeyError: 2 (moody_task.py, line 9); mend it" in capsys.readouterr().err
    (folder / "in.jsonl").write_text('{"numbers": [1], "response": "x"}\n')
    assert main(["grade", "--task", "moody_task:Moody", "--input", "in.jsonl"]) == 2
    assert "raised KeyError: 'number' (moody_task.py, line 14)" in capsys.readouterr().err
