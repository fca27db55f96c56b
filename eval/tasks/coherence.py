"""How many of the equations that a response to Countdown writes are true?

    <think>9-7=2,3+2=6,6-13=-7 no;(9-3)+7=13 ok</think><answer>(9-3)+7</answer>        3 of 4

An equation is arithmetic of two numbers or more with an `=` behind it, anywhere before the answer
block. It counts as true if both sides have exactly the same value, and if its numbers come from
somewhere: they are given, are the target, or are the result of an earlier equation of such numbers.

Since this may be paid for, it must not be cheap to fake:
- no equation at all earns 0, not 1;
- an equation that is written again counts once, true or false;
- an equation about other numbers (1+1=2) counts as false;
- one that cannot be read (9--7=2) counts as false.
What is left to fake: one true equation earns as much as many, and a chain of them may lead nowhere.

The text comes from a model, so it may be anything: no text raises, and none takes long.
"""

import re
from collections.abc import Iterator
from fractions import Fraction

from .expression import ExpressionError, parse_expression

ONE_SPELLING = str.maketrans("×÷−", "*/-")
OPERATORS = "+-*/"
LEFT = "0123456789()+-*/ \t"  # the characters of the left side
# A number, or several with operators between them; the last has no decimals behind it.
RIGHT = re.compile(r"[ \t]*+(-?[0-9]++(?:[ \t]*+[-+*/][ \t]*+[0-9]++)*+)(?!\.[0-9])")


def coherence(numbers: tuple[int, ...], target: int, response: str) -> float:
    """The share of true equations among the different ones in a response; 0 if there are none."""
    known = {abs(number) for number in (*numbers, target)}
    verdicts: dict[tuple[str, str], bool] = {}
    for left, right in equations(response):
        value, used = evaluated(left)
        result, _ = evaluated(right)
        is_about_these = value is not None and known.issuperset(used)
        verdicts.setdefault((left, right), is_about_these and value == result)
        if is_about_these and result is not None:
            known.add(abs(result))
    return sum(verdicts.values()) / len(verdicts) if verdicts else 0.0


def equations(response: str) -> Iterator[tuple[str, str]]:
    """The two sides of each equation before the answer block, without spaces; the right one is
    empty where there is no number."""
    text = response.partition("<answer>")[0].translate(ONE_SPELLING)
    pieces = text.split("=")
    for before, after in zip(pieces[:-1], pieces[1:], strict=True):
        left = "".join(before[len(before.rstrip(LEFT)) :].split())
        right = RIGHT.match(after)
        if any(operator in left[1:] for operator in OPERATORS):
            yield left, "".join(right[1].split()) if right else ""


def evaluated(side: str) -> tuple[Fraction | None, list[int]]:
    """(the value, the numbers in it); (None, []) for what is no arithmetic. A sign may lead."""
    try:
        value, used = parse_expression(f"0{side}" if side.startswith("-") else side)
    except ExpressionError:
        return None, []
    return value, used[1:] if side.startswith("-") else used
