"""The GRPO loss on per-token log-probs: a clipped surrogate, an optional KL to the reference, and one global
mean.

The mean is a weight on each token, made once for the whole batch (`token_weights`); the loss of a micro-batch
is a plain weighted sum, so the gradient does not depend on how the batch is cut.
"""
from dataclasses import dataclass

import numpy as np
import torch

MAX_LOG_RATIO = 20.0  # log-ratios are cut off here, gradient 0 beyond: exp() of them can not overflow


@dataclass(frozen=True)
class LossConfig:
    """The dials of the loss."""

    clip_low: float = 0.2
    """The ratio to the old policy earns nothing more below 1 - clip_low."""
    clip_high: float = 0.2
    """... nor above 1 + clip_high; DAPO (arXiv 2503.14476) takes 0.28."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference, k3 estimator, inside the loss; 0 leaves it out (R1-Zero took
    0.001)."""
    mean: str = "token"
    """"token": over all tokens of the batch (DAPO). "sequence": over the tokens of each answer, then over
    answers (DeepSeekMath). "constant": over answers, tokens divided by `max_new_tokens` (Dr. GRPO), so length
    has no weight."""

    def __post_init__(self):
        if self.mean not in ("token", "sequence", "constant"):
            raise ValueError(f"loss: mean is {self.mean!r}, expected token, sequence or constant")
        if not 0 < self.clip_low <= 1 or not self.clip_high > 0 or not self.kl_coef >= 0:
            raise ValueError(f"loss: clip_low {self.clip_low}, clip_high {self.clip_high}, kl_coef "
                             f"{self.kl_coef}; expected clip_low in (0, 1], clip_high above 0, kl_coef 0 or "
                             "more")


def token_weights(lengths_N: np.ndarray, mean: str, max_new_tokens: int) -> np.ndarray:
    """[N] weight of each token of answer n in the loss, for the whole global batch, dead groups included.

    lengths_N: response tokens of each answer. See LossConfig.mean.
    """
    lengths_N = np.asarray(lengths_N, np.float64)
    if mean == "token":
        return np.full(len(lengths_N), 1 / lengths_N.sum())
    if mean == "sequence":
        return 1 / (len(lengths_N) * lengths_N)
    return np.full(len(lengths_N), 1 / (len(lengths_N) * max_new_tokens))


def grpo_loss(logp, old_logp, ref_logp, advantages, weights, c: LossConfig) -> tuple[torch.Tensor, dict]:
    """Weighted sum over tokens of -min(ratio A, clip(ratio) A) + kl_coef k3   (DeepSeekMath, eq. 1 and 4).

    All [R], one a response token: logp (differentiable), old_logp and ref_logp (constants; ref_logp None
    where kl_coef is 0), advantages and weights. ratio = exp(logp - old_logp); k3 = exp(d) - d - 1 with d =
    ref_logp - logp (Schulman 2020, "Approximating KL divergence"), never negative.
    On-policy the ratio is 1 and the loss hovers about 0, for advantages sum to 0: its gradient is what
    counts. Returns the loss and the weighted sums of what a log shows, detached.
    """
    log_ratio = (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
    # the minimum is the pessimist's choice for either sign of A: for A < 0 the gradient stays above 1 +
    # clip_high
    loss = -(torch.minimum(ratio * advantages, clipped * advantages) * weights).sum()
    with torch.no_grad():
        metrics = {
            "clipped_low": (((ratio < 1 - c.clip_low) & (advantages < 0)) * weights).sum(),
            "clipped_high": (((ratio > 1 + c.clip_high) & (advantages > 0)) * weights).sum(),
        }
    if c.kl_coef > 0:
        d = (ref_logp - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = ((d.exp() - d - 1) * weights).sum()
        loss = loss + c.kl_coef * kl
        metrics["kl_loss"] = kl.detach()
    return loss, metrics
