"""Reads the attempts in a response to Countdown, as models write them that saw worked attempts.

    <think>9-7=2,3+2=5,5-13=-8 no;9+7=16,16-3=13,13-13=0 ok</think><answer>(9+7)-3</answer>

An attempt is a piece of the thoughts between `;`. It has steps, which are equations like 9-7=2
between `,`. The last step is the check: the value reached minus the target. An attempt ends with a
verdict, ok or no, in either of two languages.

The text comes from a model, so it may be anything: no text raises, and none takes long.

Left out: thoughts in any other form, which hold no attempts, and any statistics of attempts.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..response import FRAME
from .expression import MAX_LENGTH

if TYPE_CHECKING:  # countdown.py checks steps, and so needs this file
    from .countdown import CountdownProblem

TAG = re.compile("|".join(FRAME))
TAGS_BEFORE = re.compile(rf"(?:\s*({TAG.pattern}))*")
# a op b = c; at most 9 digits each, so that values stay small.
STEP = re.compile(r"(-?[0-9]{1,9})([-+*/])([0-9]{1,9})=(-?[0-9]{1,9})")

# How a verdict is written, in either language, with the space before it.
VERDICTS = {" ok": "ok", " no": "no", " 对": "ok", " 错": "no"}


class Step(NamedTuple):
    """An equation as written: a op b = c."""

    a: int
    op: str
    b: int
    c: int

    @property
    def true(self) -> bool:
        """Whether it holds exactly; a division that leaves a remainder does not."""
        if self.op == "/":
            return self.b != 0 and self.a == self.b * self.c
        results = {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}
        return results[self.op] == self.c

    def spelled(self) -> str:
        """The one way to write it, `9-7=2`."""
        return f"{self.a}{self.op}{self.b}={self.c}"


@dataclass(frozen=True)
class Attempt:
    text: str
    steps: list[Step | None]
    """The equations, the check last; None for a step that is no equation of two whole numbers."""
    verdict: str | None
    """ "ok" or "no", in whichever language it is written; None if the attempt ends with neither."""
    ends_thoughts: bool | None
    """Whether a tag follows (True) or another attempt (False); None where it was cut off."""

    @property
    def check(self) -> Step | None:
        """The last step v-t=d, if it is readable and stands before a verdict."""
        last = self.steps[-1]
        return last if self.verdict and last and last.op == "-" else None


def thoughts(response: str) -> tuple[str, bool]:
    """(what was thought, whether a tag ended it): the text from the first <think> to the next tag.

    Broken tags are for the format reward to judge. Without a <think> the text counts from its start
    (after tags that it begins with), unless it is an answer block.
    """
    _, opening, text = response.partition("<think>")
    if not opening:
        start = TAGS_BEFORE.match(response)
        opening = start[1]  # the last of the tags at the start, None if there is none
        text = response[start.end() :]
    ending = TAG.search(text)
    if ending is None:
        return text, False
    if opening == "<answer>" and ending[0] == "</answer>":
        return "", True
    return text[: ending.start()], True


def parse_attempts(response: str) -> list[Attempt]:
    """The attempts in a response: the pieces between `;` that hold an `=`.

    The last piece of a response that was cut off counts only if its verdict was written.
    """
    text, ended = thoughts(response)
    pieces = [piece.strip() for piece in text.split(";")]
    attempts = []
    for index, piece in enumerate(pieces):
        is_last = index == len(pieces) - 1
        was_cut = is_last and not ended
        ending = ending_of(piece)
        verdict = VERDICTS.get(ending)
        if "=" not in piece or (was_cut and verdict is None):
            continue
        equations = piece.removesuffix(ending)
        steps = [parse_step(equation) for equation in equations.split(",")]
        ends_thoughts = None if was_cut else is_last
        attempts.append(Attempt(piece, steps, verdict, ends_thoughts))
    return attempts


def ending_of(text: str) -> str:
    """The written verdict that a text ends with; empty for none."""
    return next((ending for ending in VERDICTS if text.endswith(ending)), "")


def parse_step(equation: str) -> Step | None:
    """An equation of two whole numbers, None for any other text."""
    match = STEP.fullmatch(equation)
    if match is None:
        return None
    a, op, b, c = match.groups()
    return Step(int(a), op, int(b), int(c))


def is_valid(attempt: Attempt, problem: "CountdownProblem") -> bool:
    """Whether an attempt is one of the problem's worked attempts, letter for letter.

    A worked attempt uses each number once, with any of the four operations; there is one way to
    spell it.
    """
    # 1. Every step is a true equation, and the check is there.
    check = attempt.check
    if None in attempt.steps or check is None or not all(step.true for step in attempt.steps):
        return False
    # 2. Each step replaces two numbers of the pool, the larger first (but 0/7), by its result.
    pool = Counter(problem.numbers)
    for step in attempt.steps[:-1]:
        taken = Counter((step.a, step.b))
        zero_divided = step.op == "/" and step.a == 0
        if (step.a < step.b and not zero_divided) or not taken <= pool:
            return False
        pool = pool - taken + Counter((step.c,))
    # 3. One number is left, and the check compares it with the target.
    if list(pool.elements()) != [check.a] or check.b != problem.target:
        return False
    # 4. The verdict is true, and the attempt is spelled in the one way there is.
    verdict = "no" if check.c else "ok"
    spelled = ",".join(step.spelled() for step in attempt.steps)
    is_spelled_so = attempt.text == f"{spelled}{ending_of(attempt.text)}"
    return attempt.verdict == verdict and is_spelled_so


def follows(answer: str, attempt: Attempt) -> bool:
    """Whether an answer is the expression of an attempt.

    `(9-3)+7` follows 9-3=6,6+7=13: (9-3) becomes 6, and 6+7 is the last step. Steps that are false
    or use numbers not given can be followed too.
    """
    steps = attempt.steps[:-1]  # without the check
    if attempt.check is None or not steps or None in steps:
        return False
    text = "".join(answer.split())
    if len(text) > MAX_LENGTH:  # the grader reads no more either
        return False
    *inner, last = steps
    for step in inner:
        before, bracket, after = text.partition(f"({step.a}{step.op}{step.b})")
        if not bracket:
            return False
        text = f"{before}{step.c}{after}"
    return text == f"{last.a}{last.op}{last.b}"
