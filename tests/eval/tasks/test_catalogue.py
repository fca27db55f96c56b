"""The catalogue: each task stands there once, and its class alone reads a problem and grades a response."""
import json

import pytest

from r1zero.eval.response import Sample, grade_response, parse_response
from r1zero.eval.tasks.catalogue import TASKS, find_task, make_task, option_types
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem

RIGHT = {"arithmetic": "42", "assistant": "(9-3)+7", "countdown": "(9-3)+7", "game24": "4*6*1*1",
         "gsm8k": "42", "jsonl": "42", "math": "0.5"}


@pytest.mark.parametrize("name", TASKS)
def test_a_class_reads_its_own_example_and_grades_it(name):
    task = find_task(name)
    assert task.name == name
    problem = task.problem_from_record(json.loads(task.example))
    right = grade_response(task, Sample(problem, f"<think></think><answer>{RIGHT[name]}</answer>"))
    assert (right.accuracy, right.format, right.answer) == (1.0, 1.0, RIGHT[name])
    wrong = grade_response(task, Sample(problem, "<answer>7</answer>"))
    assert (wrong.accuracy, wrong.format) == (0.0, 0.0)
    assert wrong.why == task.grade(problem, "<answer>7</answer>").why
    assert wrong.why_format == parse_response("<answer>7</answer>").why


@pytest.mark.parametrize("name", TASKS)
def test_options_have_types_that_a_flag_can_give_and_only_files_are_required(name):
    task, types = TASKS[name], option_types(TASKS[name])
    assert set(types.values()) <= {int, float, str, bool}
    assert ("path" in types) == ("skip_bad" in types) == (task.file_format is not None)
    if "path" not in types:
        assert make_task(name) == task()


def test_what_a_prompt_says_can_be_typed_again():
    problem = CountdownProblem((3, 7, 9), 13)
    assert Countdown.problem_from_text(Countdown.prompt(problem)) == problem


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("record", [{}, {"numbers": None, "target": 1}, {"expression": 3}, {"answer": [1]}])
def test_a_record_that_is_no_problem_is_refused(name, record):
    with pytest.raises(ValueError, match="is missing|expected text|is not a number"):
        TASKS[name].problem_from_record(record)
