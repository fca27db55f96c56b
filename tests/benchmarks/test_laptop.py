"""The examples of the task for a small real model are solved; what runs on behind an answer is not read."""
from benchmarks.laptop import EXAMPLES, FewShot
from r1zero.eval.tasks.countdown import Countdown, parse_prompt
from r1zero.train.task_flags import TaskFlags


def test_each_example_is_solved_by_its_answer():
    lines = EXAMPLES.splitlines()
    for question, answer in zip(lines[::2], lines[1::2], strict=True):
        assert Countdown.grade(parse_prompt(question), answer).accuracy == 1


def test_a_problem_stands_behind_the_examples_and_an_answer_that_runs_on_is_judged_by_itself():
    task = TaskFlags(name="benchmarks.laptop:FewShot", options=("n_numbers=2", "ops=+-", "high=20")).make()
    [problem] = task.problems("test", 1)
    first, second = problem.numbers
    prompt = task.prompt(problem)
    assert prompt.startswith(EXAMPLES) and Countdown.prompt(problem) == prompt.removeprefix(EXAMPLES)
    assert parse_prompt(prompt.splitlines()[-1]) == problem
    right = f"<answer>{first}{'+' if first + second == problem.target else '-'}{second}</answer>"
    swapped = f"<answer>{second}-{first}</answer>"
    answers = [answer for answer in (right, swapped) if FewShot.grade(problem, answer).accuracy]
    assert answers and FewShot.grade(problem, f"{answers[0]}\n7 1 -> 8\n<answer>7+1</answer>").accuracy == 1
