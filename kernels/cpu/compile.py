"""The ops as compiled loops for a CPU: what Triton is on a GPU, Numba is here.

PyTorch runs an op of several steps as so many passes over memory, and a CPU has little bandwidth: one loop
that does them all on a row while it lies in the cache is two to five times as fast. Matrix products stay
PyTorch's, but for those of attention, of the MLP and of decoding (kernels/cpu_tiles.py).

Only for fp32; kernels/reference.py has the same in plain torch, for all other tensors and where Numba is not
installed. The loops run on as many OpenMP threads as PyTorch is set to, and what is added up over rows is
added in fixed parts, so that the result is the same for any number of them. As with all of OpenMP: no loops
in a forked child of a process that has run some. The first call of each compiles it (about two seconds,
those with products inside six to twenty); the machine code is kept beside this file, or
where NUMBA_CACHE_DIR says.

Shapes: R rows, M features of a row, F d_ff, T tokens, H heads, D head_dim, V columns of logits.
"""

import contextlib
import functools
from pathlib import Path

import numpy as np
import torch

try:
    import numba
    from numba.extending import register_jitable
except ImportError:  # no wheel for this Python, or left out on purpose

    class _StandIn:
        """Enough of Numba for its decorators to be read."""

        prange = range

        def njit(self, **_):
            return lambda fn: fn

    numba, register_jitable = _StandIn(), lambda **_: lambda fn: fn
    HAS_NUMBA = False
else:
    numba.config.THREADING_LAYER_PRIORITY = [
        "omp",
        "tbb",
        "workqueue",
    ]  # PyTorch's own, where it has OpenMP
    HAS_NUMBA = True


# a product may be fused with a sum; NaN and infinity keep their meaning
ORDERED = {"contract", "nsz"}


EXACT_ENOUGH = ORDERED | {"reassoc"}  # sums and products may be reordered


f32 = np.float32


LANES = 8  # float32 in a vector


TILE_ROWS, TILE_COLUMNS = 6, 2 * LANES  # of a product that are computed in registers


# Numba compiles anew when a function's own file has changed, but loops have parts of these files in them.
HERE = Path(__file__).parent


PARTS_OF_OTHERS = ("compile.py", "elementwise.py", "registers.py", "tiles.py", "attention_tiles.py")


for kept in HERE.glob("__pycache__/*.nbi"):
    with contextlib.suppress(
        OSError
    ):  # another process may be at it, or it may not be ours to delete
        if kept.stat().st_mtime < max((HERE / name).stat().st_mtime for name in PARTS_OF_OTHERS):
            kept.unlink()


def loop(fn, fastmath=EXACT_ENOUGH):
    """Compile at the first call, for all threads."""
    compiled = numba.njit(fastmath=fastmath, error_model="numpy", parallel=True, nogil=True)(fn)
    if HAS_NUMBA:
        with contextlib.suppress(
            RuntimeError
        ):  # no folder to keep it in: compiled anew in each process
            compiled.enable_caching()
    return compiled


part = register_jitable(
    fastmath=EXACT_ENOUGH, error_model="numpy"
)  # a function that loops can call


small_part = register_jitable(
    fastmath=EXACT_ENOUGH, error_model="numpy", forceinline=True
)  # without a call


# For what must come out the same wherever in a vector or tile it is computed: elsewhere the compiler may take
# a b c as (a b) c for some numbers and as a (b c) for their neighbours.
ordered_loop = functools.partial(loop, fastmath=ORDERED)


ordered_part = register_jitable(fastmath=ORDERED, error_model="numpy")


small_ordered_part = register_jitable(fastmath=ORDERED, error_model="numpy", forceinline=True)


def refuses(*tensors: torch.Tensor | None) -> str | None:
    """Why the loops do not run on these tensors, or None."""
    if not HAS_NUMBA:
        return "the compiled loops need float32 tensors on a CPU and Numba (missing: pip install numba)"
    given = [x for x in tensors if x is not None]
    if all(x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() for x in given):
        return None
    kinds = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device.type}" for x in given)
    return (
        "the compiled loops take float32 tensors on a CPU, none of them empty, and Numba (installed); "
        f"got {kinds}"
    )


def serves(impl: str | None, *tensors: torch.Tensor | None) -> bool:
    """Whether the loops run on these tensors. Raises ValueError where `impl` says so and they cannot."""
    if impl == "reference":
        return False
    reason = refuses(*tensors)
    if impl == "cpu" and reason is not None:
        raise ValueError(f'impl is "cpu", but {reason}; expected impl=None or "reference" here')
    return reason is None


def threads() -> None:
    """As many as PyTorch has."""
    n = torch.get_num_threads()
    numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))
    if (
        torch.get_num_threads() != n
    ):  # Numba has just started its threads, and as many of them as it can
        torch.set_num_threads(n)


def array(x: torch.Tensor) -> np.ndarray:
    """The same memory, for a loop: contiguous, so that it is compiled for one layout only."""
    return x.detach().contiguous().numpy()


def flat(x: torch.Tensor) -> np.ndarray:
    """The memory behind a view, from its first number to its last, for a loop that knows its strides."""
    span = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.detach().as_strided((span,), (1,)).numpy()


@part
def exp(x):
    """e^x to 2e-7 of itself, by 2^k and a polynomial (Cephes' expf), in steps that a compiler can make
    vector instructions of; 0 below -87, where normal numbers end, infinity above 88, and NaN for NaN."""
    y = f32(-87.0) if x < f32(-87.0) else x
    y = f32(88.0) if y > f32(88.0) else y
    k = np.rint(y * f32(1.44269504))
    r = y - k * f32(0.693359375) + k * f32(2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    power = np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(f32)
    result = f32(0) if x < f32(-87.0) else (p * r * r + r + f32(1)) * power
    return f32(np.inf) if x > f32(88.0) else result
