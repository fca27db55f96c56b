"""What a person sees while work goes on: messages, results and a progress bar.

None of it ever decides over the work. A terminal can go away, the reader of a pipe can end, the
disk behind a log can be full, a stream can be closed or missing. Then the text is lost, and nothing
else happens: every write of this project that only informs goes through this file.

    say(text)           a message on stderr, above a progress bar that is shown there
    show(text)          a result on stdout. Write it to its file first
    shout(text)         a message from a signal handler
    Bar(total, ...)     a progress bar on stderr

Left out: text that is a command's product, such as the grades of `r1zero grade`. If nobody can read
that, the command ends.
"""

import os
import sys
from collections.abc import Iterable

# A bar in a file of messages is a line per update, so it is written there more seldom.
SECONDS_ON_TERMINAL = 0.1
SECONDS_ELSEWHERE = 10.0


class Careful:
    """A stream whose `write` and `flush` never raise; None stands for a stream that is missing."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        try:
            if self.stream is not None:
                self.stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            pass

    def flush(self) -> None:
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError):
            pass

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Raises OSError or ValueError where there is none, as any stream does."""
        if self.stream is None:
            raise OSError("the stream is missing")
        return self.stream.fileno()

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    # tqdm finds the bars that it must clear before a message by comparing streams.
    def __eq__(self, other) -> bool:
        if not isinstance(other, Careful):
            return False
        both_on_screen = self.isatty() and other.isatty()
        return self.stream is other.stream or both_on_screen

    __hash__ = None


def say(text: str) -> None:
    """Write a message on stderr, above a progress bar that is shown there. Never raises."""
    _write(text, sys.stderr)


def show(text: str) -> None:
    """Write a result on stdout. Never raises, so what must not be lost goes to a file first."""
    _write(text, sys.stdout)


def shout(text: str) -> None:
    """`say` for a signal handler, which may interrupt a write to the same stream. Never raises."""
    try:
        os.write(2, f"\n{text}\n".encode(errors="replace"))
    except OSError:
        pass


def _write(text: str, stream) -> None:
    careful = Careful(stream)
    if Bar.tqdm is None:
        careful.write(f"{text}\n")
    else:
        Bar.tqdm.write(text, file=careful)  # clears a bar before, and draws it again after
    careful.flush()


class Bar:
    """A progress bar on stderr: tqdm's, on a stream that never raises.

    If tqdm cannot be used (it is missing or broken, or a TQDM_ variable of the environment is no
    number), there is no bar, and nothing else changes.
    """

    tqdm = None  # the library, once a bar was made

    def __init__(self, iterable: Iterable | None = None, **options):
        """iterable: what `for` goes over; options: tqdm's."""
        stream = Careful(sys.stderr)
        seconds = SECONDS_ON_TERMINAL if stream.isatty() else SECONDS_ELSEWHERE
        options = {"dynamic_ncols": True, "mininterval": seconds, "file": stream, **options}
        self._iterable = iterable
        try:
            from tqdm import tqdm  # takes a while to import, and commands without a bar start fast

            self._bar = tqdm(iterable, **options)
            Bar.tqdm = tqdm
        except Exception:
            self._bar = None

    def __iter__(self):
        return iter(self._iterable if self._bar is None else self._bar)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """`n` more are done."""
        if self._bar is not None:
            self._bar.update(n)

    def set_postfix(self, texts: dict[str, str]) -> None:
        """Texts to show behind the bar, at its next update."""
        if self._bar is not None:
            self._bar.set_postfix(texts, refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def leave_quietly() -> bool:
    """Flush stdout and stderr for the last time; False if the text of one of them was lost.

    A stream that cannot be written is led to nowhere, or Python would complain about it at its exit
    and change the exit code.
    """
    all_written = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            all_written = False
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):
                pass
    return all_written


def fill_missing_streams() -> None:
    """Open the standard file descriptors that the caller closed (`>&-`), so that no file gets one.

    Otherwise the next file that is opened has the number of stderr, and what a library writes there
    lands in it.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
