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
from ..kernels.grpo import KL_ESTIMATORS, OBJECTIVES, POLICY_METRICS
from ..model.distributed import all_sum

MEANS = ("token", "sequence", "constant")


@dataclass(frozen=True)
class LossConfig:
    """The options of the loss."""

    objective: str = "clip"
    """What is maximised. "clip": each token's ratio within its bounds (PPO, GRPO, DAPO). "gspo":
    one ratio per sequence (arXiv 2507.18071). "cispo": the clipped ratio as a constant weight
    (arXiv 2506.13585). "reinforce": no ratio."""
    clip_low: float = 0.2
    """The ratio to the old policy earns nothing by falling below 1 - clip_low. (cispo: the lowest
    weight is 1 - clip_low.)"""
    clip_high: float = 0.2
    """The ratio to the old policy earns nothing by rising above 1 + clip_high (DAPO, arXiv
    2503.14476: 0.28; GSPO: 0.0004). (cispo: the highest weight is 1 + clip_high.)"""
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
    """Cap on the weight (trainer's probability / sampler's) of each token, or of each sequence with
    gspo. It corrects for a sampler that rounds differently (truncated importance sampling). 0 turns
    it off."""
    overlong_filter: bool = False
    """Leave answers that were cut off out of the loss and its mean; they still count in the
    baseline."""

    def __post_init__(self):
        choices = {
            "objective": OBJECTIVES,
            "mean": MEANS,
            "kl_in": ("loss", "reward"),
            "kl_estimator": KL_ESTIMATORS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"loss: {name} is {getattr(self, name)!r}, expected one of {known}"
                )
        above_zero, at_least_zero = 1e-9, 0
        bounds = {
            "clip_low": (above_zero, 1),
            "clip_high": (above_zero, math.inf),
            "kl_coef": (at_least_zero, math.inf),
            "entropy_coef": (at_least_zero, math.inf),
            "max_importance": (at_least_zero, math.inf),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most:
                expected = "above 0" if least else "0 or more"
                limit = f", and at most {most}" if most < math.inf else ""
                raise ValueError(f"loss: {name} is {value}; expected {expected}{limit}")


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
    bound: float,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """[R]: min(p_trainer / p_sampler, bound) of each token: multiply the advantage by it.

    With `offsets` [n + 1] every token of a sequence has the geometric mean of that sequence's
    ratios (GSPO).

    Per-token weights correct each token's own probability but not the distribution of its prefix,
    as PPO's ratio does (truncated importance sampling, Ionides 2008). The gradient is exact only
    for one-token answers and unclipped weights; otherwise its bias shrinks as the two policies
    agree.
    """
    log_ratio = (old_logp - sampler_logp).detach().double()
    if offsets is not None:
        ends = torch.cat([log_ratio.new_zeros(1), log_ratio.cumsum(0)])[offsets.long()]
        lengths = offsets.diff()
        means = ends.diff() / lengths.clamp(min=1)
        log_ratio = means.repeat_interleave(lengths, output_size=len(log_ratio))
    return log_ratio.exp().clamp(max=bound).to(old_logp.dtype)


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
