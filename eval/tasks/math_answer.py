r"""Mathematical answers as text: where one stands in a response, and what can be compared exactly.

    given(r"... \boxed{\frac{1}{2}}")        \frac{1}{2}
    given("<answer>$0.5$</answer>")          0.5
    exact(r"1\frac{1}{2}")                   Fraction(3, 2)

The answer is the last complete answer block, or what is boxed in it: all boxes, because a block
that boxes two values gives two answers. Without a block it is the last complete \boxed{...}. What
stands behind it is not read. Nothing else is searched for: an answer with words around it is none.

Numbers are compared here, as exact fractions: 0.3333 is not 1/3. All else is math-verify's work
(math_worker.py), so an answer that it would take too long over is refused here first.

Chosen, as math-verify does: 5\% is right for 5 and for 0.05, and 500\% for 5; a ratio is its
quotient, so 7/30 is right for 7:30; 15 digits of \pi are right for \pi; (1,2) and \{1,2\} are right
for 1,2; units are not compared.
"""

import re
from fractions import Fraction
from itertools import accumulate

from ..response import WHITE_SPACE, parse_response
from .numbers import read_number

MAX_LENGTH = 400  # characters of an answer that is read
MAX_DEPTH = 12  # brackets, one in the other; math-verify's time grows steeply with them

# Braces. \boxed{, \fbox {
BOX = re.compile(r"\\(?:boxed|fbox)[ \t]*+\{")
ESCAPED = (r"\{", r"\}", "\\\\")  # no braces that group
BRACES = re.compile(r"\\[\\{}]|[{}]")

# Around an answer. $x$, \(x\)
WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
# $12, \$12, \$ -.5
CURRENCY = re.compile(r"\\?\$[ ]*(?=[-+−.]?[0-9][^$]*$)")
# \text{1}
DIGITS_AS_TEXT = re.compile(r"\\(?:text|mbox|mathrm)\{([0-9]+)\}")

# Inside of one. \left(, 10,\!080
NOTHING = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\! *|\\[,;: ](?= *$)")
# 10\,080
SPACE = re.compile(r"\\[,;: ]")
# 10 080, but not 1 2
BETWEEN_THOUSANDS = re.compile(r"(?<=[0-9]) +(?=[0-9]{3}(?![0-9]))")
# 5 6; but \frac 5 6 and \log_2 3 are one value
TWO_NUMBERS = re.compile(r"(?<!frac )(?<![_^])[0-9]\s+[0-9.]")

# What a question may hold and an answer, too. 5, x=5, 90^\circ, \$2.50, 5cm, Ann, (A)
BARE = re.compile(
    r"(?:[a-zA-Z]=)?(?:[-+]?(?:\\?\$)?[0-9.,]+(?:\\?%|\^\\circ)?[a-zA-Z]*|\(?[a-zA-Z]+\)?)"
)

# Numbers. {12}, 3
INTEGER = r"[0-9]{1,40}"
PART = rf"(?:\{{\s*{INTEGER}\s*\}}|\s*[0-9])"
# \frac{1}{2}, \frac12, -1\frac{4}{5}
MIXED = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<whole>{INTEGER})?\s*\\[dtc]?frac(?P<top>{PART})(?P<bottom>{PART})"
)
# 1/2, - 1 / 2
QUOTIENT = re.compile(rf"(?P<sign>[-+]?)\s*(?P<top>{INTEGER})\s*/\s*(?P<bottom>{INTEGER})")
# 0.\overline{3}, -1.2\bar{45}
REPEATING = re.compile(
    rf"(?P<sign>[-+]?)(?P<whole>{INTEGER})?\.(?P<fixed>[0-9]{{0,20}})"
    r"\\(?:overline|bar)\s*(?:\{(?P<cycle>[0-9]{1,20})\}|(?P<digit>[0-9]))"
)
# 1011_2, 2516_{8}, BEE_{16}
BASED = re.compile(
    rf"(?P<digits>{INTEGER}|[0-9A-F]{{2,40}}(?=_\{{16\}}))"
    r"_(?:\{(?P<base>[0-9]{1,40})\}|(?P<digit>[0-9]))"
)


# ---- where the answer stands ----


def in_braces(text: str, opening: re.Pattern) -> list[str]:
    r"""What stands in each complete \command{...}, in order; of one in another, the outer one.

    opening: matches the command with its brace. Linear in the length of `text`.
    """
    found: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the text of an open brace begins; None for other braces
    for match in re.finditer(rf"(?P<opening>{opening.pattern})|{BRACES.pattern}", text):
        if match["opening"]:
            opened.append(match.end())
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}":
            start = opened.pop() if opened else None
            if start is None:
                continue
            # What was found inside of this one is a part of it.
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, match.start()))
    return [text[start:end] for start, end in found]


def boxed(text: str) -> list[str]:
    r"""What stands in each complete \boxed{...}, in order; of a box in a box, the outer one."""
    return in_braces(text, BOX)


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
        if len(boxes) == 1 and re.fullmatch(rf"{BOX.pattern}.*\}}", text, re.DOTALL):
            text = boxes[0].strip(WHITE_SPACE)
    text = DIGITS_AS_TEXT.sub(r"\1", text.replace("−", "-").replace("~", " "))
    return CURRENCY.sub("", text, count=1)


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


# ---- answers as they are spelled ----


def spelled(text: str) -> str:
    r"""An answer without what makes no difference: spaces, \left, \text, braces around a sign."""
    text = plain(text)
    text = re.sub(r"\\(?:text|mbox|mathrm)\s*(?=\{)", "", text)
    text = re.sub(r"\\[dtc](frac|binom)", r"\\\1", re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text))
    text = re.sub(r"\{([^{}\\])\}", r"\1", text)
    return text[1:-1] if re.fullmatch(r"\{[^{}]*\}", text) else text


def is_copied(question: str, gold: str, answer: str) -> bool:
    """Whether an answer is an expression of the question, and not the right answer as written.

    What is 99^2 + 99 + 1? It is 99^2 + 99 + 1: that is true, and no answer. Numbers and names are
    no such copies, alone or behind `x =`.
    """
    if not answer or len(answer) > MAX_LENGTH:
        return False
    text, wanted = spelled(answer), spelled(gold)
    # 1/2 is no part of 11/2.
    copied = re.search(rf"(?<![0-9.]){re.escape(text)}(?![0-9])", spelled(question))
    if copied is None or BARE.fullmatch(text):
        return False
    return (fraction_parts(text) or text) != (fraction_parts(wanted) or wanted)


# ---- what can be compared exactly ----


def plain(text: str) -> str:
    """An answer without marks of spacing, and with commas between thousands as in prose."""
    text = SPACE.sub(" ", NOTHING.sub("", text.replace("{,}", ",")))
    return BETWEEN_THOUSANDS.sub("", text).strip()


def fraction_parts(text: str) -> tuple[str, int, int, int] | None:
    """(sign, whole, top, bottom) of a fraction or a mixed number; None for all else."""
    match = MIXED.fullmatch(text) or QUOTIENT.fullmatch(text)
    if match is None:
        return None
    top, bottom = (int(match[name].strip("{} ")) for name in ("top", "bottom"))
    return match["sign"], int(match.groupdict().get("whole") or 0), top, bottom


def repeating(match: re.Match) -> Fraction:
    """The value of a decimal whose last digits repeat: 0.1666... is 1/10 + 6/90."""
    cycle, fixed = match["cycle"] or match["digit"], match["fixed"]
    head = Fraction(int((match["whole"] or "0") + fixed), 10 ** len(fixed))
    tail = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
    return -(head + tail) if match["sign"] == "-" else head + tail


def exact(text: str) -> Fraction | None:
    """The value of a number, a fraction or a mixed number; None for all else, percent too."""
    text = plain(text)
    if parts := fraction_parts(text):
        sign, whole, top, bottom = parts
        value = whole + Fraction(top, bottom) if bottom else None
        return -value if value is not None and sign == "-" else value
    if match := REPEATING.fullmatch(text):
        return repeating(match)
    if text.endswith("%"):
        return None
    if re.fullmatch(r"[-+]?\.[0-9]+", text):
        text = text.replace(".", "0.")
    return read_number(text, prose=True)


def based(text: str) -> tuple[str, int] | None:
    """(digits, base) of a number with its base, like 1011_2; None for all else."""
    match = BASED.fullmatch(plain(text))
    return match and (match["digits"], int(match["base"] or match["digit"]))


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
