"""A number instead of the next token: one value head, read at three places.

    before each token      PPO's critic: what will the answer earn?           `forward`
    at the end token       a reward model: how good is the whole answer?      `at_ends`
    at the end of a step   a process reward: is it right so far?              `at` (process.py)

A head is a vector beside a transformer, and its value the product with a hidden state. It has no
sigmoid: whoever wants a probability takes one outside. It begins at 0, so the advantages of PPO's
first step are the rewards alone.

The critic is a network of its own, begun from the base (as in TinyZero) or from the reward model
(as in InstructGPT), so it costs the memory and the time of a second policy.

Left out: a head on the policy's own trunk, which is cheaper, but then two losses pull at the same
weights.

Shapes: N answers, R response tokens, T tokens of a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..model.distributed import sum_gradients
from ..model.loss_scale import LossScaler
from ..model.optimizer import learning_rate, optimizer_step
from ..model.packed import Packed, pack
from ..model.transformer import Transformer
from .advantages import Advantages
from .losses import loss_weights, value_loss
from .rollouts import MicroBatch, Rollouts, cut_by_length, micro_batches, over_all_tokens
from .update import deal_samples


class ValueHead(nn.Module):
    """A transformer and a value head."""

    def __init__(self, trunk: Transformer):
        super().__init__()
        self.trunk = trunk
        self.value = nn.Parameter(torch.zeros(trunk.config.d_model, device=trunk.device))

    @property
    def config(self):
        """The shape of the trunk."""
        return self.trunk.config

    def at(self, packed: Packed, rows: torch.Tensor) -> torch.Tensor:
        """[len(rows)] fp32 or wider: the value at each of the tokens with these flat indices. It
        knows that token, and what stands before it."""
        hidden = self.trunk.hidden_states(packed).index_select(0, rows)
        return hidden.to(self.value.dtype) @ self.value

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """[R] fp32 or wider: V of the state before each response token."""
        return self.at(batch.packed, batch.predictors)

    def at_ends(self, packed: Packed) -> torch.Tensor:
        """[N] fp32 or wider: the value at the last token of each sequence, its end token."""
        return self.at(packed, packed.cu_seqlens[1:].long() - 1)


class RewardModel(ValueHead):
    """A value head that is read at the end of an answer: how good is it, as far as others told?

    There is no pad token, so the last token of a sequence is its end token and no other. An answer
    that was cut off has none. It gets the floor: the lowest score of any training answer.
    """

    def __init__(self, trunk: Transformer):
        super().__init__(trunk)
        self.register_buffer("centre", torch.zeros((), device=trunk.device))
        self.register_buffer("floor", torch.full((), torch.nan, device=trunk.device))

    @property
    def is_centred(self) -> bool:
        """Whether the scores have been centred, as they are when training ends."""
        return not bool(self.floor.isnan())

    @torch.no_grad()
    def scores(self, sequences: Sequence[np.ndarray], tokens_per_batch: int) -> np.ndarray:
        """[N] float64: the centred score of each sequence of token ids, its end token included.

        Equal sequences are scored once. So their scores are the same to the last bit, and a group
        of equal answers stays a dead one.
        """
        index_of: dict[bytes, int] = {}
        keys = [np.asarray(tokens, np.int64).tobytes() for tokens in sequences]
        which_N = [index_of.setdefault(key, len(index_of)) for key in keys]
        distinct = [np.frombuffer(key, np.int64) for key in index_of]
        lengths = np.array([len(tokens) for tokens in distinct], np.int64)

        scores = np.zeros(len(distinct))
        for chosen in cut_by_length(lengths, np.arange(len(distinct)), tokens_per_batch):
            packed = pack([distinct[i] for i in chosen], self.value.device)
            scores[chosen] = (self.at_ends(packed) - self.centre).cpu().double().numpy()
        return scores[which_N]

    def centre_on(self, sequences: Sequence[np.ndarray], tokens_per_batch: int) -> None:
        """Move all scores by one number, so that the mean score of these answers is 0, and take the
        lowest as the floor. (InstructGPT, arXiv 2203.02155, section 3.5, centres on its
        demonstrations.)"""
        scores_N = self.scores(sequences, tokens_per_batch)
        self.centre += scores_N.mean()
        self.floor.fill_(scores_N.min() - scores_N.mean())

    def forget_centre(self) -> None:
        """Let the scores count as not centred."""
        self.centre.zero_()
        self.floor.fill_(torch.nan)

    def score_rollouts(
        self, rollouts: Rollouts, samples: np.ndarray, tokens_per_batch: int
    ) -> np.ndarray:
        """[len(samples)] float64: the score of each of these answers; the floor where one was cut
        off."""
        has_end = np.array([rollouts.finish_reasons[n] != "length" for n in samples], bool)
        scores = np.full(len(samples), float(self.floor))
        ended = [rollouts.sequences[n] for n in samples[has_end]]
        scores[has_end] = self.scores(ended, tokens_per_batch)
        return scores


class CriticLearner:
    """The critic, its optimizer, and how it learns."""

    def __init__(
        self,
        critic: ValueHead,
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
