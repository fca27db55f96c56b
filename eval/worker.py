"""A process beside this one that answers questions, each within a limit of time and memory.

What a model writes is handed to libraries that may take for ever over it, or all memory: SymPy
works out 10^(10^10) if it is asked to. Inside this process nothing can stop that. A process of its
own can be killed, and the next question goes to a fresh one.

    worker = Worker("r1zero.eval.tasks.math_worker")
    worker.ask("is_right", "1/2", "0.5")        the reply; Overrun if the question cost too much

The worker is a module that calls `serve`. Both sides speak lines of JSON over pipes. It is started
as a plain program and not by `multiprocessing`, so it never runs the caller's main module again,
and works below pytest, torchrun and notebooks. When this process ends, however it ends, the
worker's input ends, and so does the worker.

The limit of time is one of processor time, so a verdict does not depend on how busy the machine is;
a much longer limit on the clock stands behind it. Where the system has no such timer (Windows),
only the clock counts. The limit of memory holds on Linux; other systems do not keep it.

Left out: several workers at once. A question takes a few milliseconds, and there is one process per
GPU anyway.
"""

import atexit
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

SECONDS = 2.0  # processor time for one question
PATIENCE = 100  # the clock's limit, in units of the processor's: a machine may be that busy
START_SECONDS = 120.0  # on the clock: importing, on a busy machine
MEMORY = 1 << 30  # bytes of address space
OUT_OF_MEMORY = 3  # exit code of a worker that reached its limit of memory
TRIES = 2  # for a worker that ended for no reason of ours, as when somebody killed it


class Overrun(Exception):
    """A question that took more time or memory than one may."""


class Died(Exception):
    """A worker that ended without a reply, for another reason than its limits."""


class Worker:
    """Asks a worker module, which is started when it is needed, and again when it has ended."""

    def __init__(self, module: str, seconds: float = SECONDS, memory: int = MEMORY):
        self.module = module
        self.seconds = seconds
        self.memory = memory
        self.process: subprocess.Popen | None = None
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """Lines of the worker, and None behind the last."""
        atexit.register(self.close)

    def ask(self, name: str, *arguments: Any) -> Any:
        """The reply of the worker's function `name`, as JSON holds it.

        Raises Overrun for a question that costs too much, ModuleNotFoundError for a package that
        the worker lacks, and RuntimeError for a worker that does not start.
        """
        if os.getpid() != self.owner:
            self._leave_to_parent()
        with self.lock:
            for _ in range(TRIES):
                try:
                    if self.process is None or self.process.poll() is not None:
                        self._start()
                    return self._exchange([name, *arguments])
                except Died:
                    self._stop()
                except BaseException:
                    # Ctrl-C, or a signal's exception: a late reply would answer the next question.
                    self._stop()
                    raise
            raise Overrun(f"the worker ended over it, {TRIES} times")

    def close(self) -> None:
        """End the worker and wait for it. A process that was forked leaves it to its parent."""
        if os.getpid() == self.owner:
            with self.lock:
                self._stop()

    # ---- one process ----

    def _leave_to_parent(self) -> None:
        """In a process that was forked: begin anew, because two cannot share the pipes."""
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.process = None

    def _start(self) -> None:
        self._stop()
        self.replies = queue.SimpleQueue()
        # -P: the current folder is no place to look for modules, whatever lies there.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", self.module, repr(self.seconds), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for this process alone
        )
        reader = threading.Thread(
            target=read_lines, args=(self.process.stdout, self.replies), daemon=True
        )
        reader.start()
        # The first line says whether the worker has all that it needs.
        try:
            missing = self._reply(START_SECONDS)
        except (Overrun, Died) as error:
            raise RuntimeError(
                f"the process {self.module} does not start ({error}); see whether "
                f"{sys.executable} -m {self.module} 2 {self.memory} does"
            ) from None
        if missing is not None:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    def _stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()  # close the pipes and wait: nothing is left behind

    def _exchange(self, request: list) -> Any:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise Died("it does not listen") from None
        patience = PATIENCE if hasattr(signal, "setitimer") else 1
        return self._reply(self.seconds * patience)

    def _reply(self, seconds: float) -> Any:
        try:
            line = self.replies.get(timeout=seconds)
        except queue.Empty:
            raise Overrun(f"it took more than {seconds:g} seconds on the clock") from None
        if line is not None:
            return json.loads(line)
        code = self.process.wait()
        if code == OUT_OF_MEMORY:
            raise Overrun(f"it took more than {self.memory >> 20:,} MiB of memory")
        if hasattr(signal, "SIGPROF") and code == -signal.SIGPROF:
            raise Overrun(f"it took more than {self.seconds:g} seconds of processor time")
        raise Died(f"it ended with code {code}")


def read_lines(stream, replies: queue.SimpleQueue) -> None:
    """Put each line of a worker into the queue, and None behind the last."""
    try:
        for line in stream:
            replies.put(line)
    except (OSError, ValueError):  # closed from the other side
        pass
    replies.put(None)


# ---- the worker's side ----


def limit_memory(size: int) -> None:
    """Let this process have `size` bytes at most, where the system keeps such a limit."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):
        pass


def limit_time(seconds: float) -> None:
    """End this process after so much processor time from now; 0 takes the limit away."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def serve(load: Callable[[], Mapping[str, Callable]]) -> None:
    """Answer the questions on stdin until it ends. load: makes the functions that can be asked.

    A function that raises has the reply null. One that takes too much ends the process.
    """
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    # What a library prints must not stand among the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    limit_memory(memory)
    try:
        functions = load()
    except ModuleNotFoundError as error:
        return reply(error.name)
    reply(None)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        limit_time(seconds)
        try:
            value = functions[name](*arguments)
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except Exception:
            value = None
        limit_time(0)
        reply(value)
