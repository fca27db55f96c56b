"""Problems from files: Game of 24 and GSM8K, and what is said of a file that cannot be used."""
import json

import pytest

from r1zero.eval.tasks.catalogue import make_task
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem, solve
from r1zero.eval.tasks.game24 import load_game24
from r1zero.eval.tasks.gsm8k import GSM8K


def test_game24_file(tmp_path):
    path = tmp_path / "24.csv"
    path.write_text("Rank,Puzzles,Time\n1,1 1 4 6,4.4\n2,3 3 8 8,9\n")
    problems = load_game24(path)
    assert problems == [CountdownProblem((1, 1, 4, 6), 24), CountdownProblem((3, 3, 8, 8), 24)]
    for problem in problems:
        text = next(solve(problem, whole=False))
        assert Countdown().grade(problem, f"<answer>{text}</answer>").accuracy == 1.0
    for bad, why in (
        (b"Rank,Puzzles\n1,1 1 4 6\n2,1 x 4 6\n", "line 3"),
        (b"Rank,Puzzles\n1\n", "line 2: .* got ' -> 24'"),
        (b"a,b\n", "no column Puzzles"),
        (b"", "no column"),
        (b"Puzzles\n", "holds no puzzles"),
        (b"\xff\xfe\x00", "not UTF-8 text but UTF-16"),
        (b'Puzzles\n"1 1 4 6\n', "line 2: not CSV"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=why):
            load_game24(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_game24(tmp_path)


def test_gsm8k_file(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    good = {"question": "How many ducks?\u2019", "answer": "2*9 = <<2*9=18>>18\n#### 1,018"}
    other = {"question": "?\u2028", "answer": "7"}  # U+2028 ends a line for str.splitlines
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(other, ensure_ascii=False), encoding="utf-8")
    task = make_task("gsm8k", path=str(path))
    assert [problem.gold for problem in task.problems("test", task.size("test"))] == ["1,018", "7"]
    prompt = task.prompt(task.problem("test", 0))
    assert good["question"] in prompt and "####" in prompt and prompt.endswith("Answer:")
    assert task.grade(task.problem("test", 0), good["answer"]).accuracy == 1.0
    assert {problem.gold for problem in task.problems("train", 2)} == {"1,018", "7"} and not task.held_out
    with pytest.raises(ValueError, match="problem 2 asked for, but there are 2"):
        task.problem("test", 2)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty; expected JSON lines"),
        (b"\n \n", "is empty"),
        (b'{"question": "a", "answer": "#### 1"}\nnot json\n', "line 2: not JSON"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"question": 1' + b"0" * 5000 + b"}", "line 1: not JSON"),
        (b'["question", "answer"]', "line 1: a JSON list, not an object"),
        (b'{"question": "a"}', 'line 1: "answer" is missing'),
        (b'{"question": 3, "answer": "1"}', 'line 1: there is no text "question"'),
        (b'{"question": "a", "answer": "#### many"}', "line 1: expected a number after ####"),
        (b"\x00\xff\xfe", "line 1: its byte 1 is 0"),
    ],
)
def test_gsm8k_files_that_cannot_be_used(tmp_path, content, why):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=why):
        GSM8K(str(path))
    for missing in (tmp_path, tmp_path / "absent.jsonl", "nul\0byte"):
        with pytest.raises(ValueError, match="cannot be read"):
            GSM8K(str(missing))
