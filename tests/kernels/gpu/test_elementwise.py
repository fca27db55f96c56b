"""RMSNorm, RoPE and SwiGLU on a CUDA device, at real sizes, with every configuration that can be chosen.

The rule is FlashAttention's: at most twice the error that plain PyTorch makes in the same dtype.
"""
import pytest
import torch

from r1zero.kernels.mlp import swiglu
from r1zero.kernels.rmsnorm import rmsnorm
from r1zero.kernels.rope import rope, rope_table

from ..naive_ops import naive_rmsnorm, naive_swiglu, value_and_gradients

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def new(*shape, dtype):
    return torch.randn(shape, device="cuda", dtype=dtype)


def check(op, naive, inputs, upstream):
    """Value and gradients within twice the error of the formula in the same dtype; two runs, same bits."""
    got, again = (value_and_gradients(op, inputs, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    truth = value_and_gradients(naive, [x.double() for x in inputs], [dy.double() for dy in upstream])
    plain = value_and_gradients(naive, inputs, upstream)
    for i, (g, t, p) in enumerate(zip(got, truth, plain, strict=True)):
        # in fp32 both are right to a few units in the last place, and either may be the luckier
        tiny = 1e-5 * max(1.0, t.abs().max().item() if g.dtype == torch.float32 else 0.0)
        error, allowed = (g - t).abs().max().item(), 2 * (p - t).abs().max().item() + tiny
        assert g.dtype == p.dtype and error <= allowed, f"number {i} is {error} off, {allowed} allowed"


# ---- rmsnorm: M picks the block sizes, T the number of programs

@each_dtype
@pytest.mark.parametrize("M", [1, 64, 128, 500, 896, 1536, 2048, 4096, 8192, 12_288, 16_384])
def test_rmsnorm_and_its_gradients_at_each_size(M, dtype):
    for T in (1, 1000):
        x, w, dy = new(T, M, dtype=dtype), new(M, dtype=dtype), new(T, M, dtype=dtype)
        check(lambda x, w: rmsnorm(x, w, 1e-6, impl="triton"), lambda x, w: naive_rmsnorm(x, w, 1e-6),
              [x, w], [dy])
        residual, dsum = new(T, M, dtype=dtype), new(T, M, dtype=dtype)
        check(lambda x, w, r: rmsnorm(x, w, 1e-6, r, impl="triton"),
              lambda x, w, r: (naive_rmsnorm(x + r, w, 1e-6), x + r), [x, w, residual], [dy, dsum])


@each_dtype
@pytest.mark.parametrize("M", [64, 128, 896, 2048, 4096])
def test_rmsnorm_of_a_long_batch(M, dtype):
    """Each program of backward walks many rows."""
    T = 32_768
    check(lambda x, w: rmsnorm(x, w, 1e-6, impl="triton"), lambda x, w: naive_rmsnorm(x, w, 1e-6),
          [new(T, M, dtype=dtype), new(M, dtype=dtype)], [new(T, M, dtype=dtype)])


@each_dtype
def test_rmsnorm_of_views(dtype):
    qkv, w, dy = new(1000, 24, 128, dtype=dtype), new(128, dtype=dtype), new(1000, 16, 128, dtype=dtype)
    check(lambda x, w: rmsnorm(x[:, :16], w, impl="triton"), lambda x, w: naive_rmsnorm(x[:, :16], w, 1e-6),
          [qkv, w], [dy])
    x, dy = new(100, 4096, dtype=dtype), new(2048, dtype=dtype).expand(100, 2048)
    for start in (0, 3):  # rows aligned to 16 bytes, and not
        check(lambda x, w, a=start: rmsnorm(x[:, a : a + 2048], w, impl="triton"),
              lambda x, w, a=start: naive_rmsnorm(x[:, a : a + 2048], w, 1e-6),
              [x, new(2048, dtype=dtype)], [dy])


# ---- rope

def rotated(x, cos, sin):
    (first, second), cos, sin = x.chunk(2, -1), cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@each_dtype
@pytest.mark.parametrize("D", [2, 64, 80, 96, 128, 192, 256])
def test_rope_and_its_gradient(D, dtype):
    for T, H in ((1, 18), (1000, 18), (1000, 3), (32_768, 2)):
        cos, sin = rope_table(torch.arange(T, device="cuda"), D, 1e6)
        check(lambda x, c=cos, s=sin: rope(x, c, s, impl="triton"), lambda x, c=cos, s=sin: rotated(x, c, s),
              [new(T, H, D, dtype=dtype)], [new(T, H, D, dtype=dtype)])
    cos, sin = rope_table(torch.arange(1000, device="cuda"), D, 1e6)
    check(lambda x: rope(x[:, 1:7], cos, sin, impl="triton"), lambda x: rotated(x[:, 1:7], cos, sin),
          [new(1000, 9, D, dtype=dtype)], [new(1000, 6, D, dtype=dtype)])


# ---- swiglu

@each_dtype
@pytest.mark.parametrize("F", [1, 128, 344, 896, 4864, 8192])
def test_swiglu_and_its_gradient(F, dtype):
    for T in (1, 1000):
        check(lambda x: swiglu(x, impl="triton"), naive_swiglu, [new(T, 2 * F, dtype=dtype)],
              [new(T, F, dtype=dtype)])
    check(lambda x: swiglu(x[:, 1:-1], impl="triton"), lambda x: naive_swiglu(x[:, 1:-1]),
          [new(100, 2 * F + 2, dtype=dtype)], [new(F, dtype=dtype).expand(100, F)])


@each_dtype
def test_swiglu_of_a_long_batch(dtype):
    check(lambda x: swiglu(x, impl="triton"), naive_swiglu, [new(32_768, 2 * 2048, dtype=dtype)],
          [new(32_768, 2048, dtype=dtype)])


# ---- offsets beyond 2^31: the last rows are as if they stood alone

@pytest.mark.parametrize("name", ["rmsnorm", "rope", "swiglu"])
def test_more_than_two_to_the_31_elements(name):
    T, M, last = 2**31 // 2048 + 4096, 2048, 8
    if torch.cuda.mem_get_info()[0] < 10 * T * M:
        pytest.skip("needs 10 bytes an element of free memory")
    x = torch.empty(T, M, device="cuda", dtype=torch.bfloat16).normal_()
    w = new(M, dtype=torch.bfloat16)
    cos, sin = rope_table(torch.arange(T, device="cuda"), 128, 1e6)
    op = {"rmsnorm": lambda x, first: rmsnorm(x, w, impl="triton"),
          "rope": lambda x, first: rope(x.view(-1, 16, 128), cos[first:], sin[first:], impl="triton"),
          "swiglu": lambda x, first: swiglu(x, impl="triton")}[name]

    def value_and_gradient(x, first):
        x = x.detach().requires_grad_()
        y = op(x, first)
        return y.detach()[-last:], torch.autograd.grad(y, x, y.detach())[0][-last:]

    whole, alone = value_and_gradient(x, 0), value_and_gradient(x[-last:].clone(), T - last)
    assert all(torch.equal(a, b) for a, b in zip(whole, alone, strict=True))
