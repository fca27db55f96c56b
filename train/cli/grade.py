"""Why did this answer get that reward? Grades responses by the rules that training uses, without a model.

    r1zero grade --task countdown --problem "3 7 9 -> 13" --response "... <answer>(9-3)+7</answer>"
    r1zero grade --task gsm8k --answer 42 --response "... #### 42"
    r1zero grade --task countdown --input responses.jsonl > graded.jsonl

A line of the file is a JSON object with `response` and the problem: `numbers` and `target` for countdown,
`answer` for gsm8k, `expression` for arithmetic. What `r1zero eval` writes is taken too: there the problem is
an object `problem`. For each response comes one JSON object with accuracy, format, reward, answer (what was
read as one) and why. The file is read whole before anything is written, so that a bad line costs nothing.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ...eval.response import quoted
from ...eval.tasks.arithmetic import ArithmeticProblem
from ...eval.tasks.base import Task
from ...eval.tasks.countdown import CountdownProblem, parse_prompt
from ...eval.tasks.expression import ExpressionError, parse_expression
from ...eval.tasks.gsm8k import GSM8KProblem, gold_number
from ...rl.rewards import RewardConfig, reward_one
from ..task_flags import TASKS

EXAMPLES = {
    "countdown": '{"numbers": [3, 7, 9], "target": 13, "response": "..."}',
    "gsm8k": '{"answer": "#### 42", "response": "..."}',
    "arithmetic": '{"expression": "17+25", "response": "..."}',
}


@dataclass(frozen=True, kw_only=True)
class GradeConfig:
    """Say what reward a response earns, and why: one response, or a file of them."""

    task: str = "countdown"
    """countdown, gsm8k or arithmetic."""
    input: str | None = None
    """A .jsonl file: in each line `response`, and `numbers` and `target` (countdown), `answer` (gsm8k) or
    `expression` (arithmetic)."""
    response: str | None = None
    """One response, instead of a file."""
    problem: str | None = None
    """Its problem: "3 7 9 -> 13" for countdown, "17+25" for arithmetic."""
    answer: str | None = None
    """The right answer to its problem, for gsm8k."""
    out: str | None = None
    """File to write to, instead of the screen."""
    rewards: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"--task is {self.task!r}, expected one of: {', '.join(TASKS)}")
        if (self.input is None) == (self.response is None):
            raise ValueError("expected either --input FILE.jsonl or --response TEXT")
        given = [f"--{name}" for name in ("problem", "answer") if getattr(self, name) is not None]
        if self.input is not None and given:
            raise ValueError(
                f"{given[0]} goes with --response; in a file, each line brings its own problem"
            )
        needed = "--answer" if self.task == "gsm8k" else "--problem"
        if self.response is not None and given != [needed]:
            raise ValueError(
                f"--response for {self.task} needs {needed} beside it; got "
                f"{' and '.join(given) or 'neither'}"
            )
        if self.out and self.input and Path(self.out).resolve() == Path(self.input).resolve():
            raise ValueError(
                f"--out {self.out} is the --input file, which would be lost; give another one"
            )


def grader(name: str) -> Task:
    """The task, for its `grade` and `prompt` alone. They need no dials, so the list of problems (countdown)
    and the file (gsm8k) that __init__ asks for are not made."""
    return object.__new__(TASKS[name])


def sum_of(expression: str) -> ArithmeticProblem:
    """The problem of an expression like `17+25` or `17+25=`. Raises ValueError if it is none."""
    expression = expression.strip().removesuffix("=")
    try:
        value, _ = parse_expression(expression)
    except ExpressionError as error:
        raise ValueError(f"{quoted(expression)} is not valid arithmetic: {error}") from None
    if value.denominator != 1:
        raise ValueError(f"{quoted(expression)} is no whole number")
    return ArithmeticProblem(expression, int(value))


def problem_of_flags(c: GradeConfig):
    """The problem that the flags name. Raises ValueError as the parsers do."""
    if c.task == "countdown":
        return parse_prompt(c.problem)
    return sum_of(c.problem) if c.task == "arithmetic" else GSM8KProblem("", gold_number(c.answer))


def problem_of_record(task: str, record: dict):
    """The problem of a line. Raises ValueError for a field that is missing or of the wrong kind."""
    if isinstance(
        record.get("problem"), dict
    ):  # a line that eval wrote; its `answer` is the model's
        record = record["problem"]
    names = {
        "countdown": ("numbers", "target"),
        "arithmetic": ("expression",),
        "gsm8k": ("gold",) if "gold" in record else ("answer",),
    }[task]
    values = [record.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is None:
            raise ValueError(f'"{name}" is missing')
    if task == "countdown":
        return CountdownProblem(*values)
    [value] = values
    if task == "gsm8k" and type(value) in (int, float):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f'"{names[0]}" is {quoted(repr(value))}, expected text')
    return sum_of(value) if task == "arithmetic" else GSM8KProblem("", gold_number(value))


def read_responses(path: str, task: str) -> Iterator[tuple[int, object, str]]:
    """Yield (number of the line, problem, response); lines of white space are left out.

    Raises ValueError, with the line's number and an example, for a file or line that cannot be used.
    """
    try:
        lines = (
            Path(path).read_text(encoding="utf-8-sig").split("\n")
        )  # splitlines() would cut at U+2028 too
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # bytes that are not UTF-8, or a null byte in the path
        raise ValueError(f"cannot read {path}: it is not UTF-8 text ({error})") from None
    empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        empty = False
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("response"), str):
                raise ValueError('there is no text "response"')
            problem = problem_of_record(task, record)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: {error}; expected a line like {EXAMPLES[task]}"
            ) from None
        yield number, problem, record["response"]
    if empty:
        raise ValueError(f"{path} is empty; expected lines like {EXAMPLES[task]}")


def summary(graded: list[dict]) -> str:
    """One line for people: how many responses there are, and the means of what they got."""
    mean = {
        key: sum(row[key] for row in graded) / len(graded)
        for key in ("accuracy", "format", "reward")
    }
    return (
        f"{len(graded):,} responses: accuracy {mean['accuracy']:.1%}, well formed {mean['format']:.1%}, "
        f"mean reward {mean['reward']:.3f}"
    )


def grade(c: GradeConfig) -> list[dict]:
    """Grade and write; returns what was written. Raises ValueError for a problem or line that cannot be
    used."""
    task = grader(c.task)
    if c.input is None:
        graded = [reward_one(task, problem_of_flags(c), c.response, c.rewards)]
    else:
        graded = [
            {"line": number, **reward_one(task, problem, response, c.rewards)}
            for number, problem, response in read_responses(c.input, c.task)
        ]
    with open(c.out, "w", encoding="utf-8") if c.out else nullcontext(sys.stdout) as file:
        for row in graded:
            file.write(json.dumps(row) + "\n")
    if c.input is not None:
        print(summary(graded), file=sys.stderr)
    return graded
