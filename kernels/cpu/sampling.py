"""One token of every row that is decoded, as compiled loops for a CPU (see kernels/cpu.py): embeddings,
norms, and the draw of the next. Attention is in cpu_attention.py.

Features come first here, [M, B]: the layout in which PyTorch's products of small matrices are fastest. Where
every step makes hundreds of small calls, the loops take arrays and are called without a wrapper: a call is 2
microseconds.

Shapes: B rows, M features, H heads, V vocabulary.
"""

import numpy as np
import torch

from .attention_tiles import LOWEST, peak_of
from .compile import HAS_NUMBA, LANES, array, exp, f32, flat, loop, numba, part, threads

if HAS_NUMBA:
    from .registers import transpose


DRAW_BLOCK = 32  # tokens that are added up before the cumulative sum, in fp64, is searched


@part
def soften_and_sum(row, peak, exps, ends):
    """exps = exp(row - peak), and their cumulative sum at the end of each block of tokens."""
    V, total = len(row), 0.0
    for v in range(V):
        exps[v] = exp(row[v] - peak)
    for i in range(len(ends)):
        block_sum = f32(0)
        for v in range(i * DRAW_BLOCK, min(V, (i + 1) * DRAW_BLOCK)):
            block_sum += exps[v]
        total += block_sum
        ends[i] = total


@part
def draw_row(row, uniform, exps, ends):
    """(token, its log-prob); token -1 for a row that is not finite. What lies behind the row, up to a whole
    vector, is LOWEST."""
    peak, check = peak_of(row, len(row)), f32(0)
    for v in range(len(row)):
        check += row[v]
    soften_and_sum(row, peak, exps, ends)
    threshold, i = uniform * ends[-1], 0
    while i < len(ends) - 1 and ends[i] <= threshold:
        i += 1
    so_far, token = ends[i - 1] if i else 0.0, 0
    for v in range(i * DRAW_BLOCK, min(len(row), (i + 1) * DRAW_BLOCK)):
        so_far += exps[v]
        if exps[v] > 0:  # rounding may lead past the last token of any probability
            token = v
        if so_far > threshold:
            break
    return token if np.isfinite(check) else -1, np.log(exps[token] / ends[-1])


@part
def copy_columns(x, stride, first, rows, V, to, width):
    """Columns first .. first + rows of flat x to rows of flat `to`, `width` apart."""
    most = V - V % LANES if rows == LANES else 0
    for v in range(0, most, LANES):
        transpose(x, v * stride + first, stride, to, v, width)
    for v in range(most, V):
        for i in range(rows):
            to[i * width + v] = x[v * stride + first + i]


@loop
def draw_loop(logits, stride, V, uniforms_B, tokens_B, logp_B):
    """logits: flat, `stride` from token to token, the rows side by side."""
    B, width = (
        len(tokens_B),
        V + 16,
    )  # 16: or the rows push each other out of the cache's few places for 2^n
    for n in numba.prange((B + LANES - 1) // LANES):
        first, rows = n * LANES, min(B - n * LANES, LANES)
        block, exps = np.empty(LANES * width, f32), np.empty(V, f32)
        ends = np.empty((V + DRAW_BLOCK - 1) // DRAW_BLOCK, np.float64)
        copy_columns(logits, stride, first, rows, V, block, width)
        for i in range(rows):
            row = block[i * width : i * width + V]
            block[i * width + V : i * width + V + LANES] = LOWEST
            tokens_B[first + i], logp_B[first + i] = draw_row(
                row, uniforms_B[first + i], exps, ends
            )


def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row at which the cumulative sum of the probabilities first passes the uniform number:
    (tokens [B] int64, logp [B] float32) from logits [B, V], fastest where V comes first in memory, and
    uniforms [B] float64 in [0, 1). Token -1 for a row that is NaN or infinite."""
    (B, V), logits = logits.shape, logits if logits.stride(0) == 1 else logits.t().contiguous().t()
    tokens, logp, stride = torch.empty(B, dtype=torch.int64), torch.empty(B), logits.stride(1)
    threads()
    draw_loop(flat(logits), stride, V, array(uniforms), tokens.numpy(), logp.numpy())
    return tokens, logp
