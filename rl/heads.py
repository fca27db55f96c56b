"""A number instead of the next token: PPO's critic.

The critic is a copy of the policy whose head outputs a value instead of logits. It is a network of
its own, begun from the base (as in TinyZero), so it costs the memory and the time of a second
policy. The value head begins at 0: the first step's advantages are the rewards alone.

Left out: a head on the policy's own trunk, which is cheaper, but then two losses pull at the same
weights.
"""

import numpy as np
import torch
from torch import nn

from ..model.distributed import sum_gradients
from ..model.loss_scale import LossScaler
from ..model.optimizer import learning_rate, optimizer_step
from ..model.transformer import Transformer
from .advantages import Advantages
from .losses import loss_weights, value_loss
from .rollouts import MicroBatch, Rollouts, micro_batches, over_all_tokens
from .update import deal_samples


class Critic(nn.Module):
    """A transformer and a value head."""

    def __init__(self, trunk: Transformer):
        super().__init__()
        self.trunk = trunk
        self.value = nn.Parameter(torch.zeros(trunk.config.d_model, device=trunk.device))

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """[R] fp32 or wider: V of the state before each response token."""
        hidden = self.trunk.hidden_states(batch.packed).index_select(0, batch.predictors)
        return hidden.to(self.value.dtype) @ self.value


class CriticLearner:
    """The critic, its optimizer, and how it learns."""

    def __init__(
        self,
        critic: Critic,
        optimizer: torch.optim.Optimizer,
        config,
        scaler: LossScaler | None = None,
    ):
        """config: an Algorithm (rl/family.py). scaler: the policy's; None is one that is off."""
        self.critic, self.optimizer, self.config = critic, optimizer, config
        self.scaler = scaler or LossScaler()

    def values(self, rollouts: Rollouts) -> np.ndarray:
        """[R] float64: V of the state before each response token of all rollouts."""
        values_R = over_all_tokens(
            self.critic, rollouts, self.config.micro_tokens, self.critic.value.device
        )
        return values_R.cpu().double().numpy()

    def update(self, rollouts: Rollouts, advantages: Advantages, step: int) -> dict:
        """As many optimizer steps on the critic as on the policy; returns the metrics to log."""
        config, critic = self.config, self.critic
        device, dtype = critic.value.device, critic.value.dtype
        old_values = torch.from_numpy(advantages.values).to(device, dtype)
        returns = torch.from_numpy(advantages.returns).to(device, dtype)
        rate = learning_rate(step, config.steps, config.critic_optim)
        # The mean over all tokens of the global batch, in each of the updates.
        weights_N = loss_weights(rollouts.response_lengths, "token", config.max_new_tokens)
        weight = float(weights_N[0]) * config.updates_per_step
        losses, norms = [], []
        for share in deal_samples(np.arange(len(rollouts.texts)), config, step):
            for batch in micro_batches(rollouts, share, config.micro_tokens, device):
                index = batch.token_index
                weights = torch.full_like(batch.sampler_logp, weight)
                values = critic(batch)
                loss = value_loss(
                    values, old_values[index], returns[index], weights, config.value_clip
                )
                self.scaler.scale(loss).backward()
                losses.append(loss.detach())
            sum_gradients(critic)
            optim, scaler = config.critic_optim, self.scaler
            norms.append(optimizer_step(critic, self.optimizer, rate, optim, scaler))
        return {
            "value_loss": float(torch.stack(losses).sum()) / config.updates_per_step,
            "value_explained": explained_variance(advantages.values, advantages.returns),
            "critic_gradient_norm": np.max(norms),
        }


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 for values that are the returns, 0 for a constant, below 0 for worse than a constant."""
    variance = float(np.var(returns))
    return 1 - float(np.var(returns - values)) / variance if variance else 0.0
