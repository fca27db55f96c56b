"""The SwiGLU MLP of training as compiled loops for a CPU (see kernels/cpu.py), forward and backward:

    g, u = x gate^T, x up^T        a = silu(g) u        y = a down^T

    da = dy down       dg, du, and a anew, from g, u and da (swiglu.py)       dx = [dg du] [gate; up]
    ddown = dy^T a     [dgate; dup] = [dg du]^T x

Operator by operator, half as much time as in the products goes into memory: g, u and a are nine times as wide
as x here, and each is written and read by several. So a thread takes some tokens through all of it, on what
its own caches hold; g and u alone are kept for the gradient. The products are those of kernels/cpu_tiles.py;
for them a weight's columns are laid out 16 by 16 at each call.

The weights' gradients are added up over fixed parts of the tokens: the loops give the same bits on any number
of threads.

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
    serves,
    threads,
)
from .elementwise import swiglu_fwd_row

if HAS_NUMBA:
    from .registers import load, store
    from .tiles import product

TOKENS = 96  # that a thread takes through at one time
DEPTH = 384  # of a product at one time: 16 columns so long lie in the nearest cache
PARTS = 16  # of the tokens at most, each with gradients of the weights of its own
FEWEST = 512  # tokens of a part: for fewer, adding these up takes too long
MOST = 600_000  # weights: the gradients of more lie in no cache, and PyTorch's products are faster


def parts_of(n_tokens: int) -> int:
    """A power of two, or 0; so many threads, or a divisor of them, have the same to do."""
    return min(PARTS, 1 << (n_tokens // FEWEST).bit_length() >> 1)


def fits(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether the loops run on these, and are faster: there are parts for all threads, few of which wait at
    the end, and PyTorch's products have neither longer vectors nor hardware of their own. (So which of the
    two it is, and the last bits, does depend on the number of threads.)"""
    (M, F), n_weights, parts = (
        down.shape,
        gate_up.numel() + down.numel(),
        parts_of(x.numel() // x.shape[-1]),
    )
    shapes = (
        x.shape[-1] == M
        and gate_up.shape == (2 * F, M)
        and not (M % TILE_COLUMNS or F % TILE_COLUMNS)
    )
    all_busy = parts >= 2 and 8 * (-parts % torch.get_num_threads()) <= parts
    return (
        shapes
        and all_busy
        and n_weights <= MOST
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
        and serves(None, x, gate_up, down)
    )


def panels(weight_NK: torch.Tensor):
    """weight^T, 16 of its columns side by side: [N / 16, K, 16], flat."""
    N, K = weight_NK.shape
    return array(weight_NK.view(N // TILE_COLUMNS, TILE_COLUMNS, K).transpose(1, 2)).reshape(-1)


def apart(n: int) -> int:
    """Places from row to row for n numbers: an odd number of cache lines, or rows push each other out."""
    return n + TILE_COLUMNS * (n // TILE_COLUMNS % 2 == 0)


@part
def multiply(x, at, row, T, K, w, N, zeros, out, to, out_row):
    """out [T, N] = x [T, K] w, for w in panels."""
    for n in range(0, N, TILE_COLUMNS):
        for k in range(0, K, DEPTH):
            start, start_at, start_row = (out, to + n, out_row) if k else (zeros, 0, 0)
            product(
                x,
                at + k,
                row,
                1,
                T,
                min(DEPTH, K - k),
                w,
                n * K + k * TILE_COLUMNS,
                TILE_COLUMNS,
                LANES,
                start,
                start_at,
                start_row,
                LANES,
                out,
                to + n,
                out_row,
                LANES,
            )


@part
def add_gradient(d, row, T, N, x, x_row, M, dw):
    """dw [N, M] += d^T x for d [T, N], x [T, M]."""
    for n in range(0, N, TILE_ROWS):
        for m in range(0, M, TILE_COLUMNS):
            to = n * M + m
            product(
                d,
                n,
                1,
                row,
                min(TILE_ROWS, N - n),
                T,
                x,
                m,
                x_row,
                LANES,
                dw,
                to,
                M,
                LANES,
                dw,
                to,
                M,
                LANES,
            )


@part
def copy_rows(x, at, T, M, to, row):
    for t in range(T):
        for m in range(0, M, LANES):
            store(to, t * row + m, load(x, at + t * M + m))


@part
def swiglu_back_row(da, gate, up, dgate, dup):
    """da becomes a."""
    for f in range(len(da)):
        s = f32(1) / (f32(1) + exp(-gate[f]))
        silu = gate[f] * s
        dgate[f] = da[f] * up[f] * s * (f32(1) + gate[f] * (f32(1) - s))
        dup[f] = da[f] * silu
        da[f] = silu * up[f]


@loop
def mlp_fwd_loop(x, up_panels, down_panels, zeros, M, F, keep, gate_up, a_PTF, y):
    """All flat but a. gate_up: of all tokens if it is kept, else of each part's newest."""
    T, P = len(x) // M, len(a_PTF)
    for p in numba.prange(P):
        end, a, a_row = T * (p + 1) // P, a_PTF[p].reshape(-1), a_PTF.shape[2]
        for t in range(T * p // P, end, TOKENS):
            n, at = min(TOKENS, end - t), (t if keep else p * TOKENS) * 2 * F
            multiply(x, t * M, M, n, M, up_panels, 2 * F, zeros, gate_up, at, 2 * F)
            for i in range(n):
                up = at + (2 * i + 1) * F
                swiglu_fwd_row(
                    gate_up[up - F : up], gate_up[up : up + F], a[i * a_row : i * a_row + F]
                )
            multiply(a, 0, a_row, n, F, down_panels, M, zeros, y, t * M, M)


@loop
def mlp_bwd_loop(
    dy,
    x,
    gate_up,
    down_panels,
    up_panels,
    zeros,
    F,
    a_PTF,
    d_PTF,
    xs_PTM,
    dys_PTM,
    dx,
    dup_P,
    ddown_P,
):
    """All flat but for what each part has of its own: working memory, and dup [2 F, M] and ddown [F, M]."""
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
                swiglu_back_row(
                    a[i * a_row : i * a_row + F],
                    gate_up[up - F : up],
                    gate_up[up : up + F],
                    d[to - F : to],
                    d[to : to + F],
                )
            multiply(d, 0, d_row, n, 2 * F, up_panels, M, zeros, dx, t * M, M)
            add_gradient(d, d_row, n, 2 * F, xs, row, M, dup)
            add_gradient(a, a_row, n, F, dys, row, M, ddown)


def mlp_fwd(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, [g u] [T, 2 F] if it is to be kept)"""
    (M, F), T = down.shape, x.numel() // down.shape[0]
    P = parts_of(T)
    kept = x.new_empty(T if keep else P * TOKENS, 2 * F)
    y, a = x.new_empty(x.shape), x.new_empty(P, TOKENS, apart(F))
    threads()
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
    own = [x.new_empty(P, TOKENS, apart(n)).numpy() for n in (F, 2 * F, M, M)]
    dx, dup, ddown = x.new_empty(x.shape), x.new_empty(P, 2 * F * M), x.new_empty(P, F * M)
    threads()
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


def mlp(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x [..., M], gate_up [2 F, M], down [M, F], all that `fits` -> [..., M]."""
    if torch.is_grad_enabled():
        return MLP.apply(x, gate_up, down)
    return mlp_fwd(x, gate_up, down, False)[0]
