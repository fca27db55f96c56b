"""The Triton kernels on the CPU. Triton reads TRITON_INTERPRET when it is imported, so these tests need a
process of their own, which tests/kernels/test_triton.py starts. Only fp32 and fp16 are right there."""
from pathlib import Path

import pytest
import torch

from r1zero.kernels.dispatch import HAS_TRITON, INTERPRETING


def pytest_collection_modifyitems(items):
    if HAS_TRITON and INTERPRETING:
        return
    for item in items:
        if item.path.parent == Path(__file__).parent:
            reason = "tests/kernels/test_triton.py runs it in the interpreter"
            item.add_marker(pytest.mark.skip(reason=reason))


GUARD = 4096  # elements behind each fresh buffer that nobody may write


def poisoned(make, guards):
    def make_poisoned(*args, **kwargs):
        x = make(*args, **kwargs)
        if type(x) is not torch.Tensor or not x.is_floating_point() or x.device.type != "cpu":
            return x  # one that only stands for a shape, under torch.compile
        whole = torch.full((x.numel() + GUARD,), float("nan"), dtype=x.dtype)
        guards.append(whole[x.numel():])
        return whole[: x.numel()].view(x.shape)

    return make_poisoned


@pytest.fixture(autouse=True)
def fresh_buffers_are_full_of_nan(monkeypatch):
    """So that an element which no program writes, or which one reads too early, shows; and so does a write
    behind a buffer's end."""
    guards = []
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name), guards))
    yield
    assert all(bool(guard.isnan().all()) for guard in guards), "a program wrote behind the end of a buffer"
