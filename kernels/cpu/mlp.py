"""The SwiGLU MLP of training as compiled loops, forward and backward. kernels/mlp.py is the public
op.

    g, u = x gate^T, x up^T        a = silu(g) u        y = a down^T

    da = dy down       dg, du, and a again, from g, u and da       dx = [dg du] [gate; up]
    ddown = dy^T a     [dgate; dup] = [dg du]^T x

Operator by operator, memory takes half as much time as the products: g, u and a together are nine
times as wide as x for the shapes of the demo, and each is written once and read several times. So a
thread takes a few tokens through all of it, on numbers that are still in its own caches. Only g and
u are kept for the gradient. The products are the tiles of registers.py. For these the columns of a
weight are copied into panels of 16 at each call.

The gradients of the weights are summed over fixed parts of the tokens, so they have the same bits
on any number of threads.

The loops run only where PyTorch reports AVX2 exactly. With AVX-512 PyTorch's own products are
faster, and on other CPUs the loops have never been measured.

Shapes: T tokens, M d_model, F d_ff, P parts; K and N of any product.
"""

import torch
from torch.autograd.function import once_differentiable

from .compile import (
    HAS_NUMBA,
    LANES,
    TILE_COLUMNS,
    TILE_ROWS,
    array,
    exp,
    f32,
    loop,
    numba,
    part,
    prepare,
)
from .compile import refuses as tensors_refuse
from .elementwise import swiglu_fwd_row

if HAS_NUMBA:
    from .registers import Layout, load, product, store

TOKENS = 96  # that a thread takes through the MLP at a time
DEPTH = 384  # of a product at a time: 16 columns of this length lie in the nearest cache
PARTS = 16  # of the tokens at most, each with its own gradients of the weights
FEWEST = 512  # tokens of a part: with fewer, summing these gradients takes too long
MOST = 600_000  # weights: the gradients of more fit no cache, and PyTorch's products are faster


def parts_of(n_tokens: int) -> int:
    """Number of parts: a power of two, or 0. Threads whose number divides it have equal work."""
    return min(PARTS, 1 << (n_tokens // FEWEST).bit_length() >> 1)


def refuses(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> str | None:
    """Why the loops do not run on these tensors, in words; None if they can and are faster.

    They are faster where few threads wait at the end and PyTorch's products have neither longer
    vectors nor hardware of their own. So the choice, and with it the last bits, depends on the
    number of threads."""
    reason = tensors_refuse(x, gate_up, down)
    if reason:
        return reason
    M, F = down.shape
    if x.shape[-1] != M or gate_up.shape != (2 * F, M):
        return (
            f"x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {(M, F)} do not fit together"
        )
    if M % TILE_COLUMNS or F % TILE_COLUMNS:
        return f"d_model is {M} and d_ff {F}; the loops take multiples of {TILE_COLUMNS}"
    n_weights = gate_up.numel() + down.numel()
    if n_weights > MOST:
        return f"it has {n_weights:,} weights; above {MOST:,} PyTorch's products are faster"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX2":
        return f"PyTorch reports {capability}; the loops are faster with AVX2 alone"
    n_tokens, n_threads = x.numel() // M, torch.get_num_threads()
    parts = parts_of(n_tokens)
    if parts < 2 or 8 * (-parts % n_threads) > parts:
        return f"{n_tokens} tokens in {parts} parts do not keep {n_threads} threads busy"
    return None


def panels(weight_NK: torch.Tensor):
    """weight^T as panels of 16 of its columns: [N / 16, K, 16], flat."""
    N, K = weight_NK.shape
    return array(weight_NK.view(N // TILE_COLUMNS, TILE_COLUMNS, K).transpose(1, 2)).reshape(-1)


def row_stride(n: int) -> int:
    """The row stride for n numbers: an odd number of cache lines, or rows evict each other from the
    cache."""
    return n + TILE_COLUMNS * (n // TILE_COLUMNS % 2 == 0)


@part
def multiply(x, at, row, T, K, w, N, zeros, out, to, out_row):
    """out [T, N] = x [T, K] w, for w in panels. x begins at `at` and out at `to`."""
    for n in range(0, N, TILE_COLUMNS):
        out_in = Layout(to + n, out_row, LANES)
        for k in range(0, K, DEPTH):
            depth = min(DEPTH, K - k)
            x_in = Layout(at + k, row, 1)
            w_in = Layout(n * K + k * TILE_COLUMNS, TILE_COLUMNS, LANES)
            start, start_at, start_row = (out, to + n, out_row) if k else (zeros, 0, 0)
            start_in = Layout(start_at, start_row, LANES)
            product(x, x_in, T, depth, w, w_in, start, start_in, out, out_in)


@part
def add_gradient(d, row, T, N, x, x_row, M, dw):
    """dw [N, M] += d^T x for d [T, N], x [T, M]."""
    for n in range(0, N, TILE_ROWS):
        d_in = Layout(n, 1, row)
        for m in range(0, M, TILE_COLUMNS):
            x_in, dw_in = Layout(m, x_row, LANES), Layout(n * M + m, M, LANES)
            product(d, d_in, min(TILE_ROWS, N - n), T, x, x_in, dw, dw_in, dw, dw_in)


@part
def copy_rows(x, at, T, M, to, row):
    for t in range(T):
        for m in range(0, M, LANES):
            store(to, t * row + m, load(x, at + t * M + m))


@part
def swiglu_back_row(da, gate, up, dgate, dup):
    """dgate and dup from da, which becomes a."""
    for f in range(len(da)):
        s = f32(1) / (f32(1) + exp(-gate[f]))
        silu = gate[f] * s
        dgate[f] = da[f] * up[f] * s * (f32(1) + gate[f] * (f32(1) - s))
        dup[f] = da[f] * silu
        da[f] = silu * up[f]


@loop
def mlp_fwd_loop(x, up_panels, down_panels, zeros, M, F, keep, gate_up, a_PTF, y):
    """All arrays are flat, but for a. gate_up holds all tokens if it is kept, else the newest of
    each part."""
    T, P = len(x) // M, len(a_PTF)
    for p in numba.prange(P):
        end, a, a_row = T * (p + 1) // P, a_PTF[p].reshape(-1), a_PTF.shape[2]
        for t in range(T * p // P, end, TOKENS):
            n, at = min(TOKENS, end - t), (t if keep else p * TOKENS) * 2 * F
            multiply(x, t * M, M, n, M, up_panels, 2 * F, zeros, gate_up, at, 2 * F)
            for i in range(n):
                up = at + (2 * i + 1) * F
                swiglu_fwd_row(gate_up[up - F : up], gate_up[up : up + F],
                               a[i * a_row : i * a_row + F])  # fmt: skip
            multiply(a, 0, a_row, n, F, down_panels, M, zeros, y, t * M, M)


@loop
def mlp_bwd_loop(dy, x, gate_up, down_panels, up_panels, zeros, F, a_PTF, d_PTF, xs_PTM, dys_PTM,
                 dx, dup_P, ddown_P):  # fmt: skip
    """All arrays are flat, but for those of each part: its working memory, dup [2 F, M] and ddown
    [F, M]."""
    P, M = len(a_PTF), ddown_P.shape[1] // F
    T, a_row, d_row, row = len(x) // M, a_PTF.shape[2], d_PTF.shape[2], xs_PTM.shape[2]
    for p in numba.prange(P):
        a, d = a_PTF[p].reshape(-1), d_PTF[p].reshape(-1)
        xs, dys = xs_PTM[p].reshape(-1), dys_PTM[p].reshape(-1)
        end, dup, ddown = T * (p + 1) // P, dup_P[p], ddown_P[p]
        dup[:] = 0
        ddown[:] = 0
        for t in range(T * p // P, end, TOKENS):
            n = min(TOKENS, end - t)
            copy_rows(x, t * M, n, M, xs, row)
            copy_rows(dy, t * M, n, M, dys, row)
            multiply(dys, 0, row, n, M, down_panels, F, zeros, a, 0, a_row)
            for i in range(n):
                up, to = (2 * (t + i) + 1) * F, i * d_row + F
                swiglu_back_row(a[i * a_row : i * a_row + F],
                                gate_up[up - F : up], gate_up[up : up + F],
                                d[to - F : to], d[to : to + F])  # fmt: skip
            multiply(d, 0, d_row, n, 2 * F, up_panels, M, zeros, dx, t * M, M)
            add_gradient(d, d_row, n, 2 * F, xs, row, M, dup)
            add_gradient(a, a_row, n, F, dys, row, M, ddown)


def mlp_fwd(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, [g u] [T, 2 F] if it is to be kept, else working memory)"""
    (M, F), T = down.shape, x.numel() // down.shape[0]
    P = parts_of(T)
    kept = x.new_empty(T if keep else P * TOKENS, 2 * F)
    y, a = x.new_empty(x.shape), x.new_empty(P, TOKENS, row_stride(F))
    prepare()
    mlp_fwd_loop(
        array(x).reshape(-1),
        panels(gate_up),
        panels(down),
        x.new_zeros(TILE_COLUMNS).numpy(),
        M,
        F,
        keep,
        kept.numpy().reshape(-1),
        a.numpy(),
        y.numpy().reshape(-1),
    )
    return y, kept


def mlp_bwd(
    dy: torch.Tensor, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dgate_up, ddown)"""
    (M, F), P = down.shape, parts_of(x.numel() // down.shape[0])
    own = [x.new_empty(P, TOKENS, row_stride(n)).numpy() for n in (F, 2 * F, M, M)]
    dx, dup, ddown = x.new_empty(x.shape), x.new_empty(P, 2 * F * M), x.new_empty(P, F * M)
    prepare()
    mlp_bwd_loop(
        array(dy).reshape(-1),
        array(x).reshape(-1),
        kept.numpy().reshape(-1),
        panels(down.t()),
        panels(gate_up.t()),
        x.new_zeros(TILE_COLUMNS).numpy(),
        F,
        *own,
        dx.numpy().reshape(-1),
        dup.numpy(),
        ddown.numpy(),
    )
    return dx, dup.sum(0).view(2 * F, M), ddown.sum(0).view(F, M).t()


class MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down):
        y, kept = mlp_fwd(x, gate_up, down, True)
        ctx.save_for_backward(x, gate_up, down, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return mlp_bwd(dy, *ctx.saved_tensors)


def swiglu_mlp(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """As kernels/mlp.py has it: x [..., M], gate_up [2 F, M], down [M, F], none of which `refuses`
    -> [..., M]."""
    if torch.is_grad_enabled():
        return MLP.apply(x, gate_up, down)
    return mlp_fwd(x, gate_up, down, False)[0]
