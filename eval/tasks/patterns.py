"""Patterns that an answer must match whole, in time linear in the answer, whatever the pattern is.

    full_match("[Pp]aris|the capital", "Paris")       True

Python's `re` goes back and tries again, and a pattern like `(a*)*b` keeps it busy for longer than a
run lasts; so does `a*a*a*a*b`, which no rule about nested repeats forbids. Answers come from a
model, which need not mean it to find such a text. So a pattern is compiled to a small program whose
branches are all followed at once, character by character (Thompson 1968; the way of RE2). Its size
and the length of an answer are bounded.

Taken are characters, `.`, classes like [a-z] and \\d, groups ( ) and (?: ), |, ?, *, +, {m,n}, and
(?i) in front. They mean what they mean in `re.fullmatch`, so ^ in front and $ at the end say
nothing. Left out, and refused: what needs going back (\\1, lookaround, possessive repeats), anchors
within, and named groups.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache

MAX_PATTERN = 500  # characters
MAX_STATES = 500  # instructions of a program
MAX_DEPTH = 50  # groups within groups
MAX_TEXT = 500  # characters of an answer; longer ones do not match
IGNORE_CASE = "(?i)"
TOKEN = re.compile(
    r"(?P<open>\((?:\?:)?(?!\?))"
    r"|(?P<close>\))"
    r"|(?P<either>\|)"
    r"|(?P<repeat>(?:[*+?]|\{[0-9]*,[0-9]*\}|\{[0-9]+\})\??)(?![+])"
    r"|(?P<char>\[\^?\]?(?:\\.|[^\]\\])*\]"
    r"|\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[dDsSwWnrtfv]|[^a-zA-Z0-9])"
    r"|(?!\{[0-9]*,[0-9]*\}|\{[0-9]+\})[^\\()|*+?^$\[])",
    re.DOTALL,
)


# ---- the program ----


@dataclass(frozen=True)
class Char:
    """Go on to `next` behind one character that the class matches."""

    matches: re.Pattern
    next: int


@dataclass(frozen=True)
class Split:
    """Go on to all of `nexts`, without a character."""

    nexts: tuple[int, ...]


END = Split(())  # the text is matched, if it ends here


@dataclass
class Program:
    """Instructions, built from the end of the pattern to its beginning."""

    states: list[Char | Split] = field(default_factory=lambda: [END])
    start: int = 0

    def add(self, state: Char | Split) -> int:
        """The index of a new instruction. ValueError for a program that becomes too large."""
        if len(self.states) >= MAX_STATES:
            raise ValueError(f"it becomes larger than {MAX_STATES} steps; repeat less")
        self.states.append(state)
        return len(self.states) - 1

    def closure(self, indices) -> set[int]:
        """These instructions, and all that are reached from them without a character."""
        reached, waiting = set(), list(indices)
        while waiting:
            index = waiting.pop()
            if index in reached:
                continue
            reached.add(index)
            if isinstance(self.states[index], Split):
                waiting += self.states[index].nexts
        return reached

    def matches(self, text: str) -> bool:
        """Whether the whole text is matched."""
        current = self.closure([self.start])
        for char in text:
            # All branches take the character at once.
            chars = [self.states[i] for i in current if isinstance(self.states[i], Char)]
            current = self.closure([c.next for c in chars if c.matches.match(char)])
        return 0 in current


# ---- the pattern's tree ----


@dataclass(frozen=True)
class Leaf:
    """One character, as `re` understands it."""

    matches: re.Pattern

    def build(self, program: Program, then: int) -> int:
        return program.add(Char(self.matches, then))


@dataclass(frozen=True)
class Sequence:
    parts: tuple

    def build(self, program: Program, then: int) -> int:
        for part in reversed(self.parts):
            then = part.build(program, then)
        return then


@dataclass(frozen=True)
class Either:
    parts: tuple

    def build(self, program: Program, then: int) -> int:
        return program.add(Split(tuple(part.build(program, then) for part in self.parts)))


@dataclass(frozen=True)
class Repeat:
    part: Leaf | Either
    least: int
    most: int | None
    """None for no bound."""

    def build(self, program: Program, then: int) -> int:
        if self.most is None:
            # A loop: once more, or on. Its split comes first, and learns where it leads at last.
            loop = program.add(END)
            program.states[loop] = Split((self.part.build(program, loop), then))
            then = loop
        else:
            for _ in range(self.most - self.least):
                then = program.add(Split((self.part.build(program, then), then)))
        for _ in range(self.least):
            then = self.part.build(program, then)
        return then


# ---- from the text of a pattern ----


class Reader:
    """Reads a pattern from left to right. Raises ValueError for what is not taken."""

    def __init__(self, pattern: str, flags: int):
        self.pattern = pattern
        self.flags = flags
        self.position = 0
        self.depth = 0

    def peek(self) -> re.Match | None:
        """The next token; None at the end."""
        match = TOKEN.match(self.pattern, self.position)
        if match is None and self.position < len(self.pattern):
            rest = self.pattern[self.position : self.position + 8]
            raise ValueError(f"{rest!r} at character {self.position + 1} is not taken here")
        return match

    def take(self) -> re.Match:
        match = self.peek()
        self.position = match.end()
        return match

    def either(self) -> Either:
        """Sequences between bars, up to the end or a closing bracket."""
        parts = [self.sequence()]
        while (match := self.peek()) and match["either"]:
            self.take()
            parts.append(self.sequence())
        return Either(tuple(parts))

    def sequence(self) -> Sequence:
        parts = []
        while (match := self.peek()) and not match["either"] and not match["close"]:
            parts.append(self.repeated())
        return Sequence(tuple(parts))

    def repeated(self) -> Leaf | Either | Repeat:
        """A character or a group, with the repeat behind it."""
        match = self.take()
        if match["open"]:
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ValueError(f"it has more than {MAX_DEPTH} groups within each other")
            part = self.either()
            self.take()  # the closing bracket
            self.depth -= 1
        else:
            part = Leaf(re.compile(match["char"], self.flags))
        match = self.peek()
        if match is None or not match["repeat"]:
            return part
        self.take()
        return Repeat(part, *bounds_of(match["repeat"]))


def bounds_of(repeat: str) -> tuple[int, int | None]:
    """(least, most) of a repeat like * or {2,5}; most is None for no bound."""
    known = {"*": (0, None), "+": (1, None), "?": (0, 1)}
    if repeat[0] in known:
        return known[repeat[0]]
    least, comma, most = repeat.strip("{}?").partition(",")
    if not comma:
        return int(least), int(least)
    return int(least or 0), int(most) if most else None


@lru_cache(maxsize=16_384)
def compile_pattern(pattern: str) -> Program:
    """The program of a pattern. Raises ValueError, with the reason, for one that is not taken."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, and at most {MAX_PATTERN} are taken")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None
    # 1. What stands around it: a flag in front, and anchors, which say nothing here.
    flags = re.IGNORECASE if pattern.startswith(IGNORE_CASE) else 0
    inner = pattern.removeprefix(IGNORE_CASE).removeprefix("^")
    if inner.endswith("$") and not is_escaped(inner):
        inner = inner[:-1]
    # 2. Its tree, and from that the program.
    program = Program()
    program.start = Reader(inner, flags).either().build(program, 0)
    return program


def is_escaped(text: str) -> bool:
    """Whether the last character stands behind an odd number of backslashes."""
    before = text[:-1]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def full_match(pattern: str, text: str) -> bool:
    """Whether the pattern matches all of the text, which has at most MAX_TEXT characters."""
    return len(text) <= MAX_TEXT and compile_pattern(pattern).matches(text)
