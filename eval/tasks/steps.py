"""The steps of a response to Countdown: where each ends, and whether it is right so far.

    <think>9-7=2|,3+2=5|,5-13=-8 no|;9+7=16|,16-3=13|,13-13=0 ok|</think><answer>(9+7)-3</answer>|

A step of the thoughts is a piece between `,`, `;` and `</think>`, with the mark in front of it. The
last step is all that follows: the answer. A step ends where the mark of the next one begins, or
with the response, so one that was cut off has no end. (An attempt begins with `;`: attempts.py.)

Of each step two things are checked, by exact arithmetic:

    true      it is a true equation of numbers that are at hand, or a check with a true verdict
    reaches   it is true, and what it leaves at hand can still become the target, by enumeration

"True" is what a person would mark (PRM800K, arXiv 2305.20050). "Reaches" looks ahead, to the end of
the attempt. The rollouts of Math-Shepherd (arXiv 2312.08935) look to the end of the answer: after a
step that leads nowhere, a policy that tries again may still be right. Of the answer itself both are
its grade.

After a step that is not true, the attempt goes on with the result that was written: later steps can
be true again, but reach nothing. Left out: steps of any other form of thoughts, which are false.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from .attempts import VERDICTS, Step, ending_of, parse_step
from .solver import MAX_NUMBERS, reachable

MARK = re.compile(r"[,;]|</think>")
END_OF_THOUGHTS = "</think>"


class StepCheck(NamedTuple):
    """Two facts about a step."""

    true: bool
    reaches: bool


NOTHING = StepCheck(False, False)


def step_ends(response: str, is_whole: bool = True) -> list[int]:
    """The number of characters up to the end of each step, rising.

    is_whole: whether the response ended by itself. Linear in the text's length.
    """
    ends = []
    thoughts = response.partition(END_OF_THOUGHTS)[0]
    for mark in MARK.finditer(thoughts, 1):
        ends.append(mark.start())
    if len(thoughts) < len(response):
        ends.append(len(thoughts))
    if is_whole:
        ends.append(len(response))
    # A response that begins with a mark has no step before it.
    return [end for end in ends if end > 0]


def cut_steps(response: str, ends: Sequence[int]) -> list[str]:
    """The text of each step, its mark in front."""
    return [response[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def check_step(numbers: tuple[int, ...], target: int, steps: Sequence[str], ops: str) -> StepCheck:
    """Check the last of these steps of the thoughts. ops: what may be done with what is left."""
    # 1. The attempt that it belongs to, and the numbers that are at hand before it.
    begins = [i for i, text in enumerate(steps) if text.startswith(";")]
    *before, last = [equation_of(text) for text in steps[begins[-1] if begins else 0 :]]
    at_hand, is_spoiled = Counter(numbers), False
    for text in before:
        left = after(at_hand, parse_step(text))
        is_spoiled |= left is None or not parse_step(text).true
        at_hand = at_hand if left is None else left

    # 2. With one number left the step is the check, v-t=d and a verdict.
    ending = ending_of(last)
    step = parse_step(last.removesuffix(ending))
    if step is None or not step.true:
        return NOTHING
    if at_hand.total() == 1:
        is_check = step.op == "-" and at_hand == Counter([step.a]) and step.b == target
        has_verdict = VERDICTS.get(ending) == ("no" if step.c else "ok")
        is_true = is_check and has_verdict
        return StepCheck(is_true, is_true and not is_spoiled and step.c == 0)

    # 3. Any other step takes two numbers, and leaves its result beside the others.
    left = after(at_hand, step)
    if left is None or ending:
        return NOTHING
    return StepCheck(
        True, not is_spoiled and can_reach(tuple(sorted(left.elements())), target, ops)
    )


def equation_of(text: str) -> str:
    """A step without its mark, and without the tag that opens the thoughts."""
    return text.removeprefix("<think>").lstrip(",;").removeprefix("<think>").strip()


def after(at_hand: Counter, step: Step | None) -> Counter | None:
    """The numbers at hand after a step, as it is written; None if it takes others, or is none."""
    if step is None:
        return None
    taken = Counter((step.a, step.b))
    return at_hand - taken + Counter((step.c,)) if taken <= at_hand else None


@lru_cache(maxsize=100_000)
def can_reach(numbers: tuple[int, ...], target: int, ops: str) -> bool:
    """Whether all the numbers together can become the target, by steps as problems are made of."""
    assert len(numbers) <= MAX_NUMBERS
    return target in reachable(numbers, ops)
