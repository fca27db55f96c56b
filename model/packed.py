"""Packed: a batch of sequences as flat tokens with offsets, without padding.

Every layer but attention works on `[T, ...]`; attention alone reads `cu_seqlens`. So there is no attention
mask, no pad token and no left or right padding to get wrong. The batch is checked once, here, on the host;
`max_seqlen` is a host integer, so that no layer ever reads the device back.
"""
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Packed:
    """N sequences of T tokens in all."""

    tokens: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64, the place of each token in its own sequence."""
    cu_seqlens: torch.Tensor
    """[N + 1] int32, where each sequence begins; the last is T. Sequences of length 0 are allowed."""
    max_seqlen: int
    """Length of the longest sequence."""

    def to(self, device) -> "Packed":
        tensors = (x.to(device) for x in (self.tokens, self.positions, self.cu_seqlens))
        return Packed(*tensors, self.max_seqlen)


def offsets(lengths) -> np.ndarray:
    """[N] lengths -> [N + 1] int32 offsets, beginning with 0."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int32)


def positions_of(lengths) -> np.ndarray:
    """[N] lengths -> [sum] int64: 0, 1, ... within each sequence."""
    lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def pack(sequences, device="cpu") -> Packed:
    """Lay sequences of token ids (lists or 1-D integer arrays) end to end.

    Raises ValueError when there is no sequence, no token at all, or a negative token id.
    """
    if len(sequences) == 0:
        raise ValueError("pack: got no sequences; a batch needs at least one")
    lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
    if lengths.sum() == 0:
        raise ValueError(f"pack: all {len(sequences)} sequences are empty; a batch needs at least one token")
    tokens = np.concatenate([np.asarray(s, np.int64) for s in sequences])
    if tokens.min() < 0:
        raise ValueError(f"pack: token id {tokens.min()} is negative; ids run from 0 to vocab_size - 1")
    return Packed(torch.from_numpy(tokens), torch.from_numpy(positions_of(lengths)),
                  torch.from_numpy(offsets(lengths)), int(lengths.max())).to(device)
