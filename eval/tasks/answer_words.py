r"""Words and marks in a mathematical answer that say more than its value.

    extra("5", r"5 \text{ or 6}")           a sentence: what should not stand there
    extra("5", r"5\text{ cm}")              None: a unit may stand behind a value
    is_unit("dollars per hour")             True

math-verify drops what it does not know, so \text{ or 6}, \text{ is wrong} and _{6} behind a 5 would
be paid as 5. Units are told from other words by what they are not: they have no digits, they are
few words, and none of those below.

Left out: a list of all units, and whether a unit fits: 10\text{ m} is taken for 10\text{ cm}.
Only its power is compared, where both have one.
"""

import re

from ..response import quoted
from .math_answer import in_braces

# \text{, \textbf{, \mbox{, \mathrm{: what stands in their braces is words.
TEXT = re.compile(r"\\(?:text[a-z]*|[mh]box|emph|math(?:rm|bf|it|sf|tt)|operatorname)\s*\{")
# cm, sq. in, m/s, cm^2, o'clock
UNIT = re.compile(r"(?:[^\W\d_]|[ ./°²³'~-]|\^\{?-?[0-9]\}?)+")
MAX_UNIT_WORDS = 4
# The 2 of \text{ cm}^2, \mbox{ in}^{2}
POWER = re.compile(rf"{TEXT.pattern}[^{{}}]*\}}\s*\^\s*\{{?([0-9]+)")
JOINING = ("and", "or")  # alone between two values, they make a list
NO_UNIT = frozenset(
    "and or nor not no never isn't ain't but wrong false incorrect untrue is are was be maybe "
    "perhaps possibly if unless except either neither else than rather instead more less least "
    "most zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
    "ninety hundred thousand million billion dozen".split()
)
# What an answer may hold only if the right answer does, too.
MARKS = {
    # x \ne 5, \not 5, not 5
    "a denial": re.compile(r"\\n(?:eq?|ot)(?![a-z])|(?<![a-zA-Z\\])not(?![a-zA-Z])", re.IGNORECASE),
    # 5_{6}, (5)_6
    "an index at a number": re.compile(r"[0-9})\]]\s*_"),
    # 5', \pi^\prime; f'(x) = 2x has none
    "a prime at a value": re.compile(
        r"[0-9})\]]\s*(?:'|\^\s*\{?\s*\\prime)|(?:'|\^\s*\{?\s*\\prime\s*\}?)\s*$"
    ),
    # [-\infty, 0]
    "a closed bracket at infinity": re.compile(r"\[\s*-\s*\\infty|\\infty\s*(?:\\right)?\s*\]"),
    # x \in 5
    "an element of a number": re.compile(r"\\in(?![a-z])\s*(?:[-+.0-9]|\\(?:[dt]?frac|sqrt))"),
}


def is_unit(text: str) -> bool:
    """Whether a text may be a unit (`square feet`), or the name of what is counted (`apples`)."""
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())
    few = 1 <= len(words) <= MAX_UNIT_WORDS
    return few and UNIT.fullmatch(text) is not None and NO_UNIT.isdisjoint(words)


def texts(answer: str) -> list[str]:
    r"""What stands in each \text{...} of an answer, in small letters."""
    return [" ".join(text.lower().split()) for text in in_braces(answer, TEXT)]


def marks(answer: str) -> list[str]:
    """The kinds of marks in an answer that change what its value says."""
    return [kind for kind, pattern in MARKS.items() if pattern.search(answer)]


def extra(gold: str, answer: str) -> str | None:
    """What the answer says besides a value, in one sentence; None where that is nothing.

    What the right answer holds is never too much.
    """
    for kind in marks(answer):
        if kind not in marks(gold):
            return f"The answer {quoted(answer)} has {kind}."
    powers, wanted = POWER.findall(answer), POWER.findall(gold)
    if powers and wanted and powers != wanted:
        return f"The answer {quoted(answer)} has another power of the unit."
    known = texts(gold)
    words = texts(answer)
    is_all_words = len(words) == 1 and TEXT.match(answer) and answer.endswith("}")
    for text in words:
        is_joining = text.strip(", ") in JOINING
        if not (is_all_words or is_joining or text in known or is_unit(text)):
            return f"The answer {quoted(answer)} has words that are no unit: {quoted(text)}."
    return None
