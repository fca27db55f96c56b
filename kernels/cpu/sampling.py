"""Sampling the next token of each row from its logits, as a compiled loop. kernels/sampling.py is
the public op.

Softmax, cumulative sum and search take one pass over a row while it lies in the cache. The
decoder's logits come with the vocabulary first in memory, so 8 rows at a time are transposed into a
buffer of their own.

Shapes: B rows, V vocabulary.
"""

import numpy as np
import torch

from .attention_tiles import LOWEST, peak_of
from .compile import HAS_NUMBA, LANES, array, exp, f32, flat, loop, numba, part, prepare
from .compile import refuses as tensors_refuse

if HAS_NUMBA:
    from .registers import transpose

SUM_BLOCK = 32  # tokens that are summed in fp32 before the cumulative sum, in fp64, is searched
# numbers between rows: at strides of a power of two, rows evict each other from the cache
ROW_PADDING = 16


@part
def exp_and_sum(row, peak, exps, ends):
    """exps = exp(row - peak), and their cumulative sum at the end of each block of tokens."""
    V, total = len(row), 0.0
    for v in range(V):
        exps[v] = exp(row[v] - peak)
    for i in range(len(ends)):
        block_sum = f32(0)
        for v in range(i * SUM_BLOCK, min(V, (i + 1) * SUM_BLOCK)):
            block_sum += exps[v]
        total += block_sum
        ends[i] = total


@part
def sample_row(row, uniform, exps, ends):
    """(token, its log-prob); token -1 for a row that is not finite. The numbers behind the row, up
    to a whole vector, must be LOWEST."""
    peak, check = peak_of(row, len(row)), f32(0)
    for v in range(len(row)):
        check += row[v]
    exp_and_sum(row, peak, exps, ends)
    threshold, i = uniform * ends[-1], 0
    while i < len(ends) - 1 and ends[i] <= threshold:
        i += 1
    so_far, token = ends[i - 1] if i else 0.0, 0
    for v in range(i * SUM_BLOCK, min(len(row), (i + 1) * SUM_BLOCK)):
        so_far += exps[v]
        if exps[v] > 0:  # rounding may lead past the last token with a probability above 0
            token = v
        if so_far > threshold:
            break
    return token if np.isfinite(check) else -1, np.log(exps[token] / ends[-1])


@part
def copy_columns(x, stride, first, rows, V, to, width):
    """Columns first .. first + rows of flat x become rows of flat `to`, whose row stride is
    width."""
    most = V - V % LANES if rows == LANES else 0
    for v in range(0, most, LANES):
        transpose(x, v * stride + first, stride, to, v, width)
    for v in range(most, V):
        for i in range(rows):
            to[i * width + v] = x[v * stride + first + i]


@loop
def sample_loop(logits, stride, V, uniforms_B, tokens_B, logp_B):
    """logits: flat; `stride` leads from token to token, and the rows lie side by side."""
    B, width = len(tokens_B), V + ROW_PADDING
    for n in numba.prange((B + LANES - 1) // LANES):
        first, rows = n * LANES, min(B - n * LANES, LANES)
        block, exps = np.empty(LANES * width, f32), np.empty(V, f32)
        ends = np.empty((V + SUM_BLOCK - 1) // SUM_BLOCK, np.float64)
        copy_columns(logits, stride, first, rows, V, block, width)
        for i in range(rows):
            row = block[i * width : i * width + V]
            block[i * width + V : i * width + V + LANES] = LOWEST
            token, logp = sample_row(row, uniforms_B[first + i], exps, ends)
            tokens_B[first + i], logp_B[first + i] = token, logp


def refuses(logits: torch.Tensor, uniforms: torch.Tensor) -> str | None:
    """Why the loop cannot sample these rows, in words; None if it can."""
    return tensors_refuse(logits)


def sample_logits(
    logits: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels/sampling.py has it. It is fastest where V comes first in memory."""
    if logits.stride(0) != 1:
        logits = logits.t().contiguous().t()
    B, V = logits.shape
    tokens, logp = torch.empty(B, dtype=torch.int64), torch.empty(B)
    prepare()
    sample_loop(flat(logits), logits.stride(1), V, array(uniforms), tokens.numpy(), logp.numpy())
    return tokens, logp
