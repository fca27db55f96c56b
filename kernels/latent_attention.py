"""Attention of one new token per row against latents, in pages; no gradient. Plain PyTorch so far.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) keeps no keys and values,
but what all heads make theirs from: a latent c and a rotated key r per token. A head's key is
(W_UK c, r) and its value W_UV c. With W_UK on the side of the query, and W_UV behind the sum (both
are the caller's), the latents are read as they lie:

    s = scale ((W_UK^T q_nope) c + q_rope r),  o = softmax(s) c

over row b's first lengths[b] positions. So it is attention with one key/value head of L + R
numbers, whose values are the first L. FLOPs: 2 B H S (2 L + R) for a length of S. Least bytes in
16 bit: 2 B S (L + R), each latent read once for all heads.

The two parts of a key lie apart, since L + R (576) is no power of two and only c is summed.

Left out: a Triton kernel. The reference never asks a GPU for a number, so a CUDA graph can hold it.

Shapes: B rows, H query heads, L width of a latent, R width of the rotated part, P pages, W pages a
row may have.
"""

import torch

from . import reference
from .decode_attention import check_rows
from .dispatch import Backend, check_tensors, choose, serves_all

LATENT_DECODE_ATTENTION = (Backend("reference", reference.latent_decode_attention, serves_all),)


def latent_decode_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    impl: str | None = None,
) -> torch.Tensor:
    """Row b attends to the first lengths[b] latents of its pages, the new token's own included.

    q_latent: [B, H, L], the queries times W_UK; q_rope: [B, H, R], their rotated part.
    latent_pages, rope_pages: [P, 1, page, L] and [P, 1, page, R].
    table: [B, W] int32 page numbers. lengths: [B] int32, up to W * page; a row of length 0 gives 0,
    and what lies behind a length may be NaN. scale: of the scores.
    Returns [B, H, L] in q_latent's dtype. impl: "reference", or None. Raises ValueError for shapes,
    dtypes or devices that do not fit, and for a scale that is not above 0.
    """
    check_tensors(
        "latent_decode_attention",
        q_latent=q_latent,
        q_rope=q_rope,
        latent_pages=latent_pages,
        rope_pages=rope_pages,
    )
    tensors = (q_latent, q_rope, latent_pages, rope_pages)
    q_shapes, page_shapes = (q_latent.shape, q_rope.shape), (latent_pages.shape, rope_pages.shape)
    if (
        [x.ndim for x in tensors] != [3, 3, 4, 4]
        or q_latent.shape[:2] != q_rope.shape[:2]
        or latent_pages.shape[:3] != rope_pages.shape[:3]
        or latent_pages.shape[1] != 1
        or any(q[-1] != pages[-1] for q, pages in zip(q_shapes, page_shapes, strict=True))
    ):
        given = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ValueError(
            f"latent_decode_attention: queries and pages are {given}; expected [B, H, L], "
            "[B, H, R], [P, 1, page, L] and [P, 1, page, R]"
        )
    if len({x.dtype for x in tensors}) > 1:
        given = ", ".join(str(x.dtype) for x in tensors)
        raise ValueError(
            f"latent_decode_attention: queries and pages are {given}; expected one dtype"
        )
    check_rows("latent_decode_attention", q_latent, table, lengths)
    if not scale > 0:
        raise ValueError(f"latent_decode_attention: scale is {scale}, expected a number above 0")
    args = (q_latent, q_rope, latent_pages, rope_pages, table, lengths, float(scale))
    return choose("latent_decode_attention", LATENT_DECODE_ATTENTION, impl, *args)(*args)
