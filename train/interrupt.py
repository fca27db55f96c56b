"""Ctrl-C and the signals of schedulers and terminals, as a request to stop.

    SIGINT    Ctrl-C
    SIGTERM   the machine is wanted back: kill, docker stop, Slurm, a spot instance
    SIGUSR1   the time is nearly up: Slurm's --signal=USR1@60
    SIGXCPU   a limit on the processor's time (ulimit -t) is reached
    SIGHUP    the terminal went away

The first one asks the loop to stop: it finishes its step, saves, and raises Stopped. After that,
Ctrl-C breaks off at once. The others are often sent twice (by `timeout`, or by a shell that ends),
so they never break off; whoever means it sends SIGKILL. A signal that was ignored when the loop
began (SIGHUP under nohup) stays ignored.

Left out: saving in the middle of a step. Give a scheduler's grace period the length of a step.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ..eval.console import shout

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGXCPU", "SIGHUP")  # Windows has the first two


class Stopped(KeyboardInterrupt):
    """Work that a signal ended. It is no Exception: nobody who mends errors should go on.

    A script of yours that wants the exit code of `r1zero`: `except Stopped as stop:
    sys.exit(stop.exit_code)`.
    """

    def __init__(self, number: int, message: str):
        super().__init__(number, message)
        self.exit_code = 128 + number
        """As a shell tells that a program was ended by this signal."""

    def __str__(self) -> str:
        return self.args[1]


@contextmanager
def ends_like_ctrl_c() -> Iterator[None]:
    """Within the block the others than Ctrl-C raise Stopped, unless the caller has other plans."""

    def end(number, frame):
        nonlocal ended
        if ended:  # they are often sent twice, and once is enough
            return
        ended = True
        raise Stopped(number, f"ended by {signal.Signals(number).name}")

    ended = False
    former = {}
    for name in NAMES[1:]:
        number = getattr(signal, name, None)
        if number is None or signal.getsignal(number) != signal.SIG_DFL:
            continue
        try:
            former[number] = signal.signal(number, end)
        except ValueError:  # not the main thread
            break
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class Interrupt:
    """Within a `with` block, a signal to stop only sets `requested`."""

    def __init__(self):
        self.requested = False
        self.number = 0
        """Of the signal that came first."""
        self._former_handlers = {}

    def __enter__(self):
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        for number in numbers:
            # None: the handler is not Python's, and could not be given back.
            if signal.getsignal(number) in (signal.SIG_IGN, None):
                continue
            try:
                self._former_handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: then signals are not ours to catch
                break
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        first = not self.requested
        if first:
            self.requested, self.number = True, number
        # From now on Ctrl-C does again what it did before.
        if signal.SIGINT in self._former_handlers:
            signal.signal(signal.SIGINT, self._former_handlers[signal.SIGINT])
        if not first:
            return
        if number == signal.SIGINT:
            shout("finishing this step, then saving; press Ctrl-C again to stop at once")
        else:
            shout(f"{signal.Signals(number).name}: finishing this step, then saving")
