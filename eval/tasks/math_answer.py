r"""Mathematical answers as text: where one stands in a response, and what can be compared exactly.

    given(r"... \boxed{\frac{1}{2}}")        \frac{1}{2}
    given("<answer>$0.5$</answer>")          0.5
    exact(r"1\frac{1}{2}")                   Fraction(3, 2)

The answer is the last complete answer block, or what is boxed in it: all boxes, because a block
that boxes two values gives two answers. Without a block it is the last complete \boxed{...}. What
stands behind it is not read. Nothing else is searched for: an answer with words around it is none.

Numbers are compared here, as exact fractions: 0.3333 is not 1/3. All else is math-verify's work
(math_worker.py), so an answer that it would take too long over is refused here first.
"""

import re
from fractions import Fraction
from itertools import accumulate

from ..response import WHITE_SPACE, parse_response
from .numbers import read_number

MAX_LENGTH = 400  # characters of an answer that is read
MAX_DEPTH = 12  # brackets, one in the other; math-verify's time grows steeply with them
BOX = r"\\(?:boxed|fbox)[ \t]*+\{"
BRACES = re.compile(rf"{BOX}|\\[\\{{}}]|[{{}}]")
ESCAPED = (r"\{", r"\}", "\\\\")
# Spaces and signs of LaTeX that change nothing, and spaces between thousands.
THIN = re.compile(r"\\[!,;: ] *|\\(?:left|right)(?![a-zA-Z])|(?<=[0-9]) +(?=[0-9]{3}(?![0-9]))")
# What says no, or says nothing: math-verify takes it for a unit, or for letters.
DENIAL = re.compile(r"\\n(?:eq?|ot)(?![a-z])|(?<![a-zA-Z\\])not(?![a-zA-Z])", re.IGNORECASE)
TWO_NUMBERS = re.compile(r"(?<!frac )[0-9]\s+[0-9.]")
CURRENCY = re.compile(r"\\?\$[ ]*(?=[-+−.]?[0-9][^$]*$)")
WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
INTEGER = r"[0-9]{1,40}"
PART = rf"(?:\{{\s*({INTEGER})\s*\}}|\s*([0-9]))"
MIXED = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<whole>{INTEGER})?\s*\\[dtc]?frac{PART}{PART}"
    rf"|(?P<sign2>[-+]?)\s*({INTEGER})\s*/\s*({INTEGER})"
)
BASED = re.compile(rf"({INTEGER})_(?:\{{([0-9]{{1,2}})\}}|([0-9]{{1,2}}))")


# ---- where the answer stands ----


def boxed(text: str) -> list[str]:
    r"""What stands in each complete \boxed{...}, in order; of a box in a box, the outer one.

    Linear in the length of `text`.
    """
    found: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the box of an open brace begins; None for other braces
    for match in BRACES.finditer(text):
        sign = match[0]
        if sign == "{":
            opened.append(None)
        elif sign == "}":
            start = opened.pop() if opened else None
            if start is None:
                continue
            # The boxes inside of this one are a part of it.
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, match.start()))
        elif sign.endswith("{") and len(sign) > 2:
            opened.append(match.end())
    return [text[start:end] for start, end in found]


def given(text: str) -> str | None:
    """The answer in a response, without the marks around it; None if there is none."""
    block = parse_response(text).answer
    boxes = boxed(text if block is None else block)
    if block is None:
        return unwrapped(boxes[-1]) if boxes else None
    different = list(dict.fromkeys(unwrapped(box) for box in boxes))
    return ", ".join(different) if different else unwrapped(block)


def unwrapped(text: str) -> str:
    """An answer without white space, dollar signs of LaTeX, a box or a full stop around it."""
    text = text.strip(WHITE_SPACE)
    if len(text) > MAX_LENGTH:
        return text
    before = None
    while text != before:
        before = text
        text = text.removesuffix(".").strip(WHITE_SPACE)
        for opening, closing in WRAPPERS:
            inner = text[len(opening) : -len(closing)]
            if text == f"{opening}{inner}{closing}" and opening not in inner.replace(r"\$", ""):
                text = inner.strip(WHITE_SPACE)
        boxes = boxed(text)
        if len(boxes) == 1 and re.fullmatch(rf"{BOX}.*\}}", text, re.DOTALL):
            text = boxes[0].strip(WHITE_SPACE)
    return CURRENCY.sub("", text.replace("−", "-").replace("~", " "), count=1)


def unreadable(answer: str) -> str | None:
    """Why an answer is not read at all, in one sentence; None for one that is."""
    if not answer:
        return "The answer is empty."
    if len(answer) > MAX_LENGTH:
        return f"The answer has more than {MAX_LENGTH} characters, which is not read."
    depth = list(accumulate((char in "{([") - (char in "})]") for char in answer))
    if max(depth) > MAX_DEPTH:
        return f"The answer has more than {MAX_DEPTH} brackets, one in the other."
    signs = (match[0] for match in BRACES.finditer(answer))
    braces = list(accumulate(0 if sign in ESCAPED else 1 - 2 * (sign == "}") for sign in signs))
    if braces and (min(braces) < 0 or braces[-1] != 0):
        return "The answer has a brace without its partner."
    if "$" in answer.replace(r"\$", ""):
        return "The answer has text around a formula; only the formula should be there."
    if exact(answer) is None and TWO_NUMBERS.search(plain(answer)):
        return "The answer has two numbers with nothing but space between them."
    return None


def says_not(text: str) -> bool:
    """Whether an answer says what is not the case."""
    return DENIAL.search(text) is not None


# ---- what can be compared exactly ----


def plain(text: str) -> str:
    """An answer without thin spaces, and with commas between thousands as in prose."""
    return THIN.sub("", text.replace("{,}", ",")).strip()


def exact(text: str) -> Fraction | None:
    """The value of a number, a fraction or a mixed number; None for all else, percent too."""
    text = plain(text)
    if text.endswith("%"):
        return None
    if re.fullmatch(r"[-+]?\.[0-9]+", text):
        text = text.replace(".", "0.")
    match = MIXED.fullmatch(text)
    if match is None:
        return read_number(text, prose=True)
    sign, whole, *parts, sign2, top, bottom = match.groups()
    if top is None:
        top, bottom = (part for part in parts if part is not None)
    if int(bottom) == 0:
        return None
    value = int(whole or 0) + Fraction(int(top), int(bottom))
    return -value if (sign or sign2) == "-" else value


def based(text: str) -> tuple[str, int] | None:
    """(digits, base) of a number with its base, like 1011_2; None for all else."""
    match = BASED.fullmatch(plain(text))
    return match and (match[1], int(match[2] or match[3]))


def are_equal(gold: str, answer: str) -> bool | None:
    """Whether two answers are the same number; None where only math-verify can tell."""
    gold_based, answer_based = based(gold), based(answer)
    if gold_based is not None:
        # The problem names the base, so an answer may leave it out.
        return answer_based == gold_based or plain(answer) == gold_based[0]
    if answer_based is not None:
        return False
    value, other = exact(gold), exact(answer)
    if value is None or other is None:
        return None
    return value == other
