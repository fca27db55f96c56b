"""Files with one record per line: read whole, and every bad line is named at once.

    lines = read_lines(path)                                the file as numbered lines
    kept = parse_lines(path, lines, parse, expected)        their values; a bad line is an error
    kept = parse_lines(..., skip_bad=True)                  or is left out, counted and said

Lines end with a line feed (CRLF is fine) and nothing else: U+2028 is text. Each line is decoded by
itself, so one with a wrong byte is one bad line and not the end of the file. Lines of white space
are left out.

Left out: files too large for memory, and compressed ones.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .console import say

T = TypeVar("T")
MAX_NAMED = 10  # bad lines that one error names
MAX_REASON = 160  # characters of the reason for one
# How files begin that hold no UTF-8 text.
FOREIGN = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "compressed (gzip)"}


class Kept(list[T]):
    """The values of the good lines of a file."""

    n_skipped: int
    """How many bad lines were left out."""

    def __init__(self, values: Iterable[T], n_skipped: int = 0):
        super().__init__(values)
        self.n_skipped = n_skipped


class Parsed(Kept[tuple[int, T]]):
    """(number of the line, value) of each good line."""

    def values(self) -> Kept[T]:
        """The values alone."""
        return Kept((value for _, value in self), self.n_skipped)


@dataclass(frozen=True)
class Line:
    number: int
    """Counted from 1, as an editor does."""
    data: bytes

    @property
    def text(self) -> str:
        """Raises ValueError for a byte that is 0 or not UTF-8."""
        nul = self.data.find(b"\0")
        if nul >= 0:
            raise ValueError(f"its byte {nul + 1} is 0")
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"its byte {error.start + 1} is not UTF-8") from None


def read_bytes(path: str | Path) -> bytes:
    """All of a file, without a byte-order mark.

    Raises ValueError if it cannot be read, or is another encoding or compressed.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; check the path") from None
    except ValueError as error:  # a null byte in the path
        raise ValueError(f"{path!r} cannot be read: {error}; check the path") from None
    for beginning, kind in FOREIGN.items():
        if data.startswith(beginning):
            raise ValueError(f"{path} is not UTF-8 text but {kind}; convert it to UTF-8 text")
    return data.removeprefix(b"\xef\xbb\xbf")


def read_lines(path: str | Path) -> list[Line]:
    """The lines of a file that hold more than white space. Raises ValueError as `read_bytes`."""
    pieces = read_bytes(path).split(b"\n")
    return [Line(number, data) for number, data in enumerate(pieces, 1) if data.strip()]


def parse_lines(
    path: str | Path,
    lines: Sequence[Line],
    parse: Callable[[str], T],
    expected: str,
    skip_bad: bool = False,
) -> Parsed[T]:
    """Each line's value, `parse(text)`; a line is bad if that raises ValueError.

    expected: what the file should hold, for the errors. skip_bad: leave bad lines out, and say how
    many. Raises ValueError, which names up to ten bad lines with their reasons, for bad lines, for
    a file of nothing but bad lines, and for one without lines.
    """
    if not lines:
        raise ValueError(f"{path} is empty; expected {expected}")
    good: list[tuple[int, T]] = []
    bad: list[str] = []
    for line in lines:
        try:
            good.append((line.number, parse(line.text)))
        except (ValueError, RecursionError) as error:
            bad.append(f"line {line.number}: {_short(str(error))}")
    if bad and not (good and skip_bad):
        advice = "; --skip-bad goes on without bad lines" if good else "; no line is good"
        raise ValueError(f"{path}, {_named(bad)}; expected {expected}{advice}")
    if bad:
        say(f"{path}: skipped {len(bad):,} of {len(lines):,} lines: {_named(bad)}")
    return Parsed(good, len(bad))


def _short(reason: str) -> str:
    return reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}..."


def _named(bad: list[str]) -> str:
    """The first bad lines with their reasons, and how many more there are."""
    text = "; ".join(bad[:MAX_NAMED])
    n_more = len(bad) - MAX_NAMED
    if n_more > 0:
        text += f"; and {n_more:,} more bad line{'s' if n_more > 1 else ''}"
    return text


def json_object(text: str) -> dict[str, Any]:
    """The object of JSON in a line; ValueError for anything else."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.colno}") from None
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    return record
