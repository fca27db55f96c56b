"""The one reader of numbers: in answers of a model, and in files of problems.

    read_number("-1,234.50")                the exact fraction; None for what is no number
    read_number("$12.", prose=True)         the same, as people write in a sentence
    number_in_file(72.0)                    a value of JSON, or text; ValueError with the reason

A number is a sign, ASCII digits with or without commas between thousands, and decimals. The sign
may be a Unicode one, because models copy it from typeset text: minus (U+2212) and the small and
the full-width forms. An en dash is no minus: it stands in ranges, and `3–7` is two numbers.

Left out on purpose: exponents, underscores, digits of other scripts, `.5`, `1/2`, and numbers with
words around them. Values are exact fractions, so nothing is rounded, and texts are short, so
nothing takes long.
"""

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from ..response import WHITE_SPACE, quoted

MAX_LENGTH = 40  # characters of one number; bounds the cost of comparing
DIGITS = "0123456789"
MINUS = "-−﹣－"  # hyphen, U+2212, U+FE63, U+FF0D
PLUS = "+﹢＋"  # plus, U+FE62, U+FF0B
CURRENCY = "$€£¥"
NUMBER = re.compile(
    rf"(?P<sign>[{MINUS}{PLUS}]?)"
    rf"(?P<currency>[{CURRENCY}]?)"
    rf"(?P<inner_sign>[{MINUS}{PLUS}]?)"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
    r"(?P<decimals>\.[0-9]+)?"
    r"(?P<percent>%?)"
    r"(?P<stop>\.?)"
)


def read_number(text: str, *, leading_zeros: bool = False, prose: bool = False) -> Fraction | None:
    """The exact value of a text that is a number and nothing else but white space around it.

    leading_zeros: take `007` too. prose: take what people write in a sentence, too: `$12`, `15%`
    (which is 15), `12.` at its end, and leading zeros. None for any other text, and for a long one.
    """
    text = text.strip(WHITE_SPACE)
    match = NUMBER.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if match is None:
        return None
    signs = match["sign"] + match["inner_sign"]
    whole = match["whole"]
    has_trimmings = match["currency"] or match["percent"] or match["stop"]
    has_zeros = whole[0] == "0" and len(whole) > 1
    if len(signs) > 1 or (has_trimmings and not prose):
        return None
    if has_zeros and not (leading_zeros or prose):
        return None
    value = Fraction(whole.replace(",", "") + (match["decimals"] or ""))
    return -value if signs and signs in MINUS else value


def same_number(text: str, other: str) -> bool:
    """Whether two texts are the same number as people write one, or else the same text."""
    value = read_number(text, prose=True)
    if value is None:
        return text.strip(WHITE_SPACE) == other.strip(WHITE_SPACE)
    return value == read_number(other, prose=True)


# ---- numbers in files of problems ----


def number_in_file(value: Any) -> Fraction:
    """The exact value of a number of JSON or of a text like "72".

    Raises ValueError, with what it is, for true and false, NaN, Infinity, another kind of value,
    and a text that is no number.
    """
    if isinstance(value, str):
        number = read_number(value, leading_zeros=True)
        if number is None:
            raise ValueError(f"{quoted(value)} is not a number")
        return number
    return Fraction(number_text(value))


def text_of_number_field(name: str, value: Any) -> str:
    """`number_text` of a field that might have been text: ValueError names the field."""
    try:
        return number_text(value)
    except ValueError as error:
        raise ValueError(f'"{name}" should be text or a number: {error}') from None


def number_text(value: Any) -> str:
    """A number of JSON as text without an exponent: 72 is "72", and 72.0 is "72.0".

    Raises ValueError as `number_in_file` does, and for more than 40 characters.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{quoted(repr(value))} is not a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    # An integer of thousands of digits has no repr, and is refused by its size first.
    if abs(value) < 10**MAX_LENGTH:
        text = f"{Decimal(repr(value)):f}"
        if len(text) <= MAX_LENGTH:
            return text
    raise ValueError(f"it is a number of more than {MAX_LENGTH} characters")


def whole_in_file(value: Any) -> int:
    """The integer of 7, 7.0, "7" or "7.0"; ValueError for 3.5, and as `number_in_file` says."""
    number = number_in_file(value)
    if number.denominator != 1:
        raise ValueError(f"{quoted(str(value))} is not a whole number")
    return int(number)
