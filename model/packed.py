"""Packed: a batch of sequences as flat tokens with offsets, without padding.

Every layer but attention works on `[T, ...]`; attention alone reads `cu_seqlens`. So there is no attention
mask, no pad token and no left or right padding to get wrong. The batch is checked once, here, on the host;
`max_seqlen` is a host integer, so that no layer ever reads the device back.

Sequences that begin alike, as the samples of a group do, may share that prefix (Liu et al. 2025, arXiv
2506.05433): it is one sequence, computed once, and the others go on after it, reading its keys and values.
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
    keys: torch.Tensor | None = None
    """[K] int64, where prefixes are shared: the flat index of each token that a sequence reads, its prefix's
    and then its own, sequence after sequence. None: each reads its own."""
    cu_keys: torch.Tensor | None = None
    """[N + 1] int32, where the keys of each sequence begin; the last is K."""
    max_keys: int | None = None
    """The most keys of a sequence."""

    def to(self, device) -> "Packed":
        return Packed(
            *(x.to(device) if isinstance(x, torch.Tensor) else x for x in vars(self).values())
        )


def offsets(lengths) -> np.ndarray:
    """[N] lengths -> [N + 1] int32 offsets, beginning with 0."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int32)


def positions_of(lengths) -> np.ndarray:
    """[N] lengths -> [sum] int64: 0, 1, ... within each sequence."""
    lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def pack(sequences, device="cpu", after: np.ndarray | None = None) -> Packed:
    """Lay sequences of token ids (lists or 1-D integer arrays) end to end.

    after: [N] int64, the sequence that each goes on after, or -1; one that others go on after has -1 itself.
    Raises ValueError when there is no sequence, no token at all, a negative token id, or a bad `after`.
    """
    if len(sequences) == 0:
        raise ValueError("pack: got no sequences; a batch needs at least one")
    lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
    if lengths.sum() == 0:
        raise ValueError(
            f"pack: all {len(sequences)} sequences are empty; a batch needs at least one token"
        )
    tokens = np.concatenate([np.asarray(s, np.int64) for s in sequences])
    if tokens.min() < 0:
        raise ValueError(
            f"pack: token id {tokens.min()} is negative; ids run from 0 to vocab_size - 1"
        )
    positions, shared = positions_of(lengths), ()
    if after is not None:
        if (
            len(after) != len(lengths)
            or after.min() < -1
            or (after >= len(lengths)).any()
            or (after[after[after >= 0]] >= 0).any()
        ):
            raise ValueError(
                f"pack: after is {after.tolist()[:20]} for {len(lengths)} sequences; expected "
                "for each the index of one that goes on after none itself, or -1"
            )
        starts, before = np.cumsum(lengths) - lengths, np.where(after >= 0, lengths[after], 0)
        n_keys = before + lengths
        place, left = positions_of(n_keys), np.repeat(before, n_keys)
        keys = place + np.where(
            place < left, np.repeat(starts[after], n_keys), np.repeat(starts - before, n_keys)
        )
        positions = positions + np.repeat(before, lengths)
        shared = torch.from_numpy(keys), torch.from_numpy(offsets(n_keys)), int(n_keys.max())
    return Packed(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(offsets(lengths)),
        int(lengths.max()),
        *shared,
    ).to(device)
