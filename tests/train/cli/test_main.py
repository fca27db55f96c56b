"""The command line: what it prints, its exit codes, one line for each kind of error, every command once."""
import dataclasses
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from typing import get_type_hints

import pytest
import torch

from r1zero.eval.response import parse_response
from r1zero.eval.tasks.base import Grade, Task, required_fields
from r1zero.eval.tasks.catalogue import TASKS
from r1zero.model.checkpoint import CheckpointError
from r1zero.model.engine.sampling import NonFiniteError
from r1zero.train.cli import grade
from r1zero.train.cli import main as cli
from r1zero.train.cli.eval import EvalConfig
from r1zero.train.cli.main import COMMANDS, explain, main, parse_flags
from r1zero.train.grpo import GRPOConfig
from r1zero.train.interrupt import Stopped
from r1zero.train.pretrain import PretrainConfig
from r1zero.train.sft import SFTConfig
from r1zero.train.task_flags import TaskFlags

from ..loop_cases import pretrain_config, text_file
from ..run_cases import pretrain_on_text

RIGHT = ["--problem", "3 7 9 -> 13", "--response", "<think>9-3</think><answer>(9-3)+7</answer>",
         "--rewards.format-weight", "0.5"]


def fails(capsys, argv, code, *fragments):
    """`main(argv)` ends with `code` and one line on stderr that holds all fragments."""
    assert main(argv) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error[:-1].isprintable(), error
    for fragment in (f"r1zero {argv[0]}: ", *fragments):
        assert fragment in error, error


# ---- the script itself ----

@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_every_command(capsys, argv):
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in COMMANDS)


def test_a_command_of_two_words_is_found_and_half_of_it_is_mended(capsys):
    for words in (["recipe", "minimal", "--help"], ["help", "recipe", "minimal"]):
        assert main(words) == 0
        assert "usage: r1zero recipe minimal " in capsys.readouterr().out
    for words in (["recipe"], ["recipe", "demo"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"no command {' '.join(words)!r}" in error
        assert "\n  recipe minimal " in error and "r1zero grpo" not in error


@pytest.mark.parametrize("words", [["recipe", "--help"], ["recipe", "-h"], ["help", "recipe"]])
def test_help_on_half_a_command_lists_the_commands_that_begin_with_it(capsys, words):
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "usage: r1zero recipe <name>" in text and "\n  recipe minimal " in text and "grpo" not in text


def test_an_unknown_command_names_the_known_ones(capsys):
    assert main(["pretrian", "--run", "x"]) == 2
    error = capsys.readouterr().err
    assert "'pretrian' (did you mean pretrain?)" in error and error.count("\n") == 1
    assert all(command in error for command in COMMANDS)
    assert main(["\x1b[31mxyzzy"]) == 2
    error = capsys.readouterr().err
    assert "did you mean" not in error and "\x1b" not in error


def test_the_console_script_is_main():
    [script] = importlib.metadata.entry_points(group="console_scripts", name="r1zero")
    assert script.load() is main


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_where_the_table_says_and_has_help_for_every_flag(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: r1zero {command} " in text
    entry = COMMANDS[command]
    module = importlib.import_module(f"r1zero.train.{entry.module}")
    assert callable(getattr(module, entry.function))
    config = getattr(module, entry.config)
    assert config.__dataclass_params__.frozen
    hints = get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        # A field may name its flag itself, as `mistake` does --break.
        named = [each.name for each in getattr(hints[field.name], "__metadata__", ()) if each.name]
        flag = f"--{named[0] if named else field.name.replace('_', '-')}"
        assert f"{flag} " in text or f"{flag}," in text or f"{flag}." in text, flag


def test_grade_as_a_process_of_its_own_does_not_wait_for_torch():
    command = [sys.executable, "-X", "importtime", "-m", "r1zero.train.cli.main", "grade", *RIGHT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["reward"] == 1.5
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "r1zero.rl.rewards" in imported and "torch" not in imported


def test_a_reader_that_goes_away_is_no_error():
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, "-m", "r1zero.train.cli.main", "grade", *RIGHT], env=buffered,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


# ---- errors ----

@pytest.mark.parametrize("error, code, fragment", [
    (ValueError("two\nlines  and \x1b[31m"), 2, "two lines and \\x1b[31m"),
    (ValueError(), 2, "ValueError"),
    (CheckpointError("no usable checkpoint"), 2, "no usable checkpoint"),
    (OSError(28, "No space left on device", "/run/x"), 2, "/run/x: No space left on device"),
    (OSError("of another kind"), 2, "of another kind"),
    (FloatingPointError("loss is nan at step 3"), 1, "loss is nan at step 3"),
    (NonFiniteError("logits are NaN"), 1, "logits are NaN"),
    (KeyboardInterrupt(), 130, "broken off"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), 1, "out of memory; "),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory; "),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 1, "out of memory; "),
    (MemoryError(), 1, "out of memory; "),
])
def test_each_kind_of_error_is_one_line_and_a_code(error, code, fragment, capsys, monkeypatch):
    def raises(config):
        raise error
    monkeypatch.setattr(grade, "grade", raises)
    fails(capsys, ["grade", *RIGHT], code, fragment)
    with pytest.raises(type(error)):
        main(["grade", *RIGHT, "--traceback"])


@pytest.mark.parametrize("error", [TypeError("x"), RuntimeError("x"), AssertionError(), RecursionError()])
def test_a_fault_of_ours_shows_where_and_asks_for_a_report(error, capsys, monkeypatch):
    def raises(config):
        raise error
    monkeypatch.setattr(grade, "grade", raises)
    assert main(["grade", *RIGHT]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and "in raises" in text and "please report it" in text.splitlines()[-1]


def test_out_of_memory_names_the_flags_that_the_command_has():
    assert explain(MemoryError(), EvalConfig(run="x"))[1].startswith(
        "out of memory; lower --batch, --samples, --max-new-tokens (")
    config = PretrainConfig(run="x", data=("y",))
    assert "lower --micro-tokens, --seq-len, --model (" in explain(MemoryError(), config)[1]


def test_a_warning_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(grade, "grade", lambda config: warnings.warn("first\nsecond", stacklevel=1))
    former = warnings.showwarning
    assert main(["grade", *RIGHT]) == 0
    assert capsys.readouterr().err == "r1zero grade: warning: first second\n"
    assert warnings.showwarning is former


# ---- flags ----

@pytest.mark.parametrize("argv, fragment", [
    (["pretrain", "--run", "x", "--data", "y", "--steps", "0"], "--steps is 0, expected 1 or more"),
    (["pretrain", "--run", "x", "--data", "y", "--optim.schedule", "zigzag"], "--optim.schedule is 'zigzag'"),
    (["pretrain", "--run", "x", "--data", "y", "--task.low", "21"], "need 1 <= low <= high"),
    (["grpo", "--run", "x", "--base", "y", "--group-size", "1"], "--group-size is 1"),
    (["grpo", "--run", "x", "--base", "y", "--loss.mean", "median"], "loss: mean is 'median'"),
    (["grade", *RIGHT[:-1], "-1"], "weights are accuracy 1.0, format -1.0"),
    (["demo", "--rl-steps", "0"], "--rl-steps is 0"),
    (["pretrain", "--run", "x", "--data"], "--data needs a value behind it"),
])
def test_a_value_out_of_range_is_one_clean_line(argv, fragment, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fails(capsys, argv, 2, fragment)
    assert list(tmp_path.iterdir()) == []


def test_a_tuple_takes_several_values_and_task_flags_are_flat():
    config = parse_flags("pretrain", PretrainConfig, "--run r --data a.txt b --steps 3".split())
    assert config.data == ("a.txt", "b") and config.steps == 3
    task = "--task arithmetic --options digits=1 ops=-+".split()
    for command, config_class in (("grpo", GRPOConfig), ("eval", EvalConfig)):
        base = ["--base", "b"] if command == "grpo" else []
        flags = parse_flags(command, config_class, ["--run", "r", *base, *task]).task
        assert flags == TaskFlags("arithmetic", ("digits=1", "ops=-+")) and flags.make().digits == 1
    words = "--run r --task gsm8k --data f.jsonl --skip-bad --ks 1 4".split()
    config = parse_flags("eval", EvalConfig, words)
    assert config.task == TaskFlags("gsm8k", data="f.jsonl", skip_bad=True) and config.ks == (1, 4)


@pytest.mark.parametrize("flags, config_class", [
    ("sft --run r --base b --data d", SFTConfig), ("pretrain --run r --data d", PretrainConfig),
    ("grpo --run r --base b", GRPOConfig), ("eval --run r", EvalConfig),
    ("grade --input f", grade.GradeConfig)])
def test_every_command_that_reads_lines_can_skip_bad_ones(flags, config_class):
    command, *words = flags.split()
    for given in (False, True):
        config = parse_flags(command, config_class, [*words, *["--skip-bad"] * given])
        holder = config.task if command in ("grpo", "eval") else config
        assert holder.skip_bad is given
    with pytest.raises(ValueError, match="countdown is made here"):
        PretrainConfig(run="r", data=("countdown",), skip_bad=True)


@pytest.mark.parametrize("flags, fragment", [
    (TaskFlags("chess"), "'chess'; choose one of: arithmetic, assistant, countdown, game24, gsm8k"),
    (TaskFlags(options=("high",)), "'high', expected name=value"),
    (TaskFlags(options=("high=x",)), "--options high is 'x', expected a number"),
    (TaskFlags(options=("test_share=x",)), "--options test_share is 'x', expected a number"),
    (TaskFlags(options=("width=3",)), "no option 'width'"),
    (TaskFlags(options=("high=0",)), "high 0"),
    (TaskFlags("gsm8k"), "--task gsm8k needs --data FILE"),
    (TaskFlags("gsm8k", data="/nowhere"), "/nowhere"),
    (TaskFlags("countdown", data="f"), "--data is for a task that reads"),
    (TaskFlags("countdown", skip_bad=True), "--skip-bad is for a task that reads"),
    (TaskFlags("gsm8k", ("skip_bad=yes",), data="f"), "--options skip_bad is 'yes', expected true or false"),
])
def test_a_wrong_task_is_named(flags, fragment):
    with pytest.raises(ValueError) as caught:
        flags.make()
    assert fragment in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Repeat(Task):
    """A task of the tests: say the word."""

    name = "repeat"
    example = '{"word": "hi", "response": "..."}'
    words: int = 1

    @staticmethod
    def problem_from_text(text):
        return text

    @staticmethod
    def problem_from_record(record):
        return required_fields(record, "word")[0]

    @staticmethod
    def grade(problem, response):
        answer = parse_response(response).answer
        return Grade(float(answer == problem), answer, f"The word is {problem}.")


def test_a_task_that_stands_in_the_catalogue_needs_nothing_else_to_be_graded(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "repeat", Repeat)
    assert TaskFlags("repeat", ("words=3",)).make() == Repeat(3)
    said = ["--response", "<answer>hi</answer>"]
    for word, accuracy in (("hi", 1.0), ("ho", 0.0)):
        assert main(["grade", "--task", "repeat", "--problem", word, *said]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] == accuracy
    (tmp_path / "f.jsonl").write_text('{"word": "hi", "response": "<answer>hi</answer>"}\n{"response": ""}\n')
    fails(capsys, ["grade", "--task", "repeat", "--input", str(tmp_path / "f.jsonl")], 2,
          'line 2: "word" is missing; expected lines like {"word": "hi", "response": "..."}')


# ---- every loop once, at toy size ----

def test_from_text_to_an_answer(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 40)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Who sat?", "response": "The cat."}\n')
    small = ["--device", "cpu", "--steps", "2"]
    assert main(["pretrain", "--run", "base", "--data", "text.txt", "--tokenizer", "bytes", "--model", "tiny",
                 "--seq-len", "16", "--batch-tokens", "64", *small]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["sft", "--run", "tuned", "--base", "base", "--data", "pairs.jsonl", *small]) == 0
    assert main(["grpo", "--run", "rl", "--base", "base", "--options", "n_numbers=2",
                 "--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "4", *small]) == 0
    assert main(["eval", "--run", "rl", "--n", "3", "--samples", "2", "--max-new-tokens", "4"]) == 0
    assert "countdown: 3 problems x 2 samples" in capsys.readouterr().out
    assert main(["chat", "--run", "tuned", "--problem", "Who sat?", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("Who sat?\n")
    fails(capsys, ["pretrain", "--run", "base", "--data", "text.txt", *small], 2, "base already holds a run")
    assert cli.main(["grade", "--input", "rl/eval_countdown_step2.jsonl", "--out", "graded.jsonl"]) == 0
    assert len((tmp_path / "graded.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
def test_the_demo_at_toy_size(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"--documents": 60, "--pretrain-steps": 2, "--rl-steps": 1, "--control-steps": 1,
             "--eval-problems": 4, "--eval-samples": 2, "--max-new-tokens": 8}
    flags = [str(word) for pair in sizes.items() for word in pair]
    assert main(["demo", "--run", "d", "--model", "tiny", "--device", "cpu", *flags]) == 0
    assert "report: d/report.html" in capsys.readouterr().out and (tmp_path / "d/report.html").exists()
    fails(capsys, ["chat", "--run", "d"], 2, "d holds several runs; give one of them: ", "d/seed0/rl")
    assert main(["chat", "--run", "d/seed0/rl", "--problem", "1 2 3 -> 6"]) == 0
    assert "\ngrade   wrong. " in capsys.readouterr().out


def test_a_warning_never_ends_the_work_whatever_the_environment_asks(tmp_path, monkeypatch, capsys):
    """PYTHONWARNINGS=error, as images of continuous integration have it."""
    c = pretrain_config(tmp_path / "run", text_file(tmp_path), steps=4, save_every=2)
    pretrain_on_text(c)
    weights = tmp_path / "run/checkpoints/step_00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["chat", "--run", str(tmp_path / "run"), "--problem", "a", "--max-new-tokens", "2"]) == 0
    assert "warning: using " in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--traceback"]])
def test_work_that_a_signal_ended_tells_which_one(monkeypatch, capsys, more):
    def ended(config):
        raise Stopped(15, "stopped and saved in runs/x; go on with --resume and the same flags")

    monkeypatch.setattr(grade, "grade", ended)
    assert main(["grade", *RIGHT, *more]) == 143
    assert capsys.readouterr().err == \
        "r1zero grade: stopped and saved in runs/x; go on with --resume and the same flags\n"
