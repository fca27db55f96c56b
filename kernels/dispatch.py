"""Which back end runs an op, and the checks that every op makes of its input.

Each op file holds one table of back ends, in the order in which they are tried: Triton kernels for
CUDA tensors, compiled loops for float32 tensors on a CPU, plain PyTorch for everything. `choose`
takes the first one that serves the arguments, or the one that `impl=` names; each can say in words
why it does not.

With TRITON_INTERPRET=1, a variable that Triton itself reads when it is imported, the kernels run on
CPU tensors, slowly, for tests. Where Triton is not installed the op files still import, with
stand-ins for `triton` and `tl`.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from .chips import chip_of

try:
    import triton
    import triton.language as tl
except Exception as error:  # missing, or installed and broken, which raises all kinds
    WHY_NO_TRITON = "Triton is not installed (pip install triton)"
    if not isinstance(error, ModuleNotFoundError):
        WHY_NO_TRITON = f"Triton cannot be imported: {error}"

    class _StandIn:
        """Enough of Triton for its decorators and annotations to be read."""

        constexpr = None

        def jit(self, fn=None, **_):
            return self.jit if fn is None else fn

        def __getattr__(self, name):
            raise ImportError(f"triton.{name} is needed, but {WHY_NO_TRITON}")

    triton = tl = _StandIn()
    HAS_TRITON = False
else:
    HAS_TRITON, WHY_NO_TRITON = True, "Triton is not installed (pip install triton)"

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_ARCH = 80  # the kernels are written for, and compiled ahead of time for, sm_80 and later
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


# ---- the choice


@dataclass(frozen=True)
class Backend:
    """One way to run an op. `run` and `refuses` take the op's arguments, all in one order."""

    name: str  # "triton", "cpu" or "reference"; moe.py has two more in plain PyTorch
    run: Callable
    refuses: Callable[..., str | None]  # None: it serves these arguments; else why it does not


def choose(op: str, backends: Sequence[Backend], impl: str | None, *args) -> Callable:
    """The `run` of the first back end that serves `args`, or of the one that `impl` names.

    args: the op's arguments, its main tensor first. Warns once where a CUDA tensor has to do
    without Triton. Raises ValueError for an `impl` that does not exist, or with the reason why it
    cannot serve.
    """
    if impl is not None:
        return on_device_of(args[0], _named(op, backends, impl, args))
    without_triton = None
    for backend in backends:
        reason = backend.refuses(*args)
        if reason is None:
            if without_triton:
                warn_once(f"{without_triton}: the slower back end '{backend.name}' runs instead")
            return on_device_of(args[0], backend)
        if backend.name == "triton" and (args[0].is_cuda or INTERPRETING):
            without_triton = reason
    raise ValueError(f"{op}: no back end serves these arguments; the last one says: {reason}")


def on_device_of(x: torch.Tensor, backend: Backend) -> Callable:
    """The back end's `run`. Triton launches on the current device, so it becomes that of `x`."""
    if backend.name != "triton" or not x.is_cuda:
        return backend.run

    def run(*args):
        with torch.cuda.device(x.device):
            return backend.run(*args)

    return run


def _named(op: str, backends: Sequence[Backend], impl: str, args: tuple) -> Backend:
    for backend in backends:
        if backend.name == impl:
            break
    else:
        known = ", ".join(f'"{backend.name}"' for backend in backends)
        raise ValueError(f"{op}: impl is {impl!r}; expected {known} or None (choose by device)")
    reason = backend.refuses(*args)
    if reason is not None:
        raise ValueError(
            f'{op}: impl is "{impl}", but {reason}; expected impl=None or "reference" here'
        )
    return backend


def serves_all(*_) -> None:
    """What the reference says to any arguments: it refuses none."""


def triton_refuses(x: torch.Tensor, *_) -> str | None:
    """Why the Triton kernels do not serve `x`, or None."""
    return why_not_triton(x.dtype, x.device.type, arch_of(x.device))


def why_not_triton(
    dtype: torch.dtype,
    device: str,
    arch: int,
    installed: bool = HAS_TRITON,
    interpreting: bool = INTERPRETING,
) -> str | None:
    """Why Triton does not serve `dtype` on a `device` of compute capability `arch`, or None.

    installed, interpreting: whether Triton is there, and whether its interpreter runs the kernels.
    """
    if not installed:
        return WHY_NO_TRITON
    if dtype not in TRITON_DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {dtype}"
    if interpreting:
        wrong = dtype == torch.bfloat16
        return "Triton's interpreter is wrong for bfloat16" if wrong else None
    if device != "cuda":
        return f"Triton serves CUDA tensors (and CPU tensors with TRITON_INTERPRET=1), not {device}"
    if arch < OLDEST_ARCH:
        return f"the Triton kernels need sm_{OLDEST_ARCH} or later, and this GPU is sm_{arch}"
    return None


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def arch_of(device: torch.device) -> int:
    """Compute capability as one number, 90 for an H100 or H200; 80 where the interpreter runs."""
    return chip_of(device).arch


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a model's matrix products, unless another is asked for: bf16 on a CUDA GPU, fp32
    elsewhere.

    GPUs before sm_80 have no bf16, so they compute in fp16, in plain PyTorch; a warning says so
    once.
    """
    if device.type != "cuda":
        return torch.float32
    arch = arch_of(device)
    if arch >= OLDEST_ARCH:
        return torch.bfloat16
    warn_once(
        f"bfloat16 and the Triton kernels need sm_{OLDEST_ARCH} or later, and this GPU is "
        f"sm_{arch}: models compute in float16, in plain PyTorch"
    )
    return torch.float16


def compiles_first(device: torch.device) -> bool:
    """Whether the ops will be compiled at their first call on this device, which takes a minute or
    two: on a CPU, where that has not been done before. (On a GPU Triton does it in seconds.)"""
    from .cpu.compile import HAS_NUMBA, cache_folder  # not above: it imports Numba

    if device.type != "cpu" or not HAS_NUMBA:
        return False
    folder = cache_folder()  # of the machine code, which Numba has an index for in .nbi files
    return folder is None or not any(folder.rglob("*.nbi"))


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64; float32 on an Apple GPU, which has no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64


def why_not_dtype(dtype: torch.dtype, device: str, arch: int) -> str | None:
    """Why models cannot compute in `dtype` on a `device` of compute capability `arch`, or None."""
    if dtype == torch.bfloat16 and device == "cuda" and arch < OLDEST_ARCH:
        return f"bfloat16 needs sm_{OLDEST_ARCH} or later, and this GPU is sm_{arch}"
    return None


# ---- what is checked of every op's input


def check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors that are given lie on one device, in a floating dtype,
    with a contiguous last dimension. None is skipped."""
    first = None
    for name, x in tensors.items():
        if x is None:
            continue
        first = first or (name, x.device)
        if x.device != first[1]:
            raise ValueError(
                f"{op}: {name} is on {x.device}, but {first[0]} is on {first[1]}; "
                "move them to one device"
            )
        if not x.is_floating_point():
            raise ValueError(f"{op}: {name} is {x.dtype}; expected a floating dtype")
        if x.ndim and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{op}: the last dimension of {name} has stride {x.stride(-1)}, expected 1; "
                f"pass {name}.contiguous()"
            )
