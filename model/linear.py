"""Linear: the only kind of matrix that a layer holds.

So it is the one thing to replace: an adapter (LoRA) wraps it, a quantised model puts another module
there, sharding splits it. All of these change `forward`. A fused kernel reads the weight itself and
would miss the change, so a fused path first asks `plain(...)`, and calls the modules one by one
where the answer is no.

Left out: initialisation, which is in one place for all weights (`Transformer.init_weights`).
"""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """y = x W^T + b in the dtype of x. The weight [n_out, n_in] is the optimizer's fp32 master."""

    def __init__(
        self, n_in: int, n_out: int, bias: bool = False, parts: tuple[int, ...] | None = None
    ):
        """parts: how many rows each has, where several matrices lie below each other in this one
        (q, k and v); None: it is one."""
        super().__init__()
        self.parts = parts or (n_out,)
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n_in] -> [..., n_out]."""
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight, bias)

    kept_per_token = 0
    """How many numbers per token an adapter keeps for the backward pass."""

    def flops_per_token(self) -> int:
        """Forward only; a multiply-add is 2 FLOPs, the bias is left out."""
        return 2 * self.weight.numel()


def plain(*linears: nn.Module) -> bool:
    """Whether each is exactly a Linear, so that reading its weight is the same as calling it."""
    return all(type(linear) is Linear for linear in linears)
