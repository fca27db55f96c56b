"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): school word problems from a file.

The file is the user's own copy: one JSON object per line with `question` and `answer`, the gold
number after the last `####` of `answer`. It is a test set: there are no training problems.

The answer of a response is its last complete answer block, or else what follows its last `####` on
that line. A mark may stand inside the block, and one with nothing behind it changes nothing. The
answer must be a number and nothing else, as people write one (numbers.py, prose): `1,234`, `$12`,
`12.50` and `12.` are numbers; `12 eggs` and `1/2` are not. Numbers are compared as exact fractions.

A base model that has answered often runs on into a next `Question:`, and answers that. Its response
is judged up to there.

Left out: taking the last number of a text without a mark. It pays for numbers that were never given
as the answer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ..lines import Kept, json_object, parse_lines, read_lines
from ..response import WHITE_SPACE, own_response, parse_response, quoted
from .base import Grade, Task, check_position, required_fields
from .numbers import number_text, read_number

MARK = "####"
QUESTION = re.compile(r"\nQuestion:[ \t]*+")
EXPECTED = "JSON lines with the fields question and answer"


@dataclass(frozen=True)
class GSM8KProblem:
    question: str
    gold: str
    """The right answer as written in the file, after the mark."""


def marked(text: str) -> str | None:
    """What follows the last `####` that has anything behind it on its line; None without one."""
    for piece in reversed(text.split(MARK)[1:]):
        rest_of_line = piece.partition("\n")[0].lstrip("#")
        if rest_of_line.strip(WHITE_SPACE):
            return rest_of_line
    return None


def gold_number(answer: str) -> str:
    """What follows the last `####`, or all of `answer`; ValueError if that is not a number."""
    gold = answer if MARK not in answer else marked(answer) or ""
    gold = gold.strip(WHITE_SPACE)
    if read_number(gold, prose=True) is None:
        raise ValueError(
            f"expected a number after {MARK}, like '... {MARK} 18'; got {quoted(gold)}"
        )
    return gold


def gold_of(record: Mapping[str, Any], name: str) -> str:
    """The gold number in a field that is text or a number of JSON; ValueError for other kinds."""
    [value] = required_fields(record, name)
    if isinstance(value, str):
        return gold_number(value)
    try:
        return number_text(value)
    except ValueError as error:
        raise ValueError(f'"{name}" should be text or a number: {error}') from None


def load_gsm8k(path: str | Path, skip_bad: bool = False) -> Kept[GSM8KProblem]:
    """All problems of a file; ValueError for bad lines, unless they are skipped (eval/lines.py)."""
    return parse_lines(path, read_lines(path), _parse_line, EXPECTED, skip_bad).values()


def _parse_line(line: str) -> GSM8KProblem:
    record = json_object(line)
    if not isinstance(record.get("question"), str):
        raise ValueError('there is no text "question"')
    return GSM8KProblem(record["question"], gold_of(record, "answer"))


@dataclass(frozen=True)
class GSM8K(Task):
    """The task over one file, which is read at once; ValueError if it cannot be read."""

    name: ClassVar[str] = "gsm8k"
    example: ClassVar[str] = '{"answer": "#### 42", "response": "..."}'
    problem_flag: ClassVar[str] = "answer"
    file_format: ClassVar[str] = EXPECTED

    path: str
    """A file of JSON lines with `question` and `answer`."""
    skip_bad: bool = False
    """Go on without the lines of the file that are bad, and count them."""

    def __post_init__(self):
        # Read the file now, so that a bad one is named before the work begins.
        self.size("test")

    @cached_property
    def _test(self) -> Kept[GSM8KProblem]:
        return load_gsm8k(self.path, self.skip_bad)

    @property
    def lines_skipped(self) -> int:
        """How many bad lines of the file were left out."""
        return self._test.n_skipped

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
        return GSM8KProblem("", gold_of(record, name))

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
        """Right if the last answer block, or else what follows the last `####`, is the gold one.

        What comes behind the next `Question:` is not read.
        """

        def is_own(match: re.Match) -> bool:
            return bool(problem.question) and response.startswith(problem.question, match.end())

        own = own_response(response, QUESTION, is_own)
        block = parse_response(own).answer
        answer = marked(own if block is None else block)  # a mark may stand inside the block
        if answer is None:
            answer = block
        if answer is None:
            why = f"There is neither a complete answer block nor a number after {MARK}."
            return Grade(0.0, None, why)
        value = read_number(answer, prose=True)
        if value is None:
            return Grade(0.0, answer, f"The answer {quoted(answer)} is not a number.")
        if value != read_number(problem.gold, prose=True):
            why = f"The answer is {quoted(answer.strip(WHITE_SPACE))}, not {problem.gold}."
            return Grade(0.0, answer, why)
        return Grade(1.0, answer, f"The answer is {problem.gold}.")
