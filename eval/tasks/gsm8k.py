"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): school word problems from a file.

The file is the user's own copy: one JSON object per line with `question` and `answer`, the gold
number after the last `####` of `answer`. It is a test set: there are no training problems.

The answer of a response is its last complete answer block, or else what follows its last `####` on
that line. It must be a number and nothing else: an optional minus, `$` and `%`, commas between
thousands, one trailing dot. `1,234`, `$12`, `12.50` and `12.` are numbers; `12 eggs` and `1/2` are
not. Numbers are compared as exact fractions.

Left out: taking the last number of a text without a mark. It pays for numbers that were never given
as the answer.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ..response import WHITE_SPACE, parse_response, quoted
from .base import Grade, Task, check_position, required_fields

MARK = "####"
MAX_NUMBER_LENGTH = 40  # characters of one number; bounds the cost of comparing
NUMBER = re.compile(r"(-?)\$?(-?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(\.[0-9]+)?%?\.?")


@dataclass(frozen=True)
class GSM8KProblem:
    question: str
    gold: str
    """The right answer as written in the file, after the mark."""


def read_number(text: str) -> Fraction | None:
    """The exact value of `1,234`, `-$12.50`, `15%` or `12.`; None for other or long text."""
    text = text.strip(WHITE_SPACE)
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    minus_before_dollar, minus_after_dollar, whole, decimals = match.groups()
    if minus_before_dollar and minus_after_dollar:
        return None
    value = Fraction(whole.replace(",", "") + (decimals or ""))
    return -value if minus_before_dollar or minus_after_dollar else value


def gold_number(answer: str) -> str:
    """What follows the last `####`, or all of `answer`; ValueError if that is not a number."""
    gold = answer.rpartition(MARK)[2].strip(WHITE_SPACE)
    if read_number(gold) is None:
        raise ValueError(
            f"expected a number after {MARK}, like '... {MARK} 18'; got {quoted(gold)}"
        )
    return gold


def load_gsm8k(path: str | Path) -> list[GSM8KProblem]:
    """All problems of a file; ValueError, with the line's number, if one cannot be used."""
    try:
        # Not splitlines(), which would cut at U+2028 too.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # ValueError: no text, or a null byte in the path
        raise ValueError(f"cannot read GSM8K problems from {path}: {error}") from None
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            problems.append(_parse_line(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not problems:
        raise ValueError(
            f"{path} is empty; expected JSON lines with the fields question and answer"
        )
    return problems


def _parse_line(line: str) -> GSM8KProblem:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    for field in ("question", "answer"):
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise ValueError(
                f'expected an object with "question" and "answer" as text; "{field}" is missing'
            )
    return GSM8KProblem(record["question"], gold_number(record["answer"]))


@dataclass(frozen=True)
class GSM8K(Task):
    """The task over one file, which is read at once; ValueError if it cannot be read."""

    name: ClassVar[str] = "gsm8k"
    example: ClassVar[str] = '{"answer": "#### 42", "response": "..."}'
    problem_flag: ClassVar[str] = "answer"
    file_format: ClassVar[str] = "JSON lines with the fields question and answer"

    path: str
    """A file of JSON lines with `question` and `answer`."""

    def __post_init__(self):
        # Read the file now, so that a bad one is named before the work begins.
        assert self._test

    @cached_property
    def _test(self) -> list[GSM8KProblem]:
        return load_gsm8k(self.path)

    def size(self, split: str) -> int:
        """How many problems the file holds for "test", 0 for "train"."""
        check_position(split, 0)
        return len(self._test) if split == "test" else 0

    def problem(self, split: str, index: int) -> GSM8KProblem:
        """Test problems in the order of the file; ValueError for others."""
        check_position(split, index)
        if split == "train":
            raise ValueError("gsm8k: the file is a test set; there are no training problems")
        if index >= len(self._test):
            raise ValueError(
                f"gsm8k: test problem {index} asked for, but there are {len(self._test)}"
            )
        return self._test[index]

    @staticmethod
    def problem_from_text(text: str) -> GSM8KProblem:
        """A problem of which only the right answer is known, like `42` or `so #### 42`."""
        return GSM8KProblem("", gold_number(text))

    @staticmethod
    def problem_from_record(record: Mapping[str, Any]) -> GSM8KProblem:
        """The problem of {"answer": 42}, {"answer": "#### 42"}, or the harness's {"gold": "42"}.

        ValueError for another kind of value.
        """
        name = "gold" if "gold" in record else "answer"
        [value] = required_fields(record, name)
        if type(value) in (int, float):
            value = str(value)
        if not isinstance(value, str):
            raise ValueError(f'"{name}" is {quoted(repr(value))}, expected text')
        return GSM8K.problem_from_text(value)

    @staticmethod
    def prompt(problem: GSM8KProblem) -> str:
        """The question, how to end, and `Answer:` for the model to continue."""
        how = (
            f"Think step by step, then end with a line `{MARK} n`, "
            "where n is the answer as a number."
        )
        return f"Question: {problem.question}\n{how}\nAnswer:"

    @staticmethod
    def grade(problem: GSM8KProblem, response: str) -> Grade:
        """Right if the last answer block, or else what follows the last `####`, is the gold one."""
        answer = parse_response(response).answer
        if answer is None and MARK in response:
            answer = response.rpartition(MARK)[2].partition("\n")[0]
        if answer is None:
            why = f"There is neither a complete answer block nor a number after {MARK}."
            return Grade(0.0, None, why)
        value = read_number(answer)
        if value is None:
            return Grade(0.0, answer, f"The answer {quoted(answer)} is not a number.")
        if value != read_number(problem.gold):
            why = f"The answer is {answer.strip(WHITE_SPACE)}, not {problem.gold}."
            return Grade(0.0, answer, why)
        return Grade(1.0, answer, f"The answer is {problem.gold}.")
