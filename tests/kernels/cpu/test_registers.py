"""Vectors of 8 numbers, and products of tiles."""
import numpy as np
import pytest
import torch

from r1zero.kernels.cpu import compile as cpu

from ..naive_ops import assert_close

PANEL = cpu.LANES
NAN, INF = torch.nan, torch.inf
pytestmark = pytest.mark.skipif(not cpu.HAS_NUMBA, reason="Numba is not installed")
if cpu.HAS_NUMBA:
    from r1zero.kernels.cpu.registers import Layout, exp_up_to_88, load, narrow_product, product, store

    @cpu.loop
    def product_inside(a, a3, rows, depth, b, b3, start, start3, out, out3):
        for _ in cpu.numba.prange(1):
            product(a, Layout(a3[0], a3[1], a3[2]), rows, depth, b, Layout(b3[0], b3[1], b3[2]),
                    start, Layout(start3[0], start3[1], start3[2]), out, Layout(out3[0], out3[1], out3[2]))

    @cpu.loop
    def narrow_inside(a, a3, rows, depth, b, b3, start, start3, out, out3):
        for _ in cpu.numba.prange(1):
            narrow_product(a, Layout(a3[0], a3[1], a3[2]), rows, depth, b, Layout(b3[0], b3[1], b3[2]),
                           start, Layout(start3[0], start3[1], start3[2]),
                           out, Layout(out3[0], out3[1], out3[2]))

    def product_loop(*args):
        """With each Layout as an array, for a loop takes no named tuples."""
        product_inside(*[np.array(x) if isinstance(x, Layout) else x for x in args])

    def narrow_loop(*args):
        narrow_inside(*[np.array(x) if isinstance(x, Layout) else x for x in args])

    cpu.prepare()


def piece(*sizes_and_strides):
    """A tensor somewhere in flat memory, all else NaN: (memory, first place, tensor)."""
    sizes, strides = zip(*sizes_and_strides, strict=True)
    memory, at = torch.full((7 + sum(n * stride for n, stride in sizes_and_strides),), torch.nan), 5
    return memory, at, memory[at:].as_strided(sizes, strides).copy_(torch.randn(sizes))


@pytest.mark.parametrize("rows", [*range(1, 15), 25, 97])
@pytest.mark.parametrize("depth", [1, 3, 130])
@pytest.mark.parametrize("turned", [False, True], ids=["a", "a transposed"])
@pytest.mark.parametrize("panels", ["one", "neighbours", "apart"])
def test_product_of_pieces_of_memory(rows, depth, turned, panels):
    a_row, a_step = (1, rows + 2) if turned else (depth + 3, 1)
    row, n = 2 * PANEL + 5, 1 if panels == "one" else 2
    b_next, next = (depth * row + 3, rows * row + 1) if panels == "apart" else (PANEL, PANEL)
    a, a_at, a_RK = piece((rows, a_row), (depth, a_step))
    b, b_at, b_KPC = piece((depth, row), (n, b_next), (PANEL, 1))
    out, out_at, out_RPC = piece((rows, row), (n, next), (PANEL, 1))
    for start, start_row, start_next in ((out.clone(), row, next), (torch.randn(out_at + 2 * PANEL), 0, 0)):
        start_RPC = start[out_at:].as_strided((rows, n, PANEL), (start_row, start_next, 1))
        expected, others = start_RPC.double() + torch.einsum("rk,kpc->rpc", a_RK.double(), b_KPC.double()), \
            out.isnan()
        run = narrow_loop if n == 1 else product_loop
        run(a.numpy(), Layout(a_at, a_row, a_step), rows, depth, b.numpy(), Layout(b_at, row, b_next),
            start.numpy(), Layout(out_at, start_row, start_next), out.numpy(), Layout(out_at, row, next))
        assert_close([out_RPC], [expected], 1e-6)
        assert out.isnan().equal(others)  # nothing else is written


def test_a_number_does_not_depend_on_what_is_computed_beside_it():
    a, (b, zeros, out, alone) = torch.randn(29, 50), (torch.randn(n, 2 * PANEL) for n in (50, 1, 29, 29))
    b, zeros = b.view(-1).numpy(), zeros.zero_().view(-1).numpy()
    a_in, b_in, nothing = Layout(0, 50, 1), Layout(0, 16, PANEL), Layout(0, 0, 0)
    product_loop(a.view(-1).numpy(), a_in, 29, 50, b, b_in, zeros, nothing, out.view(-1).numpy(), b_in)
    for i in range(29):
        product_loop(a[i].numpy(), a_in, 1, 50, b, b_in, zeros, nothing, alone[i].numpy(), b_in)
    assert out.equal(alone)
    for rows in (29, 1):  # 8 columns, and all rows at once or one by one
        alone.zero_()
        for i, at in ((i, at) for i in range(0, 29, rows) for at in (0, PANEL)):
            half = Layout(at, 16, 0)
            narrow_loop(a[i:].reshape(-1).numpy(), a_in, rows, 50, b, half, zeros, nothing,
                        alone[i:].view(-1).numpy(), half)
        assert out.equal(alone)


def test_exp_up_to_88():
    @cpu.numba.njit(error_model="numpy")
    def run(x, y):
        for i in range(0, len(x), 8):
            store(y, i, exp_up_to_88(load(x, i)))

    x = torch.tensor([0.0, -0.0, -INF, NAN, -1e4, -87.0, 88.0, -3e38])
    x = torch.cat([x, torch.linspace(-100, 88, 80_000)])
    y = torch.empty_like(x)
    run(x.numpy(), y.numpy())
    exact, inside = x.double().exp(), x >= -87
    assert ((y - exact).abs() / exact)[inside].max() <= 3e-7
    assert not y[x < -87].any() and torch.equal(y.isnan(), x.isnan()) and y[0] == y[1] == 1
