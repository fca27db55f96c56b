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

Arrays are flat; x_row and x_head lead to the next token and head.
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


@part
def take_keys(k, k_at, k_row, v, v_at, v_row, keys, D, cos, sin, k_rows, v_rows):
    """Keys, turned, and values of one head, side by side."""
    for j in range(len(keys)):
        turn_row(k, k_at + keys[j] * k_row, D, cos, sin, keys[j], False, k_rows, j * D)
        turn_row(v, v_at + keys[j] * v_row, D, cos[:0], sin[:0], 0, False, v_rows, j * D)


@part
def attend(q, q_at, q_row, q_head, first_token, n_q, k, k_at, k_row, v, v_at, v_row, keys, R, D, cos, sin, scale,
           out, lse, H):
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
            for i in range(rows):
                turn_row(q, q_at + (first + i) * q_row + r * q_head, D, cos, sin, first_token + first + i, False,
                         q_rows, i * D)
            times_columns(q_rows, D, rows, D, columns, place, zeros, scores, W)
            for i in range(rows):
                row, seen = scores[i * W :], max(place + i + 1, 0)
                end = cover(row, seen, UNSEEN)
                peak = peak_of(row, end)
                total = soften(row, end, peak)
                lse[to + i * H] = peak + np.log(total)
                scale_row(row[:end], f32(1) / total if seen else f32(0))
            times_rows(scores, W, rows, place, v_rows, D, D, out[to * D :], H * D)


@part
def attend_back(q, q_at, q_row, q_head, first_token, n_q, k, k_at, k_row, v, v_at, v_row, keys, R, D, cos, sin,
                scale, out, lse, H, dout, dout_row, dout_head, dlse, dq, dq_row, dq_head, dk_rows, dv_rows):
    """The gradients of what `attend` gives: dq where q's lie, those of keys, turned, and values [n_k, D]. dlse
    may be empty."""
    n_k = len(keys)
    W, turned = width_of(n_k), (n_k + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS * D
    block = min(QUERIES, n_q)
    square, wide = block * W, block * D
    own = np.empty(2 * turned + LANES * D + TILE_COLUMNS + 2 * n_k * D + 2 * (square + wide), f32)
    k_columns, v_columns, own = own[:turned], own[turned : 2 * turned], own[2 * turned :]
    probs, dprobs, own = own[:square], own[square : 2 * square], own[2 * square :]
    q_rows, dq_rows, own = own[:wide], own[wide : 2 * wide], own[2 * wide :]
    k_rows, v_rows, own = own[: n_k * D], own[n_k * D : 2 * n_k * D], own[2 * n_k * D :]
    rest, zeros = own[: LANES * D], own[LANES * D :]
    zeros[:] = f32(0)
    take_keys(k, k_at, k_row, v, v_at, v_row, keys, D, cos, sin, k_rows, v_rows)
    columns_of(k_rows, D, n_k, D, scale, rest, k_columns)
    columns_of(v_rows, D, n_k, D, f32(1), rest, v_columns)
    clear(dk_rows, D, n_k, D)
    clear(dv_rows, D, n_k, D)
    for r in range(R):
        for first in range(0, n_q, QUERIES):
            rows, place, to = min(QUERIES, n_q - first), first + n_k - n_q, first * H + r
            dout_rows = dout[first * dout_row + r * dout_head :]
            for i in range(rows):
                turn_row(q, q_at + (first + i) * q_row + r * q_head, D, cos, sin, first_token + first + i, False,
                         q_rows, i * D)
            times_columns(q_rows, D, rows, D, k_columns, place, zeros, probs, W)
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
            times_rows(dprobs, W, rows, place, k_rows, D, D, dq_rows, D)
            for i in range(rows):
                turn_row(dq_rows, i * D, D, cos, sin, first_token + first + i, True, dq,
                         (first + i) * dq_row + r * dq_head)
            add_to_keys(probs, W, rows, place, dout_rows, dout_row, D, dv_rows, D)
            add_to_keys(dprobs, W, rows, place, q_rows, D, D, dk_rows, D)


@loop
def attention_fwd_loop(q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, cos, sin, cu_q, cu_k, keys_K,
                       order_N, G, scale, out_THD, lse):
    """cu_q, cu_k: int64 offsets [N + 1]; keys_K: which token each key is; order_N: the sequences as threads get
    them. All but out are flat."""
    (_, H, D), out = out_THD.shape, out_THD.reshape(-1)
    R = H // G
    for m in numba.prange(len(order_N) * G):
        n, g = order_N[m // G], m % G
        a, to = cu_q[n], cu_q[n] * H + g * R
        attend(q, a * q_row + g * R * q_head, q_row, q_head, a, cu_q[n + 1] - a, k, g * k_head, k_row, v,
               g * v_head, v_row, keys_K[cu_k[n] : cu_k[n + 1]], R, D, cos, sin, scale, out[to * D :], lse[to:],
               H)


@loop
def attention_bwd_loop(q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, cos, sin, cu_q, cu_k, keys_K,
                       order_N, G, scale, out_THD, lse, dout, dout_row, dout_head, dlse, dq, dq_row, dq_head, dk,
                       dk_row, dk_head, dv, dv_row, dv_head, slots_K, spare):
    """dlse is empty where nobody used lse. slots_K: where in spare [slots, G, 2, D] the gradients of a key and
    its value go that others read, too; or -1."""
    (_, H, D), out = out_THD.shape, out_THD.reshape(-1)
    R = H // G
    for m in numba.prange(len(order_N) * G):
        n, g = order_N[m // G], m % G
        a, to, keys, slots = cu_q[n], cu_q[n] * H + g * R, keys_K[cu_k[n] : cu_k[n + 1]], slots_K[cu_k[n] :]
        dk_rows, dv_rows = np.empty(len(keys) * D, f32), np.empty(len(keys) * D, f32)
        attend_back(q, a * q_row + g * R * q_head, q_row, q_head, a, cu_q[n + 1] - a, k, g * k_head, k_row, v,
                    g * v_head, v_row, keys, R, D, cos, sin, scale, out[to * D :], lse[to:], H,
                    dout[a * dout_row + g * R * dout_head :], dout_row, dout_head, dlse[to:],
                    dq[a * dq_row + g * R * dq_head :], dq_row, dq_head, dk_rows, dv_rows)
        for j in range(len(keys)):
            if slots[j] < 0:
                turn_row(dk_rows, j * D, D, cos, sin, keys[j], True, dk, keys[j] * dk_row + g * dk_head)
                turn_row(dv_rows, j * D, D, cos[:0], sin[:0], 0, True, dv, keys[j] * dv_row + g * dv_head)
            else:
                at = (slots[j] * G + g) * 2 * D
                turn_row(dk_rows, j * D, D, cos, sin, keys[j], True, spare, at)
                turn_row(dv_rows, j * D, D, cos[:0], sin[:0], 0, True, spare, at + D)


@loop
def add_shared_loop(spare, tokens, G, D, dk, dk_row, dk_head, dv, dv_row, dv_head):
    """Add up the gradients of the keys that several read: spare[i] is for tokens[i], which are sorted."""
    for g in numba.prange(G):
        for i in range(len(tokens)):
            at, to_k, to_v = (i * G + g) * 2 * D, tokens[i] * dk_row + g * dk_head, tokens[i] * dv_row + g * dv_head
            more = i > 0 and tokens[i] == tokens[i - 1]
            for d in range(0, D, LANES):
                x, y = load(spare, at + d), load(spare, at + D + d)
                store(dk, to_k + d, add(load(dk, to_k + d), x) if more else x)
                store(dv, to_v + d, add(load(dv, to_v + d), y) if more else y)


def behind(*tensors: torch.Tensor) -> list:
    return [y for x in tensors for y in (flat(x), x.stride(0), x.stride(1))]


def arguments(q, k, v, cos, sin, cu_q, cu_k, keys, scale: float) -> list:
    """Those that both loops begin with. Each thread takes one run of the sequences, so they are dealt like
    cards, the most work first."""
    cu_q, cu_k = (cu.numpy().astype(np.int64) for cu in (cu_q, cu_k))
    n_queries, n_keys, n = np.diff(cu_q), np.diff(cu_k), torch.get_num_threads()
    by_work = np.argsort(-n_queries * (2 * n_keys - n_queries), kind="stable")
    order = np.concatenate([by_work[i::n] for i in range(n)])
    keys = np.arange(len(k)) if keys is None else keys.numpy()
    angles = [np.empty(0, f32) if x is None else array(x).reshape(-1) for x in (cos, sin)]
    return [*behind(q, k, v), *angles, cu_q, cu_k, keys, order, k.shape[1], f32(scale)]


def attention_fwd(*inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [Tq, H, D], lse [Tq, H])"""
    q = inputs[0]
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2])
    threads()
    attention_fwd_loop(*arguments(*inputs), out.numpy(), lse.numpy().reshape(-1))
    return out, lse


def attention_bwd(inputs, out, lse, dout, dlse, dq, dk, dv) -> None:
    """Into dq, dk, dv, each of any strides."""
    dout = torch.zeros_like(out) if dout is None else dout
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dlse = np.empty(0, f32) if dlse is None else array(dlse).reshape(-1)
    begin = arguments(*inputs)
    keys, (_, G, D) = begin[13], dk.shape
    shared = np.flatnonzero(np.bincount(keys, minlength=len(dk))[keys] > 1)
    shared = shared[np.argsort(keys[shared], kind="stable")]
    slots, spare = np.full(len(keys), -1), np.empty(len(shared) * G * 2 * D, f32)
    slots[shared] = np.arange(len(shared))
    threads()
    attention_bwd_loop(*begin, out.numpy(), lse.numpy().reshape(-1), *behind(dout), dlse, *behind(dq, dk, dv),
                       slots, spare)
    if len(shared):
        add_shared_loop(spare, keys[shared], G, D, *behind(dk, dv))


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, scale):
        out, lse = attention_fwd(q, k, v, None, None, cu_q, cu_k, None, scale)
        ctx.save_for_backward(q, k, v, cu_q, cu_k, out, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)  # a gradient that nobody asked for is None
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
        gradients = [x.new_empty(x.shape) for x in (q, k, v)]
        attention_bwd((q, k, v, None, None, cu_q, cu_k, None, ctx.scale), out, lse, dout, dlse, *gradients)
        return *gradients, None, None, None


class AttentionOfHeads(torch.autograd.Function):
    """RoPE and attention, from all heads side by side and to their gradient, without a copy between."""
    @staticmethod
    def inputs(qkv, cos, sin, cu_q, cu_k, keys, G):
        H, D = qkv.shape[1] - 2 * G, qkv.shape[2]
        return *qkv.split([H, G, G], dim=1), cos, sin, cu_q, cu_k, keys, D**-0.5

    @staticmethod
    def forward(ctx, *args):
        out, lse = attention_fwd(*AttentionOfHeads.inputs(*args))
        ctx.save_for_backward(*args[:-1], out, lse)
        ctx.G = args[-1]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *args, out, lse = ctx.saved_tensors
        dqkv, H = torch.empty_like(args[0]), out.shape[1]
        attention_bwd(AttentionOfHeads.inputs(*args, ctx.G), out, lse, dout, None,
                      *dqkv.split([H, ctx.G, ctx.G], dim=1))
        return dqkv, *[None] * 6


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
    if torch.is_grad_enabled():
        out, lse = Attention.apply(q, k, v, cu_q, cu_k, scale)
    else:
        out, lse = attention_fwd(q, k, v, None, None, cu_q, cu_k, None, scale)
    return (out, lse) if return_lse else out


def attention_of_heads(qkv, cos, sin, cu_q, cu_k, keys, n_kv_heads: int) -> torch.Tensor:
    """Causal attention [T, H, D] of qkv [T, H + 2 G, D], whose queries and keys are turned by the tables of
    their tokens first (see rope_table). keys: [K], the token that each key of each sequence is, where these are
    not their own; cu_k: where each sequence's begin."""
    args = qkv, cos, sin, cu_q, cu_k, keys, n_kv_heads
    if torch.is_grad_enabled():
        return AttentionOfHeads.apply(*args)
    return attention_fwd(*AttentionOfHeads.inputs(*args))[0]
