"""A mixture of experts on a CPU: PyTorch's grouped products against one expert after the other.

    OMP_NUM_THREADS=1 python -m benchmarks.moe                  under a minute
    OMP_NUM_THREADS=1 python -m benchmarks.moe --out moe.json

Both are back ends of `moe_mlp`, in one process, in turns, fp32: forward alone, as in decoding, and forward
with backward, as in training. Times are processor time, which other programs on the machine hardly change.
The grouped products come first (`why_not_grouped` in kernels/moe.py) because they are the faster ones here.
On a GPU `python -m benchmarks.kernels --ops moe` measures more peers.
"""
import argparse
import time

import torch

from r1zero.train.machine import reuse_memory

from .common import finish, show, spread, table
from .kernel_ops import moe_case, moe_inputs, ours_moe
from .kernels import call_of
from .timing import Timer

SIDES = ("grouped", "loop")
CASES = {
    "demo-moe, decoding 8 rows": moe_case(8, 16, 3, 128, 96),
    "demo-moe, decoding 64 rows": moe_case(64, 16, 3, 128, 96),
    "demo-moe, training": moe_case(2048, 16, 3, 128, 96),
    "many experts, 8 rows": moe_case(8, 128, 8, 256, 128),
    "many experts, 512 rows": moe_case(512, 128, 8, 256, 128),
    "few large experts, 1,024 rows": moe_case(1024, 8, 2, 512, 512),
}


def measure(case, seconds: float) -> dict[str, dict]:
    """For each mode the milliseconds of both sides, and those of the loop over those of the other."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    inputs = moe_inputs(case, lambda *shape: torch.randn(shape, requires_grad=True))
    upstream = [torch.randn(case.shape["T"], case.shape["M"])]
    found = {}
    for mode in ("forward", "full"):
        calls = {side: call_of(ours_moe(case, device, side), mode, inputs, upstream) for side in SIDES}
        with torch.set_grad_enabled(mode == "full"):
            ms = Timer(device, time.process_time).in_turns(calls, seconds)
        ratio = [loop / grouped for grouped, loop in zip(ms["grouped"], ms["loop"], strict=True)]
        found[mode] = {side: spread(ms[side]) for side in SIDES} | {"ratio": spread(ratio)}
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(prog="benchmarks.moe", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each case and mode")
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    parser.add_argument("--out", help="file for the line of JSON")
    flags = parser.parse_args(argv)
    reuse_memory()
    found = {name: measure(case, flags.seconds) for name, case in CASES.items() if flags.cases in name}
    for mode, what in (("forward", "forward"), ("full", "forward and backward")):
        print(f"{what}, ms of processor time")
        table(["", "shape", *SIDES, "loop / grouped"],
              [[name, CASES[name].label, *(show(modes[mode][side]) for side in SIDES),
                show(modes[mode]["ratio"], "x")] for name, modes in found.items()])
    return finish("moe", {"flags": vars(flags), "cases": found}, flags.out)


if __name__ == "__main__":
    main()
