r"""The final answer of a response: in its answer block, or behind a mark that its prompt asked for.

    block       <answer>18</answer>      read always, and first
    hashes      #### 18                  the mark of GSM8K's own solutions
    boxed       \boxed{18}               what models write that were taught mathematics
    sentence    The answer is 18.        the form of chain-of-thought prompts (arXiv 2201.11903)

Of several kinds, the block goes first, then the first kind that the prompt's form names; of one
kind, the last one counts. A mark may stand inside the block. So a response has one answer, however
many it writes. In a box and in a sentence a unit may stand behind the number: `18 dollars`.

Left out: the last number of a text without a mark. It pays for numbers that were never given as the
answer. Each reader is linear in the length of the text.
"""

import re
from collections.abc import Callable

from ..response import WHITE_SPACE, parse_response
from .answer_words import is_unit
from .math_answer import MAX_LENGTH, boxed, plain, unwrapped

HASHES = "####"
MAX_SENTENCE = 200  # characters of what an answer in a sentence is looked for in
SENTENCE = re.compile(r"\b[Tt]he (?:final |correct )?answer is:?[ \t]*+")
WRAPPERS = (("**", "**"), ("$", "$"), (r"\(", r"\)"), ("`", "`"))
# 18 dollars, 18\text{ eggs}
WITH_UNIT = re.compile(
    r"(?P<number>[^a-zA-Z{}\\]*[0-9%])"
    r"(?:\s*\\(?:text|mbox|mathrm)\{(?P<text>[^{}]*)\}|\s+(?P<words>[^{}\\]+))"
)


def final_answer(response: str, marks: tuple[str, ...]) -> str | None:
    """The final answer as it was written; None if there is none.

    marks: the kinds that are read besides the answer block, the first one first.
    """
    block = parse_response(response).answer
    text = response if block is None else block
    for mark in marks:
        answer = READERS[mark](text)
        if answer is not None:
            return answer
    return block


def behind_hashes(text: str) -> str | None:
    """What follows the last `####` that has anything behind it on its line; None without one."""
    for piece in reversed(text.split(HASHES)[1:]):
        rest_of_line = piece.partition("\n")[0].lstrip("#")
        if rest_of_line.strip(WHITE_SPACE):
            return rest_of_line
    return None


def in_box(text: str) -> str | None:
    r"""What stands in the last complete \boxed{...}, as a plain number is written; None without."""
    boxes = boxed(text)
    return without_latex(unwrapped(boxes[-1])) if boxes else None


def in_sentence(text: str) -> str | None:
    r"""What follows the last `The answer is` on its line, up to the end of its sentence.

    A box in the sentence is read too: `The answer is \boxed{18}.`
    """
    found = ""
    for match in SENTENCE.finditer(text):
        rest_of_line = text[match.end() : match.end() + MAX_SENTENCE].partition("\n")[0]
        found = rest_of_line or found
    # A full stop ends the sentence where no digit follows it.
    sentence = re.split(r"\.(?![0-9])", found, maxsplit=1)[0]
    return without_latex(unwrapped(sentence)) if found else None


def without_latex(text: str) -> str:
    """A number without a unit, LaTeX or Markdown around it; other text hardly changes."""
    if len(text) > MAX_LENGTH:
        return text
    text = plain(text.replace(r"\displaystyle", "")).strip(WHITE_SPACE)
    for opening, closing in WRAPPERS:
        is_around = text.startswith(opening) and text.endswith(closing)
        if is_around and len(text) > len(opening) + len(closing):
            text = text[len(opening) : -len(closing)].strip(WHITE_SPACE)
    text = text.replace(r"\$", "$").replace(r"\%", "%")
    match = WITH_UNIT.fullmatch(text)
    has_unit = match is not None and is_unit(match["text"] or match["words"] or "")
    return match["number"] if has_unit else text


READERS: dict[str, Callable[[str], str | None]] = {
    "hashes": behind_hashes,
    "boxed": in_box,
    "sentence": in_sentence,
}
WORDS = {
    "hashes": f"a number after {HASHES}",
    "boxed": r"a \boxed{}",
    "sentence": "a sentence `The answer is ...`",
}


def in_words(marks: tuple[str, ...]) -> str:
    """The marks for a message: `a number after ####`."""
    return " nor ".join(WORDS[mark] for mark in marks)
