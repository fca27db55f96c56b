"""The part of a block that works on each token alone: SwiGLU (Shazeer 2020, arXiv 2002.05202).

    mlp(x) = W_down (silu(W_gate x) * W_up x)

W_gate and W_up share one matrix, for one larger product. `make_mlp` chooses the module of a layer:
this one, or a mixture of many small ones (moe.py).

Shapes: T tokens, M d_model, F d_ff.
"""

from dataclasses import replace

import torch
from torch import nn

from ..kernels.mlp import swiglu, swiglu_mlp
from .config import ModelConfig
from .linear import Linear, plain
from .moe import MoE
from .routes import Routing


class MLP(nn.Module):
    """The dense SwiGLU MLP."""

    n_idle = 0  # parameters that a token does not use

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.d_model, self.d_ff = config.d_model, config.d_ff
        self.gate_up = Linear(config.d_model, 2 * config.d_ff, bias=config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x_TM: torch.Tensor, routing: Routing | None = None) -> torch.Tensor:
        """[T, M] -> [T, M]. routing: of mixtures; there is nothing to choose here."""
        if plain(self.gate_up, self.down) and self.down.bias is None:
            return swiglu_mlp(x_TM, self.gate_up.weight, self.down.weight)
        # A bias is not in that kernel; an adapter or a quantised weight has a forward of its own.
        return self.down(swiglu(self.gate_up(x_TM)))

    @property
    def kept_per_token(self) -> int:
        """How many numbers per token are kept for the backward pass, in the compute dtype."""
        # the input, gate and up side by side, and their product
        return self.d_model + 3 * self.d_ff

    def flops_per_token(self) -> int:
        """Forward only; the products alone count."""
        return self.gate_up.flops_per_token() + self.down.flops_per_token()

    def can_capture(self, dtype: torch.dtype) -> bool:
        """Whether a CUDA graph can hold a step in `dtype`."""
        return True


def make_mlp(config: ModelConfig, layer: int) -> nn.Module:
    """The MLP of one layer: a module with forward(x_TM, routing) -> [T, M],
    flops_per_token(), kept_per_token, n_idle and can_capture(dtype)."""
    moe = config.moe
    if moe is None or layer in moe.dense_layers:
        return MLP(config)
    shared = MLP(replace(config, d_ff=moe.d_shared)) if moe.d_shared else None
    n_before = sum(other not in moe.dense_layers for other in range(layer))
    return MoE(config, shared, n_before)
