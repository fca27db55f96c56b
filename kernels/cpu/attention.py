"""RoPE and causal attention over flat tokens as compiled loops for a CPU (see kernels/cpu.py).

A thread takes one sequence with one kv head and all its query heads (cpu_attend.py), and reads them where
they lie: nothing is padded to another's length, no two threads add to one number, and what a sequence gives
depends neither on the others nor on the number of threads.

Arrays are flat; x_row and x_head lead to the next token and head.
Shapes: N sequences, T tokens, K keys, H query heads, G kv heads, R = H / G, D head_dim.
"""

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .attention_tiles import attend, attend_back, turn_row
from .compile import HAS_NUMBA, LANES, TILE_COLUMNS, array, f32, flat, loop, numba, serves, threads

if HAS_NUMBA:
    from .registers import add, load, store


@loop
def attention_fwd_loop(
    q,
    q_row,
    q_head,
    k,
    k_row,
    k_head,
    v,
    v_row,
    v_head,
    cos,
    sin,
    cu_q,
    cu_k,
    keys_K,
    order_N,
    G,
    scale,
    out_THD,
    peaks,
    shares,
):
    """cu_q, cu_k: int64 offsets [N + 1]; keys_K: which token each key is; order_N: the sequences as threads
    get them. All but out are flat."""
    (_, H, D), out = out_THD.shape, out_THD.reshape(-1)
    R = H // G
    for m in numba.prange(len(order_N) * G):
        n, g = order_N[m // G], m % G
        a, to = cu_q[n], cu_q[n] * H + g * R
        attend(
            q,
            a * q_row + g * R * q_head,
            q_row,
            q_head,
            a,
            cu_q[n + 1] - a,
            k,
            g * k_head,
            k_row,
            v,
            g * v_head,
            v_row,
            keys_K[cu_k[n] : cu_k[n + 1]],
            R,
            D,
            cos,
            sin,
            scale,
            out[to * D :],
            peaks[to:],
            shares[to:],
            H,
        )


@loop
def attention_bwd_loop(
    q,
    q_row,
    q_head,
    k,
    k_row,
    k_head,
    v,
    v_row,
    v_head,
    cos,
    sin,
    cu_q,
    cu_k,
    keys_K,
    order_N,
    G,
    scale,
    out_THD,
    peaks,
    shares,
    dout,
    dout_row,
    dout_head,
    dlse,
    dq,
    dq_row,
    dq_head,
    dk,
    dk_row,
    dk_head,
    dv,
    dv_row,
    dv_head,
    slots_K,
    spare,
):
    """dlse is empty where nobody used lse. slots_K: where in spare [slots, G, 2, D] the gradients go of a key
    that others read, too, and of its value; or -1."""
    (_, H, D), out = out_THD.shape, out_THD.reshape(-1)
    R = H // G
    for m in numba.prange(len(order_N) * G):
        n, g = order_N[m // G], m % G
        a, to, keys, slots = (
            cu_q[n],
            cu_q[n] * H + g * R,
            keys_K[cu_k[n] : cu_k[n + 1]],
            slots_K[cu_k[n] :],
        )
        dk_rows, dv_rows = np.empty(len(keys) * D, f32), np.empty(len(keys) * D, f32)
        attend_back(
            q,
            a * q_row + g * R * q_head,
            q_row,
            q_head,
            a,
            cu_q[n + 1] - a,
            k,
            g * k_head,
            k_row,
            v,
            g * v_head,
            v_row,
            keys,
            R,
            D,
            cos,
            sin,
            scale,
            out[to * D :],
            peaks[to:],
            shares[to:],
            H,
            dout[a * dout_row + g * R * dout_head :],
            dout_row,
            dout_head,
            dlse[to:],
            dq[a * dq_row + g * R * dq_head :],
            dq_row,
            dq_head,
            dk_rows,
            dv_rows,
        )
        for j in range(len(keys)):
            if slots[j] < 0:
                turn_row(
                    dk_rows, j * D, D, cos, sin, keys[j], True, dk, keys[j] * dk_row + g * dk_head
                )
                turn_row(
                    dv_rows, j * D, D, cos[:0], sin[:0], 0, True, dv, keys[j] * dv_row + g * dv_head
                )
            else:
                at = (slots[j] * G + g) * 2 * D
                turn_row(dk_rows, j * D, D, cos, sin, keys[j], True, spare, at)
                turn_row(dv_rows, j * D, D, cos[:0], sin[:0], 0, True, spare, at + D)


@loop
def add_shared_loop(spare, tokens, G, D, dk, dk_row, dk_head, dv, dv_row, dv_head):
    """Add up the gradients of the keys that several read: spare[i] is for tokens[i], which are sorted."""
    for g in numba.prange(G):
        for i in range(len(tokens)):
            at, more = (i * G + g) * 2 * D, i > 0 and tokens[i] == tokens[i - 1]
            to_k, to_v = tokens[i] * dk_row + g * dk_head, tokens[i] * dv_row + g * dv_head
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


def attention_fwd(*inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [Tq, H, D], largest score and 1 / sum exp(score - largest) of each row [Tq, H])"""
    q = inputs[0]
    out, peaks, shares = q.new_empty(q.shape), q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])
    threads()
    attention_fwd_loop(
        *arguments(*inputs), out.numpy(), *(x.numpy().reshape(-1) for x in (peaks, shares))
    )
    return out, peaks, shares


def attention_bwd(inputs, out, peaks, shares, dout, dlse, dq, dk, dv) -> None:
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
    attention_bwd_loop(
        *begin,
        out.numpy(),
        peaks.numpy().reshape(-1),
        shares.numpy().reshape(-1),
        *behind(dout),
        dlse,
        *behind(dq, dk, dv),
        slots,
        spare,
    )
    if len(shared):
        add_shared_loop(spare, keys[shared], G, D, *behind(dk, dv))


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
        attention_bwd(
            (q, k, v, None, None, cu_q, cu_k, None, ctx.scale), *kept, dout, dlse, *gradients
        )
        return *gradients, None, None, None


class AttentionOfHeads(torch.autograd.Function):
    """RoPE and attention, from all heads side by side and to their gradient, without a copy between."""

    @staticmethod
    def inputs(qkv, cos, sin, cu_q, cu_k, keys, G):
        H, D = qkv.shape[1] - 2 * G, qkv.shape[2]
        return *qkv.split([H, G, G], dim=1), cos, sin, cu_q, cu_k, keys, D**-0.5

    @staticmethod
    def forward(ctx, *args):
        out, *rest = attention_fwd(*AttentionOfHeads.inputs(*args))
        ctx.save_for_backward(*args[:-1], out, *rest)
        ctx.G = args[-1]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *args, out, peaks, shares = ctx.saved_tensors
        dqkv, H = torch.empty_like(args[0]), out.shape[1]
        attention_bwd(
            AttentionOfHeads.inputs(*args, ctx.G),
            out,
            peaks,
            shares,
            dout,
            None,
            *dqkv.split([H, ctx.G, ctx.G], dim=1),
        )
        return dqkv, *[None] * 6


def fits(impl: str | None, q, k, v, window: int | None, softcap: float | None) -> bool:
    """Whether the loops serve this. Raises ValueError where `impl` is "cpu" and they do not."""
    if not serves(impl, q, k, v):
        return False
    able = q.shape[2] % TILE_COLUMNS == 0 and window is None and softcap is None
    if impl == "cpu" and not able:
        raise ValueError(
            f'attention: impl is "cpu", but head_dim is {q.shape[2]}, window {window}, softcap '
            f"{softcap}; the compiled loops take a head_dim that is a multiple of 16, no window "
            'and no softcap; expected impl=None or "reference" here'
        )
    return able


def attention(q, k, v, cu_q, cu_k, scale: float, return_lse: bool):
    """As kernels/attention.py has it, for what `fits`."""
    both = Attention.apply(q, k, v, cu_q, cu_k, scale)
    return both if return_lse else both[0]


def check_places(qkv, cos, sin, cu_q, cu_k, keys) -> None:
    """Nothing else looks whether all of it is inside."""
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


def attention_of_heads(qkv, cos, sin, cu_q, cu_k, keys, n_kv_heads: int) -> torch.Tensor:
    """Causal attention [T, H, D] of qkv [T, H + 2 G, D], whose queries and keys are turned by the tables of
    their tokens first (see rope_table). keys: [K], the token that each key of each sequence is, where these
    are not their own; cu_k: where each sequence's begin. Raises ValueError for places outside."""
    check_places(qkv, cos, sin, cu_q, cu_k, keys)
    args = qkv.contiguous(), cos, sin, cu_q, cu_k, keys, n_kv_heads
    if torch.is_grad_enabled():
        return AttentionOfHeads.apply(*args)
    return attention_fwd(*AttentionOfHeads.inputs(*args))[0]
