"""Sampling one token per row from logits, by inverting the cumulative distribution:

    token = the first v with  p[0] + ... + p[v] > u,    p = softmax(logits),  u uniform in [0, 1)

The uniform numbers are the caller's, so a token is a function of its row and its number. The logits
are those at the temperature wanted; top-k, top-p and min-p are model/engine/sampling.py's.

A row with a NaN or an infinity has no distribution: its token is -1, in each back end, and the
caller decides what that means. The back ends round their sums differently, so a number that falls
on the edge between two tokens may give either.

Bytes that must move: 4 B V, read once. The compiled loop does that (kernels/cpu/sampling.py); the
reference takes several passes. There is no Triton kernel yet: on a GPU the reference runs.

Shapes: B rows, V vocabulary.
"""

import torch
import torch.nn.functional as F

from .cpu import sampling as cpu
from .dispatch import Backend, choose, serves_all

BLOCK = 32  # tokens that are summed before the cumulative sum, which is then a 32nd as long


def cumulative(
    x: torch.Tensor, dtype: torch.dtype | None = None, least_rows: int | None = None
) -> torch.Tensor:
    """The cumulative sums of each row of x [B, n], summed in `dtype` (None: its own).

    least_rows: rows of zeros are added up to this number; None is 2 on a GPU and 1 elsewhere. For
    one row alone CUDA has another scan: it adds in another order, and not in the same one in every
    run (pytorch#75240).
    """
    if least_rows is None:
        least_rows = 2 if x.is_cuda else 1
    n_rows = len(x)
    missing = least_rows - n_rows
    if missing > 0:
        x = F.pad(x, (0, 0, 0, missing))
    sums = x.cumsum(-1, dtype=dtype)
    return sums[:n_rows]


def invert_cdf(
    probs: torch.Tensor, uniforms: torch.Tensor, least_rows: int | None = None
) -> torch.Tensor:
    """The token of each row [B] at which the cumulative sum of probs [B, V] first passes uniforms
    [B].

    First the block of tokens is searched, then the token in it. A token of probability 0 is never
    sampled. The token of a row that is NaN means nothing. least_rows: see `cumulative`.
    """
    zero = probs.new_zeros(())
    if probs.shape[1] % BLOCK:
        probs = F.pad(probs, (0, -probs.shape[1] % BLOCK))
    blocks = probs.view(len(probs), -1, BLOCK)
    ends = cumulative(blocks.sum(-1), least_rows=least_rows)
    total = ends[:, -1]
    # rounding may lift the threshold to the total itself: then the last token of any probability
    threshold = torch.minimum(uniforms.float() * total, torch.nextafter(total, zero))[:, None]
    # NaN would lead behind the last block
    block = torch.searchsorted(ends, threshold, right=True).clamp_(max=blocks.shape[1] - 1)
    before = ends.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)
    index = block[:, :, None].expand(-1, -1, BLOCK)
    chosen = blocks.gather(1, index)[:, 0]
    inner = cumulative(chosen, least_rows=least_rows)
    rest = torch.minimum(threshold - before, torch.nextafter(inner[:, -1:], zero))
    within = torch.searchsorted(inner, rest, right=True)
    return (block * BLOCK + within)[:, 0]


def reference_sample_logits(
    logits: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op in plain PyTorch."""
    finite = torch.isfinite(logits.sum(-1))
    probs = torch.softmax(logits, -1)
    tokens = invert_cdf(probs, uniforms).masked_fill(~finite, 0)
    logp = probs.gather(1, tokens[:, None])[:, 0].log()
    return tokens.masked_fill(~finite, -1), logp


SAMPLE_LOGITS = (
    Backend("cpu", cpu.sample_logits, cpu.refuses),
    Backend("reference", reference_sample_logits, serves_all),
)


def sample_logits(
    logits: torch.Tensor, uniforms: torch.Tensor, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row. Returns (tokens [B] int64, their log-probs in nats [B], fp32 at
    least).

    logits: [B, V]; uniforms: [B] float64 in [0, 1). Token -1 marks a row with a NaN or an infinity,
    whose log-prob means nothing. impl: "cpu", "reference", or None to choose by device. Raises
    ValueError for shapes that do not match, and for an impl that cannot serve.
    """
    if logits.ndim != 2 or uniforms.shape != logits.shape[:1]:
        raise ValueError(
            f"sample_logits: logits {tuple(logits.shape)}, uniforms {tuple(uniforms.shape)}; "
            "expected [B, V] and [B]"
        )
    return choose("sample_logits", SAMPLE_LOGITS, impl, logits, uniforms)(logits, uniforms)
