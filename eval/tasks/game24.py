"""Game of 24: make 24 of four numbers, each exactly once, with + - * /. Real puzzles from a file.

    r1zero eval --run RUN --task game24 --data game24.csv

The file is the user's own copy: CSV with a column `Puzzles`, which holds numbers like `1 1 4 6`.
The 1,362 puzzles of princeton-nlp/tree-of-thought-llm (arXiv 2305.10601) come in such a file, from
the easiest to the hardest for people. Their paper evaluates on lines 901 to 1,000.

A puzzle is a problem of Countdown with the target 24. Prompts, grader and coherence are those of
countdown.py, and the splits are those of problem_file.py. Two puzzles with the same numbers are one
question.

Left out: other columns of the file.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..lines import Kept, Line, Parsed, parse_lines, read_lines
from .base import Grade
from .countdown import TOY_OR_WORDS, Countdown, CountdownProblem, parse_prompt
from .problem_file import FileTask

TARGET = 24
COLUMN = "Puzzles"
EXPECTED = f"puzzles like 1 1 4 6 in the column {COLUMN}"


def csv_cells(line: str) -> list[str]:
    """The cells of one line of CSV. Raises ValueError for a quote that does not end."""
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise ValueError(f"not CSV: {error}") from None


def puzzle_of(text: str, template: str) -> CountdownProblem:
    """The problem of numbers like "1 1 4 6"; ValueError for any other text."""
    numbers = parse_prompt(f"{text} -> {TARGET}").numbers
    return CountdownProblem(numbers, TARGET, template)


def load_game24(path: str | Path, skip_bad: bool = False) -> Kept[CountdownProblem]:
    """The puzzles of a file; ValueError as `read_game24`."""
    return read_game24(path, skip_bad).values()


def read_game24(
    path: str | Path, skip_bad: bool = False, template: str = Countdown.template
) -> Parsed[CountdownProblem]:
    """(number of the line, puzzle) for each line of a file.

    Raises ValueError for a file that cannot be read and for lines that are no puzzles, as
    eval/lines.py does.
    """
    header, *lines = read_lines(path) or [Line(1, b"")]
    try:
        column = csv_cells(header.text).index(COLUMN)
    except ValueError:
        raise ValueError(
            f"{path} has no column {COLUMN} in its first line; is it a Game-of-24 file?"
        ) from None
    if not lines:
        raise ValueError(f"{path} holds no puzzles")

    def parse(line: str) -> CountdownProblem:
        puzzle = csv_cells(line)[column : column + 1]
        return puzzle_of("".join(puzzle), template)

    return parse_lines(path, lines, parse, EXPECTED, skip_bad)


@dataclass(frozen=True)
class Game24(FileTask):
    """The task and its options."""

    name: ClassVar[str] = "game24"
    example: ClassVar[str] = '{"numbers": [1, 1, 4, 6], "response": "..."}'
    file_format: ClassVar[str] = f"CSV with a column {COLUMN}"
    templates: ClassVar[tuple[str, ...]] = TOY_OR_WORDS

    template: str = Countdown.template
    """How a puzzle is put to the model: plain is `1 1 4 6 -> 24`; zero_shot, r1_zero, r1_zero_think
    and chat ask in words (prompts.py)."""

    def _read(self, path: str) -> Parsed[CountdownProblem]:
        return read_game24(path, self.skip_bad, self.template)

    @staticmethod
    def question(problem: CountdownProblem) -> str:
        """The numbers in ascending order: by them a puzzle is known."""
        return " ".join(map(str, sorted(problem.numbers)))

    @staticmethod
    def problem_from_text(text: str) -> CountdownProblem:
        """The puzzle of "1 1 4 6", or of "1 1 4 6 -> 24". ValueError for another target."""
        problem = parse_prompt(text if ">" in text or "→" in text else f"{text} -> {TARGET}")
        if problem.target != TARGET:
            raise ValueError(f"the target is {problem.target}; in the Game of 24 it is {TARGET}")
        return problem

    @staticmethod
    def problem_from_record(record: Mapping[str, Any]) -> CountdownProblem:
        """The puzzle of {"numbers": [1, 1, 4, 6]}; `template` may stand beside it.

        ValueError for a `target` that is not 24.
        """
        problem = Countdown.problem_from_record({"target": TARGET, **record})
        if problem.target != TARGET:
            raise ValueError(f'"target" is {problem.target}; in the Game of 24 it is {TARGET}')
        return problem

    @staticmethod
    def prompt(problem: CountdownProblem) -> str:
        """`1 1 4 6 -> 24`, or the puzzle in words."""
        return Countdown.prompt(problem)

    @staticmethod
    def prefilled(problem: CountdownProblem) -> str:
        """What of the answer the prompt holds already."""
        return Countdown.prefilled(problem)

    @staticmethod
    def grade(problem: CountdownProblem, response: str) -> Grade:
        """Right if the last answer block makes 24 of every number, each used once."""
        return Countdown.grade(problem, response)

    @staticmethod
    def same_answer(answer: str, other: str) -> bool:
        """Whether two expressions are worth the same and use the same numbers, for a vote."""
        return Countdown.same_answer(answer, other)

    @staticmethod
    def coherence(problem: CountdownProblem, response: str) -> float:
        """The share of true equations among those that the response writes, from 0 to 1."""
        return Countdown.coherence(problem, response)
