"""Causal attention of one sequence with one kv head, forward and backward, as in FlashAttention
(arXiv 2205.14135, 2307.08691). The loops of attention.py call it for each sequence and kv head; the
maths is in kernels/attention.py.

Scores exist for one block of queries at a time, and backward computes them again. Forward keeps two
numbers per row: its largest score (the peak), and 1 over the sum of the exponentials (the share).

The products are the tiles of registers.py. They leave out, to within a tile, the keys that no query
of a block sees. For the scores, keys are transposed into panels of 16; in backward values are, too.

Row i of a block stands at key `diagonal` + i, which is the last key that it sees. A product takes
rows and keys a tile at a time and reads up to 5 weights behind the last one seen, so these are set
to 0.

Left out: windows, softcap, and head sizes that are no multiple of 16.

Arrays are flat. Shapes: H query heads, R of one kv head, D head_dim, W the row stride of scores.
"""

from typing import NamedTuple

import numpy as np

from .compile import HAS_NUMBA, LANES, TILE_COLUMNS, TILE_ROWS, f32, part, small_part
from .elementwise import scale_row

if HAS_NUMBA:
    from .registers import (
        LINE,
        Layout,
        add,
        add_product,
        exp_up_to_88,
        fill,
        larger,
        largest_of,
        load,
        multiply,
        prefetch,
        product,
        store,
        subtract,
        total_of,
        transpose,
    )

QUERIES = 96  # in a block
AHEAD = 8  # rows that are prefetched before they are read: the CPU cannot guess strides this long
KEYS = 128  # that a product sums over at a time: they stay in the nearest cache for all rows
LOWEST, UNSEEN = f32(-3e38), f32(-np.inf)


class Heads(NamedTuple):
    """Where the heads of some tokens lie in a flat array."""

    at: int
    """Index of the first number."""
    row: int
    """Stride to the next token."""
    head: int
    """Stride to the next head."""


@part
def width_of(n_keys):
    """W, with room for 15 more keys: an odd number of cache lines, or rows would share few cache
    sets."""
    return ((n_keys + 2 * TILE_COLUMNS - 1) // (2 * TILE_COLUMNS) * 2 + 1) * TILE_COLUMNS


@small_part
def clear(x, x_row, n, D):
    for i in range(n):
        for d in range(0, D, LANES):
            store(x, i * x_row + d, fill(f32(0)))


@part
def columns_of(x, x_row, n, D, scale, rest, out):
    """out[j // 16, d, j % 16] = scale x[j, d], and 0 for j >= n. rest: 8 D numbers of working
    memory."""
    for j in range(0, len(out) // D, LANES):
        to, left = j // TILE_COLUMNS * D * TILE_COLUMNS + j % TILE_COLUMNS, max(n - j, 0)
        if left < LANES:
            clear(rest, D, LANES, D)
            for i in range(left):
                for d in range(0, D, LANES):
                    store(rest, i * D + d, load(x, (j + i) * x_row + d))
        for d in range(0, D, LANES):
            if left < LANES:
                transpose(rest, d, D, out, to + d * TILE_COLUMNS, TILE_COLUMNS)
            else:
                transpose(x, j * x_row + d, x_row, out, to + d * TILE_COLUMNS, TILE_COLUMNS)
    scale_row(out, scale)


@part
def times_columns(x, x_row, rows, D, columns, diagonal, zeros, out, W):
    """out[i, j] = x[i] . column j for all j that row i sees, and some more."""
    zeros_in = Layout(0, 0, 0)
    for j in range(0, diagonal + rows, TILE_COLUMNS):
        i = max(j - diagonal, 0) // TILE_ROWS * TILE_ROWS
        x_in, columns_in = Layout(i * x_row, x_row, 1), Layout(j * D, TILE_COLUMNS, LANES)
        out_in = Layout(i * W + j, W, LANES)
        product(x, x_in, rows - i, D, columns, columns_in, zeros, zeros_in, out, out_in)


@part
def times_rows(weights, W, rows, diagonal, x, x_row, D, out, out_row):
    """out[i] = sum of weights[i, j] x[j] over all keys j that row i sees, in their order."""
    clear(out, out_row, rows, D)
    for j in range(0, diagonal + rows, KEYS):
        for i in range(max(j - diagonal, 0) // TILE_ROWS * TILE_ROWS, rows, TILE_ROWS):
            n = min(TILE_ROWS, rows - i)
            depth = min(diagonal + i + n - j, KEYS)
            weights_in = Layout(i * W + j, W, 1)
            for d in range(0, D, TILE_COLUMNS):
                x_in = Layout(j * x_row + d, x_row, LANES)
                out_in = Layout(i * out_row + d, out_row, LANES)
                product(weights, weights_in, n, depth, x, x_in, out, out_in, out, out_in)


@part
def add_to_keys(weights, W, rows, diagonal, x, x_row, D, out, out_row):
    """out[j] += sum of weights[i, j] x[i] over all rows i that see key j."""
    for j in range(0, diagonal + rows, TILE_ROWS):
        n, i = min(TILE_ROWS, diagonal + rows - j), max(j - diagonal, 0)
        weights_in = Layout(i * W + j, 1, W)
        for d in range(0, D, TILE_COLUMNS):
            x_in = Layout(i * x_row + d, x_row, LANES)
            out_in = Layout(j * out_row + d, out_row, LANES)
            product(weights, weights_in, n, rows - i, x, x_in, out, out_in, out, out_in)


@small_part
def end_of(seen):
    """Where a row ends whose first `seen` numbers count: 8 more, rounded up to a vector."""
    return (seen + 2 * LANES - 1) // LANES * LANES


@small_part
def cover(row, seen, x):
    """Set what is behind the first `seen` numbers to x."""
    store(row, end_of(seen) - LANES, fill(x))
    store(row, seen, fill(x))


@small_part
def peak_of(row, n):
    """The largest of n numbers, LOWEST at least; NaN does not count."""
    peaks = fill(LOWEST)
    for j in range(0, n, LANES):
        peaks = larger(peaks, load(row, j))
    return largest_of(peaks)


@small_part
def exp_in_place(row, n, peak):
    """exp(x - peak) of n numbers, in place, and their sum."""
    shift, totals = fill(peak), fill(f32(0))
    for j in range(0, n, LANES):
        e = exp_up_to_88(subtract(load(row, j), shift))
        store(row, j, e)
        totals = add(totals, e)
    return total_of(totals)


@small_part
def dscores(probs, dprobs, n, peak, share, delta, scale):
    """In place: n scores S become P = share exp(S - peak), and dP becomes scale P (dP - delta)."""
    shift, part_of, less, by = fill(peak), fill(share), fill(delta), fill(scale)
    for j in range(0, n, LANES):
        p = multiply(exp_up_to_88(subtract(load(probs, j), shift)), part_of)
        store(probs, j, p)
        store(dprobs, j, multiply(multiply(p, subtract(load(dprobs, j), less)), by))


@small_part
def dot(x, y, D):
    sums = fill(f32(0))
    for d in range(0, D, LANES):
        sums = add_product(sums, load(x, d), load(y, d))
    return total_of(sums)


@small_part
def rotate_row(x, at, D, cos, sin, token, back, y, to):
    """RoPE of x[at], [D], by the angles of a token, or by their opposites; a copy where cos and sin
    are empty."""
    C = D // 2
    for c in range(0, C, LANES):
        first, second = load(x, at + c), load(x, at + C + c)
        if len(cos) == 0:
            store(y, to + c, first)
            store(y, to + C + c, second)
        else:
            a, b = load(cos, token * C + c), load(sin, token * C + c)
            b = subtract(fill(f32(0)), b) if back else b
            store(y, to + c, subtract(multiply(first, a), multiply(second, b)))
            store(y, to + C + c, add_product(multiply(second, a), first, b))


@small_part
def prefetch_row(x, at, D):
    for d in range(0, D, LINE):
        prefetch(x, at + d)


@part
def load_queries(q, q_in, first, n, D, cos, sin, token, q_rows):
    """Queries first .. first + n of a head, rotated, side by side."""
    for i in range(n):
        if i + AHEAD < n:
            prefetch_row(q, q_in.at + (first + i + AHEAD) * q_in.row, D)
        at = q_in.at + (first + i) * q_in.row
        rotate_row(q, at, D, cos, sin, token + first + i, False, q_rows, i * D)


@part
def load_keys(k, k_in, v, v_in, keys, D, cos, sin, k_rows, v_rows):
    """Keys, rotated, and values of one head, side by side."""
    for j in range(len(keys)):
        if j + AHEAD < len(keys):
            prefetch_row(k, k_in.at + keys[j + AHEAD] * k_in.row, D)
            prefetch_row(v, v_in.at + keys[j + AHEAD] * v_in.row, D)
        k_at, v_at = k_in.at + keys[j] * k_in.row, v_in.at + keys[j] * v_in.row
        rotate_row(k, k_at, D, cos, sin, keys[j], False, k_rows, j * D)
        rotate_row(v, v_at, D, cos[:0], sin[:0], 0, False, v_rows, j * D)


@part
def attend(
    q, q_in, token, n_q, k, k_in, v, v_in, keys, R, D, cos, sin, scale, out, peaks, shares, H
):
    """n_q queries of R heads against the keys and values of one head.

    token: the index of the first query's token, for its angles; keys: the tokens of the keys.
    Writes out, and each row's peak and share.
    """
    n_k = len(keys)
    W = width_of(n_k)
    panels = (n_k + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS * D
    block = min(QUERIES, n_q)
    # all working memory in one piece
    own = np.empty(panels + LANES * D + TILE_COLUMNS + 2 * n_k * D + block * (D + W), f32)
    columns, rest, own = own[:panels], own[panels : panels + LANES * D], own[panels + LANES * D :]
    zeros, k_rows, own = own[:TILE_COLUMNS], own[TILE_COLUMNS:], own[TILE_COLUMNS + n_k * D :]
    v_rows, q_rows, scores = own, own[n_k * D :], own[(n_k + block) * D :]
    zeros[:] = f32(0)
    load_keys(k, k_in, v, v_in, keys, D, cos, sin, k_rows, v_rows)
    columns_of(k_rows, D, n_k, D, scale, rest, columns)
    for r in range(R):
        head_in = Heads(q_in.at + r * q_in.head, q_in.row, q_in.head)
        for first in range(0, n_q, QUERIES):
            rows, diagonal, to = min(QUERIES, n_q - first), first + n_k - n_q, first * H + r
            # scores S = scale q k^T
            load_queries(q, head_in, first, rows, D, cos, sin, token, q_rows)
            times_columns(q_rows, D, rows, D, columns, diagonal, zeros, scores, W)
            # softmax, without its division: exp(S - peak) and the share
            for i in range(rows):
                row, seen = scores[i * W :], max(diagonal + i + 1, 0)
                cover(row, seen, UNSEEN)
                peaks[to + i * H] = peak_of(row, end_of(seen))
            for i in range(rows):  # another loop, for one row would wait for its own peak
                seen = max(diagonal + i + 1, 0)
                total = exp_in_place(scores[i * W :], end_of(seen), peaks[to + i * H])
                shares[to + i * H] = f32(1) / total if seen else f32(0)
            # out = P v
            times_rows(scores, W, rows, diagonal, v_rows, D, D, out[to * D :], H * D)
            for i in range(rows):
                scale_row(out[(to + i * H) * D : (to + i * H + 1) * D], shares[to + i * H])


@part
def attend_back(q, q_in, token, n_q, k, k_in, v, v_in, keys, R, D, cos, sin, scale,
                out, peaks, shares, H, dout, dout_in, dlse,
                dq, dq_in, dk_rows, dv_rows):  # fmt: skip
    """The gradients of what `attend` gives: dq, and those of rotated keys and of values, [n_k, D].

    dlse, the gradient of log sum exp, may be empty.
    """
    n_k = len(keys)
    W = width_of(n_k)
    panels = (n_k + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS * D
    block = min(QUERIES, n_q)
    square, wide = block * W, block * D
    # all working memory in one piece
    own = np.empty(
        2 * panels + LANES * D + TILE_COLUMNS + block + 2 * (n_k * D + square + wide), f32
    )
    k_columns, v_columns, own = own[:panels], own[panels : 2 * panels], own[2 * panels :]
    probs, dprobs, own = own[:square], own[square : 2 * square], own[2 * square :]
    q_rows, dq_rows, own = own[:wide], own[wide : 2 * wide], own[2 * wide :]
    k_rows, v_rows, own = own[: n_k * D], own[n_k * D : 2 * n_k * D], own[2 * n_k * D :]
    rest, zeros, deltas = own[: LANES * D], own[LANES * D :], own[LANES * D + TILE_COLUMNS :]
    zeros[:TILE_COLUMNS] = f32(0)
    load_keys(k, k_in, v, v_in, keys, D, cos, sin, k_rows, v_rows)
    columns_of(k_rows, D, n_k, D, scale, rest, k_columns)
    columns_of(v_rows, D, n_k, D, f32(1), rest, v_columns)
    clear(dk_rows, D, n_k, D)
    clear(dv_rows, D, n_k, D)
    for r in range(R):
        head_in = Heads(q_in.at + r * q_in.head, q_in.row, q_in.head)
        for first in range(0, n_q, QUERIES):
            rows, diagonal, to = min(QUERIES, n_q - first), first + n_k - n_q, first * H + r
            dout_rows = dout[dout_in.at + first * dout_in.row + r * dout_in.head :]
            # scores S = scale q k^T, and dP = dout v^T
            load_queries(q, head_in, first, rows, D, cos, sin, token, q_rows)
            times_columns(q_rows, D, rows, D, k_columns, diagonal, zeros, probs, W)
            times_columns(dout_rows, dout_in.row, rows, D, v_columns, diagonal, zeros, dprobs, W)
            # delta = dout . out - dlse of each row
            for i in range(rows):
                at, seen = to + i * H, max(diagonal + i + 1, 0)
                cover(probs[i * W :], seen, UNSEEN)
                cover(dprobs[i * W :], seen, f32(0))
                deltas[i] = dot(dout_rows[i * dout_in.row :], out[at * D :], D)
                if len(dlse) > 0:
                    deltas[i] -= dlse[at]
            # P = share exp(S - peak), and dS = scale P (dP - delta)
            for i in range(rows):
                end, at = end_of(max(diagonal + i + 1, 0)), to + i * H
                dscores(probs[i * W :], dprobs[i * W :], end,
                        peaks[at], shares[at], deltas[i], scale)  # fmt: skip
            # dq = dS k, rotated back
            times_rows(dprobs, W, rows, diagonal, k_rows, D, D, dq_rows, D)
            for i in range(rows):
                dq_at = dq_in.at + (first + i) * dq_in.row + r * dq_in.head
                rotate_row(dq_rows, i * D, D, cos, sin, token + first + i, True, dq, dq_at)
            # dv = P^T dout and dk = dS^T q
            add_to_keys(probs, W, rows, diagonal, dout_rows, dout_in.row, D, dv_rows, D)
            add_to_keys(dprobs, W, rows, diagonal, q_rows, D, D, dk_rows, D)
