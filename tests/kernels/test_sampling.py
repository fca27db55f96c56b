"""Inverting a cumulative distribution for one row alone, which CUDA would sum by another scan."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r1zero.kernels.sampling import cumulative, invert_cdf
from r1zero.model.engine.sampling import keep_likeliest

aten = torch.ops.aten


class RowsSummed(TorchDispatchMode):
    """Notes how many rows each cumulative sum has."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.cumsum.default:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


class SaysCuda(torch.Tensor):
    """Lies on the CPU, and so does what is computed from it, but says that it is a CUDA tensor."""

    is_cuda = True


@pytest.mark.parametrize("V", [1, 29, 64, 1000])
def test_rows_of_zeros_beside_a_row_change_no_token_of_it(V):
    probs = (3 * torch.randn(7, V)).softmax(-1)
    uniforms = torch.rand(7, dtype=torch.float64)
    expected = invert_cdf(probs, uniforms)
    for n in (1, 2, 7):
        for least_rows in (1, 2, 5):
            with RowsSummed() as summed:
                tokens = invert_cdf(probs[:n], uniforms[:n], least_rows)
            assert torch.equal(tokens, expected[:n]) and summed.rows == 2 * [max(n, least_rows)]


def test_cumulative_sums_are_of_the_rows_that_were_given():
    x = torch.rand(1, 50)
    assert torch.equal(cumulative(x, least_rows=3), x.cumsum(-1))
    assert torch.equal(cumulative(x, torch.float64, least_rows=3), x.cumsum(-1, dtype=torch.float64))
    with RowsSummed() as summed:
        cumulative(x)
    assert summed.rows == [1]  # on a CPU nothing is added


def test_on_a_gpu_no_scan_is_of_one_row():
    probs, uniforms = torch.rand(1, 99).softmax(-1), torch.rand(1, dtype=torch.float64)
    expected = invert_cdf(probs, uniforms)
    probs = probs.as_subclass(SaysCuda)
    filters = (torch.tensor(x) for x in ([30], [0.5], [0.0]))
    with RowsSummed() as summed:
        assert torch.equal(invert_cdf(probs, uniforms), expected)
        keep_likeliest(probs, *filters)
    assert summed.rows == [2, 2, 2]
