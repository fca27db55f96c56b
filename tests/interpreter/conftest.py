"""The Triton kernels on the CPU. Triton reads TRITON_INTERPRET when it is imported, so these tests need a
process of their own, which tests/test_triton.py starts. Only fp32 and fp16 are right there."""
from pathlib import Path

import pytest
import torch

from r1zero.kernels.dispatch import HAS_TRITON, interpreting


def pytest_collection_modifyitems(items):
    if HAS_TRITON and interpreting():
        return
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason="tests/test_triton.py runs it in the interpreter"))


def poisoned(make):
    def make_poisoned(*args, **kwargs):
        x = make(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    return make_poisoned


@pytest.fixture(autouse=True)
def fresh_buffers_are_full_of_nan(monkeypatch):
    """So that an element which no program writes, or which one reads too early, shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
