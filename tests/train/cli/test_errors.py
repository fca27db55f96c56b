"""What an error from outside becomes: one line that says what to do, and never a fault of r1zero."""
import builtins
import errno
import json
import sys
import types

import numpy as np
import pytest
from safetensors import SafetensorError

from r1zero.model.checkpoint import CheckpointError
from r1zero.train.cli.chat import ChatConfig
from r1zero.train.cli.errors import SYSTEM_ADVICE, explain


def raised(function, *args):
    """What calling the function raises."""
    with pytest.raises(BaseException) as caught:
        function(*args)
    return caught.value


def of_library(name: str, base: type = Exception) -> Exception:
    """An error of a class that a library defines."""
    return type("TheirError", (base,), {"__module__": f"{name}.somewhere"})("it went wrong")


def deep(text: str):
    limit = sys.getrecursionlimit()
    return json.loads(text * (100 * limit))


# ---- what comes from outside ----

@pytest.mark.parametrize("error, code, fragments", [
    (ModuleNotFoundError(name="tokenizers"), 2, ["pip install tokenizers"]),
    (ModuleNotFoundError(name="wandb.sdk"), 2, ["pip install wandb"]),
    (ModuleNotFoundError(name="PIL"), 2, ["PIL is not", "pip install pillow"]),
    (ImportError("Numba needs NumPy 2.3 or less"), 2, ["Numba needs NumPy 2.3", "requirements.txt"]),
    (RuntimeError("CUDA error: no kernel image is available\nmore"), 1, ["GPU", "--device cpu"]),
    (RuntimeError("The NVIDIA driver on your system is too old."), 1, ["too old", "GPU"]),
    (RuntimeError("CUDA driver initialization failed"), 1, ["--device cpu"]),
    (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), 1, ["CUDNN_STATUS_NOT_INITIALIZED"]),
    (SafetensorError("Error while deserializing header: HeaderTooLarge"), 2, ["HeaderTooLarge", "damaged"]),
    (np.linalg.LinAlgError("Singular matrix"), 2, ["numpy says: Singular matrix"]),
    (OverflowError("Python int too large to convert to C long"), 2, ["too large", "smaller"]),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, ["0xff"]),
    (json.JSONDecodeError("Expecting value", "x", 0), 2, ["Expecting value"]),
    (CheckpointError("no checkpoint"), 2, ["no checkpoint"]),
    (ConnectionRefusedError(111, "Connection refused"), 2, ["Connection refused"]),
])
def test_an_error_from_outside_is_a_line_that_says_what_to_do(error, code, fragments):
    found, message = explain(error, ChatConfig(run="x"))
    assert found == code and all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize("number", SYSTEM_ADVICE)
def test_an_error_of_the_system_names_the_file_and_what_to_do(number):
    code, message = explain(OSError(number, "what it is called", "/run/x"), None)
    assert code == 2 and message == f"/run/x: what it is called; {SYSTEM_ADVICE[number]}"
    assert explain(OSError(number, "what it is called"), None)[1].startswith("what it is called; ")


@pytest.mark.parametrize("library", ["wandb", "tyro", "matplotlib", "requests", "tokenizers", "triton"])
@pytest.mark.parametrize("base", [Exception, ValueError, RuntimeError, OSError])
def test_an_error_whose_class_a_library_defines_is_told_as_its(library, base):
    code, message = explain(of_library(library, base), None)
    assert code == 2 and message.startswith(f"{library} says: it went wrong; ")


def test_json_of_a_million_brackets_is_not_our_fault():
    code, message = explain(raised(deep, "["), None)
    assert code == 2 and "nested too deeply" in message


# ---- what is ours ----

@pytest.mark.parametrize("error", [
    TypeError("x"), AssertionError("x"), KeyError("x"), IndexError("x"), AttributeError("x"),
    RecursionError("x"), RuntimeError("expected a tensor on cpu"), ZeroDivisionError("x"),
    ModuleNotFoundError("No module named 'r1zero.train.nothing'", name="r1zero.train.nothing"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
])
def test_a_fault_of_ours_stays_one(error):
    assert explain(error, None) == (1, None)


def test_a_number_of_the_system_that_has_no_advice_is_told_as_it_is():
    assert explain(OSError(errno.ENOENT, "No such file", "x"), None) == (2, "x: No such file")


def test_a_damaged_cache_of_compiled_loops_names_the_folder_to_delete():
    """Numba reads its index with pickle, in numba.core.caching, and lets what that raises through."""
    def load():
        raise EOFError("Ran out of input")

    in_numba = types.FunctionType(load.__code__, vars(builtins) | {"__name__": "numba.core.caching"})
    code, message = explain(raised(in_numba), None)
    assert code == 2 and "the compiled loops that Numba keeps are damaged" in message and "loops-*" in message
    assert explain(raised(load), None) == (1, None)


def test_a_cache_that_triton_cannot_write_names_the_variable_that_moves_it(tmp_path, monkeypatch):
    cache = pytest.importorskip("triton.runtime.cache")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file/cache"))
    code, message = explain(raised(cache.FileCacheManager, "a key"), None)
    assert code == 2 and message.startswith("Triton cannot keep its kernels: ") and str(tmp_path) in message
    assert "set TRITON_CACHE_DIR" in message
