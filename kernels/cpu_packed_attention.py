"""Causal attention over flat tokens as compiled loops for a CPU (see kernels/cpu.py), as in FlashAttention
(arXiv 2205.14135, 2307.08691); kernels/attention.py has the maths. Scores exist for one block of queries at a
time, and backward computes them anew from each row's log-sum-exp.

A thread takes one sequence with one kv head and all its query heads, and reads them where they lie: nothing
is padded to another's length, no two threads add to one number, and what a sequence gives depends neither on
the others nor on the number of threads. The products are those of kernels/cpu_tiles.py; they leave out, to
within a tile, what no query of theirs sees. For scores, keys (in backward values, too) are turned into tiles
of 16.

Row i of a block stands at key place + i, the last that it sees. A product takes rows and keys together, and
reads up to 5 weights behind the last one seen: those are made 0.

Arrays are flat and begin with the sequence's first token and head; x_row and x_head lead to the next.
Shapes: N sequences, T tokens, H query heads, G kv heads, R = H / G, D head_dim, W the x_row of scores.
"""
import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .cpu import (
    HAS_NUMBA,
    LANES,
    TILE_COLUMNS,
    TILE_ROWS,
    array,
    f32,
    flat,
    loop,
    numba,
    part,
    scale_row,
    serves,
    threads,
)

if HAS_NUMBA:
    from .cpu_tiles import product
    from .lanes import (
        add,
        add_product,
        exp_up_to_88,
        fill,
        larger,
        largest_of,
        load,
        multiply,
        store,
        subtract,
        total_of,
        transpose,
    )

QUERIES = 96  # of a block
KEYS = 128    # that a product sums over at a time: they stay in the nearest cache for all rows
LOWEST, UNSEEN = f32(-3e38), f32(-np.inf)


@part
def width_of(n_keys):
    """W, with room for 15 more keys: an odd number of cache lines, or rows would crowd into few sets."""
    return ((n_keys + 2 * TILE_COLUMNS - 1) // (2 * TILE_COLUMNS) * 2 + 1) * TILE_COLUMNS


@part
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
        product(x, i * x_row, x_row, 1, rows - i, D, columns, j * D, TILE_COLUMNS, zeros, 0, 0, out,
                i * W + j, W)


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
                product(weights, i * W + j, W, 1, n, depth, x, j * x_row + d, x_row, out, to, out_row,
                        out, to, out_row)


@part
def add_to_keys(weights, W, rows, place, x, x_row, D, out, out_row):
    """out[j] += sum of weights[i, j] x[i] over all rows i that see key j."""
    for j in range(0, place + rows, TILE_ROWS):
        n, i = min(TILE_ROWS, place + rows - j), max(j - place, 0)
        for d in range(0, D, TILE_COLUMNS):
            to = j * out_row + d
            product(weights, i * W + j, 1, W, n, rows - i, x, i * x_row + d, x_row, out, to, out_row,
                    out, to, out_row)


@part
def cover(row, seen, x):
    """Behind the first `seen`, 8 numbers and those up to a whole vector become x. Returns where that is."""
    end = (seen + 2 * LANES - 1) // LANES * LANES
    store(row, end - LANES, fill(x))
    store(row, seen, fill(x))
    return end


@part
def peak_of(row, n):
    """The largest of n numbers, LOWEST at least; NaN does not count."""
    peaks = fill(LOWEST)
    for j in range(0, n, LANES):
        peaks = larger(peaks, load(row, j))
    return largest_of(peaks)


@part
def soften(row, n, peak):
    """exp(x - peak) of n numbers, in place, and their sum."""
    shift, totals = fill(peak), fill(f32(0))
    for j in range(0, n, LANES):
        e = exp_up_to_88(subtract(load(row, j), shift))
        store(row, j, e)
        totals = add(totals, e)
    return total_of(totals)


@part
def dscores(probs, dprobs, n, lse, delta, scale):
    """In place, from n scores to P = exp(s - lse), and from dP to scale P (dP - delta)."""
    shift, less, by = fill(lse), fill(delta), fill(scale)
    for j in range(0, n, LANES):
        p = exp_up_to_88(subtract(load(probs, j), shift))
        store(probs, j, p)
        store(dprobs, j, multiply(multiply(p, subtract(load(dprobs, j), less)), by))


@part
def dot(x, y, D):
    sums = fill(f32(0))
    for d in range(0, D, LANES):
        sums = add_product(sums, load(x, d), load(y, d))
    return total_of(sums)


@part
def attend(q, q_row, q_head, n_q, k, k_row, v, v_row, n_k, R, D, scale, out, lse, H):
    """n_q queries of R heads against n_k keys and values of one."""
    W, turned = width_of(n_k), (n_k + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS * D
    own = np.empty(turned + LANES * D + TILE_COLUMNS + min(QUERIES, n_q) * W, f32)
    columns, rest, own = own[:turned], own[turned : turned + LANES * D], own[turned + LANES * D :]
    zeros, scores = own[:TILE_COLUMNS], own[TILE_COLUMNS:]
    zeros[:] = f32(0)
    columns_of(k, k_row, n_k, D, scale, rest, columns)
    for r in range(R):
        for first in range(0, n_q, QUERIES):
            rows, place, to = min(QUERIES, n_q - first), first + n_k - n_q, first * H + r
            times_columns(q[first * q_row + r * q_head :], q_row, rows, D, columns, place, zeros, scores, W)
            for i in range(rows):
                row, seen = scores[i * W :], max(place + i + 1, 0)
                end = cover(row, seen, UNSEEN)
                peak = peak_of(row, end)
                total = soften(row, end, peak)
                lse[to + i * H] = peak + np.log(total)
                scale_row(row[:end], f32(1) / total if seen else f32(0))
            times_rows(scores, W, rows, place, v, v_row, D, out[to * D :], H * D)


@part
def attend_back(q, q_row, q_head, n_q, k, k_row, v, v_row, n_k, R, D, scale, out, lse, H, dout, dout_row,
                dout_head, dlse, dq, dk, dv, dk_row):
    """The gradients of what `attend` gives. dq lies as out does; dlse may be empty."""
    W, turned = width_of(n_k), (n_k + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS * D
    square = min(QUERIES, n_q) * W
    own = np.empty(2 * turned + LANES * D + TILE_COLUMNS + 2 * square, f32)
    k_columns, v_columns, own = own[:turned], own[turned : 2 * turned], own[2 * turned :]
    probs, dprobs, own = own[:square], own[square : 2 * square], own[2 * square :]
    rest, zeros = own[: LANES * D], own[LANES * D :]
    zeros[:] = f32(0)
    columns_of(k, k_row, n_k, D, scale, rest, k_columns)
    columns_of(v, v_row, n_k, D, f32(1), rest, v_columns)
    clear(dk, dk_row, n_k, D)
    clear(dv, dk_row, n_k, D)
    for r in range(R):
        for first in range(0, n_q, QUERIES):
            rows, place, to = min(QUERIES, n_q - first), first + n_k - n_q, first * H + r
            q_rows, dout_rows = q[first * q_row + r * q_head :], dout[first * dout_row + r * dout_head :]
            times_columns(q_rows, q_row, rows, D, k_columns, place, zeros, probs, W)
            times_columns(dout_rows, dout_row, rows, D, v_columns, place, zeros, dprobs, W)
            for i in range(rows):
                p, dp, at, seen = probs[i * W :], dprobs[i * W :], to + i * H, max(place + i + 1, 0)
                end = cover(p, seen, UNSEEN)
                cover(dp, seen, f32(0))
                delta = dot(dout_rows[i * dout_row :], out[at * D :], D)
                if len(dlse) > 0:
                    delta -= dlse[at]
                if seen:
                    dscores(p, dp, end, lse[at], delta, scale)
                else:
                    cover(p, seen, f32(0))
            times_rows(dprobs, W, rows, place, k, k_row, D, dq[to * D :], H * D)
            add_to_keys(probs, W, rows, place, dout_rows, dout_row, D, dv, dk_row)
            add_to_keys(dprobs, W, rows, place, q_rows, q_row, D, dk, dk_row)


@loop
def attention_fwd_loop(q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, cu_q, cu_k, order_N, G, scale,
                       out_THD, lse):
    """cu_q, cu_k: int64 offsets [N + 1]; order_N: the sequences as threads get them. All but out are flat."""
    (_, H, D), out = out_THD.shape, out_THD.reshape(-1)
    R = H // G
    for m in numba.prange(len(order_N) * G):
        n, g = order_N[m // G], m % G
        a, b, to = cu_q[n], cu_k[n], cu_q[n] * H + g * R
        attend(q[a * q_row + g * R * q_head :], q_row, q_head, cu_q[n + 1] - a, k[b * k_row + g * k_head :],
               k_row, v[b * v_row + g * v_head :], v_row, cu_k[n + 1] - b, R, D, scale, out[to * D :],
               lse[to:], H)


@loop
def attention_bwd_loop(q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, cu_q, cu_k, order_N, G, scale,
                       out_THD, lse, dout, dout_row, dout_head, dlse, dq, dk, dv):
    """dlse is empty where nobody used lse."""
    (_, H, D), out = out_THD.shape, out_THD.reshape(-1)
    R = H // G
    for m in numba.prange(len(order_N) * G):
        n, g = order_N[m // G], m % G
        a, b, to, k_to = cu_q[n], cu_k[n], cu_q[n] * H + g * R, (cu_k[n] * G + g) * D
        attend_back(q[a * q_row + g * R * q_head :], q_row, q_head, cu_q[n + 1] - a,
                    k[b * k_row + g * k_head :], k_row, v[b * v_row + g * v_head :], v_row, cu_k[n + 1] - b,
                    R, D, scale, out[to * D :], lse[to:], H, dout[a * dout_row + g * R * dout_head :],
                    dout_row, dout_head, dlse[to:], dq[to * D :], dk[k_to:], dv[k_to:], G * D)


def behind(*tensors: torch.Tensor) -> list:
    return [y for x in tensors for y in (flat(x), x.stride(0), x.stride(1))]


def arguments(q, k, v, cu_q: torch.Tensor, cu_k: torch.Tensor, scale: float) -> list:
    """Those that both loops begin with. Each thread takes one run of the sequences, so they are dealt like
    cards, the most work first."""
    cu_q, cu_k = (cu.numpy().astype(np.int64) for cu in (cu_q, cu_k))
    queries, keys, n = np.diff(cu_q), np.diff(cu_k), torch.get_num_threads()
    by_work = np.argsort(-queries * (2 * keys - queries), kind="stable")
    order = np.concatenate([by_work[i::n] for i in range(n)])
    return [*behind(q, k, v), cu_q, cu_k, order, k.shape[1], f32(scale)]


def attention_fwd(q, k, v, cu_q, cu_k, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [Tq, H, D], lse [Tq, H])"""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2])
    threads()
    attention_fwd_loop(*arguments(q, k, v, cu_q, cu_k, scale), out.numpy(), lse.numpy().reshape(-1))
    return out, lse


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, scale):
        out, lse = attention_fwd(q, k, v, cu_q, cu_k, scale)
        ctx.save_for_backward(q, k, v, cu_q, cu_k, out, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)  # a gradient that nobody asked for is None
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        *inputs, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
        dlse = np.empty(0, f32) if dlse is None else array(dlse).reshape(-1)
        gradients = [x.new_empty(x.shape) for x in inputs[:3]]
        threads()
        attention_bwd_loop(*arguments(*inputs, ctx.scale), out.numpy(), lse.numpy().reshape(-1),
                           *behind(dout), dlse, *[x.numpy().reshape(-1) for x in gradients])
        return *gradients, None, None, None


def fits(impl: str | None, q, k, v, window: int | None, softcap: float | None) -> bool:
    """Whether the loops serve this. Raises ValueError where `impl` is "cpu" and they do not."""
    if not serves(impl, q, k, v):
        return False
    able = q.shape[2] % TILE_COLUMNS == 0 and window is None and softcap is None
    if impl == "cpu" and not able:
        raise ValueError(f'attention: impl is "cpu", but head_dim is {q.shape[2]}, window {window}, softcap '
                         f"{softcap}; the compiled loops take a head_dim that is a multiple of 16, no window "
                         'and no softcap; expected impl=None or "reference" here')
    return able


def attention(q, k, v, cu_q, cu_k, scale: float, return_lse: bool):
    """As kernels/attention.py has it, for what `fits`."""
    out, lse = (Attention.apply if torch.is_grad_enabled() else attention_fwd)(q, k, v, cu_q, cu_k, scale)
    return (out, lse) if return_lse else out
