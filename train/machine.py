"""The machine that a run is on: its device, how memory is handed out, and what to record about it.

Left out: any decision about speed. The kernels choose their own back end (kernels/dispatch.py).
"""

import ctypes
import os
import platform
import sys
from collections.abc import Collection
from pathlib import Path

import torch

from .versions import PACKAGES, git_commit, package_version

# What --device may be, and what it needs.
DEVICES = {
    "cpu": "CPU",
    "cuda": "CUDA device; use --device cpu, or install a CUDA build of PyTorch",
    "mps": "Apple GPU; use --device cpu, or a Mac with Apple silicon",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and values of glibc's mallopt(3)


def reuse_memory() -> None:
    """Keep freed memory in the process instead of returning it after every operation (glibc only).

    Otherwise the kernel maps and unmaps big tensors each time, and clears their pages again. On two
    cores RMSNorm with its gradient took 35 ms that way, and takes 5 ms with this.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: nothing to set
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    # PyTorch's own variable, read at its first allocation: it then asks for large pages, fewer to
    # map.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def use_onednn(on: bool) -> None:
    """Whether oneDNN computes a CPU's fp32 matrix products in this process, or MKL does.

    MKL uses half the width of an AMD CPU with AVX-512. PyTorch asks oneDNN only if it may round to
    bf16, which oneDNN does with AMX; elsewhere its products are fp32. On two cores of a Zen 5 they
    went from 197 to 454 GFLOP/s.
    """
    torch.set_float32_matmul_precision("medium" if on else "highest")


def devices_here() -> list[str]:
    """The names of the devices that PyTorch sees on this machine."""
    here = ["cpu"]
    if torch.cuda.is_available():
        here.append("cuda")
    if torch.backends.mps.is_available():
        here.append("mps")
    return here


def pick_device(name: str, here: Collection[str] | None = None) -> torch.device:
    """The device for --device; "auto" is a CUDA GPU if there is one, else the CPU.

    An Apple GPU, mps, has to be asked for: nothing here has been tested on one yet. here: the
    devices of this machine; None asks PyTorch. Raises ValueError for an unknown name and for a
    device that is not there.
    """
    here = devices_here() if here is None else here
    # Sums of 16-bit products stay in fp32: on a GPU, cuBLAS may otherwise add parts of one in 16
    # bit, and the log-probs of sampler and trainer differ by more than they must.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if name == "auto":
        return torch.device("cuda" if "cuda" in here else "cpu")
    if name not in DEVICES:
        raise ValueError(f"--device is {name!r}, expected auto, {', '.join(DEVICES)}")
    if name not in here:
        raise ValueError(f"--device {name} was given, but PyTorch sees no {DEVICES[name]}")
    return torch.device(name)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes held so far: by PyTorch's tensors on a GPU, by the whole process on a CPU.

    None on a system that does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Windows has none
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on a Mac, else kilobytes


def describe_machine() -> dict:
    """Hardware, versions and commit, as JSON types, for run.json and reports."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "commit": git_commit(),
    }


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line for line in lines if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
