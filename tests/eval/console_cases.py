"""Streams that cannot be written, as terminals, pipes and disks leave them behind."""
import errno
import io


class Dead(io.TextIOBase):
    """Raises the OSError of `number` at every write and flush."""

    encoding = "utf-8"

    def __init__(self, number: int, is_terminal: bool = False):
        self.number, self.is_terminal = number, is_terminal
        self.attempts = 0

    def write(self, text):
        self.attempts += 1
        raise OSError(self.number, "dead")

    def flush(self):
        raise OSError(self.number, "dead")

    def isatty(self):
        return self.is_terminal

    def fileno(self):
        raise OSError(errno.EBADF, "dead")


def closed_stream() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


DEAD_STREAMS = {
    "terminal gone": lambda: Dead(errno.EIO, is_terminal=True),
    "reader gone": lambda: Dead(errno.EPIPE),
    "disk full": lambda: Dead(errno.ENOSPC),
    "over the quota": lambda: Dead(errno.EDQUOT),
    "not ready": lambda: Dead(errno.EAGAIN),
    "closed": closed_stream,
    "missing": lambda: None,
}
