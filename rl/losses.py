"""The loss of the family: its options, its one global mean, and its metrics.

The mean is a weight on each token, made once for the whole batch (`loss_weights`). The loss of a
micro-batch is a plain weighted sum, so the gradient depends neither on how the batch is cut nor on
how many processes share it. kernels/grpo.py has the maths of the objectives.

The KL to the reference, token by token with d = ref_logp - logp (Schulman 2020, "Approximating KL
divergence"):

    estimator   value         its on-policy gradient in the loss     and in the reward
    k1          -d            0 in expectation: nothing but noise    that of KL(policy || ref),
                                                                     exactly: what PPO does
    k2          d^2 / 2       that of KL(policy || ref) per token,   a price for what is unlikely
                              for the states as they are             in either direction
    k3          e^d - d - 1   that of KL(ref || policy) per token:   biased: not the KL's gradient
                              the same to first order only

In the reward the KL is a number like any other, and the policy gradient does the rest, the effect
of a token on later ones included. In the loss it is differentiated token by token, without that
effect. k3 works in the loss but not in the reward: for answers of one token its gradient there
vanishes to first order.

Shapes: N answers, R response tokens.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels import grpo as kernel
from ..kernels.dispatch import widest_dtype
from ..kernels.grpo import KL_ESTIMATORS, OBJECTIVES, POLICY_METRICS
from ..model.distributed import all_sum

MEANS = ("token", "sequence", "constant")
IMPORTANCES = ("token", "sequence", "geometric")


@dataclass(frozen=True)
class LossConfig:
    """The options of the loss."""

    objective: str = "clip"
    """What is maximised. "clip": each token's ratio within its bounds (PPO, GRPO, DAPO). "gspo":
    one ratio per sequence (arXiv 2507.18071). "cispo": the clipped ratio as a constant weight
    (arXiv 2506.13585). "dppo": each token's probability within its bounds (arXiv 2602.04879).
    "reinforce": no ratio."""
    clip_low: float = 0.2
    """The ratio to the old policy earns nothing by falling below 1 - clip_low. (cispo: the lowest
    weight is 1 - clip_low. dppo: the probability earns nothing by falling by more than
    clip_low.)"""
    clip_high: float = 0.2
    """The ratio to the old policy earns nothing by rising above 1 + clip_high (DAPO, arXiv
    2503.14476: 0.28; GSPO: 0.0004). (cispo: the highest weight is 1 + clip_high. dppo: the
    probability earns nothing by rising by more than clip_high; 0.15 in the paper.)"""
    mean: str = "token"
    """What the mean is taken over. "token": all tokens of the batch (DAPO). "sequence": the tokens
    of each answer, then the answers (DeepSeekMath). "constant": the answers, with their tokens
    divided by max_new_tokens, so that length has no weight (Dr. GRPO)."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference; 0 leaves it out (R1-Zero: 0.001)."""
    kl_in: str = "loss"
    """Where the KL counts: in the "loss" (GRPO) or in the "reward" (PPO, RLOO, REINFORCE++)."""
    kl_estimator: str = "k3"
    """The estimator of the KL: k1, k2 or k3. k1 in the loss adds only noise."""
    entropy_coef: float = 0.0
    """Weight of a bonus for the entropy of each token's distribution."""
    max_importance: float = 0.0
    """Cap on the importance weight, which is the trainer's probability over the sampler's. It
    corrects for a sampler that rounds differently (truncated importance sampling). 0 turns it
    off."""
    importance: str = "token"
    """What has an importance weight of its own. "token": each token; its prefix stays the
    sampler's. "sequence": each answer, the product of its tokens' weights; exact but for the cap.
    "geometric": each answer, the product to the power of 1 / length, which is biased but does not
    grow with length; gspo has it where it says "token"."""
    importance_mask: bool = False
    """Drop what has an importance weight above max_importance or below min_importance, instead of
    lowering the weight to the cap (IcePop, arXiv 2510.18855: tokens outside of 0.5 to 5; MIS:
    sequences above 2)."""
    min_importance: float = 0.0
    """Lower bound of the importance weights that importance_mask keeps."""
    overlong_filter: bool = False
    """Leave answers that were cut off out of the loss and its mean; they still count in the
    baseline."""

    def __post_init__(self):
        self.check_choices()
        self.check_bounds()
        self.check_importance()

    def check_choices(self) -> None:
        choices = {
            "objective": OBJECTIVES,
            "mean": MEANS,
            "kl_in": ("loss", "reward"),
            "kl_estimator": KL_ESTIMATORS,
            "importance": IMPORTANCES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"loss: {name} is {getattr(self, name)!r}, expected one of {known}"
                )

    def check_bounds(self) -> None:
        above_zero, at_least_zero = 1e-9, 0
        # a ratio has no upper bound, a probability has
        highest_clip = 1 if self.objective == "dppo" else math.inf
        bounds = {
            "clip_low": (above_zero, 1),
            "clip_high": (above_zero, highest_clip),
            "kl_coef": (at_least_zero, math.inf),
            "entropy_coef": (at_least_zero, math.inf),
            "max_importance": (at_least_zero, math.inf),
            "min_importance": (at_least_zero, math.inf),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most:
                expected = "above 0" if least else "0 or more"
                limit = f", and at most {most}" if most < math.inf else ""
                raise ValueError(f"loss: {name} is {value}; expected {expected}{limit}")

    def check_importance(self) -> None:
        if self.importance_mask and not self.min_importance <= 1 <= self.max_importance:
            raise ValueError(
                f"loss: importance_mask keeps weights from {self.min_importance:g} (min_importance)"
                f" to {self.max_importance:g} (max_importance); expected bounds on either side of "
                "1, the weight where sampler and trainer agree"
            )
        if self.min_importance > 0 and not self.importance_mask:
            raise ValueError(
                f"loss: min_importance is {self.min_importance:g} without importance_mask; a small "
                "weight needs no floor, so expected importance_mask, or 0"
            )

    @property
    def importance_level(self) -> str:
        """`importance`, but for gspo: its one ratio per sequence takes one weight per sequence."""
        is_gspo = self.objective == "gspo"
        return "geometric" if is_gspo and self.importance == "token" else self.importance


def loss_weights(lengths_N: np.ndarray, mean: str, max_new_tokens: int) -> np.ndarray:
    """[N]: the weight of each token of answer n in the loss, for the whole global batch.

    lengths_N: response tokens per answer, 0 for one that is left out; the answers of dead groups
    count. mean: see LossConfig. The denominator is that of all processes together.
    """
    lengths_N = np.asarray(lengths_N, np.float64)
    counts = np.array([lengths_N.sum(), (lengths_N > 0).sum()], np.float64)
    n_tokens, n_answers = np.maximum(1, all_sum(counts))
    if mean == "token":
        weights_N = np.full(len(lengths_N), 1 / n_tokens)
    elif mean == "sequence":
        weights_N = 1 / (n_answers * np.maximum(lengths_N, 1))
    else:
        weights_N = np.full(len(lengths_N), 1 / (n_answers * max_new_tokens))
    return weights_N * (lengths_N > 0)


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    config: LossConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss [], metrics) of a batch: [R] inputs, one number per response token; offsets [n + 1].

    kernels/grpo.py has the maths and the errors raised. On-policy the ratio is 1 and the loss is
    near 0, because the advantages of a group sum to 0; only its gradient matters.
    """
    if config.kl_coef == 0 or config.kl_in != "loss":  # the reference is not looked at
        ref_logp = None
    return kernel.policy_loss(
        logp,
        old_logp,
        ref_logp,
        advantages,
        weights,
        offsets,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        kl_coef=config.kl_coef,
        objective=config.objective,
        kl_estimator=config.kl_estimator,
    )


def kl_estimate(logp_R: np.ndarray, ref_logp_R: np.ndarray, estimator: str) -> np.ndarray:
    """[R]: k1, k2 or k3 of each token, as numbers for the reward."""
    d = ref_logp_R - logp_R
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d * d / 2
    return np.expm1(d) - d


def entropy_bonus(entropy_R: torch.Tensor, weights_R: torch.Tensor, coef: float) -> torch.Tensor:
    """Minus coef times the mean entropy, in nats: the part of the loss that keeps the policy from
    settling too early (Williams & Peng 1991)."""
    return -coef * (weights_R * entropy_R).sum()


def importance_weights(
    old_logp: torch.Tensor,
    sampler_logp: torch.Tensor,
    offsets: torch.Tensor,
    config: LossConfig,
) -> torch.Tensor:
    """[R]: the importance weight of each token, to multiply its advantage by; 0 if it is dropped.

    old_logp, sampler_logp: [R], of the trainer and of the sampler; offsets: [n + 1], where each
    sequence's tokens begin. With w the ratio of the two probabilities:

        token       w_t: corrects each token's own probability, but not the distribution of its
                    prefix, nor what follows, as PPO's ratio does. The bias grows with length; the
                    gradient is exact for one-token answers (Ionides 2008; "TIS").
        sequence    the product of the w_t of the answer: the importance weight of the answer as a
                    whole. Below the cap it makes the gradient exactly that of the trainer's policy
                    (Liu, Li et al. 2025, "When speed kills stability"). Its spread grows with
                    length, so long answers meet the cap often.
        geometric   the product to the power of 1 / length: GSPO's ratio. Biased, but long and short
                    answers meet the same bounds.

    Weights above the cap are lowered to it; with importance_mask, what lies outside of the bounds
    is dropped (arXiv 2510.18855 for tokens, "MIS" for sequences). What is dropped still counts in
    the mean's denominator, as an answer of no reward does: without that, the more is dropped, the
    larger the steps would be. The KL in the loss and the entropy bonus have no such weight.
    """
    log_ratio = (old_logp - sampler_logp).detach().to(widest_dtype(old_logp.device))
    # One ratio per sequence, for all of its tokens.
    level = config.importance_level
    if level != "token":
        ends = torch.cat([log_ratio.new_zeros(1), log_ratio.cumsum(0)])[offsets.long()]
        lengths = offsets.diff()
        per_sequence = ends.diff()
        if level == "geometric":
            per_sequence = per_sequence / lengths.clamp(min=1)
        log_ratio = per_sequence.repeat_interleave(lengths, output_size=len(log_ratio))
    ratio = log_ratio.exp()
    # Lower what is above the cap, or drop what is outside of the bounds. NaN stays NaN.
    if config.importance_mask:
        is_outside = (ratio < config.min_importance) | (ratio > config.max_importance)
        ratio = ratio.masked_fill(is_outside, 0.0)
    return ratio.clamp(max=config.max_importance).to(old_logp.dtype)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    weights: torch.Tensor,
    clip: float,
) -> torch.Tensor:
    """PPO's loss of a critic: sum w max((V - R)^2, (V' - R)^2) / 2; all inputs are [R].

    V' is V kept within +-clip of the old value (from the PPO code of Schulman et al. 2017, not its
    paper); clip 0 leaves V' out.
    """
    error = (values - returns).square()
    if clip:
        kept = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (kept - returns).square())
    return 0.5 * (weights * error).sum()


def mean_metrics(parts: list[torch.Tensor], n_updates: int) -> dict[str, float]:
    """What a log shows of the metrics of all micro-batches of a step. Reads the device once.

    loss and kl_loss, whose weights are a whole batch's in each update, are means over the updates;
    ratio_max is the largest; cut_off is a count; the others are means over the tokens that teach
    something.
    """
    empty = np.zeros((1, len(POLICY_METRICS)))
    table = torch.stack(parts).cpu().double().numpy() if parts else empty
    sums = dict(zip(POLICY_METRICS, table.sum(0).tolist(), strict=True))
    tokens = max(1.0, sums.pop("tokens"))
    sums["ratio_max"] = float(table[:, POLICY_METRICS.index("ratio_max")].max())
    divisors = {"loss": n_updates, "kl_loss": n_updates, "cut_off": 1, "ratio_max": 1}
    return {name: value / divisors.get(name, tokens) for name, value in sums.items()}
