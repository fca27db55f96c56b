"""Split off train/behaviour.py."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from ..response import FRAME
from .countdown import CountdownProblem
from .expression import MAX_LENGTH

TAG = re.compile("|".join(FRAME))


TAGS_BEFORE = re.compile(rf"(?:\s*({TAG.pattern}))*")


STEP = re.compile(
    r"(-?[0-9]{1,9})([-+*/])([0-9]{1,9})=(-?[0-9]{1,9})"
)  # 9 digits: values stay small


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
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.op] == self.c


@dataclass(frozen=True)
class Attempt:
    text: str
    steps: list[Step | None]
    """None for a step that is no equation of two whole numbers."""
    verdict: str | None
    """ "ok", "no", or None if it ends with neither."""
    ends_thoughts: bool | None
    """Whether a tag follows (True) or another attempt (False); None where the response was cut
    off."""

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
        opening, text = start[1], response[start.end() :]
    ending = TAG.search(text)
    if ending is None:
        return text, False
    if opening == "<answer>" and ending[0] == "</answer>":
        return "", True
    return text[: ending.start()], True


def parse_attempts(response: str) -> list[Attempt]:
    """The attempts in a response: the pieces between `;` that hold an `=`."""
    text, ended = thoughts(response)
    pieces = [piece.strip() for piece in text.split(";")]
    attempts = []
    for place, piece in enumerate(pieces):
        is_last = place == len(pieces) - 1
        verdict = piece[-2:] if piece.endswith((" ok", " no")) else None
        was_cut = is_last and not ended
        if "=" not in piece or was_cut and verdict is None:
            continue
        equations = piece[:-3] if verdict else piece
        found = [STEP.fullmatch(step) for step in equations.split(",")]
        steps = [Step(int(m[1]), m[2], int(m[3]), int(m[4])) if m else None for m in found]
        attempts.append(Attempt(piece, steps, verdict, None if was_cut else is_last))
    return attempts


def is_valid(attempt: Attempt, problem: CountdownProblem) -> bool:
    """Whether an attempt is one of corpus.all_attempts with all four operations; none of them is
    made.

    Each step takes two numbers out of the pool, the larger first (but 0/7), and puts its true
    result back; the check comes when one number is left; and there is one way to spell it.
    """
    if (
        None in attempt.steps
        or attempt.check is None
        or not all(step.true for step in attempt.steps)
    ):
        return False
    pool = Counter(problem.numbers)
    for step in attempt.steps[:-1]:
        taken = Counter((step.a, step.b))
        zero_divided = step.op == "/" and step.a == 0
        if (step.a < step.b and not zero_divided) or not taken <= pool:
            return False
        pool = pool - taken + Counter((step.c,))
    spelled = ",".join(f"{step.a}{step.op}{step.b}={step.c}" for step in attempt.steps)
    word = "no" if attempt.check.c else "ok"
    return (
        list(pool.elements()) == [attempt.check.a]
        and attempt.check.b == problem.target
        and attempt.text == f"{spelled} {word}"
    )


def follows(answer: str, attempt: Attempt) -> bool:
    """Whether an answer is the expression of an attempt: its steps, done inside the answer, use it
    up.

    `(9-3)+7` follows 9-3=6,6+7=13: (9-3) becomes 6, and 6+7 is the last step. Steps that are false
    or use numbers not given can be followed too.
    """
    steps = attempt.steps[:-1]
    if attempt.check is None or not steps or None in steps:
        return False
    text, last = "".join(answer.split()), steps.pop()
    if len(text) > MAX_LENGTH:  # the grader reads no more either
        return False
    for step in steps:
        before, bracket, after = text.partition(f"({step.a}{step.op}{step.b})")
        if not bracket:
            return False
        text = f"{before}{step.c}{after}"
    return text == f"{last.a}{last.op}{last.b}"
