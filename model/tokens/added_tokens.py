"""Added tokens: texts with an id of their own, which are looked for before anything is split.

    <|im_end|>     ends a turn: a control token, and "special": it reads as nothing
    <think>        Qwen3 has it: a control token too, but one whose text is shown
    "    "         GPT-NeoX writes indentation so: white space only, hence ordinary text

They are found as the library `tokenizers` finds them (its added_vocabulary.rs): the longest at the
leftmost position; first those that are looked for in the raw text, then, in what lies between and
is normalised now, those with "normalized". So no normalisation reaches into a token.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# What Unicode calls white space; Python's str.strip would take U+001C to U+001F too.
WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True)
class AddedToken:
    """One entry of `added_tokens` in a tokenizer.json."""

    id: int
    content: str
    special: bool = True
    """Is it left out of the text that a reader sees?"""
    normalized: bool = False
    """Is it looked for in the normalised text?"""
    lstrip: bool = False
    """Does it take the white space before it?"""
    rstrip: bool = False
    """Does it take the white space after it?"""

    @property
    def is_blank(self) -> bool:
        """Is it white space only, and so no control token?"""
        return not self.content.strip(WHITE_SPACE)


def _unchanged(text: str) -> str:
    return text


def _longest_first(contents: Iterable[str]) -> re.Pattern | None:
    """A pattern that matches the longest of some texts; None for no texts."""
    ordered = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


class AddedTokens:
    """Finds added tokens in a text."""

    def __init__(self, tokens: Iterable[AddedToken], normalise: Callable[[str], str] | None = None):
        """normalise: what is done to the text between the tokens; None is nothing."""
        self.tokens = list(tokens)
        self.normalise = normalise or _unchanged
        self._raw = {t.content: t for t in self.tokens if not t.normalized}
        self._later = {self.normalise(t.content): t for t in self.tokens if t.normalized}
        self._raw_pattern = _longest_first(self._raw)
        self._later_pattern = _longest_first(self._later)

    def split(self, text: str) -> Iterator[AddedToken | str]:
        """The added tokens in a text and, normalised, what lies between them."""
        for piece in _find(text, self._raw_pattern, self._raw):
            if isinstance(piece, str):
                yield from _find(self.normalise(piece), self._later_pattern, self._later)
            else:
                yield piece


def _find(text: str, pattern: re.Pattern | None, by_content: dict) -> Iterator[AddedToken | str]:
    """The tokens that a pattern finds, and the texts before, between and after them."""
    done = 0
    for found in pattern.finditer(text) if pattern else ():
        token = by_content[found.group()]
        start, end = found.span()
        # A token may take the white space beside it.
        if token.lstrip:
            start = max(done, len(text[:start].rstrip(WHITE_SPACE)))
        if token.rstrip:
            end = len(text) - len(text[end:].lstrip(WHITE_SPACE))
        if start > done:
            yield text[done:start]
        yield token
        done = end
    if done < len(text):
        yield text[done:]
