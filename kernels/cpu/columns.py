"""Split off kernels/cpu_decode.py."""

import numpy as np

from .compile import f32, loop, numba, part

COLUMNS = 64  # rows that are normed together


@loop
def embed_loop(embed_VM, tokens_B, x_IMC):
    """The embeddings of the tokens as columns of tiles; 0 behind the last."""
    tiles, M, C = x_IMC.shape
    for n in numba.prange(tiles * M):
        i, m = n // M, n % M
        for c in range(C):
            b = i * C + c
            x_IMC[i, m, c] = embed_VM[tokens_B[b], m] if b < len(tokens_B) else f32(0)


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
