"""Causal attention over flat tokens: out = softmax(scale q k^T + causal mask) v, within each sequence.

FLOPs: 2 S^2 D a query head and sequence forward (half of 4 S^2 D, causal), 2.5 times that backward.
Least bytes in 16 bit: q, out (2 T H D each) and k, v (2 T G D each).
"""
import torch

from . import reference


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
              scale: float | None = None) -> torch.Tensor:
    """Each token attends to itself and to the earlier tokens of its own sequence.

    q: [T, H, D]; k, v: [T, G, D] with H a multiple of G (grouped queries); cu_seqlens: [N + 1] int32 offsets;
    max_seqlen: host integer, at least the longest length; scale: 1 / sqrt(D) unless given.
    Returns [T, H, D] in q's dtype. Raises ValueError for shapes that do not fit together.
    """
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2]:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected "
                         "[T, H, D] and twice [T, G, D]")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads over {k.shape[1]} key/value heads; the first "
                         "must be a multiple of the second")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.attention(q, k, v, cu_seqlens, max_seqlen, scale)
