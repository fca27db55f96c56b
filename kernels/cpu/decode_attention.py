"""RoPE and attention of one new token per row against the cache, as a compiled loop for decoding.

This is a part of the decoder (decoder.py), not the op of kernels/decode_attention.py, which reads
pages. Rows of the cache go in blocks of 8, and each number of the 8 lies side by side. So a vector
holds one number of each row, nothing is ever summed across a vector, and what is read of a kv head
is one run of memory. A decoder of fewer than 8 rows has blocks of one.

So there are two versions of each step, for 8 rows (_rows) and for one (_row), on the query heads of
one kv head. Their arrays are flat: q and out [R, D, W], k and v [S, D, W], scores [R, S, W].

Shapes: B rows, W rows of a block, H query heads, G kv heads, R = H / G, D head_dim, N = H + 2 G, S
slots of the cache, C = D / 2 pairs of RoPE.
"""

import numpy as np

from .attention_tiles import LOWEST
from .compile import HAS_NUMBA, LANES, exp, f32, loop, numba, part

if HAS_NUMBA:
    from .registers import (
        LINE,
        add,
        add_product,
        divide,
        fill,
        larger,
        load,
        multiply,
        prefetch_once,
        store,
        subtract,
    )

ROW_BLOCK = LANES  # rows of the cache that lie, and are read, together
SLOTS = 4  # of the cache that are read together


@part
def scores_of_rows(q, k, R, D, scores):
    S, step = len(scores) // (R * LANES), D * LANES
    most = step - step % (4 * LANES)
    for s in range(S):
        if s + SLOTS < S:
            for i in range(0, step, LINE):
                prefetch_once(k, (s + SLOTS) * step + i)
        for r in range(R):
            at, to = s * step, r * step
            # four sums, since each addition would wait for the one before
            a, b = fill(f32(0)), fill(f32(0))
            c, e = fill(f32(0)), fill(f32(0))
            for i in range(0, most, 4 * LANES):
                a = add_product(a, load(q, to + i), load(k, at + i))
                b = add_product(b, load(q, to + i + LANES), load(k, at + i + LANES))
                c = add_product(c, load(q, to + i + 2 * LANES), load(k, at + i + 2 * LANES))
                e = add_product(e, load(q, to + i + 3 * LANES), load(k, at + i + 3 * LANES))
            for i in range(most, step, LANES):
                a = add_product(a, load(q, to + i), load(k, at + i))
            store(scores, (r * S + s) * LANES, add(add(a, b), add(c, e)))


@part
def softmax_rows(scores):
    """Of one head's [S, 8], in place."""
    peak, total = fill(LOWEST), fill(f32(0))
    for i in range(0, len(scores), LANES):
        peak = larger(peak, load(scores, i))
    for i in range(0, len(scores), LANES):
        store(scores, i, subtract(load(scores, i), peak))
    for i in range(len(scores)):
        scores[i] = exp(scores[i])
    for i in range(0, len(scores), LANES):
        total = add(total, load(scores, i))
    share = divide(fill(f32(1)), total)
    for i in range(0, len(scores), LANES):
        store(scores, i, multiply(load(scores, i), share))


@part
def add_values_of_rows(scores, v, R, D, out):
    """out += scores v, 4 slots at a time.

    Memory is prefetched in the order in which it lies: a CPU does not guess it from reads that
    alternate between 4 slots.
    """
    S, step = len(scores) // (R * LANES), D * LANES
    for s in range(0, S, SLOTS):
        for r in range(R):
            at, to, p, ahead = s * step, r * step, (r * S + s) * LANES, (s + 2 * SLOTS) * step
            a, b = load(scores, p), load(scores, p + LANES)
            c, e = load(scores, p + 2 * LANES), load(scores, p + 3 * LANES)
            for i in range(0, step, LANES):
                if r == 0 and s + 2 * SLOTS < S:
                    prefetch_once(v, ahead + 4 * i)
                    prefetch_once(v, ahead + 4 * i + LINE)
                x = add_product(load(out, to + i), a, load(v, at + i))
                x = add_product(x, b, load(v, at + i + step))
                x = add_product(x, c, load(v, at + i + 2 * step))
                x = add_product(x, e, load(v, at + i + 3 * step))
                store(out, to + i, x)


@part
def scores_of_row(q, k, R, D, scores):
    S = len(scores) // R
    for s in range(S):
        for r in range(R):
            score = f32(0)
            for d in range(D):
                score += q[r * D + d] * k[s * D + d]
            scores[r * S + s] = score


@part
def softmax_row(scores):
    peak, total = LOWEST, f32(0)
    for s in range(len(scores)):
        peak = peak if scores[s] < peak else scores[s]
    for s in range(len(scores)):
        scores[s] = exp(scores[s] - peak)
        total += scores[s]
    for s in range(len(scores)):
        scores[s] /= total


@part
def add_values_of_row(scores, v, R, D, out):
    S = len(scores) // R
    for s in range(S):
        for r in range(R):
            p = scores[r * S + s]
            for d in range(D):
                out[r * D + d] += p * v[s * D + d]


@part
def rotate(x, cos, sin, scale):
    """RoPE of one head [2, C, rows], flat, in place, and scaled."""
    C = len(cos)
    for i in range(C):
        first, second = x[i], x[C + i]
        x[i] = (first * cos[i] - second * sin[i]) * scale
        x[C + i] = (second * cos[i] + first * sin[i]) * scale


@part
def copy(x, at, stride, to, to_at, to_stride, M, rows):
    """Copy M runs of `rows` numbers. The runs are `stride` apart in x and `to_stride` apart in
    `to`."""
    if rows == LANES:
        for m in range(M):
            store(to, to_at + m * to_stride, load(x, at + m * stride))
        return
    for i in range(rows):
        for m in range(M):
            to[to_at + m * to_stride + i] = x[at + m * stride + i]


@part
def attend(qkv, at, B, g, H, G, cos_SC, sin_SC, scale, lengths, k_SDW, v_SDW, out, to):
    """A block of rows with the query heads of kv head g. It begins at qkv[at] and out[to]; both are
    flat, with B columns. lengths: the slot of each row's new token."""
    D, W = k_SDW.shape[1:]
    C, R, head, rows = cos_SC.shape[1], H // G, D * W, len(lengths)
    k, v, S = k_SDW.reshape(-1), v_SDW.reshape(-1), lengths.max() // SLOTS * SLOTS + SLOTS
    # working memory in one piece, since each allocation takes as long as reading a few slots
    own = np.empty((2 * R + 3) * head + R * S * W, f32)
    new, own = own[: (R + 2) * head], own[(R + 2) * head :]
    angles, own = own[:head], own[head:]
    cos, sin, mixed, scores = angles[: C * W], angles[C * W :], own[: R * head], own[R * head :]
    # the new token's heads of q, k and v
    for i in range(rows):
        for c in range(C):
            cos[c * W + i], sin[c * W + i] = cos_SC[lengths[i], c], sin_SC[lengths[i], c]
    copy(qkv, at + g * R * D * B, B, new, 0, W, R * D, rows)
    copy(qkv, at + (H + g) * D * B, B, new, R * head, W, D, rows)
    copy(qkv, at + (H + G + g) * D * B, B, new, (R + 1) * head, W, D, rows)
    for r in range(R + 1):
        rotate(new[r * head : (r + 1) * head], cos, sin, scale if r < R else f32(1))
    # k and v go into the cache
    for i in range(rows):
        new_at, by = lengths[i] * head + i, R * head + i
        for d in range(D):
            k[new_at + d * W], v[new_at + d * W] = new[by + d * W], new[by + head + d * W]
    # scores
    mixed[:] = 0
    if W == LANES:
        scores_of_rows(new, k, R, D, scores)
    else:
        scores_of_row(new, k, R, D, scores)
    # softmax over the slots that a row has; longer rows of the block have more
    for r in range(R):
        for i in range(rows):
            for s in range(lengths[i] + 1, S):
                scores[(r * S + s) * W + i] = LOWEST
        if W == LANES:
            softmax_rows(scores[r * S * W : (r + 1) * S * W])
        else:
            softmax_row(scores[r * S : (r + 1) * S])
    # the values, weighted
    if W == LANES:
        add_values_of_rows(scores, v, R, D, mixed)
    else:
        add_values_of_row(scores, v, R, D, mixed)
    copy(mixed, 0, W, out, to + g * R * D * B, B, R * D, rows)


@loop
def decode_attention_loop(qkv_INDC, cos_SC, sin_SC, scale, lengths_B, k, v, out_IHDC):
    """RoPE and attention of one new token per row. The new keys and values are written into the
    cache.

    qkv: the N = H + 2 G heads of the new tokens. scale: that of the scores. cos, sin: the angles of
    every position. lengths: int64, the tokens of each row that the cache holds so far. k, v:
    [blocks, G, S, D, W], where W is 8 or 1 and S a multiple of 4; all of them must be finite. qkv
    and out hold the rows in tiles of C columns, a multiple of W. There may be more columns than
    rows, and one tile may hold all rows.
    """
    _, H, D, C = out_IHDC.shape
    G, W, qkv, out = k.shape[1], k.shape[4], qkv_INDC.reshape(-1), out_IHDC.reshape(-1)
    for n in numba.prange((len(lengths_B) + W - 1) // W * G):
        i, g = n // G, n % G
        lengths = lengths_B[i * W : (i + 1) * W]
        tile, first = i * W // C, i * W % C
        at, to = tile * (H + 2 * G) * D * C + first, tile * H * D * C + first
        attend(qkv, at, C, g, H, G, cos_SC, sin_SC, scale, lengths, k[i, g], v[i, g], out, to)


@loop
def write_rows_loop(new_TGD, firsts_B, lengths_B, rows_B, cache):
    """Write keys or values of the lengths_B tokens from firsts_B on into rows of the cache [blocks,
    G, S, D, W]."""
    _, G, S, D, W = cache.shape
    new, flat = new_TGD.reshape(-1), cache.reshape(-1)
    for i in numba.prange(len(rows_B) * G):
        b, g = i // G, i % G
        to = (rows_B[b] // W * G + g) * S * D * W + rows_B[b] % W
        for s in range(lengths_B[b]):
            copy(new, ((firsts_B[b] + s) * G + g) * D, 1, flat, to + s * D * W, W, D, 1)


@loop
def move_rows_loop(by_B, lengths_B, to_B, cache):
    """Copy the first lengths_B slots of rows by_B into rows to_B."""
    _, G, S, D, W = cache.shape
    flat = cache.reshape(-1)
    for i in numba.prange(len(to_B) * G):
        b, g = i // G, i % G
        by = (by_B[b] // W * G + g) * S * D * W + by_B[b] % W
        to = (to_B[b] // W * G + g) * S * D * W + to_B[b] % W
        copy(flat, by, W, flat, to, W, lengths_B[b] * D, 1)
