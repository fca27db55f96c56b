"""Packed: a batch of sequences as flat tokens with offsets, without padding.

Every layer but attention works on [T, ...]; only attention reads `cu_seqlens`. So there is no
attention mask, no pad token, and no left or right padding to get wrong. The batch is checked once,
here, on the host. `max_seqlen` is a host integer, so that no layer has to wait for the device.

Sequences with the same beginning, as the samples of a group, may share that prefix (Liu et al.
2025, arXiv 2506.05433). The prefix is a sequence of its own, computed once. The others continue it:
their positions go on from its end, and they read its keys and values before their own.

Shapes: N sequences, T tokens of all sequences, K keys that they read.
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
    """[T] int64: the position of each token in its sequence, a shared prefix included."""
    cu_seqlens: torch.Tensor
    """[N + 1] int32: where each sequence begins; the last is T. A sequence may be empty."""
    max_seqlen: int
    """Length of the longest sequence."""
    keys: torch.Tensor | None = None
    """[K] int64 where prefixes are shared: the flat indices of the tokens that each sequence reads,
    first its prefix's and then its own. None: each sequence reads its own tokens only."""
    cu_keys: torch.Tensor | None = None
    """[N + 1] int32: where the keys of each sequence begin; the last is K."""
    max_keys: int | None = None
    """The most keys of any sequence."""

    def to(self, device) -> "Packed":
        """The same batch on another device."""
        moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in vars(self).values()]
        return Packed(*moved)


def offsets(lengths) -> np.ndarray:
    """[N] lengths -> [N + 1] int32 offsets, from 0 to the sum."""
    ends = np.cumsum(np.asarray(lengths, np.int64))
    return np.concatenate([[0], ends]).astype(np.int32)


def positions_of(lengths) -> np.ndarray:
    """[N] lengths -> [sum] int64: 0, 1, ... within each sequence."""
    lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def pack(sequences, device="cpu", after: np.ndarray | None = None) -> Packed:
    """Lay sequences of token ids (lists or 1-D integer arrays) end to end.

    after: [N] int64, the index of the sequence that each one continues, or -1. A sequence that
    others continue has -1 itself. Raises ValueError when there is no sequence, no token at all, a
    negative token id, or a bad `after`.
    """
    # 1. All tokens in one array, and the position of each.
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
    positions = positions_of(lengths)

    # 2. With shared prefixes: positions go on from the prefix, and its tokens are read first.
    shared = ()
    if after is not None:
        _check_after(after, len(lengths))
        prefix_lengths = np.where(after >= 0, lengths[after], 0)
        positions = positions + np.repeat(prefix_lengths, lengths)
        n_keys = prefix_lengths + lengths
        keys = _keys_of(lengths, prefix_lengths, after)
        shared = torch.from_numpy(keys), torch.from_numpy(offsets(n_keys)), int(n_keys.max())

    packed = Packed(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(offsets(lengths)),
        int(lengths.max()),
        *shared,
    )
    return packed.to(device)


def _check_after(after: np.ndarray, n_sequences: int) -> None:
    """Raise ValueError unless each sequence continues none, or one that continues none itself."""
    in_range = len(after) == n_sequences and after.min() >= -1 and (after < n_sequences).all()
    if not in_range or (after[after[after >= 0]] >= 0).any():
        raise ValueError(
            f"pack: after is {after.tolist()[:20]} for {n_sequences} sequences; expected "
            "for each the index of one that goes on after none itself, or -1"
        )


def _keys_of(lengths: np.ndarray, prefix_lengths: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[K] int64: for each sequence the flat indices of its prefix's tokens, then of its own."""
    starts = np.cumsum(lengths) - lengths
    n_keys = prefix_lengths + lengths
    # Key number j of a sequence is token j of its prefix, or token j - prefix_length of itself.
    j = positions_of(n_keys)
    in_prefix = j < np.repeat(prefix_lengths, n_keys)
    first_of_prefix = np.repeat(starts[after], n_keys)
    first_of_own = np.repeat(starts - prefix_lengths, n_keys)
    return j + np.where(in_prefix, first_of_prefix, first_of_own)
