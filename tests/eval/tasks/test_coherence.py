"""The share of true equations that a response to Countdown writes: by hand, and as a reward hacker would."""
import pytest

from r1zero.eval.tasks.base import Task
from r1zero.eval.tasks.coherence import coherence
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem

PROBLEM = CountdownProblem((3, 7, 9), 13)


def share(thoughts: str) -> float:
    return Countdown.coherence(PROBLEM, f"<think>{thoughts}</think><answer>(9-3)+7</answer>")


@pytest.mark.parametrize("thoughts, expected", [
    ("9-7=2,3+2=5,5-13=-8 no;9-3=6,6+7=13,13-13=0 ok", 1),  # as the demo writes
    ("9-7=2,3+2=6,6-13=-7 no", 2 / 3),  # what follows a false step is judged by itself
    ("First (9 - 3) + 7 = 13, so 9 × 7 = 63. And 9 ÷ 3 = 3!", 1),
    ("9/7=1", 0), ("9-7=2.5", 0), ("9-7=", 0), ("9-7=x", 0), ("3-9=-6,-6+7=1", 1), ("3-9=−6", 1),
    ("9-7=2+3=5", 0),  # a chain of equals signs that are not equal
    ("", 0), ("I think it is 13.", 0), ("x=5, 13=13, =, -3=-3", 0),  # no equation at all
])
def test_by_hand(thoughts, expected):
    assert share(thoughts) == pytest.approx(expected)


@pytest.mark.parametrize("honest, hacked", [
    ("9-7=2,3+2=6", "9-7=2,3+2=6" + ",9-7=2" * 50),  # a true equation again
    ("9-7=2,3+2=6", "9-7=2,3+2=6" + ",9 - 7 = 2" * 50),  # spelled in another way
    ("9-7=2,3+2=6", "9-7=2,3+2=6,1+1=2,1+2=3,2+2=4,100+1=101"),  # about other numbers
    ("9-7=2,3+2=6", "9-7=2,3+2==6"), ("9-7=2,3+2=6", "9-7=2,3++2=6"),  # the false one made unreadable
    ("9-7=2", ""), ("9-7=2", "13=13"),  # nothing at stake
])
def test_no_hack_pays_more(honest, hacked):
    assert share(hacked) <= share(honest)


def test_what_stands_in_the_answer_block_or_behind_it_does_not_count():
    assert Countdown.coherence(PROBLEM, "<answer>9-3+7=13</answer>\n9-7=2") == 0
    assert share("9-7=3") == 0


@pytest.mark.parametrize("text", [
    "=" * 50_000, "9-7=2," * 20_000, "(" * 100_000 + "=", "9" * 100_000 + "-1=2", "1-" * 50_000 + "=1",
    "\ud800-1=2", "9-7=" + "2-" * 50_000])
def test_any_text_is_read_and_none_takes_long(text):
    assert 0 <= coherence((3, 7, 9), 13, text) <= 1


def test_a_task_without_steps_has_no_coherence():
    assert Task.coherence is None
