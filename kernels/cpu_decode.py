"""One token of every row that is decoded, as compiled loops for a CPU (see kernels/cpu.py): norms, RoPE with
attention against the cache, and drawing the next token.

Features come first here, [M, B]: the layout in which PyTorch's products of small matrices are fastest. Where
every step makes hundreds of small calls, the loops take arrays and are called without a wrapper: a call is 2
microseconds.

Shapes: B rows, M features, H query heads, G kv heads, R = H / G, D head_dim, N = H + 2 G, S places of the
cache, V vocabulary, C = D / 2 pairs of RoPE, W the heads of a block of rows.
"""
import contextlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from . import cpu
from .cpu import array, exp, f32, loop, numba, part, threads

# Numba compiles anew when a function's own file has changed, but these have `exp` of cpu.py in them.
for kept in Path(__file__).parent.glob("__pycache__/cpu_decode.*.nbi"):
    with contextlib.suppress(OSError):  # another process may be at it, or it may not be ours to delete
        if kept.stat().st_mtime < Path(cpu.__file__).stat().st_mtime:
            kept.unlink()

ROW_BLOCK = 8    # rows of the cache that lie, and are read, together
COLUMNS = 64     # rows that are normed together
DRAW_BLOCK = 32  # tokens that are added up before the cumulative sum, in fp64, is searched
LOWEST = f32(-3e38)


@part
def add_squares(x, sums):
    for b in range(len(x)):
        sums[b] += x[b] * x[b]


@part
def scale_by(x, r, w, y):
    for b in range(len(x)):
        y[b] = x[b] * r[b] * w


@loop
def rmsnorm_columns_loop(x_HMB, w_M, eps, y_HMB):
    """Each column x[h, :, b] normed, for decoding; y may be x."""
    H, M, B = x_HMB.shape
    blocks = (B + COLUMNS - 1) // COLUMNS
    for i in numba.prange(H * blocks):
        h, first = i // blocks, i % blocks * COLUMNS
        end = min(B, first + COLUMNS)
        sums = np.zeros(COLUMNS, f32)
        for m in range(M):
            add_squares(x_HMB[h, m, first:end], sums)
        for b in range(COLUMNS):
            sums[b] = f32(1) / np.sqrt(sums[b] / f32(M) + eps)
        for m in range(M):
            scale_by(x_HMB[h, m, first:end], sums, w_M[m], y_HMB[h, m, first:end])


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
    """(token, its log-prob); token -1 for a row that is not finite."""
    peak, check = row[0], f32(0)
    for v in range(len(row)):
        peak = peak if row[v] < peak else row[v]
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
def copy_columns(x, stride, first, rows, V, to_BV):
    for v in range(V):
        at = v * stride + first
        for i in range(rows):
            to_BV[i, v] = x[at + i]


@loop
def draw_loop(logits, stride, V, uniforms_B, tokens_B, logp_B):
    """logits: flat, `stride` from token to token, the rows side by side."""
    B = len(tokens_B)
    for n in numba.prange((B + ROW_BLOCK - 1) // ROW_BLOCK):
        first, rows = n * ROW_BLOCK, min(B - n * ROW_BLOCK, ROW_BLOCK)
        block, exps = np.empty((ROW_BLOCK, V + 16), f32), np.empty(V, f32)  # 16: or they push each other out
        ends = np.empty((V + DRAW_BLOCK - 1) // DRAW_BLOCK, np.float64)  # of the cache's few places for 2^n
        copy_columns(logits, stride, first, rows, V, block)
        for b in range(first, first + rows):
            tokens_B[b], logp_B[b] = draw_row(block[b - first, :V], uniforms_B[b], exps, ends)


def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row at which the cumulative sum of the probabilities first passes the uniform number:
    (tokens [B] int64, logp [B] float32) from logits [B, V], fastest where V comes first in memory, and
    uniforms [B] float64 in [0, 1). Token -1 for a row that is NaN or infinite."""
    (B, V), logits = logits.shape, logits if logits.stride(0) == 1 else logits.t().contiguous().t()
    tokens, logp, stride = torch.empty(B, dtype=torch.int64), torch.empty(B), logits.stride(1)
    threads()
    draw_loop(logits.detach().as_strided(((V - 1) * stride + B,), (1,)).numpy(), stride, V, array(uniforms),
              tokens.numpy(), logp.numpy())
    return tokens, logp


@part
def scores_of(q_WD, k_SBGD, R, scores_SW):
    """q k of a block of rows at every place. D is no constant here: a compiler that knows it unrolls so short
    a loop before it could make vectors of it."""
    B, G, D = k_SBGD.shape[1:]
    for s in range(len(scores_SW)):
        row = scores_SW[s]
        for b in range(B):
            for g in range(G):
                k = k_SBGD[s, b, g]
                for r in range(R):
                    h = (b * G + g) * R + r
                    q, score = q_WD[h], f32(0)
                    for d in range(D):
                        score += q[d] * k[d]
                    row[h] = score


@cache
def decode_attention_loop(H: int, G: int, D: int, row_block: int):
    """A loop for these sizes, which the compiler should know: RoPE and attention of one new token a row.

    run(qkv_NDB, cos_SC, sin_SC, scale, lengths_B, k, v, out_HDB): qkv are the N = H + 2 G heads of the new
    tokens, scale that of the scores, cos and sin of every place; lengths (int64) how many tokens the cache
    has of each row so far. The new keys and values are written behind them. Keys and values: [blocks, S,
    row_block, G, D], so that what a block of rows reads is one run of memory. All of it must be finite.
    """
    R, C, WIDTH = H // G, D // 2, row_block * H

    @part
    def soften(scores_SW, peak_W, total_W):
        """Scores to exp(scores - peak), and their sums."""
        for s in range(len(scores_SW)):
            row = scores_SW[s]
            for h in range(WIDTH):
                e = exp(row[h] - peak_W[h])
                row[h] = e
                total_W[h] += e

    @part
    def add_values(scores_SW, v_SBGD, out_WD):
        """out += scores v of a block of rows, place by place."""
        v, out = v_SBGD.reshape(-1), out_WD.reshape(-1)
        for s in range(len(scores_SW)):
            row = scores_SW[s]
            for i in range(row_block * G):
                at = (s * row_block * G + i) * D
                for r in range(R):
                    h = i * R + r
                    p = row[h]
                    for d in range(D):
                        out[h * D + d] += p * v[at + d]

    @part
    def turn(new_DB, b, cos_C, sin_C, scale, to):
        """RoPE of one head of row b."""
        for c in range(C):
            x, y = new_DB[c, b], new_DB[C + c, b]
            to[c] = (x * cos_C[c] - y * sin_C[c]) * scale
            to[C + c] = (y * cos_C[c] + x * sin_C[c]) * scale

    @part
    def block(first, rows, qkv_NDB, cos_SC, sin_SC, scale, lengths_B, k_SBGD, v_SBGD, out_HDB):
        q, S = np.zeros((WIDTH, D), f32), 0
        for i in range(rows):
            b = first + i
            place = lengths_B[b]
            S = max(S, place + 1)
            for h in range(H):
                turn(qkv_NDB[h], b, cos_SC[place], sin_SC[place], scale, q[i * H + h])
            for g in range(G):
                turn(qkv_NDB[H + g], b, cos_SC[place], sin_SC[place], f32(1), k_SBGD[place, i, g])
                for d in range(D):
                    v_SBGD[place, i, g, d] = qkv_NDB[H + G + g, d, b]
        scores, peak = np.empty((S, WIDTH), f32), np.full(WIDTH, LOWEST, f32)
        scores_of(q, k_SBGD, R, scores)
        for i in range(rows):
            for s in range(lengths_B[first + i] + 1, S):  # what others have, and it has not
                scores[s, i * H : (i + 1) * H] = LOWEST
        for s in range(S):
            row = scores[s]
            for h in range(WIDTH):
                peak[h] = peak[h] if row[h] < peak[h] else row[h]
        total, out = np.zeros(WIDTH, f32), np.zeros((WIDTH, D), f32)
        soften(scores, peak, total)
        add_values(scores, v_SBGD, out)
        for h in range(H):
            for d in range(D):
                for i in range(rows):
                    out_HDB[h, d, first + i] = out[i * H + h, d] / total[i * H + h]

    @loop
    def run(qkv_NDB, cos_SC, sin_SC, scale, lengths_B, k, v, out_HDB):
        B = len(lengths_B)
        for n in numba.prange((B + row_block - 1) // row_block):
            block(n * row_block, min(B - n * row_block, row_block), qkv_NDB, cos_SC, sin_SC, scale, lengths_B,
                  k[n], v[n], out_HDB)

    return run
