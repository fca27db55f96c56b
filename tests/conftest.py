"""What all tests share: fixed seeds, hypothesis without chance, GPU tests skipped where there is no GPU."""
import gc
import os
import random
import signal

import numpy as np
import pytest
import torch

# `make test` has a process for each core: then one thread in each, and in the processes that the tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# A shell starts its background jobs deaf to Ctrl-C, and some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import hypothesis
except ImportError:  # a machine with a GPU may not have it, and the tests of the GPU do without
    pass
else:
    # The same examples on every run and machine; no clock decides whether a test passes.
    hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def importance(item) -> int:
    """On a GPU bf16 comes first, then fp16; fp32, which nobody trains in there, is last."""
    if "gpu" not in item.keywords or not hasattr(item, "callspec"):
        return 0
    return {torch.float16: 1, torch.float32: 2}.get(item.callspec.params.get("dtype"), 0)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A case that needs more memory than this GPU has is skipped, and leaves none of it behind."""
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        why = str(error).splitlines()[0][:200]
    gc.collect()
    torch.cuda.empty_cache()
    pytest.skip(f"out of memory: {why}")


def pytest_collection_modifyitems(items):
    items.sort(key=importance)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
