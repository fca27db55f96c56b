"""Attention of one new token per row against that row's keys and values, in pages; no gradient.

Split over the length: Flash-Decoding, Dao et al. 2023. Pages: vLLM, Kwon et al. 2023, arXiv
2309.06180.

    s = scale q k^T,  L = log sum exp s,  o = softmax(s) v    (row b's first lengths[b] positions)

Softcapped, where asked: s = softcap tanh(s / softcap). With a window a row sees its last `window`
positions only, and nothing before them is read.

Position j of row b lies in page table[b, j // page], in slot j % page of it. FLOPs: 4 B H L D for a
length of L. Least bytes in 16 bit: 4 B G L D, keys and values read once: always memory-bound.

    positions of row b   | split 0 | split 1 | split 2 |  . .       SPLIT positions each
    program (b, g, 0)      o_0, L_0
    program (b, g, 1)                o_1, L_1
    program (b, g, 2)                          o_2, L_2             ends at the row's length
    second kernel (b, h)   o = sum of o_i exp(L_i - L)              in the order of the splits

A program holds all query heads of its kv head as the rows of one product, padded to the 16 that the
matrix units know, so the cache is read once. The size of a split is fixed, not their number. So a
row's parts, and the order in which they are added, depend on its length alone: it has the same bits
in any batch. A split behind a row's end, or before its window, exits early; its part is never read.

Shapes: B rows, H query heads, G kv heads, R = H / G, D head_dim, P pages, W pages a row may have.
"""

import torch

from . import chips, reference
from .attention import _tanh
from .chips import Chip, padded, stepped_down
from .dispatch import Backend, check_tensors, choose, serves_all, tl, triton, triton_refuses

MAX_HEAD_DIM = 256
SPLIT = 256  # positions per program
LONGEST = 2**31 - 1  # lengths are int32


@triton.jit
def _first_seen(length, window, WINDOW: tl.constexpr):
    """The first position that a row of this length sees."""
    return tl.maximum(length - window, 0) if WINDOW else 0


@triton.jit(
    do_not_specialize=["n_splits", "stride_tb", "window"],
    do_not_specialize_on_alignment=["table_BW", "lengths_B"],
)
def decode_attention_fwd_kernel(
    q_BHD,
    k_pages,
    v_pages,
    table_BW,
    lengths_B,
    out_BSHD,
    lse_BSH,
    stride_qb,
    stride_qh,
    stride_kp,
    stride_kg,
    stride_ks,
    stride_vp,
    stride_vg,
    stride_vs,
    stride_tb,
    n_splits,
    scale,
    window,
    softcap,
    H: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (b, g, split): o and L of one split, for the R query heads of kv head g."""
    b = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths_B + b)
    first = split * SPLIT
    lo = _first_seen(length, window, WINDOW)
    seen_at_all = (first < length) & (first + SPLIT > lo) if WINDOW else first < length
    if seen_at_all:
        # -- load the R queries; they stay on the chip --
        r = tl.arange(0, BLOCK_R)
        d = tl.arange(0, BLOCK_D)
        heads = g * R + r
        inside = (r < R)[:, None] & (d < D)[None, :]
        q_ptrs = q_BHD + b * stride_qb + heads[:, None] * stride_qh + d[None, :]
        q = tl.load(q_ptrs, inside, other=0.0)

        end = tl.minimum(first + SPLIT, length)
        acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        m_i = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_R,), tl.float32)
        begin = tl.maximum(first, lo // BLOCK_N * BLOCK_N) if WINDOW else first
        for start in range(begin, end, BLOCK_N):
            # -- where these positions lie --
            n = start + tl.arange(0, BLOCK_N)
            seen = (n < end) & (n >= lo) if WINDOW else n < end
            page = tl.load(table_BW + b * stride_tb + n // PAGE, seen, other=0).to(tl.int64)
            slot = n % PAGE
            k_offsets = page * stride_kp + g * stride_kg + slot * stride_ks
            v_offsets = page * stride_vp + g * stride_vg + slot * stride_vs
            # -- compute s = q k^T, in base 2 --
            k_ptrs = k_pages + k_offsets[None, :] + d[:, None]
            k_t = tl.load(k_ptrs, seen[None, :] & (d < D)[:, None], other=0.0)
            s = tl.dot(q, k_t, input_precision="ieee")
            if SOFTCAP:
                s = softcap * _tanh(s * scale / softcap) * 1.4426950408889634
            else:
                s = s * (scale * 1.4426950408889634)
            s = tl.where(seen[None, :], s, float("-inf"))
            # -- update m_i and l_i; m_new is finite: each block holds a position that is seen --
            m_new = tl.maximum(m_i, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            # -- update the output: acc = acc alpha + p v --
            v_ptrs = v_pages + v_offsets[:, None] + d[None, :]
            v = tl.load(v_ptrs, seen[:, None] & (d < D)[None, :], other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m_i = m_new

        # -- leave o and L of this split --
        part = (b * n_splits + split) * H + heads
        tl.store(out_BSHD + part[:, None] * D + d[None, :], acc / l_i[:, None], inside)
        tl.store(lse_BSH + part, m_i + tl.log2(l_i), r < R)


@triton.jit(do_not_specialize=["n_splits", "window"], do_not_specialize_on_alignment=["lengths_B"])
def decode_attention_combine_fwd_kernel(
    part_BSHD,
    lse_BSH,
    lengths_B,
    out_BHD,
    n_splits,
    window,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (b, h): o = sum of o_i exp(L_i - L) over the splits i, in their order."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    length = tl.load(lengths_B + b)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    m_i, l_i = float("-inf"), 0.0
    lo = _first_seen(length, window, WINDOW)
    for split in range(lo // SPLIT, tl.cdiv(length, SPLIT)):
        part = (b * n_splits + split) * H + h
        lse = tl.load(lse_BSH + part)
        out = tl.load(part_BSHD + part * D + d, d < D, other=0.0)
        m_new = tl.maximum(m_i, lse)
        alpha = tl.exp2(m_i - m_new)
        weight = tl.exp2(lse - m_new)
        acc = acc * alpha + out * weight
        l_i = l_i * alpha + weight
        m_i = m_new
    out = acc / tl.where(l_i > 0, l_i, 1.0)  # a row of length 0 gives 0
    tl.store(out_BHD + (b * H + h) * D + d, out.to(out_BHD.dtype.element_ty), d < D)


def decode_attention_config(
    head_dim: int, dtype: torch.dtype, per_group: int, chip: Chip
) -> dict[str, int]:
    """Block sizes: the keys of a block fit the registers beside the queries' rows, and the chip's
    shared memory."""
    large = head_dim > 128 or per_group > 16
    config = {"BLOCK_N": 32 if large else 64, "num_warps": 4, "num_stages": 2}
    if dtype == torch.float32:
        config = {
            "BLOCK_N": 16 if large else 32,
            "num_warps": 8 if per_group > 16 else 4,
            "num_stages": 1,
        }
    if dtype == torch.float32 or head_dim <= 16 or per_group > 16:
        # without this the assembler spills registers, to run more of these small programs at once
        config["maxnreg"] = 255

    def bytes_of(config):
        queries, keys = padded(per_group), config["BLOCK_N"]
        width = padded(head_dim)
        tiles = queries + 2 * keys * chip.buffers(config["num_stages"])
        return dtype.itemsize * (width * tiles + queries * keys)

    return stepped_down(config, bytes_of, chip, (("BLOCK_N", 16), ("num_stages", 1)))


def decode_attention_fwd(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    split: int = SPLIT,
) -> torch.Tensor:
    """Launch both kernels. Their grid depends on the table's width only, as CUDA graphs need.

    So a caller passes no more columns of the table than its longest row may use: a program behind
    the end of its row does nothing, but there is one for every row, kv head and split of the table.
    """
    B, H, D = q.shape
    _, G, page, _ = k_pages.shape
    grid = decode_attention_grid(B, G, table.shape[1] * page, split)
    n_splits = grid[2]
    out = torch.empty((B, H, D), dtype=q.dtype, device=q.device)
    parts = q.new_empty((B, n_splits, H, D), dtype=torch.float32)
    lse = q.new_empty((B, n_splits, H), dtype=torch.float32)
    if B == 0:
        return out
    block_d = padded(D)
    per_group = H // G
    has_window, window = window is not None, min(window or 1, LONGEST)
    decode_attention_fwd_kernel[grid](
        q,
        k_pages,
        v_pages,
        table,
        lengths,
        parts,
        lse,
        q.stride(0),
        q.stride(1),
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        table.stride(0),
        n_splits,
        scale,
        window,
        softcap or 1.0,
        H=H,
        R=per_group,
        PAGE=page,
        D=D,
        SPLIT=split,
        WINDOW=has_window,
        SOFTCAP=softcap is not None,
        BLOCK_R=padded(per_group),
        BLOCK_D=block_d,
        **decode_attention_config(D, q.dtype, per_group, chips.chip_of(q.device)),
    )
    decode_attention_combine_fwd_kernel[(B, H)](
        parts,
        lse,
        lengths,
        out,
        n_splits,
        window,
        H=H,
        D=D,
        SPLIT=split,
        WINDOW=has_window,
        BLOCK_D=block_d,
        num_warps=1,
    )
    return out


def decode_attention_grid(n_rows: int, n_kv_heads: int, n_positions: int, split: int = SPLIT):
    """(B, G, splits): the programs of the first kernel, for a table of so many positions a row."""
    return n_rows, n_kv_heads, max(1, -(-n_positions // split))


def can_capture(pages: torch.Tensor) -> bool:
    """Whether a CUDA graph can hold this op. The plain PyTorch one reads lengths on the host."""
    return triton_refuses(pages) is None


DECODE_ATTENTION = (
    Backend("triton", decode_attention_fwd, triton_refuses),
    Backend("reference", reference.decode_attention, serves_all),
)


def check_rows(op: str, q: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> None:
    """Raise ValueError unless a page table [B, W] and lengths [B] belong to the rows of q."""
    for name, x, ndim in (("table", table, 2), ("lengths", lengths, 1)):
        if (
            x.ndim != ndim
            or x.shape[0] != q.shape[0]
            or x.dtype != torch.int32
            or x.device != q.device
        ):
            raise ValueError(
                f"{op}: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; "
                f"expected int32 with {q.shape[0]} rows on {q.device}"
            )


def decode_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Row b attends to the first lengths[b] positions of its pages, the new token's own included.

    q: [B, H, D]; k_pages, v_pages: [P, G, page, D] with H a multiple of G, D up to 256.
    table: [B, W] int32 page numbers. lengths: [B] int32, up to W * page; a row of length 0 gives 0,
    and what lies behind a length is not read. scale: of q k^T, 1 / sqrt(D) by default. window: how
    many positions a row sees, the last ones of its length. softcap: scores become
    softcap tanh(score / softcap).
    Returns [B, H, D] in q's dtype. impl: "triton", "reference", or None to choose by device.
    Raises ValueError for shapes, dtypes or devices that do not fit, and for a scale, window or
    softcap that is not above 0.
    """
    check_tensors("decode_attention", q=q, k_pages=k_pages, v_pages=v_pages)
    if (
        q.ndim != 3
        or k_pages.ndim != 4
        or k_pages.shape != v_pages.shape
        or q.shape[2] != k_pages.shape[3]
        or q.shape[1] % k_pages.shape[1]
        or not 1 <= q.shape[2] <= MAX_HEAD_DIM
    ):
        raise ValueError(
            f"decode_attention: q {tuple(q.shape)}, pages {tuple(k_pages.shape)} and "
            f"{tuple(v_pages.shape)}; expected [B, H, D] and twice [P, G, page, D] with H a "
            f"multiple of G and D at most {MAX_HEAD_DIM}"
        )
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(
            f"decode_attention: q is {q.dtype}, the pages {k_pages.dtype} and {v_pages.dtype}; "
            "expected one dtype"
        )
    check_rows("decode_attention", q, table, lengths)
    for name, value in (("scale", scale), ("window", window), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(
                f"decode_attention: {name} is {value}, expected a positive number or None"
            )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    args = (q, k_pages, v_pages, table, lengths, scale, window, softcap)
    return choose("decode_attention", DECODE_ATTENTION, impl, *args)(*args)
