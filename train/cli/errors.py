"""What an error means for a person: an exit code and one line, or the word that it is our fault.

KINDS is the table, tried from top to bottom. An error that is none of them is a fault of r1zero:
it keeps its traceback, and is to be reported.

    1    the computation failed: out of memory, NaN, the GPU
    2    what the user can mend: flags, files, packages, the account of a service
    128 + n  ended by signal n: 130 by Ctrl-C, 143 by SIGTERM
"""

import errno
import pickle
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from ...eval.plugin import is_named, passed_through, raised
from ..interrupt import Stopped

# The flags that decide how much memory a command takes, as far as it has them.
MEMORY_FLAGS = (
    "micro_tokens",
    "batch",
    "samples",
    "prompts_per_step",
    "group_size",
    "max_new_tokens",
    "seq_len",
    "model",
)
MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory")
# How an error of the GPU reads. Those of a kernel that is wrong are not among them: they are ours.
DEVICE_WORDS = (
    "cuda error",
    "cuda driver",
    "nvidia driver",
    "no kernel image",
    "cublas",
    "cudnn",
    "nccl",
    "hip error",
)
KERNEL_WORDS = ("illegal memory access", "device-side assert", "misaligned address")
# What to do about an error that the system reports.
SYSTEM_ADVICE = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space: the quota of this account is used up",
    errno.EMFILE: "close other files, or raise the limit (ulimit -n)",
    errno.ENFILE: "close other programs: the system has no more open files",
    errno.EROFS: "write somewhere else: this disk is read-only",
    errno.EACCES: "give another path, or the right to use this one",
    errno.EPERM: "give another path, or the right to use this one",
}
# Packages whose name on the index is another than in `import`.
INDEX_NAMES = {
    "PIL": "pillow",
    "dateutil": "python-dateutil",
    "math_verify": "math-verify",
    "yaml": "pyyaml",
}
# What to do about an error that a library has named itself.
LIBRARY_ADVICE = {
    "safetensors": "the file is damaged, or is of another kind; take another checkpoint",
    "wandb": "log in (wandb login), set WANDB_MODE=offline to keep the log here, or leave out "
    "--wandb",
    "numpy": "see whether the numbers and sizes that were given are sensible",
    "tyro": "install the version of tyro that requirements.txt names",
    "matplotlib": "install matplotlib again, or set MPLCONFIGDIR to a folder that can be written",
    "tiktoken": "see whether the file of ranks is whole",
    "tokenizers": "see whether the text is one that a tokenizer can be trained on",
    "requests": "see whether the network is there",
    "urllib3": "see whether the network is there",
    "httpx": "see whether the network is there",
    "zlib": "the file is damaged",
    "triton": "see whether this Triton fits PyTorch and the GPU (requirements.txt names one that "
    "the kernels compile with); --device cpu needs neither",
    "torch": "see whether this PyTorch fits the machine; --device cpu needs no GPU",
}


class Kind(NamedTuple):
    """One kind of error."""

    is_it: Callable[[BaseException], bool]
    code: int
    say: Callable[[Any, Any], str]
    """From the error and the command's config (None before there is one) to the line."""


def package_of(error: BaseException) -> str:
    """The package that defines the class of an error."""
    return type(error).__module__.partition(".")[0]


# ---- Ctrl-C, memory, NaN ----


def is_stopped(error: BaseException) -> bool:
    return isinstance(error, Stopped)


def is_ctrl_c(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's and NumPy's MemoryError, and what torch raises on a GPU and on a CPU."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in MEMORY_WORDS)


def say_out_of_memory(error: BaseException, config: Any) -> str:
    if type(error).__name__ == "BatchTooLargeError":  # its module would import torch
        return f"out of memory: {error}"
    flags = [f"--{name.replace('_', '-')}" for name in MEMORY_FLAGS if hasattr(config, name)]
    advice = f"lower {', '.join(flags)}" if flags else "close other programs, or give it less data"
    return f"out of memory; {advice} ({str(error)[:200] or type(error).__name__})"


def is_non_finite(error: BaseException) -> bool:
    """A NaN or infinity that stopped the computation."""
    if isinstance(error, RuntimeError):
        try:
            # Imports torch, which a RuntimeError mostly comes from.
            from ...model.engine.sampling import NonFiniteError
        except ImportError:
            return False
        return isinstance(error, NonFiniteError)
    return isinstance(error, FloatingPointError)


def say_itself(error: BaseException, config: Any) -> str:
    return str(error)


# ---- packages and the GPU ----


def is_import(error: BaseException) -> bool:
    """A package that is missing or broken; a module of r1zero that is missing is our fault."""
    ours = (getattr(error, "name", None) or "").partition(".")[0] == "r1zero"
    return isinstance(error, ImportError) and not ours


def say_import(error: ImportError, config: Any) -> str:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return f"{error}; a package does not fit the others: pip install -r requirements.txt"
    package = error.name.partition(".")[0]
    wanted = INDEX_NAMES.get(package, package)
    return f"the package {package} is not installed; pip install {wanted}"


def is_device(error: BaseException) -> bool:
    text = str(error).lower()
    is_kernel = any(word in text for word in KERNEL_WORDS)
    is_named = any(word in text for word in DEVICE_WORDS)
    return isinstance(error, RuntimeError) and is_named and not is_kernel


def say_device(error: BaseException, config: Any) -> str:
    line = next(iter(str(error).splitlines()), "")
    advice = "see whether nvidia-smi knows the GPU, and whether PyTorch fits its driver"
    if hasattr(config, "device"):
        advice += "; --device cpu needs no GPU"
    return f"the GPU cannot be used: {line}; {advice}"


# ---- files, values, libraries ----


def is_system(error: BaseException) -> bool:
    return isinstance(error, OSError)


def say_system(error: OSError, config: Any) -> str:
    where = f"{error.filename}: " if error.filename else ""
    advice = SYSTEM_ADVICE.get(error.errno, "")
    return f"{where}{error.strerror or error}{'; ' if advice else ''}{advice}"


def is_deep_json(error: BaseException) -> bool:
    """JSON of thousands of brackets, one in the other, which Python's reader gives up on."""
    is_deep = isinstance(error, RecursionError)
    return is_deep and any(name.startswith("json") for name in modules_of(error))


def modules_of(error: BaseException) -> list[str]:
    """The modules that an error came through."""
    frames = traceback.walk_tb(error.__traceback__)
    return [frame.f_globals.get("__name__", "") for frame, _ in frames]


def is_loop_cache(error: BaseException) -> bool:
    """A damaged file among the compiled loops that Numba keeps."""
    is_damage = isinstance(error, (EOFError, pickle.UnpicklingError))
    return is_damage and "numba.core.caching" in modules_of(error)


def say_loop_cache(error: BaseException, config: Any) -> str:
    return (
        f"the compiled loops that Numba keeps are damaged ({error}); delete the folders loops-* in "
        "kernels/cpu/__pycache__, or below NUMBA_CACHE_DIR"
    )


def is_kernel_cache(error: BaseException) -> bool:
    """Triton cannot write the kernels that it has compiled."""
    is_triton = any(name.startswith("triton.") for name in modules_of(error))
    return isinstance(error, OSError) and is_triton


def say_kernel_cache(error: OSError, config: Any) -> str:
    return (
        f"Triton cannot keep its kernels: {error}; set TRITON_CACHE_DIR to a folder that can be "
        "written"
    )


def say_deep_json(error: BaseException, config: Any) -> str:
    return "a file holds JSON that is nested too deeply to be read; see what is in it"


def is_value(error: BaseException) -> bool:
    """ValueError is what every check of r1zero raises; a CheckpointError is one."""
    from_here = package_of(error) in ("builtins", "r1zero", "json")
    return isinstance(error, ValueError) and from_here


def is_too_large(error: BaseException) -> bool:
    return isinstance(error, OverflowError)


def say_too_large(error: BaseException, config: Any) -> str:
    return f"a number is too large: {error}; give a smaller one"


def is_of_library(error: BaseException) -> bool:
    return package_of(error) in LIBRARY_ADVICE


def say_of_library(error: BaseException, config: Any) -> str:
    package = package_of(error)
    text = str(error) or type(error).__name__
    return f"{package} says: {text}; {LIBRARY_ADVICE[package]}"


def is_other_value(error: BaseException) -> bool:
    return isinstance(error, ValueError)


KINDS = (
    Kind(is_stopped, 130, say_itself),
    Kind(is_ctrl_c, 130, lambda error, config: "broken off"),
    Kind(is_out_of_memory, 1, say_out_of_memory),
    Kind(is_non_finite, 1, say_itself),
    Kind(is_import, 2, say_import),
    Kind(is_device, 1, say_device),
    Kind(is_deep_json, 2, say_deep_json),
    Kind(is_loop_cache, 2, say_loop_cache),
    Kind(is_value, 2, say_itself),
    Kind(is_too_large, 2, say_too_large),
    Kind(is_of_library, 2, say_of_library),
    Kind(is_kernel_cache, 2, say_kernel_cache),
    Kind(is_system, 2, say_system),
    Kind(is_other_value, 2, say_itself),
)


def own_code(config: Any) -> list[str]:
    """The names `module:name` of the user's own code that a command was given."""
    task = getattr(config, "task", None)
    rewards = getattr(config, "rewards", None)
    values = (task, getattr(task, "name", None), getattr(rewards, "plugin", None))
    return [value for value in values if isinstance(value, str) and is_named(value)]


def explain(error: BaseException, config: Any) -> tuple[int, str | None]:
    """(exit code, what to tell the user); None for a fault of r1zero."""
    for kind in KINDS:
        if kind.is_it(error):
            code = error.exit_code if isinstance(error, Stopped) else kind.code
            return code, kind.say(error, config)
    for name in own_code(config):
        if passed_through(error, name.partition(":")[0]):
            return 2, f"{name} {raised(error)}; mend it"
    return 1, None
