"""The layers of one token of every row that is decoded, and the logits, but for attention (cpu_attention.py),
as compiled loops for a CPU (see kernels/cpu.py).

Rows go in blocks of 8, each number of the 8 side by side: [blocks, M, 8]. Nothing that a layer does to one
block has to do with another, so a thread takes a group of blocks from the residual stream to the heads, and
after attention back to it, waiting for no other, on what its own caches still hold. Each 12 rows of a weight
are read for all blocks of the group in turn, two at a time. Weights are read where they lie.

What comes out for a row is the same to the last bit whatever the others are, and on any number of threads.

Shapes: M features, N of a product's result, A of the query heads, F d_ff. All arrays are flat.
"""

import numpy as np
import torch

from .compile import HAS_NUMBA, LANES, f32, numba, ordered_loop, ordered_part
from .elementwise import swiglu_fwd_row

if HAS_NUMBA:
    from .registers import LINE, add_product, fill, load, multiply, prefetch, store
    from .tiles import NARROW_ROWS, narrow_product, product

BLOCKS = 8  # of a group at most: what they hold stays in the nearer caches of a core
ROWS_A_THREAD = 16  # or more, or reading all weights for them takes longer than the arithmetic
SMALL = 4_000_000  # weights that all cores' common cache holds: they may be read for a single block


def groups_of(n_rows: int, n_threads: int, n_weights: int) -> int:
    """Groups of blocks, as many for each thread; 0 where PyTorch's products are faster: for few rows, and
    where these have longer vectors than the loops, or hardware of their own. (So whether a row of a large
    model goes by blocks, and its last bits, does depend on rows and threads.)"""
    few = n_rows < (2 if n_weights <= SMALL else ROWS_A_THREAD * n_threads)
    if few or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return 0
    return n_threads * -(-n_rows // (n_threads * BLOCKS * LANES))


@ordered_part
def norm_block(x, at, M, weight, w_at, eps, y):
    """Columns of x[at], [M, 8], normed, into y[at]."""
    r, total = np.empty(LANES, f32), fill(f32(0))
    for i in range(at, at + M * LANES, LANES):
        total = add_product(total, load(x, i), load(x, i))
    store(r, 0, total)
    for j in range(LANES):
        r[j] = f32(1) / np.sqrt(r[j] / f32(M) + eps)
    share = load(r, 0)
    for m in range(M):
        i = at + m * LANES
        store(y, i, multiply(multiply(load(x, i), share), fill(weight[w_at + m])))


@ordered_part
def multiply_blocks(w, N, K, x, start, start_block, start_row, out, out_block, out_row, first, end):
    """start + w x for w [N, K] and x [K, 8] of each block; a block and a row further are so many places."""
    for n in range(0, N, NARROW_ROWS):
        rows, b = min(NARROW_ROWS, N - n), first
        for i in range((n + NARROW_ROWS) * K, min(n + 2 * NARROW_ROWS, N) * K, LINE):
            prefetch(w, i)
        while b + 2 <= end:
            product(
                w,
                n * K,
                K,
                1,
                rows,
                K,
                x,
                b * K * LANES,
                LANES,
                K * LANES,
                start,
                b * start_block + n * start_row,
                start_row,
                start_block,
                out,
                b * out_block + n * out_row,
                out_row,
                out_block,
            )
            b += 2
        if b < end:
            narrow_product(
                w,
                n * K,
                K,
                1,
                rows,
                K,
                x,
                b * K * LANES,
                LANES,
                start,
                b * start_block + n * start_row,
                start_row,
                out,
                b * out_block + n * out_row,
                out_row,
            )


@ordered_part
def project(x, eps, norm, w, bias, head_norms, D, first, end, y, out, out_block, out_row):
    """y = norm(x) and out = w y + bias of these blocks, and the first heads normed."""
    M = len(norm)
    N, bias_row = len(w) // M, LANES if len(bias) > LANES else 0
    for b in range(first, end):
        norm_block(x, b * M * LANES, M, norm, 0, eps, y)
    multiply_blocks(w, N, M, y, bias, 0, bias_row, out, out_block, out_row, first, end)
    for b in range(first, end):
        for h in range(len(head_norms) // D):
            norm_block(out, b * out_block + h * D * LANES, D, head_norms, h * D, eps, out)


@ordered_loop
def project_loop(
    x, eps, norm, w, bias, head_norms, D, n_blocks, groups, y, out, out_block, out_row
):
    """From the residual stream to the heads: out = w norm(x) + bias of each block, and the first heads are
    normed, with a row [D] of head_norms each. bias: [N, 8], 8 times the same number, or 8 zeros for all."""
    for g in numba.prange(groups):
        first, end = n_blocks * g // groups, n_blocks * (g + 1) // groups
        project(x, eps, norm, w, bias, head_norms, D, first, end, y, out, out_block, out_row)


@ordered_loop
def finish_layer_loop(
    x,
    mixed,
    eps,
    w_out,
    mlp_norm,
    w_up,
    w_down,
    zeros,
    n_blocks,
    groups,
    gate_up,
    act,
    norm,
    w,
    bias,
    head_norms,
    D,
    y,
    out,
    out_block,
    out_row,
):
    """What follows attention, whose result is mixed: x += w_out mixed, and x += MLP(norm(x)); then what comes
    before the next, as in project_loop, or the model's last norm and logits."""
    M, C = len(norm), LANES
    A, F = len(w_out) // M, len(w_down) // M
    step, wide = M * C, F * C
    for g in numba.prange(groups):
        first, end = n_blocks * g // groups, n_blocks * (g + 1) // groups
        multiply_blocks(w_out, M, A, mixed, x, step, C, x, step, C, first, end)
        for b in range(first, end):
            norm_block(x, b * step, M, mlp_norm, 0, eps, y)
        multiply_blocks(w_up, 2 * F, M, y, zeros, 0, 0, gate_up, 2 * wide, C, first, end)
        for b in range(first, end):
            up, after = (2 * b + 1) * wide, (2 * b + 2) * wide
            swiglu_fwd_row(
                gate_up[up - wide : up], gate_up[up:after], act[b * wide : (b + 1) * wide]
            )
        multiply_blocks(w_down, M, F, act, x, step, C, x, step, C, first, end)
        project(x, eps, norm, w, bias, head_norms, D, first, end, y, out, out_block, out_row)
