"""Times on a GPU (and, to try a benchmark out, on a CPU): providers in turns, each from a cold cache.

What is timed in turns meets the same clocks, temperature and neighbours. Before each call a tensor much
larger than the second-level cache is read, so that inputs come from memory as they do in a model. It is not
written: what was written last stays in the cache, up to its whole size, and would go to memory while the
timed kernel runs, which costs a small kernel half of its time. Reading also takes the GPU long enough (about
a quarter of a millisecond) for Python to hand over the next call, so launches that are slow on the CPU do
not count.
"""
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 1 << 30
WARM_UP = 3  # calls before the timed ones


class Timer:
    """`device`: cuda, with events; or cpu, with the clock on the wall or another."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device, self.cuda, self.clock = device, device.type == "cuda", clock
        self.buffer = torch.zeros(FLUSH_BYTES // 4 if self.cuda else 4, dtype=torch.int32, device=device)
        self.total = torch.zeros((), dtype=torch.int32, device=device)

    def flush(self) -> None:
        """Put other things into the cache than what the next call reads, and leave nothing to be written."""
        torch.sum(self.buffer, dim=0, dtype=torch.int32, out=self.total)

    def once(self, function: Callable) -> Callable[[], float]:
        """Call it; returns a function that waits and gives the milliseconds."""
        if not self.cuda:
            started = self.clock()
            function()
            took = 1000 * (self.clock() - started)
            return lambda: took
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        start.record()
        function()
        end.record()

        def wait():
            end.synchronize()
            return start.elapsed_time(end)
        return wait

    def in_turns(self, functions: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
        """Milliseconds of each call, `seconds` in all or so, 5 to 50 turns."""
        for function in functions.values():
            for _ in range(WARM_UP):
                function()
        if self.cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        first = [self.once(function) for function in functions.values()]
        for wait in first:
            wait()
        turns = max(5, min(50, int(seconds / (time.perf_counter() - started))))
        waits = [{name: self.once(function) for name, function in functions.items()} for _ in range(turns)]
        return {name: [turn[name]() for turn in waits] for name in functions}

    def peak_memory(self, function: Callable) -> float | None:
        """Call it: the megabytes that it needs at its peak, on top of what was there; on a CPU None."""
        if not self.cuda:
            function()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


def ceilings(timer: Timer) -> dict[str, dict]:
    """What the machine reaches: bytes/s in a copy (read and written), FLOP/s in a bf16 matrix product."""
    n, m, dtype = (2**31, 8192, torch.bfloat16) if timer.cuda else (2**20, 128, torch.float32)
    # random bytes: chips save power, and so keep higher clocks, on zeros
    source, target = (torch.empty(n, dtype=torch.int8, device=timer.device).random_() for _ in range(2))
    a, b = (torch.randn(m, m, dtype=dtype, device=timer.device) for _ in range(2))
    times = timer.in_turns({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, seconds=1)
    return {"copy": {"ms": times["copy"], "bytes": 2 * n, "flops": 0},
            "matmul": {"ms": times["matmul"], "bytes": 0, "flops": 2 * m**3}}
