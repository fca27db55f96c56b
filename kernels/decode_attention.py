"""Attention of one new token a row against the row's key/value cache; no gradient.

FLOPs: 4 B H L D. Least bytes in 16 bit: 4 B G L D, the cache read once: always memory-bound.
"""
import torch

from . import reference


def decode_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
                     scale: float | None = None) -> torch.Tensor:
    """Row b attends to the first lengths[b] places of its cache, the new token's own included.

    q: [B, H, D]; k_cache, v_cache: [B, G, S, D] with H a multiple of G; lengths: [B] integers from 1 to S.
    Returns [B, H, D] in q's dtype. Raises ValueError for shapes that do not fit together.
    """
    if k_cache.shape != v_cache.shape or k_cache.ndim != 4 or q.ndim != 3 or lengths.shape != q.shape[:1] or \
            (q.shape[0], q.shape[2]) != (k_cache.shape[0], k_cache.shape[3]) or q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"decode_attention: q {tuple(q.shape)}, caches {tuple(k_cache.shape)} and "
                         f"{tuple(v_cache.shape)}, lengths {tuple(lengths.shape)}; expected [B, H, D], "
                         "twice [B, G, S, D] with H a multiple of G, and [B]")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.decode_attention(q, k_cache, v_cache, lengths, scale)
