"""Which implementation of an op runs, and the checks that every op makes of what it is given.

Triton serves CUDA tensors, compiled loops fp32 tensors on a CPU (kernels/cpu.py, for the ops that have them),
the reference all others; `impl="triton"`, "cpu" or "reference" forces one. With TRITON_INTERPRET=1, Triton's
own variable, Triton serves CPU tensors too. Where Triton is not installed, the op files still import, with
stand-ins for `triton` and `tl`.
"""

import os
import warnings
from functools import cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform

    class _StandIn:
        """Enough of Triton for its decorators and annotations to be read."""

        constexpr = None

        def jit(self, fn=None, **_):
            return self.jit if fn is None else fn

        def __getattr__(self, name):
            raise ImportError(
                f"triton.{name} is needed, but Triton is not installed: pip install triton"
            )

    triton = tl = _StandIn()
    HAS_TRITON = False
else:
    HAS_TRITON = True

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def use_triton(impl: str | None, x: torch.Tensor, loops: bool = False) -> bool:
    """Whether Triton serves `x`. loops: the op has compiled loops, too (kernels/cpu.py). Raises ValueError
    for an `impl` that does not exist or cannot serve it."""
    names = ["triton", *["cpu"] * loops, "reference"]
    if impl not in (None, *names):
        listed = ", ".join(f'"{name}"' for name in names)
        raise ValueError(f"impl is {impl!r}; expected {listed} or None (choose by device)")
    if impl in ("cpu", "reference"):
        return False
    reason = None
    if not HAS_TRITON:
        reason = "Triton is not installed (pip install triton)"
    elif x.dtype not in TRITON_DTYPES:
        reason = f"the Triton kernels take float32, float16 and bfloat16, not {x.dtype}"
    elif interpreting() and x.dtype == torch.bfloat16:
        reason = "Triton's interpreter is wrong for bfloat16"
    elif not x.is_cuda and not interpreting():
        reason = f"Triton serves CUDA tensors (and CPU tensors with TRITON_INTERPRET=1), not {x.device.type}"
    if reason is None:
        return True
    if impl == "triton":
        raise ValueError(f'impl is "triton", but {reason}; expected impl=None or "reference" here')
    if x.is_cuda or interpreting():
        warn_once(f"{reason}: the slower plain torch reference runs instead")
    return False


def check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors that are given lie on one device, in a floating dtype, with a
    contiguous last dimension."""
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


def arch_of(device: torch.device) -> int:
    """Compute capability as one number, 90 for an H100 or H200; 80 where the interpreter runs."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
