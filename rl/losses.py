"""The GRPO loss: its dials, its one global mean, and what a log shows of it.

The mean is a weight on each token, made once for the whole batch (`token_weights`); the loss of a micro-batch
is a plain weighted sum, so the gradient does not depend on how the batch is cut.
"""
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels import grpo as kernel
from ..kernels.grpo import GRPO_METRICS, GRPO_OBJECTIVES


@dataclass(frozen=True)
class LossConfig:
    """The dials of the loss."""

    clip_low: float = 0.2
    """The ratio to the old policy earns nothing more below 1 - clip_low."""
    clip_high: float = 0.2
    """... nor above 1 + clip_high; DAPO (arXiv 2503.14476) takes 0.28."""
    objective: str = "clip"
    """"clip": each token's ratio within its bounds (GRPO, DAPO). "gspo": one ratio a sequence (arXiv
    2507.18071; its bounds are far smaller: 0.0003 and 0.0004). "cispo": the clipped ratio as a constant
    weight (arXiv 2506.13585)."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference, k3 estimator, inside the loss; 0 leaves it out (R1-Zero took
    0.001)."""
    mean: str = "token"
    """"token": over all tokens of the batch (DAPO). "sequence": over the tokens of each answer, then over
    answers (DeepSeekMath). "constant": over answers, tokens divided by `max_new_tokens` (Dr. GRPO), so length
    has no weight."""

    def __post_init__(self):
        if self.objective not in GRPO_OBJECTIVES:
            raise ValueError(f"loss: objective is {self.objective!r}, expected one of {GRPO_OBJECTIVES}")
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
        return 1 / (len(lengths_N) * np.maximum(lengths_N, 1))
    return np.full(len(lengths_N), 1 / (len(lengths_N) * max_new_tokens))


def grpo_loss(logp: torch.Tensor, old_logp: torch.Tensor, ref_logp: torch.Tensor | None,
              advantages: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor,
              c: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, and its metrics; kernels/grpo.py has the maths, the shapes and the errors.

    On-policy the ratio is 1 and the loss hovers about 0, for advantages sum to 0: its gradient is what
    counts. ref_logp is not looked at where kl_coef is 0.
    """
    return kernel.grpo_loss(logp, old_logp, advantages, weights, offsets, ref_logp if c.kl_coef else None,
                            clip_low=c.clip_low, clip_high=c.clip_high, kl_coef=c.kl_coef,
                            objective=c.objective)


def mean_metrics(parts: list[torch.Tensor], n_updates: int) -> dict[str, float]:
    """What a log shows of the metrics of all micro-batches of a step: loss and kl_loss, whose weights are a
    whole batch's in each update, as means over the updates; ratio_max, the largest; cut_off, a count; the
    others as means over the tokens that teach something. Reads the device once."""
    table = torch.stack(parts).double().cpu().numpy() if parts else np.zeros((1, len(GRPO_METRICS)))
    sums = dict(zip(GRPO_METRICS, table.sum(0).tolist(), strict=True))
    tokens = max(1.0, sums.pop("tokens"))
    divisors = {"loss": n_updates, "kl_loss": n_updates, "cut_off": 1, "ratio_max": 1}
    sums["ratio_max"] = float(table[:, GRPO_METRICS.index("ratio_max")].max())
    return {name: value / divisors.get(name, tokens) for name, value in sums.items()}
