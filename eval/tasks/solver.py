"""All values and all expressions that given numbers reach, each number used exactly once.

A table over the subsets of the numbers: the values of a subset come from every way to part it in
two. The table has each value once, so six numbers and four operations take a fraction of a second
although they have millions of expressions. With `whole` every step must give a whole number that is
not negative (as a child would work); without it any exact fraction may occur on the way, as the
Game of 24 needs (8/(3-8/3)), and the table of six numbers gets very large.

Expressions have brackets around every inner step: `(9-3)+7`.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction

OPERATIONS = "+-*/"
MAX_NUMBERS = 6


def apply(op: str, a: int | Fraction, b: int | Fraction, whole: bool) -> int | Fraction | None:
    """a op b, None where it is not allowed."""
    if op == "+":
        return a + b
    if op == "*":
        return a * b
    if op == "-":
        return None if whole and a < b else a - b
    if b == 0 or (whole and a % b):
        return None
    return a // b if whole else Fraction(a) / b


def _bracketed(text: str) -> str:
    return text if text.isdigit() else f"({text})"


def _join(left: str, op: str, right: str) -> str:
    return f"{_bracketed(left)}{op}{_bracketed(right)}"


def _halves(mask: int) -> Iterator[tuple[int, int]]:
    """All ordered ways to part the set bits of `mask` in two, neither empty."""
    part = (mask - 1) & mask
    while part:
        yield part, mask ^ part
        part = (part - 1) & mask


def _reach_table(numbers: Sequence[int], ops: str, whole: bool) -> list[dict[int | Fraction, str]]:
    """For every subset of the numbers (as bits): its values, each with one expression."""
    if not 1 <= len(numbers) <= MAX_NUMBERS:
        raise ValueError(f"the solver takes 1 to {MAX_NUMBERS} numbers, got {len(numbers)}")
    table: list[dict[int | Fraction, str]] = [{} for _ in range(1 << len(numbers))]
    for mask in range(1, len(table)):
        if mask.bit_count() == 1:
            number = numbers[mask.bit_length() - 1]
            table[mask][number] = str(number)
            continue
        for left, right in _halves(mask):
            for a, left_text in table[left].items():
                for b, right_text in table[right].items():
                    for op in ops:
                        value = apply(op, a, b, whole)
                        if value is not None and value not in table[mask]:
                            table[mask][value] = _join(left_text, op, right_text)
    return table


def reachable(
    numbers: Sequence[int], ops: str = OPERATIONS, whole: bool = True
) -> dict[int | Fraction, str]:
    """Every value of all the numbers together, with one expression each.

    Raises ValueError for more than 6 numbers.
    """
    return _reach_table(numbers, ops, whole)[-1]


def solutions(
    numbers: Sequence[int], target: int, ops: str = OPERATIONS, whole: bool = True
) -> Iterator[str]:
    """All different expressions for the target, one by one, `a+b` and `b+a` both.

    Raises ValueError for more than 6 numbers.
    """
    table = _reach_table(numbers, ops, whole)

    def ways(mask: int, value: int | Fraction) -> Iterator[str]:
        if mask.bit_count() == 1:
            yield table[mask][value]
            return
        for left, right in _halves(mask):
            for a in table[left]:
                for b in table[right]:
                    for op in ops:
                        if apply(op, a, b, whole) == value:
                            for left_text in ways(left, a):
                                for right_text in ways(right, b):
                                    yield _join(left_text, op, right_text)

    if target in table[-1]:
        yield from _distinct(ways(len(table) - 1, target))


def _distinct(texts: Iterator[str]) -> Iterator[str]:
    """Each text once: equal numbers give the same text in several ways."""
    seen = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text
