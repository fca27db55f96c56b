"""RMSNorm, RoPE and SwiGLU as Triton kernels, forward and every gradient, against naive oracles in fp64."""
from dataclasses import replace

import pytest
import torch

from r1zero.kernels import chips
from r1zero.kernels.chips import KNOWN_CHIPS
from r1zero.kernels.dispatch import choose
from r1zero.kernels.mlp import SWIGLU, swiglu, swiglu_bwd_op, swiglu_config, swiglu_fwd_op
from r1zero.kernels.rmsnorm import rmsnorm, rmsnorm_bwd_config, rmsnorm_bwd_op, rmsnorm_config, rmsnorm_fwd_op
from r1zero.kernels.rope import rope, rope_config, rope_op, rope_table

from ..naive_ops import (
    assert_close,
    assert_rounded_once,
    naive_rmsnorm,
    naive_swiglu,
    rmsnorm_of_open_models,
    value_and_gradients,
)

DTYPES = [torch.float32, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(got, expected, eager=None, first=1):
    """fp32: 2e-6 of the largest. fp16: rounded once, and at most twice the error of the maths in fp16.

    first: how often the first result is rounded.
    """
    if got[0].dtype == torch.float32:
        return assert_close(got, expected, 2e-6)
    assert_rounded_once(got, expected, first)
    for g, e, plain in zip(got, expected, eager or (), strict=eager is not None):
        assert not e.numel() or (g - e).abs().max() <= 2 * (plain - e).abs().max() + 1e-5


def against_naive(op, naive, inputs, upstream, first=1):
    got = value_and_gradients(op, inputs, upstream)
    expected = value_and_gradients(naive, [x.double() for x in inputs], [dy.double() for dy in upstream])
    assert all(g.dtype == inputs[0].dtype for g in got)
    check(got, expected, value_and_gradients(naive, inputs, upstream), first)


# ---- rmsnorm

SHAPES = [(1, 1), (2, 3), (17, 64), (63, 65), (129, 128), (1, 896), (19, 1500), (10, 2100), (2, 12_000),
          (24,), (3, 5, 24), (0, 24), (2, 0, 3, 8)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rmsnorm_and_its_gradients(shape, dtype):
    x, w, dy = (torch.randn(s).to(dtype) for s in (shape, shape[-1:], shape))
    against_naive(lambda x, w: rmsnorm(x, w, 0.01, impl="triton"), lambda x, w: naive_rmsnorm(x, w, 0.01),
                  [x, w], [dy], first=2)


@each_dtype
@pytest.mark.parametrize("shape", [(17, 64), (63, 65), (9, 2100), (2, 12_000), (3, 5, 24), (0, 24)], ids=str)
def test_rmsnorm_with_a_residual(shape, dtype):
    x, residual, dy, dsum = (torch.randn(shape).to(dtype) for _ in range(4))
    w = torch.randn(shape[-1])  # fp32 beside fp16, as a master weight is
    y, total, dx, dw, dresidual = value_and_gradients(
        lambda x, w, r: rmsnorm(x, w, 0.01, r, impl="triton"), [x, w, residual], [dy, dsum])
    assert torch.equal(total, x + residual) and torch.equal(dx, dresidual) and dw.dtype == torch.float32
    # the norm is of the sum as it is stored
    expected = value_and_gradients(lambda x, w: naive_rmsnorm(x, w, 0.01),
                                   [total.detach().double(), w.double()], [dy.double()])
    check([y, dx], [expected[0], expected[1] + dsum], first=2)
    check([dw], [expected[2]])


def test_rmsnorm_when_one_of_its_two_results_is_used():
    x, residual, w, dy = torch.randn(5, 40), torch.randn(5, 40), torch.randn(40), torch.randn(5, 40)

    def gradients(pick, x, residual, w):
        leaves = [t.clone().requires_grad_() for t in (x, residual, w)]
        outputs = rmsnorm(leaves[0], leaves[2], 0.1, leaves[1], impl="triton")
        return torch.autograd.grad(pick(*outputs), leaves, dy, allow_unused=True)

    dx, dresidual, dw = gradients(lambda y, total: total, x, residual, w)
    assert torch.equal(dx, dy) and torch.equal(dresidual, dy) and dw is None
    got = gradients(lambda y, total: y, x, residual, w)
    expected = value_and_gradients(lambda x, r, w: naive_rmsnorm(x + r, w, 0.1),
                                   [t.double() for t in (x, residual, w)], [dy.double()])
    check(got, expected[1:])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_rmsnorm_rounds_where_the_open_models_do(impl):
    """Bit for bit, but where sums that differ in the last place lie at the edge between two numbers."""
    x, w = torch.randn(200, 896).half() * 3, torch.randn(896).half()
    ours, theirs = rmsnorm(x, w, 1e-6, impl=impl), rmsnorm_of_open_models(x, w, 1e-6)
    rounded_once = naive_rmsnorm(x.double(), w.double(), 1e-6).half()
    assert (ours != theirs).float().mean() < 2e-3 < 0.05 < (rounded_once != theirs).float().mean()


@each_dtype
def test_rmsnorm_of_some_heads_of_wider_rows(dtype):
    """q and k normed in place in the fused projection; the gradient of each comes as a strided view too."""
    qkv, dy = torch.randn(9, 7, 24).to(dtype), torch.randn(9, 5, 24).to(dtype)
    weights = [torch.randn(24).to(dtype) for _ in range(2)]

    def op(norm):
        return lambda qkv, wq, wk: torch.cat([norm(qkv[:, :4], wq), norm(qkv[:, 4:5], wk)], 1)

    against_naive(op(lambda x, w: rmsnorm(x, w, 1e-6, impl="triton")),
                  op(lambda x, w: naive_rmsnorm(x, w, 1e-6)), [qkv, *weights], [dy], first=2)
    columns = torch.randn(6, 50).to(dtype)[:, 3:27]  # rows with a stride, and not aligned
    against_naive(lambda x, w: rmsnorm(x, w, 1e-6, impl="triton"), lambda x, w: naive_rmsnorm(x, w, 1e-6),
                  [columns, weights[0]], [torch.randn(24).to(dtype).expand(6, 24)], first=2)
    assert torch.equal(rmsnorm(columns, weights[0], impl="triton"),
                       rmsnorm(columns.contiguous(), weights[0], impl="triton"))


def test_rmsnorm_when_a_program_walks_many_rows(monkeypatch):
    tiny = replace(KNOWN_CHIPS[80], processors=1)
    monkeypatch.setattr(chips, "chip_of", lambda device: tiny)
    x, w, dy = torch.randn(301, 60), torch.randn(60), torch.randn(301, 60)
    assert rmsnorm_bwd_config(60, 301, tiny)[0] == 8
    against_naive(lambda x, w: rmsnorm(x, w, 0.01, impl="triton"), lambda x, w: naive_rmsnorm(x, w, 0.01),
                  [x, w], [dy], first=2)


def test_a_row_and_a_gradient_do_not_depend_on_the_batch_or_the_run():
    x, w, dy = torch.randn(70, 33), torch.randn(33), torch.randn(70, 33)
    runs = [value_and_gradients(lambda x, w: rmsnorm(x, w, impl="triton"), [x, w], [dy]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    y, dx, _ = value_and_gradients(lambda x, w: rmsnorm(x, w, impl="triton"), [x[65:], w], [dy[65:]])
    assert torch.equal(y, runs[0][0][65:]) and torch.equal(dx, runs[0][1][65:])


def test_rmsnorm_at_hostile_values():
    zero = torch.zeros(1, 2, requires_grad=True)
    rmsnorm(zero, torch.ones(2), 1e-6, impl="triton").sum().backward()
    assert torch.allclose(zero.grad, torch.full((1, 2), 1e3))
    assert rmsnorm(torch.full((1, 4), 6e4).half(), torch.ones(4), impl="triton").tolist() == [[1.0] * 4]
    with pytest.raises(ValueError, match="rmsnorm: .*the last dimension of x is 16385"):
        rmsnorm(torch.zeros(2, 16_385), torch.zeros(16_385), impl="triton")


# ---- rope

def rotated(x, cos, sin):
    (first, second), cos, sin = x.chunk(2, -1), cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 6), (17, 1, 64), (63, 5, 80), (129, 2, 32), (0, 2, 8)],
                         ids=str)
def test_rope_and_its_gradient(shape, dtype):
    cos, sin = rope_table(torch.arange(shape[0]) * 7, shape[2], 100.0)
    x, dy = torch.randn(2, *shape).to(dtype)
    against_naive(lambda x: rope(x, cos, sin, impl="triton"), lambda x: rotated(x, cos, sin), [x], [dy])


@each_dtype
def test_rope_of_some_heads_of_wider_rows(dtype):
    cos, sin = rope_table(torch.arange(11), 16, 100.0)
    qkv, dy = torch.randn(11, 8, 16).to(dtype), torch.randn(11, 5, 16).to(dtype)
    against_naive(lambda x: rope(x[:, 1:6], cos, sin, impl="triton"), lambda x: rotated(x[:, 1:6], cos, sin),
                  [qkv], [dy])
    # a table and an upstream gradient that are views as well
    wide_cos, wide_sin = (torch.cat([t, t], -1)[:, :8] for t in (cos, sin))
    against_naive(lambda x: rope(x, wide_cos, wide_sin, impl="triton"), lambda x: rotated(x, cos, sin),
                  [qkv[:, 2:4]], [torch.randn(16).to(dtype).expand(11, 2, 16)])


# ---- swiglu

@each_dtype
@pytest.mark.parametrize("shape", [(1, 2), (2, 10), (17, 130), (63, 256), (3, 2 * 1025), (2, 2 * 2304), (12,),
                                   (3, 5, 24), (0, 24)], ids=str)
def test_swiglu_and_its_gradient(shape, dtype):
    spread = 3 if dtype == torch.float32 else 1  # exp(11) is too large for the naive formula in fp16
    x, dy = torch.randn(shape).to(dtype) * spread, torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    against_naive(lambda x: swiglu(x, impl="triton"), naive_swiglu, [x], [dy])


def test_swiglu_of_strided_rows():
    x = torch.randn(9, 50)
    against_naive(lambda x: swiglu(x[:, 5:35], impl="triton"), lambda x: naive_swiglu(x[:, 5:35]), [x],
                  [torch.randn(15).expand(9, 15)])


def test_swiglu_at_gates_of_ten_thousand():
    x = torch.tensor([[1e4, -1e4, 0.0, 2.0, 3.0, 4.0]], requires_grad=True)
    y = swiglu(x, impl="triton")
    y.sum().backward()
    assert y.tolist() == [[2e4, 0.0, 0.0]] and x.grad.tolist() == [[2.0, 0.0, 2.0, 1e4, 0.0, 0.0]]


# ---- as operators of torch

def samples():
    x, w, dy = torch.randn(5, 3, 8), torch.rand(8), torch.randn(5, 3, 8)
    cos, sin = rope_table(torch.arange(5), 8, 100.0)
    leaf, scale = x.clone().requires_grad_(), w.clone().requires_grad_()
    return {
        "rmsnorm": (rmsnorm_fwd_op, (leaf, scale, 0.1, None)),
        "rmsnorm with a residual": (rmsnorm_fwd_op, (leaf, scale, 0.1, dy.clone().requires_grad_())),
        "rmsnorm backward": (rmsnorm_bwd_op, (dy, None, x, w, torch.rand(15))),
        "rmsnorm backward with a residual": (rmsnorm_bwd_op, (dy, dy, x, w, torch.rand(15))),
        "rope": (rope_op, (leaf, cos, sin, False)),
        "swiglu": (swiglu_fwd_op, (leaf,)),
        "swiglu backward": (swiglu_bwd_op, (dy[..., :4], x)),
    }


@pytest.mark.parametrize("name", samples())
def test_the_ops_keep_torchs_rules(name):
    torch.library.opcheck(*samples()[name])


def test_the_ops_compile_as_one_graph():
    cos, sin = rope_table(torch.arange(5), 8, 100.0)

    def layer(x, w, residual):
        y, total = rmsnorm(x, w, 0.1, residual, impl="triton")
        return swiglu(rope(y, cos, sin, impl="triton"), impl="triton"), rmsnorm(total, w, 0.1, impl="triton")

    inputs = [torch.randn(5, 3, 8), torch.randn(8), torch.randn(5, 3, 8)]
    upstream = [torch.randn(5, 3, 4), torch.randn(5, 3, 8)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(value_and_gradients(compiled, inputs, upstream),
                 value_and_gradients(layer, inputs, upstream), 1e-6)


# ---- choices

def served(impl, x):
    """The name of the back end of SwiGLU that runs."""
    run = choose("swiglu", SWIGLU, impl, x)
    [name] = [backend.name for backend in SWIGLU if backend.run is run]
    return name


def test_the_interpreter_serves_what_it_gets_right():
    assert served(None, torch.zeros(1)) == served("triton", torch.zeros(1).half()) == "triton"
    with pytest.raises(ValueError, match="wrong for bfloat16"):
        served("triton", torch.zeros(1).bfloat16())
    with pytest.warns(UserWarning, match="not torch.float64"):
        assert served(None, torch.zeros(1).double()) == "reference"
    assert served("reference", torch.zeros(1)) == "reference"


def test_rows_too_long_for_the_kernel_go_to_another_back_end_and_it_is_said():
    with pytest.warns(UserWarning, match="the last dimension of x is 16385, the Triton kernel takes 16384"):
        y = rmsnorm(torch.full((1, 16_385), 2.0), torch.ones(16_385), 0.0)
    torch.testing.assert_close(y, torch.ones(1, 16_385))


def test_block_sizes_cover_a_row_and_the_partial_sums_stay_few():
    for M in (1, 64, 128, 896, 1024, 1500, 2048, 4096, 8192, 12_288, 16_384):
        config = rmsnorm_config(M)
        assert M <= config["BLOCK_M"] < 2 * M or M == config["BLOCK_M"] == 1
        assert config["ROWS"] * config["BLOCK_M"] <= 32 * 32 * config["num_warps"]
        for R in (0, 1, 1000, 10**8):
            P, config = rmsnorm_bwd_config(M, R, KNOWN_CHIPS[90])
            assert (R > 0) <= P <= min(8 * 132, R // 8 + 1) and config["BLOCK_M"] >= min(M, 8192)
    assert rope_config(128) == {"BLOCK_C": 64, "ROWS": 16, "num_warps": 4}
    assert swiglu_config(4864) == {"BLOCK_F": 1024, "ROWS": 2, "num_warps": 4}
