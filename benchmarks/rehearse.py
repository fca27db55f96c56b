"""The tests of the GPU, rehearsed without one: which kernels they launch, and these compiled in parallel.

    python -m benchmarks.rehearse --plan      how many kernels, and how long on this machine's cores
    python -m benchmarks.rehearse             compile them into Triton's cache, where the tests find them

A test compiles a kernel when it first launches it, one after the other, about a second each. Here the tests
run with tensors of the device "meta" in place of "cuda": they have shapes and no numbers. Each launch is
noted instead of made, every comparison holds, and a number that is read back is 0 unless it came from the
CPU. So a rehearsal proves nothing about the kernels, but it launches what the test will launch. A test that
needs more is named in the plan, and compiles its kernels when it runs. What memory_predicted.py launches is
rehearsed, too: that stage of `make gpu` has seconds.
"""
import argparse
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from r1zero.kernels import dispatch

from .aot import chip, recorded
from .memory_predicted import launch_all

aten = torch.ops.aten
INTEGERS = (torch.int32, torch.int64)
ROOT = Path(__file__).parents[1]
TESTS = "tests/kernels/gpu"
ARCH = 90  # planned for where there is no GPU
MOST_JOBS = 32  # a compiler takes half a gigabyte
# Seconds to compile one kernel on one core: samples on an EPYC took 0.5 in bf16 and 0.3 in fp32 on average;
# the rest is a margin. A plan is their sum.
SECONDS = {"bf16": 0.8, "fp16": 0.8, "fp32": 0.6}
START = 8.0  # seconds until the compilers of a pool have started


# ---- "cuda" is "meta"

def renamed(x):
    """The device "meta" for any spelling of "cuda"."""
    if isinstance(x, str) and x.partition(":")[0] == "cuda":
        return "meta"
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("meta")
    return x


class OnMeta(TorchFunctionMode):
    """Whatever asks for the device "cuda" gets "meta"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0].to("meta")
        kwargs = {name: renamed(x) for name, x in (kwargs or {}).items()}
        if func is torch.tensor and kwargs.pop("device", None):
            return func(*args, **kwargs).to("meta")  # by way of the CPU, where its numbers are seen
        if func.__name__ == "repeat_interleave" and isinstance(args[1], torch.Tensor) and args[1].is_meta:
            kwargs["output_size"] = int(args[1].sum())  # a meta tensor alone cannot say
        return func(*map(renamed, args), **kwargs)


def where(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """An index without a mask: a mask of unknown numbers lets everything through."""
    if index is None or index.dtype != torch.bool or not index.is_meta:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.int64, device="meta")] * index.ndim


class WithoutNumbers(TorchDispatchMode):
    """Our ops call their launchers, which a meta tensor alone would not; what reads numbers gets an answer.

    Integers from the CPU keep their numbers beside the meta tensor: offsets and lengths decide shapes.
    """

    def __init__(self):
        super().__init__()
        self.known = WeakTensorKeyDictionary()  # meta tensor: the same on the CPU

    def with_numbers(self, tensor: torch.Tensor) -> torch.Tensor:
        there = torch.empty_like(tensor, device="meta")
        self.known[there] = tensor
        return there

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func.namespace == "r1zero":
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **kwargs)
        if func is aten._to_copy.default:
            device = kwargs.get("device") or first.device
            if device.type == "meta" and not first.is_meta and first.dtype in INTEGERS:
                return self.with_numbers(first.to(kwargs.get("dtype") or first.dtype))
            if device.type == "cpu" and first.is_meta:
                found = self.known.get(first, torch.zeros(first.shape))
                return found.to(kwargs.get("dtype") or first.dtype)
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if not any(x.is_meta for x in tensors):
            return func(*args, **kwargs)
        if func is aten.equal.default:
            return True
        if func is aten.nonzero.default:
            return torch.empty(first.numel(), first.ndim, dtype=torch.int64, device="meta")
        if func is aten.bincount.default:
            return torch.zeros(args[2], dtype=torch.int64, device="meta")
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            places = [place for x in args[1] for place in where(x)]
            args = (first, places, *args[2:])
        if not func._schema.is_mutable and all(not x.is_meta or x in self.known for x in tensors):
            numbers = tree_map_only(torch.Tensor, lambda x: self.known.get(x, x), args)
            found = func(*numbers, **{name: x for name, x in kwargs.items() if name != "device"})
            return self.with_numbers(found) if isinstance(found, torch.Tensor) else found
        if func is aten._local_scalar_dense.default:
            return first.dtype == torch.bool or (0.0 if first.is_floating_point() else 0)
        if func._schema.is_mutable and first in self.known:
            del self.known[first]
        return func(*args, **kwargs)


@contextmanager
def without_a_gpu(arch: int) -> Iterator[None]:
    """Tensors for "cuda" have no memory, and the kernels serve them as if they lay on a chip of this kind."""
    refuses = dispatch.why_not_triton

    def why_not(dtype, device, *rest):
        return refuses(dtype, "cuda" if device == "meta" else device, *rest)

    with ExitStack() as stack:
        for module, name, value in (
                (dispatch, "why_not_triton", why_not), (dispatch, "arch_of", lambda device: arch),
                (torch.testing, "assert_close", lambda *args, **options: None),
                (torch.cuda, "mem_get_info", lambda *args: (1 << 50, 1 << 50))):
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(OnMeta())
        stack.enter_context(WithoutNumbers())
        yield


# ---- the rehearsal

Launch = tuple[str, str, str]  # module, kernel, data as Triton's hook gives it


@dataclass
class Rehearsal:
    """A plugin of pytest that runs each test in this way. Keeps what was launched, in order, each once."""

    arch: int
    found: Callable = lambda launch: None  # called with each new kernel
    kernels: dict[Launch, str] = field(default_factory=dict)  # and the test that is the first to need it
    unrehearsed: dict[str, str] = field(default_factory=dict)  # test: why it did not reach its end
    tests: int = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        for item in items:  # that there is no GPU is no reason to skip here
            item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        self.tests += 1
        self.note(pyfuncitem.nodeid, lambda: pyfuncitem.obj(**arguments))
        return True  # pytest need not call it

    def note(self, name: str, launch: Callable) -> None:
        """Keep what a test, or a stage, launches."""
        def reach_the_end():
            try:
                launch()
            except Exception as error:  # it needs numbers, or a GPU: it is named
                lines = str(error).splitlines() or [""]
                self.unrehearsed[name] = f"{type(error).__name__}: {lines[0][:100]}"

        with without_a_gpu(self.arch):
            launches = recorded(reach_the_end)
        for new in dict.fromkeys(launches):
            if new not in self.kernels:
                self.kernels[new] = name
                self.found(new)


def rehearse(rehearsal: Rehearsal, *flags: str) -> None:
    """Rehearse the tests that the flags of pytest pick. Raises RuntimeError if pytest itself fails."""
    picked = flags or ("-m", "gpu", TESTS)
    with chip(rehearsal.arch):
        code = pytest.main(["-q", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *picked],
                           plugins=[rehearsal])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest {' '.join(picked)} ended with {code!r}; expected tests to rehearse")


def dtype_of(launch: Launch) -> str:
    """fp32, fp16 or bf16: the narrowest type that a kernel's pointers have."""
    types = set(json.loads(launch[2])["signature"].values())
    return next((name for name in ("bf16", "fp16") if "*" + name in types), "fp32")


def minutes(kernels: list[Launch], jobs: int) -> float:
    """How long it takes to compile them with so many compilers at a time."""
    return (START + sum(SECONDS[dtype_of(launch)] for launch in kernels) / jobs) / 60


# ---- compiling

def compile_one(arch: int, launch: Launch) -> str | None:
    """Compile one kernel into Triton's cache; None, or why it does not compile."""
    module, name, data = launch
    with chip(arch):
        try:
            getattr(importlib.import_module(module), name).preload(data)
        except Exception as error:  # whatever the compiler's passes raise is this kernel's result
            return f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[-1]}"
    return None


class Compilers:
    """A pool of processes that compile what they are given at once, in that order."""

    def __init__(self, arch: int, jobs: int):
        self.arch, self.pool = arch, ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        self.results: dict[Launch, Future] = {}

    def add(self, launch: Launch) -> None:
        self.results[launch] = self.pool.submit(compile_one, self.arch, launch)

    def finish(self) -> dict[Launch, str]:
        """Wait for all; what does not compile, and why."""
        faults = {}
        for i, (launch, future) in enumerate(self.results.items(), 1):
            if fault := future.result():
                faults[launch] = fault
                print(f"DOES NOT COMPILE  {launch[1]}: {fault}", file=sys.stderr, flush=True)
            if i % 50 == 0 or i == len(self.results):
                print(f"{i} of {len(self.results)} kernels compiled", flush=True)
        self.pool.shutdown()
        return faults


def show_plan(rehearsal: Rehearsal, jobs: int) -> None:
    """How many kernels of which type, and how long they take."""
    kernels = list(rehearsal.kernels)
    by_dtype = Counter(map(dtype_of, kernels))
    parts = ", ".join(f"{by_dtype[name]} in {name}" for name in ("bf16", "fp16", "fp32") if by_dtype[name])
    print(f"{rehearsal.tests} tests launch {len(kernels)} kernels on sm_{rehearsal.arch}: {parts}")
    for cores in sorted({1, 4, 8, 16, jobs}):
        print(f"    {minutes(kernels, cores):5.1f} minutes to compile them on {cores} cores")
    for name, why in rehearsal.unrehearsed.items():
        print(f"not rehearsed: {name}: {why}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.rehearse", description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="count the kernels, and compile none")
    parser.add_argument("--arch", type=int, help="compute capability, such as 90; by default this GPU's, "
                        "or 90")
    parser.add_argument("--jobs", type=int, default=min(MOST_JOBS, len(os.sched_getaffinity(0))),
                        help="compilers at a time")
    parser.add_argument("--out", help="file for the line of JSON")
    flags = parser.parse_args(argv)
    if not dispatch.HAS_TRITON or dispatch.INTERPRETING:
        problem = "TRITON_INTERPRET is set: unset it" if dispatch.HAS_TRITON else dispatch.WHY_NO_TRITON
        print(f"benchmarks.rehearse: {problem}; nothing can be compiled", file=sys.stderr)
        return 2
    here = torch.cuda.is_available()
    arch = flags.arch or (dispatch.arch_of(torch.device("cuda")) if here else ARCH)
    started, compilers, rehearsal = time.monotonic(), None, Rehearsal(arch)
    if not flags.plan:  # they work while the rehearsal goes on
        compilers = Compilers(arch, flags.jobs)
        rehearsal.found = compilers.add
    rehearse(rehearsal)
    with chip(arch):
        rehearsal.note("memory", launch_all)
    rehearsed_after = time.monotonic() - started
    show_plan(rehearsal, flags.jobs)
    record = {"arch": arch, "jobs": flags.jobs, "tests": rehearsal.tests, "kernels": len(rehearsal.kernels),
              "predicted_minutes": minutes(list(rehearsal.kernels), flags.jobs),
              "unrehearsed": rehearsal.unrehearsed, "rehearsal_seconds": rehearsed_after}
    if compilers:
        faults = compilers.finish()
        record["seconds"] = time.monotonic() - started
        record["faults"] = {f"{launch[1]} of {rehearsal.kernels[launch]}": why
                            for launch, why in faults.items()}
    print(json.dumps(record))
    if flags.out:
        Path(flags.out).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return 1 if record.get("faults") else 0


if __name__ == "__main__":
    sys.exit(main())
