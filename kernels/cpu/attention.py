"""RoPE and causal attention over flat tokens as compiled loops, for training and prefill. The
public ops are in kernels/attention.py.

A thread takes one sequence with one kv head and all its query heads (attention_tiles.py), and reads
them where they lie. Nothing is padded to another sequence's length, and no two threads add to one
number. So what a sequence gives depends neither on the others nor on the number of threads.

Keys may be shared: a key that several sequences read is one token's, and its gradients are added up
at the end, in the order of the sequences.

Arrays are flat; x_row and x_head are the strides to the next token and head.
Shapes: N sequences, T tokens, K keys, H query heads, G kv heads, R = H / G, D head_dim.
"""

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .attention_tiles import Heads, attend, attend_back, rotate_row
from .compile import (
    HAS_NUMBA,
    LANES,
    TILE_COLUMNS,
    array,
    f32,
    flat,
    loop,
    numba,
    prepare,
)
from .compile import refuses as tensors_refuse

if HAS_NUMBA:
    from .registers import add, load, store


@loop
def attention_fwd_loop(q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, cos, sin, cu_q, cu_k,
                       keys_K, order_N, G, scale, out_THD, peaks, shares):  # fmt: skip
    """cu_q, cu_k: int64 offsets [N + 1]; keys_K: the token that each key is; order_N: the sequences
    in the order in which threads get them. All arrays but out are flat."""
    (_, H, D), out = out_THD.shape, out_THD.reshape(-1)
    R = H // G
    for m in numba.prange(len(order_N) * G):
        n, g = order_N[m // G], m % G
        a, to = cu_q[n], cu_q[n] * H + g * R
        q_in = Heads(a * q_row + g * R * q_head, q_row, q_head)
        k_in, v_in = Heads(g * k_head, k_row, k_head), Heads(g * v_head, v_row, v_head)
        keys = keys_K[cu_k[n] : cu_k[n + 1]]
        attend(q, q_in, a, cu_q[n + 1] - a, k, k_in, v, v_in, keys, R, D, cos, sin, scale,
               out[to * D :], peaks[to:], shares[to:], H)  # fmt: skip


@loop
def attention_bwd_loop(q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, cos, sin, cu_q, cu_k,
                       keys_K, order_N, G, scale, out_THD, peaks, shares,
                       dout, dout_row, dout_head, dlse, dq, dq_row, dq_head,
                       dk, dk_row, dk_head, dv, dv_row, dv_head, slots_K, spare):  # fmt: skip
    """dlse is empty where nobody used lse. slots_K: for a key that others read, too, where its
    gradients go in spare [slots, G, 2, D], those of the key and of its value; -1 for the other
    keys."""
    (_, H, D), out = out_THD.shape, out_THD.reshape(-1)
    R = H // G
    for m in numba.prange(len(order_N) * G):
        n, g = order_N[m // G], m % G
        a, to = cu_q[n], cu_q[n] * H + g * R
        q_in = Heads(a * q_row + g * R * q_head, q_row, q_head)
        k_in, v_in = Heads(g * k_head, k_row, k_head), Heads(g * v_head, v_row, v_head)
        dout_in = Heads(a * dout_row + g * R * dout_head, dout_row, dout_head)
        dq_in = Heads(a * dq_row + g * R * dq_head, dq_row, dq_head)
        keys, slots = keys_K[cu_k[n] : cu_k[n + 1]], slots_K[cu_k[n] :]
        dk_rows, dv_rows = np.empty(len(keys) * D, f32), np.empty(len(keys) * D, f32)
        attend_back(q, q_in, a, cu_q[n + 1] - a, k, k_in, v, v_in, keys, R, D, cos, sin, scale,
                    out[to * D :], peaks[to:], shares[to:], H,
                    dout, dout_in, dlse[to:], dq, dq_in, dk_rows, dv_rows)  # fmt: skip
        for j in range(len(keys)):
            if slots[j] < 0:
                to_k, to_v = keys[j] * dk_row + g * dk_head, keys[j] * dv_row + g * dv_head
                rotate_row(dk_rows, j * D, D, cos, sin, keys[j], True, dk, to_k)
                rotate_row(dv_rows, j * D, D, cos[:0], sin[:0], 0, True, dv, to_v)
            else:
                at = (slots[j] * G + g) * 2 * D
                rotate_row(dk_rows, j * D, D, cos, sin, keys[j], True, spare, at)
                rotate_row(dv_rows, j * D, D, cos[:0], sin[:0], 0, True, spare, at + D)


@loop
def add_shared_loop(spare, tokens, G, D, dk, dk_row, dk_head, dv, dv_row, dv_head):
    """Add up the gradients of the keys that several read: spare[i] is for tokens[i], which are
    sorted."""
    for g in numba.prange(G):
        for i in range(len(tokens)):
            at, more = (i * G + g) * 2 * D, i > 0 and tokens[i] == tokens[i - 1]
            to_k, to_v = tokens[i] * dk_row + g * dk_head, tokens[i] * dv_row + g * dv_head
            for d in range(0, D, LANES):
                x, y = load(spare, at + d), load(spare, at + D + d)
                store(dk, to_k + d, add(load(dk, to_k + d), x) if more else x)
                store(dv, to_v + d, add(load(dv, to_v + d), y) if more else y)


def with_strides(*tensors: torch.Tensor) -> list:
    """(memory, row stride, head stride) of each, in one list."""
    return [y for x in tensors for y in (flat(x), x.stride(0), x.stride(1))]


def arguments(q, k, v, cos, sin, cu_q, cu_k, keys, scale: float) -> list:
    """The arguments that both loops begin with.

    Each thread takes one run of the sequences, so these are dealt to the threads in turn, the most
    work first.
    """
    cu_q, cu_k = (cu.numpy().astype(np.int64) for cu in (cu_q, cu_k))
    n_queries, n_keys, n = np.diff(cu_q), np.diff(cu_k), torch.get_num_threads()
    by_work = np.argsort(-n_queries * (2 * n_keys - n_queries), kind="stable")
    order = np.concatenate([by_work[i::n] for i in range(n)])
    keys = np.arange(len(k)) if keys is None else keys.numpy()
    angles = [np.empty(0, f32) if x is None else array(x).reshape(-1) for x in (cos, sin)]
    return [*with_strides(q, k, v), *angles, cu_q, cu_k, keys, order, k.shape[1], f32(scale)]


def attention_fwd(*inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [Tq, H, D], largest score and 1 / sum exp(score - largest) of each row [Tq, H])"""
    q = inputs[0]
    out, peaks, shares = q.new_empty(q.shape), q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])
    per_row = [x.numpy().reshape(-1) for x in (peaks, shares)]
    prepare()
    attention_fwd_loop(*arguments(*inputs), out.numpy(), *per_row)
    return out, peaks, shares


def attention_bwd(inputs, out, peaks, shares, dout, dlse, dq, dk, dv) -> None:
    """Into dq, dk, dv, each of any strides."""
    dout = torch.zeros_like(out) if dout is None else dout
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dlse = np.empty(0, f32) if dlse is None else array(dlse).reshape(-1)
    begin = arguments(*inputs)
    keys, (_, G, D) = begin[13], dk.shape
    # keys that several sequences read, sorted by their tokens
    shared = np.flatnonzero(np.bincount(keys, minlength=len(dk))[keys] > 1)
    shared = shared[np.argsort(keys[shared], kind="stable")]
    slots, spare = np.full(len(keys), -1), np.empty(len(shared) * G * 2 * D, f32)
    slots[shared] = np.arange(len(shared))
    per_row = [x.numpy().reshape(-1) for x in (peaks, shares)]
    gradients = with_strides(dq, dk, dv)
    prepare()
    of_out = [out.numpy(), *per_row, *with_strides(dout), dlse]
    attention_bwd_loop(*begin, *of_out, *gradients, slots, spare)
    if len(shared):
        add_shared_loop(spare, keys[shared], G, D, *with_strides(dk, dv))


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, scale):
        out, peaks, shares = attention_fwd(q, k, v, None, None, cu_q, cu_k, None, scale)
        ctx.save_for_backward(q, k, v, cu_q, cu_k, out, peaks, shares)
        ctx.scale = scale
        ctx.set_materialize_grads(False)  # a gradient that nobody asked for is None
        return out, torch.where(shares == 0, -torch.inf, peaks - shares.log())

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, cu_q, cu_k, *kept = ctx.saved_tensors
        gradients = [x.new_empty(x.shape) for x in (q, k, v)]
        inputs = (q, k, v, None, None, cu_q, cu_k, None, ctx.scale)
        attention_bwd(inputs, *kept, dout, dlse, *gradients)
        return *gradients, None, None, None


class RopeAttention(torch.autograd.Function):
    """RoPE and attention, from all heads side by side and to their gradient, without a copy
    between."""

    @staticmethod
    def inputs(qkv, cos, sin, cu_q, cu_k, keys, G):
        H, D = qkv.shape[1] - 2 * G, qkv.shape[2]
        return *qkv.split([H, G, G], dim=1), cos, sin, cu_q, cu_k, keys, D**-0.5

    @staticmethod
    def forward(ctx, *args):
        out, *rest = attention_fwd(*RopeAttention.inputs(*args))
        ctx.save_for_backward(*args[:-1], out, *rest)
        ctx.G = args[-1]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *args, out, peaks, shares = ctx.saved_tensors
        dqkv, H = torch.empty_like(args[0]), out.shape[1]
        gradients = dqkv.split([H, ctx.G, ctx.G], dim=1)
        inputs = RopeAttention.inputs(*args, ctx.G)
        attention_bwd(inputs, out, peaks, shares, dout, None, *gradients)
        return dqkv, *[None] * 6


# ---- attention ----


def refuses(q, k, v, cu_seqlens, max_seqlen, scale=None, cu_seqlens_k=None, max_seqlen_k=None,
            window=None, softcap=None, return_lse=False) -> str | None:  # fmt: skip
    """Why the loops cannot serve these arguments of kernels/attention.py's op, in words; None if
    they can."""
    reason = tensors_refuse(q, k, v)
    if reason:
        return reason
    if k.shape[2] != v.shape[2]:
        return (
            f"keys are {k.shape[2]} wide and values {v.shape[2]}; the compiled loops take one "
            "width for both"
        )
    if q.shape[2] % TILE_COLUMNS or window is not None or softcap is not None:
        return (
            f"head_dim is {q.shape[2]}, window {window}, softcap {softcap}; the compiled loops "
            "take a head_dim that is a multiple of 16, no window and no softcap"
        )
    return None


def attention(q, k, v, cu_seqlens, max_seqlen, scale, cu_seqlens_k, max_seqlen_k,
              window, softcap, return_lse):  # fmt: skip
    """As kernels/attention.py has it, with all arguments given, for what `refuses` does not
    refuse."""
    out, lse = Attention.apply(q, k, v, cu_seqlens, cu_seqlens_k, scale)
    return (out, lse) if return_lse else out


# ---- RoPE and attention ----


def rope_attention_refuses(qkv, cos, sin, cu_seqlens, max_seqlen, n_kv_heads,
                           keys=None, cu_keys=None, max_keys=None) -> str | None:  # fmt: skip
    """Why the loops cannot serve these arguments of `rope_attention`, in words; None if they
    can."""
    reason = tensors_refuse(qkv, cos, sin)
    if reason:
        return reason
    if qkv.shape[2] % TILE_COLUMNS:
        return f"head_dim is {qkv.shape[2]}; the compiled loops take a multiple of {TILE_COLUMNS}"
    return None


def rope_attention(qkv, cos, sin, cu_seqlens, max_seqlen, n_kv_heads,
                   keys=None, cu_keys=None, max_keys=None) -> torch.Tensor:  # fmt: skip
    """Causal attention [T, H, D] of qkv [T, H + 2 G, D], whose queries and keys are rotated first.

    cos, sin: [T, D / 2], the angles of each token (see rope_table). keys: [K], the token that each
    key of each sequence is, where these are not the sequence's own tokens; cu_keys: where each
    sequence's keys begin. Raises ValueError for indices outside, for the loops check none.
    """
    cu_keys = cu_seqlens if keys is None else cu_keys
    check_indices(qkv, cos, sin, cu_seqlens, cu_keys, keys)
    args = qkv.contiguous(), cos, sin, cu_seqlens, cu_keys, keys, n_kv_heads
    if torch.is_grad_enabled():
        return RopeAttention.apply(*args)
    return attention_fwd(*RopeAttention.inputs(*args))[0]


def check_indices(qkv, cos, sin, cu_q, cu_k, keys) -> None:
    """Raise ValueError unless all offsets and keys lie inside, and each token has its angles."""
    T, D = len(qkv), qkv.shape[2]
    for name, cu, n in (("cu_q", cu_q, T), ("cu_k", cu_k, T if keys is None else len(keys))):
        if cu[0] != 0 or cu[-1] != n or cu.diff().min() < 0:
            raise ValueError(
                f"attention: {name} is {cu.tolist()[:20]}; expected offsets that begin at 0, "
                f"never decrease, and end at {n}"
            )
    if keys is not None and (
        keys.min() < 0 or keys.max() >= T or not np.bincount(keys, minlength=T).all()
    ):
        raise ValueError(
            f"attention: keys are {int(keys.min())} to {int(keys.max())}; expected indices of "
            f"the {T} tokens, each at least once, for a token reads itself"
        )
    if not cos.shape == sin.shape == (T, D // 2):
        raise ValueError(
            f"attention: cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; expected {(T, D // 2)}"
        )
