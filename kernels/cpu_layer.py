"""A layer of one token of every row that is decoded, but for attention (cpu_attention.py), as compiled loops
for a CPU (see kernels/cpu.py).

Rows go in tiles of 16, each number of the 16 side by side: [tiles, M, 16]. Nothing that a layer does to one
tile has to do with another, so a thread takes a group of tiles from the residual stream to the heads, and
after attention back to it, waiting for no other, on what its own caches still hold. Each 6 rows of a weight
are read for all tiles of the group in turn. Weights are read where they lie.

What comes out for a row is the same to the last bit whatever the others are, and on any number of threads.

Shapes: M features, N those of all heads, A of the query heads, F d_ff. All arrays are flat.
"""
import numpy as np
import torch

from .cpu import (
    HAS_NUMBA,
    LANES,
    TILE_COLUMNS,
    TILE_ROWS,
    f32,
    numba,
    ordered_loop,
    ordered_part,
    swiglu_fwd_row,
)

if HAS_NUMBA:
    from .cpu_tiles import product
    from .lanes import LINE, add_product, fill, load, multiply, prefetch, store

TILES = 4            # of a group at most: what they hold stays in the nearer caches of a core
ROWS_A_THREAD = 16   # or more, or reading all weights for them takes longer than the arithmetic
SMALL = 4_000_000    # weights that all cores' common cache holds: they may be read for a single tile


def groups_of(n_rows: int, n_threads: int, n_weights: int) -> int:
    """Groups of tiles, as many for each thread; 0 where PyTorch's products are faster: for few rows, and
    where these have longer vectors than the loops, or hardware of their own. (So whether a row of a large
    model goes by tiles, and its last bits, does depend on rows and threads.)"""
    few = n_rows < (2 if n_weights <= SMALL else ROWS_A_THREAD * n_threads)
    if few or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return 0
    return n_threads * -(-n_rows // (n_threads * TILES * TILE_COLUMNS))


@ordered_part
def norm_tile(x, at, M, weight, w_at, eps, y):
    """Columns of x[at], [M, 16], normed, into y[at]."""
    r, first, second = np.empty(TILE_COLUMNS, f32), fill(f32(0)), fill(f32(0))
    for i in range(at, at + M * TILE_COLUMNS, TILE_COLUMNS):
        a, b = load(x, i), load(x, i + LANES)
        first, second = add_product(first, a, a), add_product(second, b, b)
    store(r, 0, first)
    store(r, LANES, second)
    for j in range(TILE_COLUMNS):
        r[j] = f32(1) / np.sqrt(r[j] / f32(M) + eps)
    first, second = load(r, 0), load(r, LANES)
    for m in range(M):
        i, w = at + m * TILE_COLUMNS, fill(weight[w_at + m])
        store(y, i, multiply(multiply(load(x, i), first), w))
        store(y, i + LANES, multiply(multiply(load(x, i + LANES), second), w))


@ordered_part
def multiply_tiles(w, N, K, x, start, start_tile, start_row, out, out_tile, out_row, first, end):
    """start + w x for w [N, K] and x [K, 16] of each tile; a tile and a row further are so many places."""
    for n in range(0, N, TILE_ROWS):
        for i in range((n + TILE_ROWS) * K, min(n + 2 * TILE_ROWS, N) * K, LINE):
            prefetch(w, i)
        for t in range(first, end):
            product(w, n * K, K, 1, min(TILE_ROWS, N - n), K, x, t * K * TILE_COLUMNS, TILE_COLUMNS, start,
                    t * start_tile + n * start_row, start_row, out, t * out_tile + n * out_row, out_row)


@ordered_loop
def project_loop(x, eps, norm, w, bias, head_norms, D, n_tiles, groups, y, qkv):
    """qkv = w norm(x) + bias of each tile, and the first heads normed, with a row [D] of head_norms each.

    bias: [N, 16], 16 times the same number, or 16 zeros for all.
    """
    M = len(norm)
    N = len(w) // M
    bias_row = TILE_COLUMNS if len(bias) > TILE_COLUMNS else 0
    for g in numba.prange(groups):
        first, end = n_tiles * g // groups, n_tiles * (g + 1) // groups
        for t in range(first, end):
            norm_tile(x, t * M * TILE_COLUMNS, M, norm, 0, eps, y)
        multiply_tiles(w, N, M, y, bias, 0, bias_row, qkv, N * TILE_COLUMNS, TILE_COLUMNS, first, end)
        for t in range(first, end):
            for h in range(len(head_norms) // D):
                norm_tile(qkv, (t * N + h * D) * TILE_COLUMNS, D, head_norms, h * D, eps, qkv)


@ordered_loop
def finish_layer_loop(x, mixed, eps, w_out, norm, w_up, w_down, zeros, n_tiles, groups, y, gate_up, act):
    """What follows attention, whose result is mixed: x += w_out mixed, and x += MLP(norm(x))."""
    M, C = len(norm), TILE_COLUMNS
    A, F = len(w_out) // M, len(w_down) // M
    step, wide = M * C, F * C
    for g in numba.prange(groups):
        first, end = n_tiles * g // groups, n_tiles * (g + 1) // groups
        multiply_tiles(w_out, M, A, mixed, x, step, C, x, step, C, first, end)
        for t in range(first, end):
            norm_tile(x, t * step, M, norm, 0, eps, y)
        multiply_tiles(w_up, 2 * F, M, y, zeros, 0, 0, gate_up, 2 * wide, C, first, end)
        for t in range(first, end):
            up, after = (2 * t + 1) * wide, (2 * t + 2) * wide
            swiglu_fwd_row(gate_up[up - wide : up], gate_up[up:after], act[t * wide : (t + 1) * wide])
        multiply_tiles(w_down, M, F, act, x, step, C, x, step, C, first, end)
