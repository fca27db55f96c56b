"""Rotary position embedding, half-split layout of Llama and Qwen   (Su et al. 2021, arXiv 2104.09864)

The pair (x[i], x[i + D/2]) of a token at position p is turned by the angle p * theta^(-2i / D):
    y[i] = x[i] cos - x[i + D/2] sin        y[i + D/2] = x[i + D/2] cos + x[i] sin
The gradient is the turn by the opposite angle. Memory-bound: q and k are read and written once.
"""
import torch

from . import reference


def rope_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of each token's angles: two tensors [T, head_dim / 2], fp32. positions: [T] ints."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    # in fp64, so that position 100,000 keeps its angle
    angles = positions.to(torch.float64)[:, None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn every head of `x`; give q and k side by side in one tensor, so that one launch serves both.

    x: [T, H, D], any float dtype; cos, sin: [T, D / 2]. Returns [T, H, D] in x's dtype.
    Raises ValueError if the table does not fit x.
    """
    if x.ndim != 3 or x.shape[2] % 2 or cos.shape != (x.shape[0], x.shape[2] // 2) or sin.shape != cos.shape:
        raise ValueError(f"rope: x is {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; "
                         "expected [T, H, D] and twice [T, D / 2] (see rope_table)")
    return reference.rope(x, cos, sin)
