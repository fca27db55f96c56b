"""The command chat: what it prints for a response, and how it takes lines from flags, pipes and terminals."""
import io
import json
import sys
from dataclasses import asdict

import pytest
import torch

from r1zero.eval.harness import Sampled
from r1zero.eval.tasks.countdown import CountdownProblem
from r1zero.model.checkpoint import save_checkpoint
from r1zero.model.config import preset
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.train.cli.chat import Responder, answer_person, knows_countdown_only
from r1zero.train.cli.main import main
from r1zero.train.cli.responses import shown
from r1zero.train.grpo import GRPOConfig
from r1zero.train.interrupt import Stopped
from r1zero.train.pretrain import PretrainConfig
from r1zero.train.task_flags import TaskFlags

PROBLEM = CountdownProblem((3, 7, 9), 13)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of Countdown and one of text, with the same random weights."""
    folder, tokenizer = tmp_path_factory.mktemp("runs"), Tokenizer.bytes()
    model = Transformer(preset("tiny", tokenizer.vocab_size), torch.float32).init_weights(0)
    for name, data in (("countdown", "countdown"), ("text", "a.txt")):
        state = {"model_config": model.config.to_dict(), "tokenizer": tokenizer.to_dict(),
                 "settings": {"data": [data]}}
        save_checkpoint(folder / name, 1, {"model": dict(model.named_parameters())}, state)
    return folder


def talk(capsys, monkeypatch, run, typed: str | None, *flags: str, person=False) -> str:
    """What `r1zero chat` prints when this is typed (or piped in)."""
    if typed is not None:
        stdin = io.StringIO(typed)
        stdin.isatty = lambda: person
        monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["chat", "--run", str(run), "--max-new-tokens", "5", *flags]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    return out


def test_think_answer_and_the_graders_word_stand_apart():
    right = Sampled("<think>9-3=6\n6+7</think><answer>(9-3)+7</answer>", 12, "stop")
    assert shown(PROBLEM, right).splitlines() == [
        "think   9-3=6", "6+7", "answer  (9-3)+7",
        "grade   right. The answer uses every number once and equals 13."]
    assert shown(None, right).splitlines() == ["think   9-3=6", "6+7", "answer  (9-3)+7"]
    cut = Sampled("<answer>9</answer>\x1b[31m", 5, "length")
    assert shown(PROBLEM, cut).splitlines() == [
        "answer  9", "grade   wrong. The answer does not use 3.",
        "format  It was cut off at the token limit. There is no <think> tag.",
        "note    cut off after 5 tokens"]
    assert shown(None, Sampled("some \x1b[2J text\x00", 9, "stop")) == "some \\x1b[2J text\\x00"
    assert shown(PROBLEM, Sampled("eh", 1, "stop")).splitlines()[0] == "text    eh"


def test_which_models_are_given_countdown_only():
    """Read off the settings as a run stores them, so that no field can be renamed unnoticed."""
    def settings(config):
        return json.loads(json.dumps(asdict(config)))
    grpo = GRPOConfig(run="r", base="b")
    assert knows_countdown_only(settings(grpo))
    assert not knows_countdown_only(settings(GRPOConfig(run="r", base="b", task=TaskFlags("arithmetic"))))
    assert knows_countdown_only(settings(PretrainConfig(run="r", data=("countdown",))))
    assert not knows_countdown_only(settings(PretrainConfig(run="r", data=("countdown", "text.txt"))))
    assert not knows_countdown_only({})


def test_lines_from_a_pipe(runs, capsys, monkeypatch):
    typed = "3,7 9 → 13\n\n  \nhello\n3 7 9 -> 13\n quit \n1 1 -> 2\n"
    blocks = talk(capsys, monkeypatch, runs / "countdown", typed).split("\n\n")[:-1]
    assert [block.splitlines()[0] for block in blocks] == ["3,7 9 → 13", "hello", "3 7 9 -> 13"]
    assert all("\ngrade   wrong. " in blocks[i] for i in (0, 2))
    assert blocks[1].splitlines()[1].startswith("expected numbers, an arrow and a target, like 3 7 9 -> 13")
    assert blocks[0].splitlines()[1:] != blocks[2].splitlines()[1:]  # asked again, it answers anew
    assert talk(capsys, monkeypatch, runs / "countdown", "").strip() == ""
    assert "hello\n" in talk(capsys, monkeypatch, runs / "text", "hello")  # no line break at the end


def test_a_model_of_text_goes_on_with_any_line(runs, capsys, monkeypatch):
    out = talk(capsys, monkeypatch, runs / "text", "hello\n3 7 9 -> 13\n" + "long " * 60 + "\nbye\n")
    hello, problem, long, bye = out.split("\n\n")[:-1]
    assert hello.startswith("hello\n") and "grade" not in hello
    assert "\ngrade   wrong. " in problem
    assert "pass the model's max_seq_len 256" in long and bye.startswith("bye\n")


def test_a_person_is_asked_and_no_escape_codes_are_written(runs, capsys, monkeypatch):
    out = talk(capsys, monkeypatch, runs / "countdown", "3 7 9 -> 13\nhello\n", person=True)
    first, *rest = out.split("> ")
    assert "step_00000001: type problems, like 3 7 9 -" in first
    assert out.count("\n> ") == 3 and out.endswith("> \n") and "\x1b" not in out and len(rest) > 3
    assert "type text" in talk(capsys, monkeypatch, runs / "text", "quit\n", person=True)


def test_problems_as_flags(runs, capsys, monkeypatch):
    flags = ["--problem", "1 2 -> 3", "--problem", "3 7 9 -> 13"]
    out = talk(capsys, monkeypatch, runs / "countdown", None, *flags)
    assert [block.splitlines()[0] for block in out.split("\n\n")[:-1]] == ["1 2 -> 3", "3 7 9 -> 13"]
    assert talk(capsys, monkeypatch, runs / "countdown", None, *flags) == out
    assert talk(capsys, monkeypatch, runs / "countdown", None, *flags, "--seed", "1") != out
    cold = ["--temperature", "0", "--problem", "x"]
    once = talk(capsys, monkeypatch, runs / "text", None, *cold)
    assert talk(capsys, monkeypatch, runs / "text", None, *cold, "--problem", "x") == once + once


@pytest.mark.parametrize("flags, fragment", [
    (["--problem", "1 2 -> 3", "--problem", "one"], "got 'one'"),
    (["--temperature", "-1"], "--temperature is -1"), (["--temperature", "nan"], "--temperature is nan"),
    (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
    (["--max-new-tokens", "256"], "expected 1 to 255"), (["--which", "7"], "no checkpoint 7"),
    (["--run", "/nowhere"], "/nowhere does not exist"), (["--device", "tpu"], "'tpu'")])
def test_chat_refuses(flags, fragment, runs, capsys):
    run = [] if "--run" in flags else ["--run", str(runs / "countdown")]
    assert main(["chat", *run, *flags]) == 2
    out, error = capsys.readouterr()
    assert fragment in error and error.count("\n") == 1 and out == ""


def test_what_is_graded_is_shown_where_it_is_not_what_was_streamed(capsys):
    """Special tokens are not streamed, but the grader sees them."""
    class Sampler:
        def stream(self, prompt):
            yield "<answer>(9-3)+7", None
            yield "</answer>", Sampled("<answer>(9-3)<|bos|>+7</answer>", 9, "stop")

    Responder(Sampler(), countdown_only=True).stream("3 7 9 -> 13")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["<answer>(9-3)+7</answer>", "sampled <answer>(9-3)<|bos|>+7</answer>"]
    assert lines[2].startswith("grade   wrong.")


def test_ctrl_c_ends_an_answer_and_a_signal_to_stop_ends_the_chat(monkeypatch, capsys):
    ends = iter([KeyboardInterrupt(), Stopped(15, "ended by SIGTERM")])

    class Broken:
        greeting = "type"

        def stream(self, line):
            raise next(ends)

    stdin = io.StringIO("1 2 -> 3\n1 2 -> 3\nnever read\n")
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(Stopped):
        answer_person(Broken(), "a run")
    assert stdin.read() == "never read\n"
