"""Arithmetic: a first task that needs no search. The answer is one integer.

    prompt      17+25=
    response    <think> ... </think><answer>42</answer>

Numbers have up to `digits` digits, operators are drawn from + - *, and * binds before + and -, as usual. Only
the answer block is read, so the same grader serves responses with and without thoughts. The space is drawn
from, not listed; 17+25 and 25+17 have the same numbers and operators, so they are always in the same split.

Left out: division (quotients that are no integers need a rule of their own) and brackets.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..response import parse_response, quoted
from .base import Grade, Task, check_position, is_held_out, stable_hash
from .expression import DIGITS, WHITE_SPACE, parse_expression

OPERATIONS = "+-*"
MAX_OPERANDS = 8
MAX_DIGITS = 9
MAX_DRAWS = 10_000  # draws before giving up on dials that leave a split empty


@dataclass(frozen=True)
class ArithmeticProblem:
    expression: str
    answer: int


@dataclass(frozen=True)
class Arithmetic(Task):
    """The task and its dials; ValueError for a dial out of range."""

    name: ClassVar[str] = "arithmetic"
    n_operands: int = 2
    """How many numbers are combined, 2 to 8."""
    digits: int = 2
    """Each number is from 0 to 10^digits - 1, all equally likely; 1 to 9."""
    ops: str = "+-"
    """The operations that are drawn from, some of + - *."""
    test_share: float = 0.2
    """Share of all problems that is held out for testing."""
    seed: int = 0
    """Changes the training problems; the test problems are the same for every seed."""

    def __post_init__(self):
        if not 2 <= self.n_operands <= MAX_OPERANDS:
            raise ValueError(
                f"arithmetic: n_operands is {self.n_operands}; it must be 2 to {MAX_OPERANDS}"
            )
        if not 1 <= self.digits <= MAX_DIGITS:
            raise ValueError(f"arithmetic: digits is {self.digits}; it must be 1 to {MAX_DIGITS}")
        if (
            not self.ops
            or not set(self.ops) <= set(OPERATIONS)
            or len(set(self.ops)) < len(self.ops)
        ):
            raise ValueError(
                f"arithmetic: ops is {self.ops!r}; it must be some of {OPERATIONS}, each once"
            )
        if not 0 < self.test_share < 1:
            raise ValueError(
                f"arithmetic: test_share is {self.test_share}; it must lie between 0 and 1"
            )

    def size(self, split: str) -> None:
        """None: problems are drawn with replacement from a space that is not listed."""
        check_position(split, 0)

    def problem(self, split: str, index: int) -> ArithmeticProblem:
        """A draw of its own for every index; neither split ends."""
        check_position(split, index)
        seed = self.seed if split == "train" else "test"
        for attempt in range(MAX_DRAWS):
            hashes = (
                stable_hash("draw", seed, index, attempt, i) for i in range(2 * self.n_operands)
            )
            numbers = [next(hashes) % 10**self.digits for _ in range(self.n_operands)]
            ops = [self.ops[next(hashes) % len(self.ops)] for _ in numbers[1:]]
            key = tuple(sorted(numbers)), "".join(sorted(ops))
            if is_held_out(key, self.test_share) == (split == "test"):
                text = str(numbers[0]) + "".join(
                    f"{op}{n}" for op, n in zip(ops, numbers[1:], strict=True)
                )
                return ArithmeticProblem(text, int(parse_expression(text)[0]))
        raise ValueError(f"arithmetic: {MAX_DRAWS:,} draws gave no {split} problem; raise digits")

    def prompt(self, problem: ArithmeticProblem) -> str:
        """`17+25=`"""
        return f"{problem.expression}="

    def grade(self, problem: ArithmeticProblem, response: str) -> Grade:
        """Right if the last answer block is the integer as usually written: `42`, `-7`, not `042`."""
        answer = parse_response(response).answer
        if answer is None:
            return Grade(0.0, None, "There is no complete <answer>...</answer> block.")
        number = answer.strip(WHITE_SPACE)
        if number == str(problem.answer):
            return Grade(1.0, answer, f"The answer is {number}.")
        digits = number.removeprefix("-")
        if not digits or not set(digits) <= set(DIGITS):
            return Grade(0.0, answer, f"The answer {quoted(answer)} is not an integer.")
        return Grade(0.0, answer, f"The answer is {quoted(number)}, not {problem.answer}.")
