"""Causal attention over flat tokens, each sequence for itself.

FlashAttention: Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691. The online softmax:
Milakov & Gimelshein 2018, arXiv 1805.02867.

    s = scale q k^T          (softcapped, where asked: s = softcap tanh(s / softcap))
    P = exp(s - L),  L = log sum exp s,  o = P v
Gradient, with delta = rowsum(do * o) - dL:
    ds = P (do v^T - delta)  (softcapped: times 1 - (s / softcap)^2)
    dq = scale ds k          dk = scale ds^T q          dv = P^T do

Query i of a sequence with Sq queries and Sk keys sees the keys j with 0 <= i + Sk - Sq - j, and
that < window where there is one. So the last query stands at the last key, as in training (Sq = Sk)
and against a cache (Sq < Sk).

FLOPs: H (D + E) S^2 forward (causal), H (3 D + 2 E) S^2 backward. Least bytes in 16 bit, forward:
2 T (D + E) (H + G) + 4 T H.

Who owns what, in one sequence and head; # are the scores that are seen:

               keys ->      forward and dq: a program owns BLOCK_M queries (a row of tiles), and
    queries    # . . .        walks over the keys from left to right
       |       # # . .      dk and dv: a program owns BLOCK_N keys (a column of tiles), and walks
       v       # # # .        over the queries from top to bottom, of all heads of its kv head
               # # # #      tiles without a # are skipped, those on the diagonal are masked

So nothing is added up by atomics, and every run gives the same bits. The price is that backward
computes the scores twice, 7 products where 5 would do. Forward keeps a running maximum m_i, a
running sum l_i and an accumulator acc per query, as the papers do, in base 2.

Tiles are as wide as the next power of two, BLOCK_D and BLOCK_E, with zeros behind D and E: keys of
192 cost as much as keys of 256.

Shapes: T tokens, H query heads, G kv heads, D head_dim (of queries and keys), E width of a value (D
but for latent attention, where they are 192 and 128), N sequences.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import embedding

from . import chips, reference
from .chips import Chip, padded, stepped_down
from .cpu import attention as cpu
from .dispatch import Backend, check_tensors, choose, serves_all, tl, triton, triton_refuses
from .rope import rope

MAX_HEAD_DIM = 256


# ---- forward kernels


@triton.jit
def _load(base, offsets, rows_ok, width_ok, MASK_ROWS: tl.constexpr, MASK_WIDTH: tl.constexpr):
    """A tile at 32-bit offsets from a 64-bit base, with no needless masks; zeros outside."""
    if MASK_ROWS and MASK_WIDTH:
        return tl.load(base + offsets, rows_ok & width_ok, other=0.0)
    elif MASK_ROWS:
        return tl.load(base + offsets, rows_ok, other=0.0)
    elif MASK_WIDTH:
        return tl.load(base + offsets, width_ok, other=0.0)
    return tl.load(base + offsets)


@triton.jit
def _sequence(cu_seqlens, n):
    """(first token, 64 bits; length) of sequence n."""
    start = tl.load(cu_seqlens + n).to(tl.int64)
    return start, (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)


@triton.jit
def _tanh(x):
    # from e^2x, in base 2; right at both ends too, where that is 0 or inf
    return 1 - 2 / (tl.exp2(x * 2.8853900817779268) + 1)


@triton.jit
def _scores(
    q,
    k_t,
    scale,
    softcap,
    rows,
    keys,
    window,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores in base 2, -inf where a row does not see a key. rows: the queries' positions."""
    s = tl.dot(q, k_t, input_precision="ieee") * scale
    if SOFTCAP:
        s = softcap * _tanh(s / softcap)
    s = s * 1.4426950408889634
    if MASKED:
        seen = keys <= rows
        if WINDOW:
            seen = seen & (keys > rows - window)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit(
    do_not_specialize=["m_blocks", "Tq", "window"], do_not_specialize_on_alignment=["cu_q", "cu_k"]
)
def attention_fwd_kernel(
    q_THD,
    k_TGD,
    v_TGE,
    out_THE,
    lse_HT,
    cu_q,
    cu_k,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    m_blocks,
    Tq,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program (n m_blocks + block, h): BLOCK_M queries of sequence n and head h."""
    n = tl.program_id(0) // m_blocks
    h = tl.program_id(1).to(tl.int64)
    first = (m_blocks - 1 - tl.program_id(0) % m_blocks) * BLOCK_M  # the longest rows first
    q_start, q_len = _sequence(cu_q, n)
    k_start, k_len = _sequence(cu_k, n)
    if first < q_len:
        # -- load this program's queries; they stay on the chip --
        m = first + tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        e = tl.arange(0, BLOCK_E)
        in_q = (m < q_len)[:, None] & (d < D)[None, :]
        in_out = (m < q_len)[:, None] & (e < E)[None, :]
        tokens = (q_start + m)[:, None]
        q = tl.load(q_THD + tokens * stride_qt + h * stride_qh + d[None, :], in_q, other=0.0)
        k_GD = k_TGD + k_start * stride_kt + (h // GROUP) * stride_kh
        v_GE = v_TGE + k_start * stride_vt + (h // GROUP) * stride_vh

        # -- which keys: those before seen_by_all need no mask, none behind seen_by_any counts --
        shift = k_len - q_len
        rows = m + shift
        seen_by_all = tl.maximum(first + shift + 1, 0) // BLOCK_N * BLOCK_N
        seen_by_any = tl.minimum(first + BLOCK_M + shift, k_len)
        if WINDOW:  # all blocks are masked
            seen_by_all = tl.maximum(first + shift - window + 1, 0) // BLOCK_N * BLOCK_N

        acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        in_block = tl.arange(0, BLOCK_N)
        k_offsets = in_block[None, :] * stride_kt + d[:, None]
        v_offsets = in_block[:, None] * stride_vt + e[None, :]
        d_ok, e_ok = d < D, e < E
        # the same loop twice: first over whole blocks without a mask, then over the rest with one
        for MASKED in tl.static_range(1 if WINDOW else 0, 2):
            lo = seen_by_all if MASKED else 0
            hi = seen_by_any if MASKED else seen_by_all
            for start in range(lo, hi, BLOCK_N):
                keys = start + in_block
                start_64 = tl.cast(start, tl.int64)
                keys_ok = keys < k_len
                # -- compute s = q k^T --
                k_t = _load(
                    k_GD + start_64 * stride_kt,
                    k_offsets,
                    keys_ok[None, :],
                    d_ok[:, None],
                    MASKED,
                    D < BLOCK_D,
                )
                s = _scores(
                    q,
                    k_t,
                    scale,
                    softcap,
                    rows[:, None],
                    keys[None, :],
                    window,
                    SOFTCAP,
                    WINDOW,
                    MASKED,
                )
                # -- update the running maximum m_i and sum l_i --
                m_new = tl.maximum(m_i, tl.max(s, 1))
                # a row that saw nothing yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) would be NaN
                m_finite = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
                p = tl.exp2(s - m_finite[:, None])
                alpha = tl.exp2(m_i - m_finite)
                l_i = l_i * alpha + tl.sum(p, 1)
                # -- update the output: acc = acc alpha + p v --
                v = _load(
                    v_GE + start_64 * stride_vt,
                    v_offsets,
                    keys_ok[:, None],
                    e_ok[None, :],
                    MASKED,
                    E < BLOCK_E,
                )
                acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
                m_i = m_new

        # -- o = acc / l_i, and L = m_i + log l_i; a row that sees no key gives 0 and -inf --
        out = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
        out_ptrs = out_THE + tokens * stride_ot + h * stride_oh + e[None, :]
        tl.store(out_ptrs, out.to(out_THE.dtype.element_ty), in_out)
        lse = (m_i + tl.log2(l_i)) * 0.6931471805599453
        tl.store(lse_HT + h * Tq + q_start + m, tl.where(l_i > 0, lse, float("-inf")), m < q_len)


# ---- backward kernels


@triton.jit(do_not_specialize=["Tq"])
def attention_bwd_delta_kernel(
    dout_THE,
    out_THE,
    dlse_HT,
    delta_HT,
    Tq,
    stride_dot,
    stride_doh,
    stride_ot,
    stride_oh,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DLSE: tl.constexpr,
):
    """Program (block, h): delta = rowsum(do * o) - dL of BLOCK_M tokens, for dk, dv and dq."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    inside = (t < Tq)[:, None] & (e < E)[None, :]
    dout_ptrs = dout_THE + t[:, None] * stride_dot + h * stride_doh + e[None, :]
    out_ptrs = out_THE + t[:, None] * stride_ot + h * stride_oh + e[None, :]
    dout = tl.load(dout_ptrs, inside, other=0.0)
    out = tl.load(out_ptrs, inside, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse_HT + h * Tq + t, t < Tq, other=0.0)
    tl.store(delta_HT + h * Tq + t, delta, t < Tq)


@triton.jit
def _p_and_ds(s, dp, lse, delta, softcap, SOFTCAP: tl.constexpr):
    """P and ds / scale, from masked scores in base 2, do v^T, and the rows' L and delta."""
    seen = s > float("-inf")
    # a row that sees no key has L = -inf, and -inf - -inf is NaN
    p = tl.where(seen, tl.exp2(s - lse * 1.4426950408889634), 0.0)
    ds = p * (dp - delta)
    if SOFTCAP:
        tanh = tl.where(seen, s / (softcap * 1.4426950408889634), 0.0)
        ds = ds * (1 - tanh * tanh)
    return p, ds


@triton.jit(
    do_not_specialize=["n_blocks", "Tq", "window"], do_not_specialize_on_alignment=["cu_q", "cu_k"]
)
def attention_bwd_dkdv_kernel(
    q_THD,
    k_TGD,
    v_TGE,
    dout_THE,
    lse_HT,
    delta_HT,
    dk_TGD,
    dv_TGE,
    cu_q,
    cu_k,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    n_blocks,
    Tq,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program (n n_blocks + block, g): dk and dv of BLOCK_N keys of sequence n and kv head g.

    All products are transposed, keys by queries, so that none of their results is: compilers up to
    Triton 3.7 get a transposed result as an operand wrong on sm_90.
    """
    n = tl.program_id(0) // n_blocks
    g = tl.program_id(1).to(tl.int64)
    first = (tl.program_id(0) % n_blocks) * BLOCK_N  # the first keys have the most queries
    q_start, q_len = _sequence(cu_q, n)
    k_start, k_len = _sequence(cu_k, n)
    if first < k_len:
        # -- load this program's keys and values; they stay on the chip --
        keys = first + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        e = tl.arange(0, BLOCK_E)
        in_k = (keys < k_len)[:, None] & (d < D)[None, :]
        in_v = (keys < k_len)[:, None] & (e < E)[None, :]
        tokens = (k_start + keys)[:, None]
        k = tl.load(k_TGD + tokens * stride_kt + g * stride_kh + d[None, :], in_k, other=0.0)
        v = tl.load(v_TGE + tokens * stride_vt + g * stride_vh + e[None, :], in_v, other=0.0)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)

        # -- which queries: from the first that sees any of these keys to the last --
        shift = k_len - q_len
        lo = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
        hi = tl.minimum(q_len, first + BLOCK_N - 1 + window - shift) if WINDOW else q_len
        in_block = tl.arange(0, BLOCK_M)
        d_ok, e_ok = (d < D)[None, :], (e < E)[None, :]
        q_offsets = in_block[:, None] * stride_qt + d[None, :]
        dout_offsets = in_block[:, None] * stride_dot + e[None, :]
        for r in range(GROUP):
            h = g * GROUP + r
            q_HD = q_THD + q_start * stride_qt + h * stride_qh
            dout_HE = dout_THE + q_start * stride_dot + h * stride_doh
            lse_T = lse_HT + h * Tq + q_start
            delta_T = delta_HT + h * Tq + q_start
            for start in range(lo, hi, BLOCK_M):
                m = start + in_block
                start_64 = tl.cast(start, tl.int64)
                m_ok = m < q_len
                rows = m + shift
                # rows behind the end are zeros, with do = delta = 0: they add nothing
                q_ptrs = q_HD + start_64 * stride_qt
                dout_ptrs = dout_HE + start_64 * stride_dot
                q = _load(q_ptrs, q_offsets, m_ok[:, None], d_ok, True, D < BLOCK_D)
                dout = _load(dout_ptrs, dout_offsets, m_ok[:, None], e_ok, True, E < BLOCK_E)
                lse = tl.load(lse_T + m, m_ok, other=0.0)
                delta = tl.load(delta_T + m, m_ok, other=0.0)
                # -- recompute s^T = k q^T and P^T; ds^T from dP^T = v do^T --
                s_t = _scores(
                    k,
                    tl.trans(q),
                    scale,
                    softcap,
                    rows[None, :],
                    keys[:, None],
                    window,
                    SOFTCAP,
                    WINDOW,
                    True,
                )
                dp_t = tl.dot(v, tl.trans(dout), input_precision="ieee")
                p_t, ds_t = _p_and_ds(s_t, dp_t, lse[None, :], delta[None, :], softcap, SOFTCAP)
                # -- dv += P^T do, dk += ds^T q --
                dv = tl.dot(p_t.to(dout.dtype), dout, dv, input_precision="ieee")
                dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision="ieee")
        dk_ptrs = dk_TGD + tokens * stride_dkt + g * stride_dkh + d[None, :]
        dv_ptrs = dv_TGE + tokens * stride_dvt + g * stride_dvh + e[None, :]
        tl.store(dk_ptrs, (dk * scale).to(dk_TGD.dtype.element_ty), in_k)
        tl.store(dv_ptrs, dv.to(dv_TGE.dtype.element_ty), in_v)


@triton.jit(
    do_not_specialize=["m_blocks", "Tq", "window"], do_not_specialize_on_alignment=["cu_q", "cu_k"]
)
def attention_bwd_dq_kernel(
    q_THD,
    k_TGD,
    v_TGE,
    dout_THE,
    lse_HT,
    delta_HT,
    dq_THD,
    cu_q,
    cu_k,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    stride_dqt,
    stride_dqh,
    m_blocks,
    Tq,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program (n m_blocks + block, h): dq of BLOCK_M queries of sequence n and head h."""
    n = tl.program_id(0) // m_blocks
    h = tl.program_id(1).to(tl.int64)
    first = (m_blocks - 1 - tl.program_id(0) % m_blocks) * BLOCK_M
    q_start, q_len = _sequence(cu_q, n)
    k_start, k_len = _sequence(cu_k, n)
    if first < q_len:
        # -- load this program's queries, do, L and delta; they stay on the chip --
        m = first + tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        e = tl.arange(0, BLOCK_E)
        m_ok = m < q_len
        in_q = m_ok[:, None] & (d < D)[None, :]
        in_dout = m_ok[:, None] & (e < E)[None, :]
        tokens = (q_start + m)[:, None]
        q_ptrs = q_THD + tokens * stride_qt + h * stride_qh + d[None, :]
        dout_ptrs = dout_THE + tokens * stride_dot + h * stride_doh + e[None, :]
        q = tl.load(q_ptrs, in_q, other=0.0)
        dout = tl.load(dout_ptrs, in_dout, other=0.0)
        lse = tl.load(lse_HT + h * Tq + q_start + m, m_ok, other=0.0)
        delta = tl.load(delta_HT + h * Tq + q_start + m, m_ok, other=0.0)
        k_GD = k_TGD + k_start * stride_kt + (h // GROUP) * stride_kh
        v_GE = v_TGE + k_start * stride_vt + (h // GROUP) * stride_vh

        # -- which keys --
        shift = k_len - q_len
        rows = m + shift
        lo = tl.maximum(first + shift - window + 1, 0) // BLOCK_N * BLOCK_N if WINDOW else 0
        seen_by_any = tl.minimum(first + BLOCK_M + shift, k_len)
        in_block = tl.arange(0, BLOCK_N)
        d_ok, e_ok = (d < D)[:, None], (e < E)[:, None]
        k_offsets = in_block[None, :] * stride_kt + d[:, None]
        v_offsets = in_block[None, :] * stride_vt + e[:, None]
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(lo, seen_by_any, BLOCK_N):
            keys = start + in_block
            start_64 = tl.cast(start, tl.int64)
            keys_ok = (keys < k_len)[None, :]
            k_t = _load(k_GD + start_64 * stride_kt, k_offsets, keys_ok, d_ok, True, D < BLOCK_D)
            v_t = _load(v_GE + start_64 * stride_vt, v_offsets, keys_ok, e_ok, True, E < BLOCK_E)
            # -- recompute s = q k^T and P; ds from dP = do v^T --
            s = _scores(
                q, k_t, scale, softcap, rows[:, None], keys[None, :], window, SOFTCAP, WINDOW, True
            )
            dp = tl.dot(dout, v_t, input_precision="ieee")
            _, ds = _p_and_ds(s, dp, lse[:, None], delta[:, None], softcap, SOFTCAP)
            # -- dq += ds k --
            dq = tl.dot(ds.to(k_t.dtype), tl.trans(k_t), dq, input_precision="ieee")
        dq_ptrs = dq_THD + tokens * stride_dqt + h * stride_dqh + d[None, :]
        tl.store(dq_ptrs, (dq * scale).to(dq_THD.dtype.element_ty), in_q)


# ---- block sizes


class Heads(NamedTuple):
    """What the kernels are compiled for: the widths of a key and of a value, and how many query
    heads share them."""

    key_width: int
    value_width: int
    group: int


# (BLOCK_M, BLOCK_N, warps, stages) by kernel and matrix unit, then by head_dim up to 32, 64, 128,
# 256. The largest of those tried that fit in registers; `python -m benchmarks.aot` shows what each
# one takes.
BLOCKS = {
    ("fwd", "mma"): [(128, 128, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)],
    ("fwd", "wgmma"): [(128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (64, 64, 8, 2)],
    ("fwd", "tcgen05"): [(128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (64, 64, 8, 2)],
    ("dkdv", "mma"): [(64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2), (16, 64, 8, 1)],
    ("dkdv", "wgmma"): [(64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 1)],
    ("dkdv", "tcgen05"): [(64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 1), (32, 32, 8, 1)],
    ("dq", "mma"): [(128, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)],
    ("dq", "wgmma"): [(128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)],
    ("dq", "tcgen05"): [(128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 1)],
    ("fwd", "fp32"): [(32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
    ("dkdv", "fp32"): [(16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
    ("dq", "fp32"): [(32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)],
}

# the same for heads of latent attention: keys of more than 128, values of up to 128, shared by none
BLOCKS_OF_LATENTS = {
    ("fwd", "mma"): (128, 32, 8, 2),
    ("fwd", "wgmma"): (128, 64, 8, 3),
    ("fwd", "tcgen05"): (128, 64, 8, 3),
    ("dkdv", "mma"): (16, 64, 8, 2),
    ("dkdv", "wgmma"): (32, 64, 8, 2),
    ("dkdv", "tcgen05"): (32, 128, 8, 2),
    ("dq", "mma"): (64, 64, 8, 2),
    ("dq", "wgmma"): (128, 32, 8, 2),
    ("dq", "tcgen05"): (128, 32, 8, 2),
    ("fwd", "fp32"): (16, 32, 8, 1),
    ("dkdv", "fp32"): (16, 16, 8, 1),
    ("dq", "fp32"): (16, 32, 8, 1),
}


def sizes_in_table(kernel: str, unit: str, heads: Heads) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages) for such heads."""
    key_width, value_width, group = heads
    if group == 1 and key_width > 128 >= value_width:
        return BLOCKS_OF_LATENTS[kernel, unit]
    widest = max(key_width, value_width)
    if value_width > key_width and widest > 64:
        widest = MAX_HEAD_DIM  # with the sizes of 128 these spill registers
    column = 0 if widest <= 32 else 1 if widest <= 64 else 2 if widest <= 128 else 3
    return BLOCKS[kernel, unit][column]


def attention_config(
    kernel: str, heads: Heads, dtype: torch.dtype, chip: Chip, max_q: int, softcap: float = 0.0
) -> dict[str, int]:
    """Block sizes of "fwd", "dkdv" or "dq".

    They are of the table, made smaller until they fit the chip's shared memory. A few queries
    against a cache take the fewest rows that the matrix units know; fp32 has none.
    """
    unit = "fp32" if dtype == torch.float32 else chip.matrix_unit
    m, n, warps, stages = sizes_in_table(kernel, unit, heads)
    few_queries = max_q <= 16 and kernel != "dkdv" and dtype != torch.float32
    if few_queries:
        m, n, warps, stages = 16, min(n, 32), 4, min(stages, 2)
    config = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    small_softcapped = warps == 4 and softcap > 0
    if few_queries or small_softcapped or dtype == torch.float32 or max(heads[:2]) <= 16:
        # without this the assembler spills registers, to run more of these small programs at once
        config["maxnreg"] = 255

    def bytes_of(config):
        return shared_bytes(kernel, heads, dtype, chip, config)

    return stepped_down(config, bytes_of, chip, STEPS[kernel])


# what gives way where shared memory is small, and how far: first the tiles that are loaded in turns
STEPS = {
    "fwd": (("BLOCK_N", 16), ("num_stages", 1), ("BLOCK_M", 16)),
    "dkdv": (("BLOCK_M", 16), ("num_stages", 1), ("BLOCK_N", 16)),
    "dq": (("BLOCK_N", 16), ("num_stages", 1), ("BLOCK_M", 16)),
}


def shared_bytes(
    kernel: str, heads: Heads, dtype: torch.dtype, chip: Chip, config: dict[str, int]
) -> int:
    """Shared memory of a program, or somewhat more: the tiles that it keeps, those that it loads in
    turns, and the scores between two products where several warps share a row."""
    m, n = config["BLOCK_M"], config["BLOCK_N"]
    d, e = padded(heads.key_width), padded(heads.value_width)
    kept, loaded = {
        "fwd": (m * d, n * (d + e)),
        "dkdv": (n * (d + e) + m * d, m * (d + e)),
        "dq": (m * (d + e), n * (d + e)),
    }[kernel]
    tiles = kept + loaded * chip.buffers(config["num_stages"])
    rows_are_shared = kernel != "fwd" or m < 16 * config["num_warps"]
    scores = m * max(n, 32) if rows_are_shared else 0
    return dtype.itemsize * (tiles + scores) + 8 * m


# ---- launchers


def _heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Heads:
    return Heads(q.shape[2], v.shape[2], q.shape[1] // k.shape[1])


def _constants(heads: Heads, window: int, softcap: float) -> dict:
    return {
        "GROUP": heads.group,
        "D": heads.key_width,
        "E": heads.value_width,
        "BLOCK_D": padded(heads.key_width),
        "BLOCK_E": padded(heads.value_width),
        "SOFTCAP": softcap > 0,
        "WINDOW": window >= 0,
    }


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of each [T, heads, D], the strides from token to token and from head to head."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch forward: (out [Tq, H, E], lse [H, Tq] fp32). No window is -1, no softcap 0."""
    Tq, H, _ = q.shape
    N = cu_q.shape[0] - 1
    heads = _heads(q, k, v)
    out = torch.empty((Tq, H, heads.value_width), dtype=q.dtype, device=q.device)
    lse = q.new_empty((H, Tq), dtype=torch.float32)
    config = attention_config("fwd", heads, q.dtype, chips.chip_of(q.device), max_q, softcap)
    m_blocks = triton.cdiv(max_q, config["BLOCK_M"])
    if Tq > 0 and m_blocks > 0:
        attention_fwd_kernel[(N * m_blocks, H)](
            q,
            k,
            v,
            out,
            lse,
            cu_q,
            cu_k,
            *_strides(q, k, v, out),
            m_blocks,
            Tq,
            scale,
            softcap,
            window,
            **_constants(heads, window, softcap),
            **config,
        )
    return out, lse


def attention_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward pass: (dq, dk, dv), contiguous."""
    Tq, H, _ = q.shape
    Tk, G, _ = k.shape
    N = cu_q.shape[0] - 1
    heads = _heads(q, k, v)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    chip = chips.chip_of(q.device)
    constants = _constants(heads, window, softcap)
    strides = _strides(q, k, v, dout)

    # 1. delta of each query
    delta = torch.empty_like(lse)
    if Tq > 0:
        attention_bwd_delta_kernel[(triton.cdiv(Tq, 32), H)](
            dout,
            out,
            lse if dlse is None else dlse,
            delta,
            Tq,
            *_strides(dout, out),
            E=heads.value_width,
            BLOCK_M=32,
            BLOCK_E=constants["BLOCK_E"],
            DLSE=dlse is not None,
        )

    # 2. dk and dv, by programs that own keys
    config = attention_config("dkdv", heads, q.dtype, chip, max_q, softcap)
    n_blocks = triton.cdiv(max_k, config["BLOCK_N"])
    if Tk > 0 and n_blocks > 0:
        attention_bwd_dkdv_kernel[(N * n_blocks, G)](
            q,
            k,
            v,
            dout,
            lse,
            delta,
            dk,
            dv,
            cu_q,
            cu_k,
            *strides,
            *_strides(dk, dv),
            n_blocks,
            Tq,
            scale,
            softcap,
            window,
            **constants,
            **config,
        )

    # 3. dq, by programs that own queries
    config = attention_config("dq", heads, q.dtype, chip, max_q, softcap)
    m_blocks = triton.cdiv(max_q, config["BLOCK_M"])
    if Tq > 0 and m_blocks > 0:
        attention_bwd_dq_kernel[(N * m_blocks, H)](
            q,
            k,
            v,
            dout,
            lse,
            delta,
            dq,
            cu_q,
            cu_k,
            *strides,
            *_strides(dq),
            m_blocks,
            Tq,
            scale,
            softcap,
            window,
            **constants,
            **config,
        )
    return dq, dk, dv


# ---- PyTorch's operators


attention_fwd_op = torch.library.custom_op("r1zero::attention_fwd", attention_fwd, mutates_args=())
attention_bwd_op = torch.library.custom_op("r1zero::attention_bwd", attention_bwd, mutates_args=())


@attention_fwd_op.register_fake
def attention_fwd_fake(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap):
    out = torch.empty((*q.shape[:2], v.shape[2]), dtype=q.dtype, device=q.device)
    return out, q.new_empty(q.shape[1::-1], dtype=torch.float32)


@attention_bwd_op.register_fake
def attention_bwd_fake(dout, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def keep_for_backward(ctx, inputs, output):
    q, k, v, cu_q, cu_k, *ctx.args = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.set_materialize_grads(False)  # a gradient that nobody asked for is None, and costs nothing


def backward(ctx, dout, dlse):
    q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    gradients = attention_bwd_op(dout, q, k, v, out, lse, dlse, cu_q, cu_k, *ctx.args)
    return *gradients, *[None] * 7


attention_fwd_op.register_autograd(backward, setup_context=keep_for_backward)


# ---- the public functions


def triton_attention(q, k, v, cu_q, max_q, scale, cu_k, max_k, window, softcap, return_lse):
    # One that is as long as the longest sequence hides nothing. (And 32 bits would overflow if
    # positions were added to one near 2^31.)
    window = -1 if window is None or window >= max_k else window
    settings = (max_q, max_k, scale, window, softcap or 0.0)
    out, lse = attention_fwd_op(q, k, v, cu_q, cu_k, *settings)
    return (out, lse.T) if return_lse else out


def reference_attention(q, k, v, cu_q, max_q, scale, cu_k, max_k, window, softcap, return_lse):
    return reference.attention(q, k, v, cu_q, cu_k, scale, window, softcap, return_lse)


ATTENTION = (
    Backend("triton", triton_attention, triton_refuses),
    Backend("cpu", cpu.attention, cpu.refuses),
    Backend("reference", reference_attention, serves_all),
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = None,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
):
    """Each token attends to the tokens of its own sequence up to and including itself.

    q: [Tq, H, D]; k: [Tk, G, D]; v: [Tk, G, E] with H a multiple of G, D and E up to 256.
    cu_seqlens: [N + 1] int32 offsets into q; max_seqlen: the longest length, a number on the host.
    cu_seqlens_k, max_seqlen_k: the same of k and v where they differ (a cache, shared prefixes).
    scale: of q k^T, 1 / sqrt(D) by default. window: how many keys a query sees, itself included.
    softcap: scores become softcap tanh(score / softcap).

    Returns [Tq, H, E] in q's dtype. With return_lse also log sum exp of the scores [Tq, H], in fp32
    (fp64 for fp64). A row that sees no key gives 0 and -inf. Both results are differentiable, and
    the same in every run. impl: "triton", "cpu" (fp32, E = D, a multiple of 16, no window,
    no softcap), "reference", or None to choose. Raises ValueError for shapes, dtypes or devices
    that do not fit together, for a window, scale or softcap that is not positive, and for an impl
    that cannot serve the rest.
    """
    _check(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, window, softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    args = (q, k, v, cu_seqlens, max_seqlen, scale)
    args += (cu_seqlens_k, max_seqlen_k, window, softcap, return_lse)
    return choose("attention", ATTENTION, impl, *args)(*args)


def rope_attention_in_steps(
    qkv, cos, sin, cu_seqlens, max_seqlen, n_kv_heads, keys, cu_keys, max_keys, impl
):
    """RoPE, then attention; each of them is served by `impl`, or chooses for itself."""
    H = qkv.shape[1] - 2 * n_kv_heads
    qk, v = qkv.split([H + n_kv_heads, n_kv_heads], dim=1)
    q, k = rope(qk, cos, sin, impl).split([H, n_kv_heads], dim=1)
    if keys is not None:
        k, v = gather_keys(k, v, keys)
    return attention(
        q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k=cu_keys, max_seqlen_k=max_keys, impl=impl
    )


def gather_keys(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [K, G, D] and values [K, G, E] of the tokens `keys` [K], from k [T, G, D], v [T, G, E].

    It is an embedding for the sake of its gradient: what several sequences read is added up in a
    fixed order, and on a CPU not token by token, as index_select does.
    """
    G, D, E = k.shape[1], k.shape[2], v.shape[2]
    kv = torch.cat([k.flatten(1), v.flatten(1)], dim=1)
    k, v = embedding(keys, kv).split([G * D, G * E], dim=1)
    return k.unflatten(1, (G, D)), v.unflatten(1, (G, E))


def rope_attention_in_one_loop(
    qkv, cos, sin, cu_seqlens, max_seqlen, n_kv_heads, keys, cu_keys, max_keys, impl
):
    return cpu.rope_attention(
        qkv, cos, sin, cu_seqlens, max_seqlen, n_kv_heads, keys, cu_keys, max_keys
    )


ROPE_ATTENTION = (
    Backend("triton", rope_attention_in_steps, triton_refuses),
    Backend("cpu", rope_attention_in_one_loop, cpu.rope_attention_refuses),
    Backend("reference", rope_attention_in_steps, serves_all),
)


def rope_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    n_kv_heads: int,
    *,
    keys: torch.Tensor | None = None,
    cu_keys: torch.Tensor | None = None,
    max_keys: int | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """RoPE and causal attention within each sequence, from the projected heads.

    qkv: [T, H + 2 G, D], the H heads of queries, then G = n_kv_heads of keys, then G of values.
    cos, sin: [T, D / 2], see rope_table. cu_seqlens, max_seqlen: as in `attention`.

    Sequences may share a prefix, whose keys and values are computed once. Then keys [K] int64
    names, sequence after sequence, the tokens that each one reads, its own last; cu_keys [N + 1]
    int32 says where each sequence's begin, and max_keys how many one has at most.

    Returns [T, H, D] in qkv's dtype, differentiable in qkv. impl: "triton", "cpu" (one compiled
    loop), "reference", or None to choose. Raises ValueError for shapes that do not fit together.
    """
    if qkv.ndim != 3 or n_kv_heads < 1 or (qkv.shape[1] - 2 * n_kv_heads) % n_kv_heads:
        raise ValueError(
            f"rope_attention: qkv is {tuple(qkv.shape)} with n_kv_heads {n_kv_heads}; expected "
            "[T, H + 2 G, D] with H a multiple of G"
        )
    if not (keys is None) == (cu_keys is None) == (max_keys is None):
        raise ValueError(
            "rope_attention: give keys, cu_keys and max_keys together, or none of them"
        )
    args = (qkv, cos, sin, cu_seqlens, max_seqlen, n_kv_heads, keys, cu_keys, max_keys)
    return choose("rope_attention", ROPE_ATTENTION, impl, *args)(*args, impl)


def _check(q, k, v, cu_q, max_q, cu_k, max_k, scale, window, softcap):
    check_tensors("attention", q=q, k=k, v=v)
    if (
        q.ndim != 3
        or k.ndim != 3
        or v.ndim != 3
        or k.shape[:2] != v.shape[:2]
        or k.shape[2] != q.shape[2]
        or k.shape[1] == 0
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected "
            "[Tq, H, D], [Tk, G, D] and [Tk, G, E] with H a multiple of G"
        )
    for name, width in (("head_dim", q.shape[2]), ("the width of values", v.shape[2])):
        if not 1 <= width <= MAX_HEAD_DIM:
            raise ValueError(f"attention: {name} is {width}, expected 1 to {MAX_HEAD_DIM}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected one dtype")
    if (cu_k is None) != (max_k is None):
        raise ValueError("attention: give cu_seqlens_k and max_seqlen_k together, or neither")
    offsets = [("cu_seqlens", cu_q, max_q, q)]
    if cu_k is not None:
        offsets.append(("cu_seqlens_k", cu_k, max_k, k))
    elif len(k) != len(q):  # the same offsets can not end at both
        offsets.append(("cu_seqlens_k", cu_q, max_q, k))
    for name, cu, max_len, x in offsets:
        if cu.ndim != 1 or cu.shape[0] < 2 or cu.dtype != torch.int32 or cu.shape != cu_q.shape:
            raise ValueError(
                f"attention: {name} is {cu.dtype} {tuple(cu.shape)}; expected int32 [N + 1] for "
                "N >= 1 sequences, as many for k as for q (is the batch empty?)"
            )
        if cu.device != q.device:
            raise ValueError(
                f"attention: {name} is on {cu.device}, but q is on {q.device}; move it there"
            )
        # a GPU would have to be waited for: there it was checked where it was built
        if cu.device.type == "cpu" and not torch.compiler.is_compiling():
            ends, lengths = cu[[0, -1]].tolist(), cu.diff()
            if ends != [0, x.shape[0]] or lengths.min() < 0 or lengths.max() > max_len:
                raise ValueError(
                    f"attention: {name} is {cu.tolist()[:20]}; expected offsets that begin at "
                    f"0, never decrease, end at {x.shape[0]} and are at most {max_len} "
                    "(max_seqlen) apart"
                )
    for name, value in (("scale", scale), ("window", window), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"attention: {name} is {value}, expected a positive number or None")
