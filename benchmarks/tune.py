"""Which block sizes are fastest on this GPU? Tries a grid of them for one op, prints the table for its file.

    python -m benchmarks.tune attention --head-dims 64,128 --parts fwd
    python -m benchmarks.tune rmsnorm

An op's block sizes come from a plain function in its file (attention_config, rmsnorm_config, ...). Here its
answer is overridden, one configuration after the other. All are first compiled in parallel; one that does not
compile, spills, or asks for too much shared memory is listed and not run. Every other one is held against the
reference in fp32 before it is timed, in turns with its rivals. Times are of a whole forward or backward pass.
"""
import argparse
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from r1zero.kernels.chips import Chip, chip_of

from .aot import DTYPES, HEAD_DIMS, Kernel, compile_all, listed, recorded
from .common import finish, show, spread, table
from .kernel_ops import OPS, Case, attention_case, logprob_case, widths
from .kernels import LARGEST_ERROR, call_of, error_of, failure, posed, with_gradients
from .timing import Timer

SECONDS = 3.0  # of timing for one case, all configurations
TOKENS = 16384
Config = tuple[tuple[str, int], ...]  # name and value, hashable


@dataclass(frozen=True)
class Sweep:
    """One function of block sizes, and what to try instead of its answer."""

    part: str
    mode: str  # the pass that is timed
    function: str
    grid: dict[str, tuple[int, ...]]

    def configs(self) -> list[Config]:
        every = itertools.product(*self.grid.values())
        return [tuple(zip(self.grid, values, strict=True)) for values in every]


PRODUCTS = {"BLOCK_T": (64, 128, 256), "BLOCK_V": (128, 256), "BLOCK_K": (32, 64, 128), "num_warps": (4, 8),
            "num_stages": (3, 4)}
TILES = {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}
SWEEPS = {
    "attention": [Sweep("fwd", "forward", "attention_config", TILES),
                  *(Sweep(part, "backward", "attention_config", TILES | {"BLOCK_M": (32, 64, 128)})
                    for part in ("dkdv", "dq"))],
    "rmsnorm": [Sweep("fwd", "forward", "rmsnorm_config", {"ROWS": (1, 2, 4), "num_warps": (2, 4, 8, 16)}),
                Sweep("bwd", "backward", "rmsnorm_bwd_config",
                      {"ROWS": (1, 2, 4), "STAGES": (1, 2, 3), "num_warps": (4, 8, 16)})],
    "rope": [Sweep("both", "full", "rope_config", {"ROWS": (4, 8, 16, 32), "num_warps": (2, 4, 8)})],
    "swiglu": [Sweep("both", "full", "swiglu_config",
                     {"BLOCK_F": (256, 512, 1024, 2048), "ROWS": (1, 2, 4), "num_warps": (2, 4, 8)})],
    "moe": [Sweep("both", "full", "moe_config",
                  {"BLOCK_M": (64, 128), "BLOCK_N": (128, 256), "BLOCK_K": (32, 64), "num_warps": (4, 8),
                   "num_stages": (3, 4)})],
    "linear_logprob": [Sweep("tiles", "forward", "logprob_config", PRODUCTS),
                       *(Sweep(part, "backward", "logprob_config", PRODUCTS)
                         for part in ("dlogits", "product"))],
}


def module_of(op: str):
    """The file of an op's kernels, which has its functions of block sizes."""
    return importlib.import_module(f"r1zero.kernels.{ {'swiglu': 'mlp', 'moe': 'moe_triton'}.get(op, op)}")


def cases_of(op: str, head_dims: list[int]) -> tuple[Case, ...]:
    if op == "attention":
        return tuple(attention_case(TOKENS // 4096, 4096, 2048 // D, 2048 // D, D) for D in head_dims)
    if op == "rope":
        return tuple(case for D in head_dims for case in widths("rope", "H", (18,), TOKENS, D=D))
    if op == "linear_logprob":
        return logprob_case(8192, 2048), logprob_case(8192, 4096)
    return OPS[op].full_size


def changed(answer, config: Config):
    """A function's answer with the configuration's values; some answer (programs, block sizes)."""
    if isinstance(answer, tuple):
        return answer[0], changed(answer[1], config)
    return {**answer, **dict(config)}


@contextmanager
def overridden(module, sweep: Sweep, config: Config) -> Iterator[None]:
    """While it holds, the op's function of block sizes answers with `config` (for this part of the op)."""
    original = getattr(module, sweep.function)

    def answer(*args):
        other_part = isinstance(args[0], str) and args[0] != sweep.part
        return original(*args) if other_part else changed(original(*args), config)

    with mock.patch.object(module, sweep.function, answer):
        yield


def compile_ahead(chip: Chip, configs: list[Config], under: Callable, launch: Callable,
                  jobs: int) -> dict[Config, str]:
    """Compile what each configuration launches, in parallel, into Triton's cache. Returns faults."""
    kernels, owners, faults = {}, {}, {}
    for config in configs:
        try:
            with under(config):
                found = recorded(launch)
        except Exception as error:  # whatever a configuration raises is its result
            faults[config] = failure(error)
            continue
        for module, name, data in found:
            kernels[data] = Kernel("", module, name, chip.arch, data, [""], chip.shared_memory)
            owners.setdefault(data, []).append(config)
    for kernel, row in zip(kernels.values(), compile_all(list(kernels.values()), jobs), strict=True):
        if row["complaints"]:
            faults |= dict.fromkeys(owners[kernel.data], f"{kernel.name}: {row['complaints'][0]}")
    return faults


def rank(configs: list[Config], under: Callable, check: Callable[[], float], call: Callable,
         timer: Timer) -> tuple[list[tuple[Config, dict]], dict[Config, str]]:
    """The configurations that are right, fastest first with their milliseconds, and the others' faults."""
    faults, calls = {}, {}

    def calling(config):
        def called():
            with under(config):
                call()
        return called

    for config in configs:
        try:
            with under(config):
                error = check()
        except Exception as error:  # whatever a configuration raises is its result
            faults[config] = failure(error)
            continue
        if error > LARGEST_ERROR:
            faults[config] = f"wrong: off by {error:.3g} of a row"
        else:
            calls[config] = calling(config)
    times = {config: spread(ms) for config, ms in timer.in_turns(calls, SECONDS).items()} if calls else {}
    return sorted(times.items(), key=lambda item: item[1]["median"]), faults


def words(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config)


def tune(op_name: str, case: Case, sweep: Sweep, dtype: torch.dtype, timer: Timer, jobs: int) -> dict:
    """Sweep one case; prints its table."""
    op, chip = OPS[op_name], chip_of(timer.device)
    module = module_of(op_name)
    inputs, upstream, truth = posed(op, case, timer.device, dtype)
    ours = op.ours(case, timer.device, None)

    def under(config):
        return overridden(module, sweep, config)

    def launch():
        with_gradients(ours, inputs, upstream)

    faults = compile_ahead(chip, sweep.configs(), under, launch, jobs)
    best, wrong = rank([config for config in sweep.configs() if config not in faults], under,
                       lambda: error_of(with_gradients(ours, inputs, upstream), truth),
                       call_of(ours, sweep.mode, inputs, upstream), timer)
    name = f"{op_name} {sweep.part}, {case.label}, {str(dtype).removeprefix('torch.')}, sm_{chip.arch}"
    print(f"{name}: {sweep.mode} pass")
    table(["", "ms"], [[words(config), show(ms, digits=4)] for config, ms in best[:8]])
    for config, fault in (faults | wrong).items():
        print(f"  not {words(config)}: {fault}")
    print()
    return {"what": name, "best": [{"config": dict(config), "ms": ms} for config, ms in best],
            "faults": {words(config): fault for config, fault in (faults | wrong).items()}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=SWEEPS)
    parser.add_argument("--parts", type=lambda text: text.split(","), help="fwd, bwd, ...; all by default")
    parser.add_argument("--dtypes", type=listed(DTYPES), default=["bf16"])
    parser.add_argument("--head-dims", type=listed(HEAD_DIMS, int), default=[64, 128])
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="compilers at a time")
    parser.add_argument("--out", help="a file for the line of JSON")
    flags = parser.parse_args(argv)
    parts = {sweep.part for sweep in SWEEPS[flags.op]}
    if flags.parts and set(flags.parts) - parts:
        parser.error(f"--parts is {','.join(flags.parts)}, expected some of {','.join(sorted(parts))}")
    if not torch.cuda.is_available():
        print("benchmarks.tune: PyTorch sees no CUDA device to tune on", file=sys.stderr)
        return 2
    timer = Timer(torch.device("cuda"))
    found = [tune(flags.op, case, sweep, DTYPES[name], timer, flags.jobs)
             for name in flags.dtypes for case in cases_of(flags.op, flags.head_dims)
             for sweep in SWEEPS[flags.op] if not flags.parts or sweep.part in flags.parts]
    print("to paste: the fastest")
    table(["", "config", "ms"], [[x["what"], words(tuple(x["best"][0]["config"].items())),
                                  f"{x['best'][0]['ms']['median']:.4f}"] for x in found if x["best"]])
    finish("tune", {"flags": vars(flags), "found": found}, flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
