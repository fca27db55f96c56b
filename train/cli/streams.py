"""The standard streams of a command, whatever its caller did with them.

A stream can be closed (`>&-`), its disk full, its reader gone, its terminal narrow or unable to
show a character. Messages that cannot be written are lost (eval/console.py), and nothing else
happens. Text that is a command's product is another thing: if it cannot be written, the command
has failed, and `Output` remembers why.
"""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ...eval import console


class Output:
    """stdout, and why it could not be written, if it could not; None stands for a closed one."""

    def __init__(self, stream):
        self.stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        """Raises what the stream raises, and OSError for one that is closed."""
        try:
            if self.stream is None:
                raise OSError(errno.EBADF, "it is closed")
            return self.stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: closed by somebody else
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Raises what the stream raises."""
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or error
            raise

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        """Raises OSError where there is none."""
        if self.stream is None:
            raise OSError(errno.EBADF, "it is closed")
        return self.stream.fileno()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def lost(self) -> Exception | None:
        """Why text was lost, None if all of it is written; what waits is written first."""
        try:
            self.flush()
        except (OSError, ValueError):
            pass
        return self.error


class Screen(io.StringIO):
    """Text that is held back before it goes to a stream, made as for that stream.

    Without colours under NO_COLOR, and where it does not go to a terminal.
    """

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    @property
    def encoding(self) -> str:
        return (getattr(self.stream, "encoding", None) or "utf-8").lower()

    def isatty(self) -> bool:
        return not os.environ.get("NO_COLOR") and self.stream.isatty()


@contextmanager
def ready_streams() -> Iterator[Output]:
    """Within the block all three streams are there, and any text can be written to them.

    Yields stdout. After the block Python has nothing left to write, and to complain about.
    """
    console.fill_missing_streams()
    former = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    # A model can write characters that a terminal lacks, and a pipe can bring bytes that are no
    # text.
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    sys.stdout = output = Output(sys.stdout)
    try:
        yield output
    finally:
        sys.stdin, sys.stdout, sys.stderr = former
        console.leave_quietly()
