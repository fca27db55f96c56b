"""Our kernels against the plain formula, torch.compile, PyTorch's own and other libraries' kernels, on a GPU.

    python -m benchmarks.kernels                                      all of it, under 5 minutes on an H200
    python -m benchmarks.kernels --ops attention --out-dir results    one op, into a folder of yours
    python -m benchmarks.kernels --smoke                              the program itself, on a CPU, in seconds

First come the two ceilings of this very machine, copy bandwidth and bf16 matrix product. Then for each op and
shape every provider takes its turn: forward, backward, and both. Before it is timed, its outputs and
all gradients are held against the reference in fp32: a wrong one is marked and not timed, and so is one that
cannot be had here, or has no memory left. Peers that torch.compile makes take up to half a minute a shape:
they come last, in a second pass over all ops. `fraction_of_roofline` is the least time that the op's FLOPs
and bytes allow at these ceilings (see benchmarks/kernel_ops.py), over the median time.

Writes kernels.csv row by row, so that a stop loses nothing, a picture for each op, and kernels.json; prints
tables and one line of JSON. The exit code is 1 if a kernel of ours is wrong or fails, 2 without a GPU.
"""
import argparse
import csv
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import matplotlib
import torch
import torch._functorch.config as functorch_config

from .common import cpu_name, finish, spread, table
from .kernel_ops import MODES, OPS, SHAPE, Case, Op
from .timing import Timer, ceilings

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt  # noqa: E402

COLUMNS = ("op", "provider", "mode", "dtype", *SHAPE, "ms_median", "ms_p20", "ms_p80", "tflops", "gbs",
           "fraction_of_roofline", "peak_memory_mb", "error", "note", "gpu", "torch", "triton", "date")
LARGEST_ERROR = 0.05  # of a row; 16 bit gives about 0.01
COMPILED = ("torch.compile", "flex_attention")  # peers that compile for long
OUT_OF_MEMORY = "out of memory"
SECONDS = 0.35  # of timing for one mode of one case, all providers
SMOKE_SECONDS = 0.01


class Results:
    """Rows, each written out at once, with what is the same in all of them."""

    def __init__(self, path: Path, device: torch.device):
        self.rows: list[dict] = []
        self.file = open(path, "w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.writer.writeheader()
        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = "missing"
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else f"none, {cpu_name()}"
        self.common = {"gpu": gpu, "torch": torch.__version__, "triton": triton}

    def add(self, **row) -> None:
        row |= self.common | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.rows.append(row)
        self.writer.writerow({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()})
        self.file.flush()


# ---- is it right? ----

Tensors = list[torch.Tensor]


def as_list(outputs) -> Tensors:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def with_gradients(function: Callable, inputs: Tensors, upstream: Tensors) -> Tensors:
    """Outputs, then the gradient of each input."""
    outputs = as_list(function(*inputs))
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, inputs, upstream))


def error_of(found: Tensors, truth: Tensors) -> float:
    """The worst row of all tensors: the length of the difference, over the row's own plus the usual one."""
    worst = 0.0
    for x, y in zip(found, truth, strict=True):
        if x.shape != y.shape:
            return float("inf")
        y = y.float()
        length = y.norm(dim=-1)
        error = (x.float() - y).norm(dim=-1) / (length + length.square().mean().sqrt())
        worst = max(worst, float("inf") if error.isnan().any() else error.max().item())
    return worst


# ---- one case ----

def call_of(function: Callable, mode: str, inputs: Tensors, upstream: Tensors) -> Callable:
    """What is timed. Backward alone runs again and again on what one forward kept."""
    if mode == "forward":
        return lambda: function(*inputs)
    if mode == "backward":
        outputs = as_list(function(*inputs))
        return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(as_list(function(*inputs)), inputs, upstream)


def failure(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"{OUT_OF_MEMORY}: {str(error).splitlines()[0][:150]}"
    return f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def posed(op: Op, case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensors, Tensors, Tensors]:
    """Random inputs and upstream gradients, and what the reference makes of them in fp32."""
    torch.manual_seed(0)

    def new(*shape):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    inputs = op.inputs(case, new)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    reference = op.ours(case, device, "reference")
    upstream = [torch.randn_like(x).to(dtype) for x in as_list(reference(*exact))]
    return inputs, upstream, with_gradients(reference, exact, [x.float() for x in upstream])


@dataclass(frozen=True)
class Measuring:
    """What all cases of a run have in common."""

    timer: Timer
    dtype: torch.dtype
    impl: str | None  # of ours
    peaks: dict
    seconds: float  # of timing for one mode of one case


def measure(op: Op, case: Case, how: Measuring, compiled: bool) -> Iterator[dict]:
    """The rows of one case: those of the peers that compile for long, or all others. Memory ends the case."""
    base = {"op": case.op, "dtype": str(how.dtype).removeprefix("torch."), **case.shape}
    try:
        for row in measured(op, case, how, compiled):
            yield base | row
    except torch.OutOfMemoryError as error:
        note = failure(error)
    else:
        return
    free_memory()
    yield {**base, "provider": "this case", "mode": "all", "note": note}


def free_memory() -> None:
    """What a failed case held, for the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured(op: Op, case: Case, how: Measuring, compiled: bool) -> Iterator[dict]:
    """The same, as far as memory goes, without what is the same in all rows of the case."""
    timer = how.timer
    torch.compiler.reset()  # each shape is compiled for itself, none of them for sizes in general
    providers = {name: function for name, function in op.peers(case, timer.device).items()
                 if (name in COMPILED) == compiled}
    if compiled and all(isinstance(function, str) for function in providers.values()):
        yield from ({"provider": name, "mode": "all", "note": note} for name, note in providers.items())
        return
    inputs, upstream, truth = posed(op, case, timer.device, how.dtype)
    if not compiled:
        providers = {"ours": op.ours(case, timer.device, how.impl), **providers}
    notes, errors, sound = {}, {}, {}
    for name, function in providers.items():
        if isinstance(function, str):
            notes[name] = function
            continue
        try:
            errors[name] = error_of(with_gradients(function, inputs, upstream), truth)
        except Exception as error:  # whatever a peer raises here is its result: it does not run
            notes[name] = failure(error)
            continue
        if errors[name] > LARGEST_ERROR:
            notes[name] = f"wrong: off by {errors[name]:.3g} of a row"
        else:
            sound[name] = function
    del truth

    for name, note in notes.items():
        yield {"provider": name, "mode": "all", "error": errors.get(name), "note": note}
    for mode in MODES:
        calls, memory = {}, {}
        for name, function in sound.items():
            try:
                calls[name] = call_of(function, mode, inputs, upstream)
                memory[name] = timer.peak_memory(calls[name])
            except Exception as error:  # some peers cannot go backward twice, or have no memory left for it
                calls.pop(name, None)
                yield {"provider": name, "mode": mode, "error": errors[name], "note": failure(error)}
        if not calls:
            continue
        times = timer.in_turns(calls, how.seconds)
        for name in calls:
            yield {"provider": name, "mode": mode, "error": errors[name], "peak_memory_mb": memory[name],
                   **metrics(op, case, mode, spread(times[name]), how.peaks)}


def metrics(op: Op, case: Case, mode: str, ms: dict[str, float], peaks: dict) -> dict:
    """Times, rates, and the least time over the median."""
    costs = [op.cost(case, part) for part in (MODES[:2] if mode == "full" else [mode])]
    flops, moved = (sum(column) for column in zip(*costs, strict=True))
    least = max(flops / peaks["flops"], moved / peaks["bytes"])
    seconds = ms["median"] / 1000
    return {"ms_median": ms["median"], "ms_p20": ms["p20"], "ms_p80": ms["p80"],
            "tflops": flops / seconds / 1e12 if flops else None, "gbs": moved / seconds / 1e9,
            "fraction_of_roofline": least / seconds}


# ---- for people ----

def show(rows: list[dict]) -> None:
    """One case's table: one row per provider, its modes side by side."""
    if not rows:
        return
    unit = "tflops" if any(row.get("tflops") for row in rows) else "gbs"
    lines = {row["provider"]: [row["provider"]] for row in rows if "ms_median" in row}
    for provider, line in lines.items():
        for mode in MODES:
            found = [row for row in rows if (row["provider"], row["mode"]) == (provider, mode)
                     and "ms_median" in row]
            line += [f"{found[0]['ms_median']:.3f}", f"{found[0][unit]:.0f}",
                     f"{found[0]['fraction_of_roofline']:.0%}"] if found else ["-"] * 3
    unit = {"tflops": "TFLOP/s", "gbs": "GB/s"}[unit]
    for row in rows:
        if row.get("note"):
            print(f"  {row['provider']}, {row['mode']}: {row['note']}")
    table(["", *[cell for mode in MODES for cell in (f"{mode} ms", unit, "of roofline")]],
          list(lines.values()))


def plot(op: Op, rows: list[dict], path: Path, peaks: dict) -> None:
    """Rates over the op's axis: a column per mode, a row of panels for each set of the other sizes."""
    rows = [row for row in rows if row.get("ms_median")]
    if not rows:
        return
    beside = [letter for letter in "HGDET" if letter != op.x and letter in rows[0]]
    panels = list(dict.fromkeys((row["op"], *(row[letter] for letter in beside)) for row in rows))
    unit = "tflops" if rows[0].get("tflops") else "gbs"
    ceiling = peaks["flops"] / 1e12 if unit == "tflops" else peaks["bytes"] / 1e9
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["provider"] for row in rows))}
    figure, axes = plt.subplots(len(panels), len(MODES), squeeze=False,
                                figsize=(4 * len(MODES), 3 * len(panels)))
    for panel, line in zip(panels, axes, strict=True):
        for mode, axis in zip(MODES, line, strict=True):
            for provider, colour in colours.items():
                own = [row for row in rows if row["provider"] == provider and row["mode"] == mode
                       and (row["op"], *(row[letter] for letter in beside)) == panel]
                x, y = zip(*sorted((row[op.x], row[unit]) for row in own), strict=True) if own else ((), ())
                axis.plot(x, y, "o-", color=colour, label=provider)
            axis.axhline(ceiling, color="grey", linestyle=":")
            rest = " ".join(f"{letter}{size}" for letter, size in zip(beside, panel[1:], strict=True))
            axis.set_title(f"{panel[0]} {mode}, {rest}", fontsize=9)
            axis.set_xscale("log", base=2)
            sizes = sorted({row[op.x] for row in rows})
            axis.set_xticks(sizes, list(map(str, sizes)), fontsize=7)
            axis.set_ylim(bottom=0)
            axis.set_xlabel(op.x)
    for line in axes:
        line[0].set_ylabel({"tflops": "TFLOP/s", "gbs": "GB/s"}[unit])
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(f"{rows[0]['gpu']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}; "
                    "dotted: the ceiling measured in the same run", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default=",".join(OPS), help=f"some of {','.join(OPS)}")
    parser.add_argument("--out-dir", default="results_kernels", help="folder of the CSV, pictures and JSON")
    parser.add_argument("--minutes", type=float, default=5, help="cases that would begin later are left out")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and the references, on a CPU")
    flags = parser.parse_args(argv)
    names = flags.ops.split(",")
    if set(names) - OPS.keys():
        parser.error(f"--ops is {flags.ops}, expected some of {','.join(OPS)}")
    if not flags.smoke and not torch.cuda.is_available():
        print("benchmarks.kernels: PyTorch sees no CUDA device; --smoke tries the program out on a CPU",
              file=sys.stderr)
        return 2
    started, folder = time.monotonic(), Path(flags.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if flags.smoke else "cuda")
    dtype, impl = (torch.float32, "reference") if flags.smoke else (torch.bfloat16, None)
    seconds = SMOKE_SECONDS if flags.smoke else SECONDS
    # a compiled backward may otherwise be run once only, as it reuses the memory of what it was given
    functorch_config.donated_buffer = False

    timer, results = Timer(device), Results(folder / "kernels.csv", device)
    peaks = {}
    for name, ceiling in ceilings(timer).items():
        ms = spread(ceiling["ms"])
        unit = "flops" if ceiling["flops"] else "bytes"
        peaks[unit] = ceiling[unit] / ms["median"] * 1000
        rate = {"tflops": peaks[unit] / 1e12} if unit == "flops" else {"gbs": peaks[unit] / 1e9}
        results.add(op="ceiling", provider=name, mode="forward", **rate,
                    **{f"ms_{quantile}": value for quantile, value in ms.items()})
    print(f"{results.common['gpu']}: copies {peaks['bytes'] / 1e9:.0f} GB/s, multiplies matrices at "
          f"{peaks['flops'] / 1e12:.0f} TFLOP/s\n")

    late, how, rows_of = [], Measuring(timer, dtype, impl, peaks, seconds), {name: [] for name in names}
    for compiled in (False, True):
        for name in names:
            op = OPS[name]
            for case in op.smoke if flags.smoke else op.full_size:
                what = f"{case.op}: {case.label}" + ", compiled peers" * compiled
                if time.monotonic() - started > 60 * flags.minutes:
                    late.append(what)
                    continue
                print(f"{what}, {str(dtype).removeprefix('torch.')}")
                first = len(results.rows)
                for row in measure(op, case, how, compiled):
                    results.add(**row)
                show(results.rows[first:])
                rows_of[name] += results.rows[first:]
            plot(op, rows_of[name], folder / f"{name}.png", peaks)  # at once: a stop loses none
    if late:
        print(f"left out, as {flags.minutes:g} minutes were over: {'; '.join(late)}")
    bad = [row for row in results.rows if row["provider"] == "ours" and row.get("note")
           and not row["note"].startswith(OUT_OF_MEMORY)]
    for row in bad:
        print(f"OURS {row['op']} {row['note']}", file=sys.stderr)
    finish("kernels", {"flags": vars(flags), "ceilings": peaks, "rows": results.rows, "left_out": late,
                       "seconds": time.monotonic() - started}, str(folder / "kernels.json"),
           peers=("liger-kernel", "flash-attn"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
