"""Countdown: combine the given numbers, each exactly once, with + - * / into the target.

    prompt      3 7 9 -> 13
    response    <think> ... </think><answer>(9-3)+7</answer>

Problems are made so that a child could solve them: every step gives a whole number that is not
negative (the larger minus the smaller, divisions without remainder), and the target is from 1 to
`max_target`. Two problems are different when their multisets of numbers or their targets differ.
Three numbers from 1 to 9 with + and - give 550 problems, from 1 to 20 give 5,640.

The grader asks less than the generator: any of the four operations may be used, and values on the
way may be negative or fractions, because the prompt does not forbid it. What counts is every number
exactly once and the exact target. A problem from elsewhere may have a negative target.

The toy form above is for models that were trained on it. Models that know English are asked in
words: `template` is zero_shot, r1_zero, r1_zero_think or chat (prompts.py), and the answer stands
in its block all the same.

A response that runs on into another problem, on a new line behind its answer, is judged by its own
answer.

Left out: near misses and partial credit (they teach short wrong answers), and using only some of
the numbers.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Any, ClassVar

from ..response import WHITE_SPACE, own_response, parse_response, quoted
from .base import (
    Grade,
    Task,
    check_ops,
    check_position,
    check_test_share,
    is_held_out,
    permutation,
    required_fields,
    stable_hash,
)
from .coherence import coherence
from .expression import MAX_DIGITS, ExpressionError, parse_expression
from .numbers import read_number, whole_in_file
from .prompts import TEMPLATES, chat, check_template, zero_shot
from .solver import MAX_NUMBERS, OPERATIONS, apply, reachable, solutions
from .steps import END_OF_THOUGHTS, StepCheck, check_step, step_ends

# How many multisets of numbers are listed, by n_numbers: listing them takes a second or two.
MAX_LISTED = {2: 5_000, 3: 5_000, 4: 1_000}
MAX_TRIES = 10_000  # before giving up on options that leave no problem
QUESTION = re.compile(
    r"(?:\n|(?<=</answer>))[ \t]*+([0-9][0-9, \t]*+)(?:->|→)[ \t]*+([-−]?[0-9]*+)"
)
HOW_TO_END = (
    "Think step by step, then give the expression alone between <answer> and </answer>, for "
    "example <answer>(1 + 2) * 3</answer>."
)
# How a problem is put to a model that knows English, by the name of the template.
FORMS = {
    "zero_shot": zero_shot(HOW_TO_END),
    "r1_zero": TEMPLATES["r1_zero"],
    "r1_zero_think": TEMPLATES["r1_zero_think"],
    "chat": chat(HOW_TO_END),
}
TOY = "plain"
TOY_OR_WORDS = (TOY, *FORMS)


@dataclass(frozen=True)
class CountdownProblem:
    numbers: tuple[int, ...]
    """1 to 6 whole numbers from 0 to 999,999,999, in the prompt's order. A list is taken too."""
    target: int
    """A whole number of the same range, or a negative one of as many digits. (ValueError for
    anything else.)"""
    template: str = TOY
    """How the problem is put to the model."""

    def __post_init__(self):
        if not isinstance(self.numbers, tuple | list) or not 1 <= len(self.numbers) <= MAX_NUMBERS:
            given = quoted(repr(self.numbers))
            raise ValueError(f"Countdown takes a list of 1 to {MAX_NUMBERS} numbers, got {given}")
        object.__setattr__(self, "numbers", tuple(self.numbers))
        limit = 10**MAX_DIGITS
        for value in self.numbers:
            if type(value) is not int or not 0 <= value < limit:
                given = quoted(repr(value))
                raise ValueError(
                    f"Countdown takes whole numbers of up to {MAX_DIGITS} digits, not negative, "
                    f"got {given}"
                )
        if type(self.target) is not int or not -limit < self.target < limit:
            given = quoted(repr(self.target))
            raise ValueError(
                f"Countdown takes a whole target of up to {MAX_DIGITS} digits, got {given}"
            )

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """Two problems are the same problem when their keys are equal."""
        return tuple(sorted(self.numbers)), self.target


def parse_prompt(text: str) -> CountdownProblem:
    """The problem that a user typed: "3 7 9 -> 13".

    Spaces or commas may stand between the numbers, and the arrow may be `→`. Only the target may be
    negative. Raises ValueError with what was expected. The problem may have no solution: `solve`
    tells.
    """
    expected = f"expected numbers, an arrow and a target, like 3 7 9 -> 13; got {quoted(text)}"
    sides = text.replace("→", "->").split("->", 2)
    if len(sides) != 2:
        raise ValueError(expected)
    words, targets = sides[0].replace(",", " ").split(), sides[1].split()
    if not words or len(targets) != 1:
        raise ValueError(expected)
    try:
        return CountdownProblem([whole_in_file(word) for word in words], whole_in_file(targets[0]))
    except ValueError as error:
        raise ValueError(f"{expected}: {error}") from None


def question(problem: CountdownProblem) -> str:
    """The problem in words."""
    *others, last = map(str, problem.numbers)
    numbers = f"{', '.join(others)} and {last}" if others else last
    return (
        f"Write an arithmetic expression that equals {problem.target}. Use each of the numbers "
        f"{numbers} exactly once, with + - * / and brackets."
    )


def form_of(record: Mapping[str, Any]) -> str:
    """The template in an object of JSON; ValueError for one that there is not."""
    template = record.get("template", TOY)
    check_template(template, TOY_OR_WORDS)
    return template


def own_part(problem: CountdownProblem, response: str) -> str:
    """The response up to another problem in the form of its prompt."""
    if problem.template != TOY:
        return FORMS[problem.template].own_part(question(problem), response)

    def is_own(match: re.Match) -> bool:
        words = match[1].replace(",", " ").split()
        same_numbers = sorted(words) == sorted(map(str, problem.numbers))
        return same_numbers and match[2].replace("−", "-") == str(problem.target)

    return own_response(response, QUESTION, is_own)


def solve(problem: CountdownProblem, ops: str = OPERATIONS, whole: bool = True) -> Iterator[str]:
    """All different solutions as text, one by one; `whole` is explained in solver.py."""
    return solutions(problem.numbers, problem.target, ops, whole)


def _times(n: int) -> str:
    return {1: "once", 2: "twice", 3: "three times", 4: "four times"}.get(n, f"{n} times")


def _miscount(given: Counter, used: Counter) -> str | None:
    """Which number is not used as often as it is given, None if all are."""
    # Numbers that are not given come first, then the smallest.
    for number in sorted(given | used, key=lambda number: (number in given, number)):
        if number not in given:
            return f"The answer uses {number}, which is not given."
        if number not in used:
            return f"The answer does not use {number}."
        if given[number] != used[number]:
            times, should = _times(used[number]), _times(given[number])
            return f"The answer uses {number} {times}, but it is given {should}."
    return None


def _fault(problem: CountdownProblem, answer: str) -> str | None:
    """Why the answer does not solve the problem, None if it does."""
    if not answer.strip(WHITE_SPACE):
        return "The answer block is empty."
    # 1. An expression, perhaps with `= target` behind it.
    expression, equals, right_side = answer.partition("=")
    try:
        value, used = parse_expression(expression)
    except ExpressionError as error:
        return f"The answer {quoted(answer)} is not valid arithmetic: {error}."
    # 2. Every number exactly once.
    miscount = _miscount(Counter(problem.numbers), Counter(used))
    if miscount:
        return miscount
    # 3. The exact target.
    if value != problem.target:
        return f"The answer equals {_shown(value)}, not {problem.target}."
    if equals and read_number(right_side) != problem.target:
        return f"The right side of the answer is {quoted(right_side)}, not {problem.target}."
    return None


def worth(answer: str) -> tuple:
    """All that the grader looks at in an answer, so equal ones are graded alike.

    (value, numbers used, value behind `=`); for what is no arithmetic, its text.
    """
    expression, equals, right_side = answer.partition("=")
    try:
        value, used = parse_expression(expression)
    except ExpressionError:
        return (answer.strip(WHITE_SPACE),)
    return value, sorted(used), equals and read_number(right_side)


def _shown(value: Fraction) -> str:
    return str(value) if len(str(value)) <= 40 else "a number with very many digits"


@dataclass(frozen=True)
class Countdown(Task):
    """Countdown and its options."""

    name: ClassVar[str] = "countdown"
    example: ClassVar[str] = '{"numbers": [3, 7, 9], "target": 13, "response": "..."}'

    n_numbers: int = 3
    """How many numbers are given, 2 to 6."""
    low: int = 1
    """The smallest number that can be given."""
    high: int = 20
    """The largest number that can be given."""
    ops: str = "+-"
    """The operations that problems are made with, some of + - * /. The grader takes all four."""
    max_target: int = 100
    """The largest target."""
    test_share: float = 0.2
    """Share of all problems that is held out for testing."""
    seed: int = 0
    """Changes the order of the training problems; the test problems are the same for every seed."""
    template: str = TOY
    """How a problem is put to the model: plain is `3 7 9 -> 13`; zero_shot, r1_zero, r1_zero_think
    and chat ask in words (prompts.py)."""

    def __post_init__(self):
        """Raises ValueError for an option out of range, or an empty split."""
        check_template(self.template, TOY_OR_WORDS)
        if not 2 <= self.n_numbers <= MAX_NUMBERS:
            raise ValueError(
                f"countdown: n_numbers is {self.n_numbers}; it must be 2 to {MAX_NUMBERS}"
            )
        if not 1 <= self.low <= self.high <= 999:
            raise ValueError(
                f"countdown: low is {self.low}, high {self.high}; need 1 <= low <= high <= 999"
            )
        check_ops(self.name, self.ops, OPERATIONS)
        if not 1 <= self.max_target < 10**MAX_DIGITS:
            raise ValueError(
                f"countdown: max_target is {self.max_target}; it must be 1 to 999,999,999"
            )
        check_test_share(self.name, self.test_share)
        if self._listed is not None and not all(self._listed.values()):
            raise ValueError(
                "countdown: a split is left without problems; widen low..high or max_target"
            )

    @cached_property
    def _listed(self) -> dict[str, list[CountdownProblem]] | None:
        """Both splits, numbers sorted, in a fixed shuffled order; None if there are too many."""
        multisets = math.comb(self.high - self.low + self.n_numbers, self.n_numbers)
        if multisets > MAX_LISTED.get(self.n_numbers, 0):
            return None
        splits = {"train": [], "test": []}
        allowed = range(self.low, self.high + 1)
        for numbers in combinations_with_replacement(allowed, self.n_numbers):
            for target in reachable(numbers, self.ops):
                if 1 <= target <= self.max_target:
                    split = "test" if is_held_out((numbers, target), self.test_share) else "train"
                    splits[split].append(CountdownProblem(numbers, target))
        for problems in splits.values():
            problems.sort(key=lambda problem: stable_hash("order", problem.key))
        return splits

    def _sample(self, split: str, seed: int | str, index: int) -> CountdownProblem:
        """Random numbers combined by random steps, sampled again until target and split fit."""
        n_choices = self.high - self.low + 1
        for attempt in range(MAX_TRIES):
            # "draw" is part of the key of every published problem: another word, other problems.
            hashes = (
                stable_hash("draw", seed, index, attempt, i) for i in range(4 * self.n_numbers)
            )
            values = [self.low + next(hashes) % n_choices for _ in range(self.n_numbers)]
            numbers = tuple(sorted(values))
            target = self._combine(values, hashes)
            if target is None or not 1 <= target <= self.max_target:
                continue
            if is_held_out((numbers, target), self.test_share) == (split == "test"):
                return CountdownProblem(numbers, target)
        raise ValueError(f"countdown: no {split} problem in {MAX_TRIES:,} tries; widen low..high")

    def _combine(self, values: list[int], hashes: Iterator[int]) -> int | None:
        """One value from all of `values`, by random steps; None where no step is allowed."""
        while len(values) > 1:
            # Take two values out, and put back what a random operation makes of them.
            a = values.pop(next(hashes) % len(values))
            b = values.pop(next(hashes) % len(values))
            results = [apply(op, max(a, b), min(a, b), whole=True) for op in self.ops]
            allowed = [result for result in results if result is not None]
            if not allowed:
                return None
            values.append(allowed[next(hashes) % len(allowed)])
        return values[0]

    def size(self, split: str) -> int | None:
        """How many different problems the split holds, None for a space too large to list."""
        check_position(split, 0)
        return None if self._listed is None else len(self._listed[split])

    def problem(self, split: str, index: int) -> CountdownProblem:
        """Training problems never end: each epoch has all of them, each time in another order.

        Test problems end after `size("test")` (ValueError), so that no evaluation counts one twice.
        In a space too large to list, both splits are sampled with replacement and do not end.
        """
        check_position(split, index)
        seed = self.seed if split == "train" else "test"
        if self._listed is None:
            problem = self._sample(split, seed, index)
        elif split == "train":
            problems = self._listed["train"]
            epoch, position = divmod(index, len(problems))
            order = permutation(len(problems), seed, epoch)
            problem = problems[order[position]]
        elif index < len(self._listed["test"]):
            problem = self._listed["test"][index]
        else:
            raise ValueError(
                f"countdown: test problem {index} asked for, but there are {self.size('test')}"
            )
        # Numbers are listed in ascending order; shuffle them, so that the order tells nothing.
        shuffled = sorted(
            range(self.n_numbers), key=lambda i: stable_hash("numbers", seed, index, i)
        )
        numbers = tuple(problem.numbers[i] for i in shuffled)
        return CountdownProblem(numbers, problem.target, self.template)

    @staticmethod
    def problem_from_text(text: str) -> CountdownProblem:
        """`parse_prompt`."""
        return parse_prompt(text)

    @staticmethod
    def problem_from_record(record: Mapping[str, Any]) -> CountdownProblem:
        """The problem of {"numbers": [3, 7, 9], "target": 13}; a number may be text, like "13".

        `template` may stand beside it.
        """
        numbers, target = required_fields(record, "numbers", "target")
        if isinstance(numbers, list):
            numbers = [whole_in_file(number) for number in numbers]
        return CountdownProblem(numbers, whole_in_file(target), form_of(record))

    @staticmethod
    def prompt(problem: CountdownProblem) -> str:
        """`3 7 9 -> 13`, or the problem in words."""
        if problem.template != TOY:
            return FORMS[problem.template].prompt(question(problem))
        return f"{' '.join(map(str, problem.numbers))} -> {problem.target}"

    @staticmethod
    def prefilled(problem: CountdownProblem) -> str:
        """What of the answer the prompt holds already."""
        return "" if problem.template == TOY else FORMS[problem.template].prefilled

    @staticmethod
    def grade(problem: CountdownProblem, response: str) -> Grade:
        """Right if the last answer block uses every number exactly once and has the target's value.

        `(9-3)+7 = 13` counts too, but only with the target itself on the right side.
        """
        answer = parse_response(own_part(problem, response)).answer
        if answer is None:
            return Grade(0.0, None, "There is no complete <answer>...</answer> block.")
        fault = _fault(problem, answer)
        right = f"The answer uses every number once and equals {problem.target}."
        return Grade(float(fault is None), answer, fault or right)

    @staticmethod
    def same_answer(answer: str, other: str) -> bool:
        """Whether two expressions are worth the same and use the same numbers, for a vote."""
        return worth(answer) == worth(other)

    @staticmethod
    def coherence(problem: CountdownProblem, response: str) -> float:
        """The share of true equations among those that the response writes, from 0 to 1."""
        return coherence(problem.numbers, problem.target, response)

    @staticmethod
    def step_ends(response: str, is_whole: bool = True) -> list[int]:
        """Where the equations of the thoughts end, and the response (steps.py)."""
        return step_ends(response, is_whole)

    def check_step(self, problem: CountdownProblem, steps: Sequence[str]) -> StepCheck:
        """The last of these steps; what is left may be combined by the task's `ops` (steps.py)."""
        if steps[-1].startswith(END_OF_THOUGHTS):
            is_right = self.grade(problem, "".join(steps)).accuracy == 1
            return StepCheck(is_right, is_right)
        return check_step(problem.numbers, problem.target, steps, self.ops)
