"""Arithmetic: a first task that needs no search. The answer is one integer.

    prompt      17+25=
    response    <think> ... </think><answer>42</answer>

The toy form above is for models that were trained on it. Models that know English are asked in
words: `template` is zero_shot, few_shot, r1_zero, r1_zero_think or chat (prompts.py). In a chat the
answer may also stand in a box of LaTeX, or in a sentence `The answer is 42.` (final_answer.py).

Numbers have up to `digits` digits. Operators are sampled from + - *, and * binds before + and -, as
usual. Only the answer block is read, so the same grader serves responses with and without thoughts.
A response that runs on into another sum, on a new line behind its answer, is judged by its own
answer. Problems are sampled, not listed; 17+25 and 25+17 have the same numbers and operators, so
they are always in the same split.

Left out: division (quotients that are no integers need a rule of their own) and brackets.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..response import WHITE_SPACE, own_response, parse_response, quoted
from .base import (
    Grade,
    Task,
    check_ops,
    check_position,
    check_test_share,
    is_held_out,
    required_fields,
    stable_hash,
)
from .expression import ExpressionError, parse_expression
from .final_answer import final_answer, in_words
from .numbers import read_number
from .prompts import TEMPLATES, chat, check_template, zero_shot

OPERATIONS = "+-*"
MAX_OPERANDS = 8
MAX_DIGITS = 9
MAX_TRIES = 10_000  # before giving up on options that leave a split empty
SPACED = re.compile(r"[ \t]*([-+*])[ \t]*")
# A sum that is asked, not worked out: no number follows it.
QUESTION = re.compile(r"(?:\n|(?<=</answer>))[ \t]*+([0-9][-+*0-9 \t]*+)=(?![ \t\r\n]*+[-−0-9])")
HOW_TO_END = (
    "Think step by step, then give the number alone between <answer> and </answer>, for example "
    "<answer>7</answer>."
)
EXAMPLES = """\
Question: What is 3 + 5?
Answer: <think>3 + 5 = 8</think> <answer>8</answer>

Question: What is 9 - 2?
Answer: <think>9 - 2 = 7</think> <answer>7</answer>

Question: What is 4 * 6?
Answer: <think>4 * 6 = 24</think> <answer>24</answer>

Question: What is 4 - 6?
Answer: <think>4 - 6 = -2</think> <answer>-2</answer>

"""
# How a problem is put to a model that knows English, by the name of the template.
FORMS = {
    "zero_shot": zero_shot(HOW_TO_END),
    "few_shot": replace(TEMPLATES["few_shot"], before=f"{EXAMPLES}Question: "),
    "r1_zero": TEMPLATES["r1_zero"],
    "r1_zero_think": TEMPLATES["r1_zero_think"],
    "chat": chat(HOW_TO_END),
}
TOY = "plain"
TOY_OR_WORDS = (TOY, *FORMS)


@dataclass(frozen=True)
class ArithmeticProblem:
    expression: str
    answer: int
    template: str = TOY
    """How the problem is put to the model."""


def question(problem: ArithmeticProblem) -> str:
    """The problem in words."""
    spaced = SPACED.sub(r" \1 ", problem.expression)
    return f"What is {spaced}?"


def answer_of(problem: ArithmeticProblem, response: str) -> str | None:
    """The answer in the response's own part; None if there is none."""
    if problem.template != TOY:
        form = FORMS[problem.template]
        marks = form.marks if problem.template == "chat" else ()
        return final_answer(form.own_part(question(problem), response), marks)

    def is_own(match: re.Match) -> bool:
        return "".join(match[1].split()) == problem.expression

    return parse_response(own_response(response, QUESTION, is_own)).answer


@dataclass(frozen=True)
class Arithmetic(Task):
    """Arithmetic and its options."""

    name: ClassVar[str] = "arithmetic"
    example: ClassVar[str] = '{"expression": "17+25", "response": "..."}'

    n_operands: int = 2
    """How many numbers are combined, 2 to 8."""
    digits: int = 2
    """Each number is from 0 to 10^digits - 1, all equally likely; 1 to 9."""
    ops: str = "+-"
    """The operations that are sampled from, some of + - *."""
    test_share: float = 0.2
    """Share of all problems that is held out for testing."""
    seed: int = 0
    """Changes the training problems; the test problems are the same for every seed."""
    template: str = TOY
    """How a problem is put to the model: plain is `17+25=`; zero_shot, few_shot, r1_zero,
    r1_zero_think and chat ask in words (prompts.py)."""

    def __post_init__(self):
        """Raises ValueError for an option out of range."""
        check_template(self.template, TOY_OR_WORDS)
        if not 2 <= self.n_operands <= MAX_OPERANDS:
            raise ValueError(
                f"arithmetic: n_operands is {self.n_operands}; it must be 2 to {MAX_OPERANDS}"
            )
        if not 1 <= self.digits <= MAX_DIGITS:
            raise ValueError(f"arithmetic: digits is {self.digits}; it must be 1 to {MAX_DIGITS}")
        check_ops(self.name, self.ops, OPERATIONS)
        check_test_share(self.name, self.test_share)

    def size(self, split: str) -> None:
        """None: problems are sampled with replacement from a space that is not listed."""
        check_position(split, 0)

    def problem(self, split: str, index: int) -> ArithmeticProblem:
        """A sample of its own for every index; neither split ends."""
        check_position(split, index)
        seed = self.seed if split == "train" else "test"
        for attempt in range(MAX_TRIES):
            # "draw" is part of the key of every published problem: another word, other problems.
            hashes = (
                stable_hash("draw", seed, index, attempt, i) for i in range(2 * self.n_operands)
            )
            numbers = [next(hashes) % 10**self.digits for _ in range(self.n_operands)]
            ops = [self.ops[next(hashes) % len(self.ops)] for _ in numbers[1:]]
            # The order of numbers and operators does not count, so that 25+17 stays with 17+25.
            key = tuple(sorted(numbers)), "".join(sorted(ops))
            if is_held_out(key, self.test_share) == (split == "test"):
                terms = [f"{op}{number}" for op, number in zip(ops, numbers[1:], strict=True)]
                text = f"{numbers[0]}{''.join(terms)}"
                value, _ = parse_expression(text)
                return ArithmeticProblem(text, int(value), self.template)
        raise ValueError(f"arithmetic: {MAX_TRIES:,} tries gave no {split} problem; raise digits")

    @staticmethod
    def problem_from_text(text: str) -> ArithmeticProblem:
        """The problem of `17+25` or `17+25=`. ValueError if its value is no integer."""
        expression = text.strip().removesuffix("=")
        try:
            value, _ = parse_expression(expression)
        except ExpressionError as error:
            raise ValueError(f"{quoted(expression)} is not valid arithmetic: {error}") from None
        if value.denominator != 1:
            raise ValueError(f"{quoted(expression)} is not a whole number")
        return ArithmeticProblem(expression, int(value))

    @staticmethod
    def problem_from_record(record: Mapping[str, Any]) -> ArithmeticProblem:
        """The problem of {"expression": "17+25"}; `template` may stand beside it.

        ValueError for another kind of value.
        """
        template = record.get("template", TOY)
        check_template(template, TOY_OR_WORDS)
        [expression] = required_fields(record, "expression")
        if not isinstance(expression, str):
            raise ValueError(f'"expression" is {quoted(repr(expression))}, expected text')
        return replace(Arithmetic.problem_from_text(expression), template=template)

    @staticmethod
    def prompt(problem: ArithmeticProblem) -> str:
        """`17+25=`, or the problem in words."""
        if problem.template != TOY:
            return FORMS[problem.template].prompt(question(problem))
        return f"{problem.expression}="

    @staticmethod
    def prefilled(problem: ArithmeticProblem) -> str:
        """What of the answer the prompt holds already."""
        return "" if problem.template == TOY else FORMS[problem.template].prefilled

    @staticmethod
    def grade(problem: ArithmeticProblem, response: str) -> Grade:
        """Right if the last answer block is the number and nothing else: `-7`, not `042`.

        In a chat without such a block, a box or another mark counts too (final_answer.py).
        """
        answer = answer_of(problem, response)
        if answer is None:
            why = "There is no complete <answer>...</answer> block."
            if problem.template == "chat":
                marks = in_words(FORMS["chat"].marks)
                why = f"There is neither a complete answer block nor {marks}."
            return Grade(0.0, None, why)
        number = read_number(answer)
        if number is None:
            return Grade(0.0, answer, f"The answer {quoted(answer)} is not a number.")
        if number != problem.answer:
            given = quoted(answer.strip(WHITE_SPACE))
            return Grade(0.0, answer, f"The answer is {given}, not {problem.answer}.")
        return Grade(1.0, answer, f"The answer is {problem.answer}.")

    @staticmethod
    def same_answer(answer: str, other: str) -> bool:
        """Whether two answers are the same number, or the same text, for a vote among them."""
        value = read_number(answer)
        if value is None:
            return answer.strip(WHITE_SPACE) == other.strip(WHITE_SPACE)
        return value == read_number(other)
