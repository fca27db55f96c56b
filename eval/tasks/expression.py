"""Arithmetic as a model writes it: a bounded parser with exact values, for unchecked text.

    sum     = product (("+" | "-") product)*          left to right
    product = factor (("*" | "/") factor)*            left to right, before sums
    factor  = integer | "(" sum ")"

`×` and `÷` count as `*` and `/`, and the Unicode forms of plus and minus (numbers.py) as those.
Integers have ASCII digits, at most nine, and no leading zero. Space, tab and line breaks may stand
between the tokens. Values are exact fractions, so 8/(3-8/3) is 24 and nothing is rounded.

Left out on purpose: signs (`-3`, `+3`: numbers are given without a sign, and `3--4` invites
mistakes), powers, `//`, decimals, underscores, digits of other scripts, comments, implied
multiplication (`2(3)`, `3 4`), and Python's own evaluator, which knows all of these and can be made
to hang or to crash.
"""

from collections.abc import Iterator
from fractions import Fraction

from ..response import WHITE_SPACE
from .numbers import DIGITS, MINUS, PLUS

MAX_LENGTH = 200  # characters of one expression; bounds the time and the size of every value
MAX_DEPTH = 20  # brackets inside brackets; bounds the recursion
MAX_DIGITS = 9  # digits of one integer

OPERATOR = {char: char for char in "*/()"}
OPERATOR |= {"×": "*", "÷": "/"}
OPERATOR |= dict.fromkeys(PLUS, "+")
OPERATOR |= dict.fromkeys(MINUS, "-")


class ExpressionError(ValueError):
    """The text is no expression of the grammar above; the message says why, counting from 1."""


def _tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, value, position) of each token: kind is "number", an operator or bracket, or "end"."""
    i = 0
    while i < len(text):
        start, char = i, text[i]
        i += 1
        if char in WHITE_SPACE:
            continue
        if char in OPERATOR:
            yield OPERATOR[char], 0, start + 1
        elif char in DIGITS:
            while i < len(text) and text[i] in DIGITS:
                i += 1
            digits = text[start:i]
            if len(digits) > MAX_DIGITS:
                raise ExpressionError(
                    f"more than {MAX_DIGITS} digits in the number at character {start + 1}"
                )
            if digits[0] == "0" and len(digits) > 1:
                raise ExpressionError(f"the number at character {start + 1} begins with a zero")
            yield "number", int(digits), start + 1
        else:
            raise ExpressionError(
                f"{char!a} at character {start + 1} is not a digit, + - * / or a bracket"
            )
    yield "end", 0, len(text) + 1


class _Parser:
    """Recursive descent; `kind`, `value` and `position` are those of the next token."""

    def __init__(self, text: str):
        self.tokens = _tokens(text)
        self.numbers: list[int] = []
        self.advance()

    def advance(self) -> None:
        self.kind, self.value, self.position = next(self.tokens)

    def unexpected(self, expected: str) -> ExpressionError:
        found = {"end": "it ends", "number": "there is a number"}.get(
            self.kind, f"there is a {self.kind!r}"
        )
        return ExpressionError(f"{found} at character {self.position} where {expected} should be")

    def sum(self, depth: int) -> Fraction:
        total = self.product(depth)
        while self.kind in ("+", "-"):
            operator = self.kind
            self.advance()
            term = self.product(depth)
            total = total + term if operator == "+" else total - term
        return total

    def product(self, depth: int) -> Fraction:
        total = self.factor(depth)
        while self.kind in ("*", "/"):
            operator, position = self.kind, self.position
            self.advance()
            factor = self.factor(depth)
            if operator == "/" and factor == 0:
                raise ExpressionError(f"it divides by zero at character {position}")
            total = total * factor if operator == "*" else total / factor
        return total

    def factor(self, depth: int) -> Fraction:
        if self.kind == "number":
            number = self.value
            self.numbers.append(number)
            self.advance()
            return Fraction(number)
        if self.kind != "(":
            raise self.unexpected("a number or an opening bracket")
        if depth == MAX_DEPTH:
            raise ExpressionError(
                f"more than {MAX_DEPTH} nested brackets at character {self.position}"
            )
        self.advance()
        value = self.sum(depth + 1)
        if self.kind != ")":
            raise self.unexpected("an operator or a closing bracket")
        self.advance()
        return value


def parse_expression(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of `text`, and the integers in it in the order they are written.

    Raises ExpressionError for anything outside the grammar or its limits, and for a division by
    zero.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"it has {len(text)} characters and at most {MAX_LENGTH} are read")
    parser = _Parser(text)
    value = parser.sum(depth=0)
    if parser.kind != "end":
        raise parser.unexpected("an operator or the end")
    return value, parser.numbers
