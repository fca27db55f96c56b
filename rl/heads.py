"""PPO's critic: a transformer like the policy, with a value in the place of the next token.

It is a network of its own, begun from the base (as in TinyZero), so it costs the memory and the time of a
second policy. The value head begins at 0: the first step's advantages are the rewards alone.
Left out: a head on the policy's own trunk (cheaper, but the two losses then pull at the same weights).
"""

import torch
from torch import nn

from ..model.transformer import Transformer
from .rollouts import MicroBatch


class Critic(nn.Module):
    def __init__(self, trunk: Transformer):
        super().__init__()
        self.trunk = trunk
        self.value = nn.Parameter(torch.zeros(trunk.config.d_model, device=trunk.embed.device))

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """[R] fp32 or wider: V of the state before each response token."""
        hidden = self.trunk.hidden_states(batch.packed).index_select(0, batch.predictors)
        return hidden.to(self.value.dtype) @ self.value
