"""Causal attention of one sequence with one kv head, forward and backward, as in FlashAttention (arXiv
2205.14135, 2307.08691): what the loops of cpu_packed_attention.py do of each. kernels/attention.py has the
maths. Scores exist for one block of queries at a time, and backward computes them anew; of each row its
largest score is kept, and 1 over the sum of the exponentials.

The products are those of cpu_tiles.py; they leave out, to within a tile, what no query of theirs sees. For
scores, keys (in backward values, too) are turned into tiles of 16.

Row i of a block stands at key place + i, the last that it sees. A product takes rows and keys together, and
reads up to 5 weights behind the last one seen: those are made 0.

Arrays are flat; x_at is where x begins, x_row and x_head lead to the next token and head.
Shapes: H query heads, R of one kv head, D head_dim, W the x_row of scores.
"""

import numpy as np

from .compile import HAS_NUMBA, LANES, TILE_COLUMNS, TILE_ROWS, f32, part, small_part
from .elementwise import scale_row

if HAS_NUMBA:
    from .registers import (
        LINE,
        add,
        add_product,
        exp_up_to_88,
        fill,
        larger,
        largest_of,
        load,
        multiply,
        prefetch,
        store,
        subtract,
        total_of,
        transpose,
    )
    from .tiles import product

QUERIES = 96  # of a block
AHEAD = 8  # rows that are asked for before they are read: they lie too far apart to be guessed
KEYS = 128  # that a product sums over at a time: they stay in the nearest cache for all rows
LOWEST, UNSEEN = f32(-3e38), f32(-np.inf)


@part
def width_of(n_keys):
    """W, with room for 15 more keys: an odd number of cache lines, or rows would crowd into few sets."""
    return ((n_keys + 2 * TILE_COLUMNS - 1) // (2 * TILE_COLUMNS) * 2 + 1) * TILE_COLUMNS


@small_part
def clear(x, x_row, n, D):
    for i in range(n):
        for d in range(0, D, LANES):
            store(x, i * x_row + d, fill(f32(0)))


@part
def columns_of(x, x_row, n, D, scale, rest, out):
    """out[j // 16, d, j % 16] = scale x[j, d], 0 for j >= n; rest: 8 D numbers of working memory."""
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
def times_columns(x, x_row, rows, D, columns, place, zeros, out, W):
    """out[i, j] = x[i] . column j for all j that row i sees, and some more."""
    for j in range(0, place + rows, TILE_COLUMNS):
        i = max(j - place, 0) // TILE_ROWS * TILE_ROWS
        product(
            x,
            i * x_row,
            x_row,
            1,
            rows - i,
            D,
            columns,
            j * D,
            TILE_COLUMNS,
            LANES,
            zeros,
            0,
            0,
            0,
            out,
            i * W + j,
            W,
            LANES,
        )


@part
def times_rows(weights, W, rows, place, x, x_row, D, out, out_row):
    """out[i] = sum of weights[i, j] x[j] over all keys j that row i sees, in their order."""
    clear(out, out_row, rows, D)
    for j in range(0, place + rows, KEYS):
        for i in range(max(j - place, 0) // TILE_ROWS * TILE_ROWS, rows, TILE_ROWS):
            n = min(TILE_ROWS, rows - i)
            depth = min(place + i + n - j, KEYS)
            for d in range(0, D, TILE_COLUMNS):
                to = i * out_row + d
                product(
                    weights,
                    i * W + j,
                    W,
                    1,
                    n,
                    depth,
                    x,
                    j * x_row + d,
                    x_row,
                    LANES,
                    out,
                    to,
                    out_row,
                    LANES,
                    out,
                    to,
                    out_row,
                    LANES,
                )


@part
def add_to_keys(weights, W, rows, place, x, x_row, D, out, out_row):
    """out[j] += sum of weights[i, j] x[i] over all rows i that see key j."""
    for j in range(0, place + rows, TILE_ROWS):
        n, i = min(TILE_ROWS, place + rows - j), max(j - place, 0)
        for d in range(0, D, TILE_COLUMNS):
            to = j * out_row + d
            product(
                weights,
                i * W + j,
                1,
                W,
                n,
                rows - i,
                x,
                i * x_row + d,
                x_row,
                LANES,
                out,
                to,
                out_row,
                LANES,
                out,
                to,
                out_row,
                LANES,
            )


@small_part
def end_of(seen):
    """Where the numbers of a row end, of which the first `seen` count: 8 more, and those up to a vector."""
    return (seen + 2 * LANES - 1) // LANES * LANES


@small_part
def cover(row, seen, x):
    """What is behind the first `seen` becomes x."""
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
def soften(row, n, peak):
    """exp(x - peak) of n numbers, in place, and their sum."""
    shift, totals = fill(peak), fill(f32(0))
    for j in range(0, n, LANES):
        e = exp_up_to_88(subtract(load(row, j), shift))
        store(row, j, e)
        totals = add(totals, e)
    return total_of(totals)


@small_part
def dscores(probs, dprobs, n, peak, share, delta, scale):
    """In place, from n scores to P = share exp(s - peak), and from dP to scale P (dP - delta)."""
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
def turn_row(x, at, D, cos, sin, token, back, y, to):
    """RoPE of x[at], [D], by the angles of a token, or back; a copy where cos and sin have no angles."""
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
def ask_for_row(x, at, D):
    for d in range(0, D, LINE):
        prefetch(x, at + d)


@part
def take_queries(q, q_at, q_row, first, n, D, cos, sin, token, q_rows):
    """Queries first .. first + n of a head, turned, side by side."""
    for i in range(n):
        if i + AHEAD < n:
            ask_for_row(q, q_at + (first + i + AHEAD) * q_row, D)
        turn_row(
            q, q_at + (first + i) * q_row, D, cos, sin, token + first + i, False, q_rows, i * D
        )


@part
def take_keys(k, k_at, k_row, v, v_at, v_row, keys, D, cos, sin, k_rows, v_rows):
    """Keys, turned, and values of one head, side by side."""
    for j in range(len(keys)):
        if j + AHEAD < len(keys):
            ask_for_row(k, k_at + keys[j + AHEAD] * k_row, D)
            ask_for_row(v, v_at + keys[j + AHEAD] * v_row, D)
        turn_row(k, k_at + keys[j] * k_row, D, cos, sin, keys[j], False, k_rows, j * D)
        turn_row(v, v_at + keys[j] * v_row, D, cos[:0], sin[:0], 0, False, v_rows, j * D)


@part
def attend(
    q,
    q_at,
    q_row,
    q_head,
    first_token,
    n_q,
    k,
    k_at,
    k_row,
    v,
    v_at,
    v_row,
    keys,
    R,
    D,
    cos,
    sin,
    scale,
    out,
    peaks,
    shares,
    H,
):
    """n_q queries of R heads, from q[q_at] on, against the keys and values of one head."""
    n_k = len(keys)
    W, turned = width_of(n_k), (n_k + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS * D
    block = min(QUERIES, n_q)
    own = np.empty(turned + LANES * D + TILE_COLUMNS + 2 * n_k * D + block * (D + W), f32)
    columns, rest, own = own[:turned], own[turned : turned + LANES * D], own[turned + LANES * D :]
    zeros, k_rows, own = own[:TILE_COLUMNS], own[TILE_COLUMNS:], own[TILE_COLUMNS + n_k * D :]
    v_rows, q_rows, scores = own, own[n_k * D :], own[(n_k + block) * D :]
    zeros[:] = f32(0)
    take_keys(k, k_at, k_row, v, v_at, v_row, keys, D, cos, sin, k_rows, v_rows)
    columns_of(k_rows, D, n_k, D, scale, rest, columns)
    for r in range(R):
        for first in range(0, n_q, QUERIES):
            rows, place, to = min(QUERIES, n_q - first), first + n_k - n_q, first * H + r
            take_queries(q, q_at + r * q_head, q_row, first, rows, D, cos, sin, first_token, q_rows)
            times_columns(q_rows, D, rows, D, columns, place, zeros, scores, W)
            for i in range(rows):
                row, seen = scores[i * W :], max(place + i + 1, 0)
                cover(row, seen, UNSEEN)
                peaks[to + i * H] = peak_of(row, end_of(seen))
            for i in range(rows):  # another loop, for one row would wait for its own peak
                seen = max(place + i + 1, 0)
                total = soften(scores[i * W :], end_of(seen), peaks[to + i * H])
                shares[to + i * H] = f32(1) / total if seen else f32(0)
            times_rows(scores, W, rows, place, v_rows, D, D, out[to * D :], H * D)
            for i in range(rows):
                scale_row(out[(to + i * H) * D : (to + i * H + 1) * D], shares[to + i * H])


@part
def attend_back(
    q,
    q_at,
    q_row,
    q_head,
    first_token,
    n_q,
    k,
    k_at,
    k_row,
    v,
    v_at,
    v_row,
    keys,
    R,
    D,
    cos,
    sin,
    scale,
    out,
    peaks,
    shares,
    H,
    dout,
    dout_row,
    dout_head,
    dlse,
    dq,
    dq_row,
    dq_head,
    dk_rows,
    dv_rows,
):
    """The gradients of what `attend` gives: dq as q lies, those of turned keys and of values [n_k, D]. dlse
    may be empty."""
    n_k = len(keys)
    W, turned = width_of(n_k), (n_k + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS * D
    block = min(QUERIES, n_q)
    square, wide = block * W, block * D
    own = np.empty(
        2 * turned + LANES * D + TILE_COLUMNS + block + 2 * (n_k * D + square + wide), f32
    )
    k_columns, v_columns, own = own[:turned], own[turned : 2 * turned], own[2 * turned :]
    probs, dprobs, own = own[:square], own[square : 2 * square], own[2 * square :]
    q_rows, dq_rows, own = own[:wide], own[wide : 2 * wide], own[2 * wide :]
    k_rows, v_rows, own = own[: n_k * D], own[n_k * D : 2 * n_k * D], own[2 * n_k * D :]
    rest, zeros, deltas = own[: LANES * D], own[LANES * D :], own[LANES * D + TILE_COLUMNS :]
    zeros[:TILE_COLUMNS] = f32(0)
    take_keys(k, k_at, k_row, v, v_at, v_row, keys, D, cos, sin, k_rows, v_rows)
    columns_of(k_rows, D, n_k, D, scale, rest, k_columns)
    columns_of(v_rows, D, n_k, D, f32(1), rest, v_columns)
    clear(dk_rows, D, n_k, D)
    clear(dv_rows, D, n_k, D)
    for r in range(R):
        for first in range(0, n_q, QUERIES):
            rows, place, to = min(QUERIES, n_q - first), first + n_k - n_q, first * H + r
            dout_rows = dout[first * dout_row + r * dout_head :]
            take_queries(q, q_at + r * q_head, q_row, first, rows, D, cos, sin, first_token, q_rows)
            times_columns(q_rows, D, rows, D, k_columns, place, zeros, probs, W)
            times_columns(dout_rows, dout_row, rows, D, v_columns, place, zeros, dprobs, W)
            for i in range(rows):
                at, seen = to + i * H, max(place + i + 1, 0)
                cover(probs[i * W :], seen, UNSEEN)
                cover(dprobs[i * W :], seen, f32(0))
                deltas[i] = dot(dout_rows[i * dout_row :], out[at * D :], D)
                if len(dlse) > 0:
                    deltas[i] -= dlse[at]
            for i in range(rows):
                end, at = end_of(max(place + i + 1, 0)), to + i * H
                dscores(
                    probs[i * W :], dprobs[i * W :], end, peaks[at], shares[at], deltas[i], scale
                )
            times_rows(dprobs, W, rows, place, k_rows, D, D, dq_rows, D)
            for i in range(rows):
                turn_row(
                    dq_rows,
                    i * D,
                    D,
                    cos,
                    sin,
                    first_token + first + i,
                    True,
                    dq,
                    (first + i) * dq_row + r * dq_head,
                )
            add_to_keys(probs, W, rows, place, dout_rows, dout_row, D, dv_rows, D)
            add_to_keys(dprobs, W, rows, place, q_rows, D, D, dk_rows, D)
