r"""The final answer of a response: in its answer block, or behind a mark that its prompt asked for.

    block       <answer>18</answer>      read always, and first
    hashes      #### 18                  the mark of GSM8K's own solutions
    boxed       \boxed{18}               what models write that were taught mathematics
    sentence    The answer is 18.        the form of chain-of-thought prompts (arXiv 2201.11903)

Of several kinds, the block goes first, then the first kind that the prompt's form names; of one
kind, the last one counts. A mark may stand inside the block. So a response has one answer, however
many it writes.

Left out: the last number of a text without a mark. It pays for numbers that were never given as the
answer. Each reader is linear in the length of the text.
"""

import re
from collections.abc import Callable

from ..response import WHITE_SPACE, parse_response
from .math_answer import boxed, unwrapped

HASHES = "####"
MAX_SENTENCE = 200  # characters of what an answer in a sentence is looked for in
SENTENCE = re.compile(
    rf"\b[Tt]he (?:final |correct )?answer is:?[ \t]*+([^\n]{{1,{MAX_SENTENCE}}}+)"
)
# LaTeX around a number that changes nothing of its value: signs, thin spaces, units in words.
LATEX = re.compile(r"\\[!,;: ]|\\(?:left|right|displaystyle)\b|\\text\{[^0-9{}]*+\}")
WRAPPERS = (("**", "**"), ("$", "$"), (r"\(", r"\)"), ("`", "`"))


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
    """What follows the last `The answer is` on its line, up to the end of its sentence."""
    found = None
    for match in SENTENCE.finditer(text):
        found = match[1]
    if found is None:
        return None
    # A full stop ends the sentence where no digit follows it.
    sentence = re.split(r"\.(?![0-9])", found, maxsplit=1)[0]
    return without_latex(sentence)


def without_latex(text: str) -> str:
    """A number without the marks of LaTeX or Markdown around it; other text hardly changes."""
    text = LATEX.sub("", text.replace("{,}", ",")).strip(WHITE_SPACE)
    for opening, closing in WRAPPERS:
        is_around = text.startswith(opening) and text.endswith(closing)
        if is_around and len(text) > len(opening) + len(closing):
            text = text[len(opening) : -len(closing)].strip(WHITE_SPACE)
    return text.replace(r"\$", "$").replace(r"\%", "%")


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
