"""How the compiled loops are made and called. What Triton is on a GPU, Numba is here.

PyTorch runs an op of several steps as several passes over memory, and a CPU has little bandwidth.
One loop that takes a row through all steps while it lies in the cache is two to five times as fast.
Matrix products stay PyTorch's, except inside attention, the MLP and decoding (see the tiles in
registers.py).

The loops take float32 only. kernels/reference.py holds the same ops in plain PyTorch: they serve
all other tensors, and machines without Numba. The loops run on as many OpenMP threads as PyTorch is
set to. Sums over rows are made in fixed parts, so the result is the same for any number of threads.
As always with OpenMP, a forked child may not run loops after its parent has run some.

A loop is compiled at its first call, which takes about two seconds, or six to twenty where it holds
products. The machine code is kept in __pycache__ beside this file, or below NUMBA_CACHE_DIR, in a
folder that is named after a hash of these sources. A changed source therefore never meets old
machine code. Numba optimises the kept code once more than the code it has just compiled, so the
process that compiles a loop may differ from later ones in the last bits.

Left out: dtypes other than float32, and vectors longer than 8 numbers.

Shapes: R rows, M features of a row, F d_ff, T tokens, H heads, D head_dim, V columns of logits.
"""

import functools
import hashlib
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import torch

try:
    import numba
    from numba.extending import register_jitable
    from numba.misc.appdirs import AppDirs
except Exception as error:  # missing, or installed and broken, which raises all kinds
    WHY_NO_NUMBA = "missing: pip install numba"
    if not isinstance(error, ModuleNotFoundError):
        WHY_NO_NUMBA = f"installed, but it cannot be imported: {error}"
        warnings.warn(
            f"Numba is {WHY_NO_NUMBA}; plain PyTorch takes its place, which is slower",
            stacklevel=2,
        )

    class _StandIn:
        """Enough of Numba for its decorators to be read."""

        prange = range

        def njit(self, **_):
            return lambda fn: fn

    numba, register_jitable = _StandIn(), lambda **_: lambda fn: fn
    HAS_NUMBA = False
else:
    # PyTorch's own threads, where both find the same OpenMP library
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    HAS_NUMBA = not numba.config.DISABLE_JIT
    WHY_NO_NUMBA = "missing: pip install numba"
    if not HAS_NUMBA:
        WHY_NO_NUMBA = "switched off: NUMBA_DISABLE_JIT is set"

HERE = Path(__file__).parent
# a product may be fused with a sum; NaN and infinity keep their meaning
ORDERED = {"contract", "nsz"}
# and sums and products may be reordered
EXACT_ENOUGH = ORDERED | {"reassoc"}

f32 = np.float32
LANES = 8  # float32 numbers in a vector
TILE_ROWS, TILE_COLUMNS = 6, 2 * LANES  # of a product that is computed in registers


# ---- compiling ----

UNCACHED = []  # loops whose machine code is not kept yet
LOCK = threading.Lock()  # of this list, and of Numba's setting


def loop(fn, fastmath=EXACT_ENOUGH):
    """Compile at the first call, for all threads. Call `prepare` before a loop.

    Inside, named tuples of integers are free, but one that holds an array costs atomic counts of
    its references. So arrays are passed one by one, each beside where its numbers lie.
    """
    compiled = numba.njit(fastmath=fastmath, error_model="numpy", parallel=True, nogil=True)(fn)
    UNCACHED.append(compiled)
    return compiled


# a function that loops can call
part = register_jitable(fastmath=EXACT_ENOUGH, error_model="numpy")

# the same, pasted in without a call
small_part = register_jitable(fastmath=EXACT_ENOUGH, error_model="numpy", forceinline=True)

# For numbers that must come out the same wherever in a vector or tile they are computed. In other
# loops the compiler may take a b c as (a b) c for some numbers and as a (b c) for their neighbours.
ordered_loop = functools.partial(loop, fastmath=ORDERED)
ordered_part = register_jitable(fastmath=ORDERED, error_model="numpy")
small_ordered_part = register_jitable(fastmath=ORDERED, error_model="numpy", forceinline=True)


# ---- keeping the machine code ----


def source_hash(folder: Path) -> str:
    """A hash of the sources in `folder`: a loop has parts of other files in it, so all of them
    count."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        found.update(path.name.encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


SOURCES = source_hash(HERE)  # read with the sources themselves, before somebody can edit them


def is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@functools.cache
def cache_folder() -> Path | None:
    """The folder for machine code; None if none can be written to: each process compiles anew."""
    if numba.config.CACHE_DIR:
        parents = [Path(numba.config.CACHE_DIR)]
    else:
        of_user = AppDirs(appname="numba", appauthor=False).user_cache_dir
        parents = [HERE / "__pycache__", Path(of_user)]
    name = f"loops-{SOURCES}"
    return next((parent / name for parent in parents if is_writable(parent / name)), None)


def keep_machine_code() -> None:
    """Have Numba keep the machine code of all loops that were made since the last call."""
    with LOCK:
        folder, before = cache_folder(), numba.config.CACHE_DIR
        while UNCACHED:
            compiled = UNCACHED.pop()
            if folder is None:
                continue
            numba.config.CACHE_DIR = str(folder)  # Numba reads it in enable_caching alone
            try:
                compiled.enable_caching()
            finally:
                numba.config.CACHE_DIR = before


# ---- calling ----


def prepare() -> None:
    """Call before a loop: as many threads as PyTorch has, and a folder for the machine code."""
    if UNCACHED:
        keep_machine_code()
    n = torch.get_num_threads()
    numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))
    # at its first call Numba starts all threads that it can, and PyTorch's number changes with them
    if torch.get_num_threads() != n:
        torch.set_num_threads(n)


def refuses(*tensors: torch.Tensor | None) -> str | None:
    """Why the loops cannot run on these tensors, in words; None if they can."""
    given = [x for x in tensors if x is not None]
    if HAS_NUMBA and all(
        x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() for x in given
    ):
        return None
    kinds = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device.type}" for x in given)
    return (
        "the compiled loops take float32 tensors on a CPU, none of them empty, and Numba "
        f"({'installed' if HAS_NUMBA else WHY_NO_NUMBA}); got {kinds}"
    )


def array(x: torch.Tensor) -> np.ndarray:
    """The tensor for a loop: the same memory, or a contiguous copy, so that one layout is
    compiled."""
    return x.detach().contiguous().numpy()


def flat(x: torch.Tensor) -> np.ndarray:
    """The memory behind a view, from its first number to its last, for a loop that knows its
    strides."""
    span = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.detach().as_strided((span,), (1,)).numpy()


@part
def exp(x):
    """e^x with a relative error of 2e-7, by 2^k and a polynomial (Cephes' expf), in steps that a
    compiler can vectorise. It gives 0 below -87, where normal numbers end, infinity above 88, and
    NaN for NaN."""
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
