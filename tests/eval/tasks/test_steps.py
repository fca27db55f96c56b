"""The steps of a Countdown response: where they end, and whether each is right so far."""
from collections import Counter
from itertools import permutations

import pytest

from r1zero.eval.tasks.countdown import Countdown, CountdownProblem
from r1zero.eval.tasks.steps import can_reach, cut_steps, step_ends

TASK = Countdown()
PROBLEM = CountdownProblem((3, 7, 9), 13)
RETRY = ("<think>9-7=2,3+2=5,5-13=-8 no;9+7=16,16-3=13,13-13=0 ok</think><answer>(9+7)-3</answer>")


def checked(response: str, problem=PROBLEM, task=TASK) -> list[tuple[str, bool, bool]]:
    steps = cut_steps(response, step_ends(response))
    return [(text, *task.check_step(problem, steps[: i + 1])) for i, text in enumerate(steps)]


def test_steps_are_the_pieces_between_marks_and_the_answer_is_the_last():
    assert checked(RETRY) == [
        ("<think>9-7=2", True, False),
        (",3+2=5", True, False),
        (",5-13=-8 no", True, False),
        (";9+7=16", True, True),
        (",16-3=13", True, True),
        (",13-13=0 ok", True, True),
        ("</think><answer>(9+7)-3</answer>", True, True),
    ]


@pytest.mark.parametrize("response, facts", [
    ("<think>9-7=3", "FF"),                            # a false equation
    ("<think>9-7=3,3+3=6", "FF TF"),                   # goes on with what it wrote, and reaches nothing
    ("<think>9-7=10,10+3=13,13-13=0 ok", "FF TF TF"),  # although that is the target
    ("<think>9-7=3,3+3=6;9+7=16", "FF TF TT"),         # a new attempt begins with all numbers
    ("<think>9-7=3,3+10=13,13-13=0 ok", "FF FF FF"),   # a number that is not at hand
    ("<think>9+9=18", "FF"),                           # 9 is there once
    ("<think>9+7=16,16-3=13,13-13=0 no", "TT TT FF"),  # a false verdict
    ("<think>9+7=16,16-3=13,13-13=0", "TT TT FF"),     # none
    ("<think>9+7=16,16-3=13,13-3=10 no", "TT TT FF"),  # compared with something else
    ("<think>9+7=16,16+3=19,19-13=6 no", "TT TF TF"),  # an honest no is true, and reaches nothing
    ("<think>9+7=16 ok,16-3=13", "FF FF"),             # a verdict too early
    ("<think>9+7=16</think><answer>9+7-3</answer>", "TT TT"),
    ("<think>9+7=16</think><answer>9+7</answer>", "TT FF"),
    ("<think>9+7=16</think><answer>9+7-3", "TT FF"),
    ("well,", "FF FF"),
    ("<think>,9+7=16", "FF TF"),                        # an empty step
    ("</think><answer>9+7-3</answer>", "TT"),
])
def test_a_step_is_true_by_its_equation_and_reaches_by_what_it_leaves(response, facts):
    found = [f"{'FT'[true]}{'FT'[reaches]}" for _, true, reaches in checked(response)]
    assert " ".join(found) == facts


def test_a_step_has_an_end_only_when_something_follows_or_the_response_is_whole():
    assert step_ends("<think>9+7=16,16-3=13") == [13, 21]
    assert step_ends("<think>9+7=16,16-3=13", is_whole=False) == [13]
    assert step_ends("<think>9+7=16</think>", is_whole=False) == [13]
    assert step_ends("") == step_ends("", False) == step_ends(",", False) == []
    ends = step_ends(RETRY + ";9,9;</think>")
    assert "".join(cut_steps(RETRY + ";9,9;</think>", ends)) == RETRY + ";9,9;</think>"
    assert len(ends) == 7  # marks behind the thoughts are none


def naive_reach(numbers, target, ops) -> bool:
    """All orders of combining two numbers, without a table."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        results = {"+": a + b, "*": a * b}
        if a >= b:
            results["-"] = a - b
        if b and a % b == 0:
            results["/"] = a // b
        if any(naive_reach([*rest, results[op]], target, ops) for op in ops if op in results):
            return True
    return False


@pytest.mark.parametrize("ops", ["+-", "+-*/"])
def test_what_can_be_reached_is_what_enumeration_says(ops):
    counts = Counter()
    for numbers in [(2, 16), (1, 5, 8), (3, 3, 7), (2, 4, 6, 9)]:
        for target in range(1, 30):
            expected = naive_reach(list(numbers), target, ops)
            assert can_reach(numbers, target, ops) == expected
            counts[expected] += 1
    assert min(counts.values()) > 10


def test_what_may_be_done_is_the_tasks_option():
    response = "<think>7-3=4"
    problem = CountdownProblem((3, 7, 9), 36)  # (7-3)*9
    assert checked(response, problem) == [(response, True, False)]
    assert checked(response, problem, Countdown(ops="*")) == [(response, True, True)]
