"""The loss of the family: its dials, its one global mean, and what a log shows of it.

The mean is a weight on each token, made once for the whole batch (`token_weights`); the loss of a micro-batch
is a plain weighted sum, so the gradient depends neither on how the batch is cut nor on how many processes
share it. kernels/grpo.py has the maths of the objectives.

The KL to the reference, a token at a time with d = ref_logp - logp (Schulman 2020, "Approximating KL"):

    estimator   value           in the loss, its gradient is on-policy          in the reward
    k1          -d              0 in expectation: it does nothing but noise    that of KL(policy||reference),
                                                                               exactly: what PPO does
    k2          d^2 / 2         that of KL(policy || reference) of each token, a price for what is unlikely in
                                for the states as they are                     either direction
    k3          e^d - d - 1     that of KL(reference || policy) of each token: biased: its gradient is not the
                                the same to first order only                   KL's

In the reward it is a number like any other, and the policy gradient does the rest, the effect of a token on
the later ones too; in the loss it is differentiated, token by token, and that effect is left out. What k3 has
in the loss it lacks in the reward: for answers of one token nothing is left there to first order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels import grpo as kernel
from ..kernels.grpo import KL_ESTIMATORS, OBJECTIVES, POLICY_METRICS

MEANS = ("token", "sequence", "constant")


@dataclass(frozen=True)
class LossConfig:
    """The dials of the loss. One that is not given is as --algo has it."""

    objective: str | None = None
    """"clip": each token's ratio within its bounds (PPO, GRPO, DAPO). "gspo": one ratio a sequence (arXiv
    2507.18071). "cispo": the clipped ratio as a constant weight (arXiv 2506.13585). "reinforce": no ratio."""
    clip_low: float | None = None
    """The ratio to the old policy earns nothing more below 1 - clip_low."""
    clip_high: float | None = None
    """... nor above 1 + clip_high; 0.2, DAPO (arXiv 2503.14476) 0.28, GSPO 0.0004."""
    mean: str | None = None
    """"token": over all tokens of the batch (DAPO). "sequence": over the tokens of each answer, then over
    answers (DeepSeekMath). "constant": over answers, tokens divided by `max_new_tokens` (Dr. GRPO), so length
    has no weight."""
    kl_coef: float | None = None
    """Weight of the KL to the reference; 0 leaves it out (R1-Zero took 0.001)."""
    kl_in: str | None = None
    """"loss" (GRPO) or "reward" (PPO, RLOO, REINFORCE++)."""
    kl_estimator: str | None = None
    """k1, k2 or k3; rl/losses.py says what each one's gradient is. k1 in the loss does nothing."""
    entropy_coef: float | None = None
    """Weight of an entropy bonus in the loss; the entropy is that of each token's distribution."""
    max_importance: float | None = None
    """Weigh each token by (trainer's probability / sampler's), at most this: corrects for a sampler that
    rounds otherwise (truncated importance sampling). 0 for none."""
    overlong_filter: bool | None = None
    """Leave answers that were cut off out of the loss and its mean; they still count in the baseline."""

    def __post_init__(self):
        for name, known in (
            ("objective", OBJECTIVES),
            ("mean", MEANS),
            ("kl_in", ("loss", "reward")),
            ("kl_estimator", KL_ESTIMATORS),
        ):
            if getattr(self, name) not in (None, *known):
                raise ValueError(
                    f"loss: {name} is {getattr(self, name)!r}, expected one of {known}"
                )
        for name, least, most in (
            ("clip_low", 1e-9, 1),
            ("clip_high", 1e-9, math.inf),
            *((name, 0, math.inf) for name in ("kl_coef", "entropy_coef", "max_importance")),
        ):
            if (value := getattr(self, name)) is not None and not least <= value <= most:
                raise ValueError(
                    f"loss: {name} is {value}; expected {'above 0' if least else '0 or more'}"
                    + (f", and at most {most}" if most < math.inf else "")
                )


def token_weights(
    lengths_N: np.ndarray, mean: str, max_new_tokens: int, total: Callable = np.asarray
) -> np.ndarray:
    """[N] weight of each token of answer n in the loss, for the whole global batch, dead groups included.

    lengths_N: response tokens of each answer, 0 for one that is left out. See LossConfig.mean. total: adds an
    array up over processes, so that all share one denominator.
    """
    lengths_N = np.asarray(lengths_N, np.float64)
    n_tokens, n_answers = np.maximum(
        1, total(np.array([lengths_N.sum(), (lengths_N > 0).sum()], np.float64))
    )
    if mean == "token":
        weights = np.full(len(lengths_N), 1 / n_tokens)
    elif mean == "sequence":
        weights = 1 / (n_answers * np.maximum(lengths_N, 1))
    else:
        weights = np.full(len(lengths_N), 1 / (n_answers * max_new_tokens))
    return weights * (lengths_N > 0)


def grpo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    c: LossConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, and its metrics; kernels/grpo.py has the maths, the shapes and the errors.

    On-policy the ratio is 1 and the loss hovers about 0, for advantages sum to 0: its gradient is what
    counts. ref_logp is not looked at where there is no KL in the loss.
    """
    ref_logp = ref_logp if c.kl_coef and c.kl_in == "loss" else None
    sizes = offsets.diff().long()
    if advantages.shape == weights.shape:  # one per sequence
        advantages = advantages.repeat_interleave(sizes, output_size=len(logp))
    weights = weights.repeat_interleave(sizes, output_size=len(logp))
    return kernel.policy_loss(
        logp,
        old_logp,
        ref_logp,
        advantages,
        weights,
        offsets,
        clip_low=c.clip_low,
        clip_high=c.clip_high,
        kl_coef=c.kl_coef,
        objective=c.objective,
        kl_estimator=c.kl_estimator,
    )


def kl_estimate(logp_R: np.ndarray, ref_logp_R: np.ndarray, estimator: str) -> np.ndarray:
    """[R] k1, k2 or k3 of each token, as numbers for the reward."""
    d = ref_logp_R - logp_R
    return {"k1": lambda: -d, "k2": lambda: d * d / 2, "k3": lambda: np.expm1(d) - d}[estimator]()


def entropy_bonus(entropy_R: torch.Tensor, weights_R: torch.Tensor, coef: float) -> torch.Tensor:
    """The part of the loss that keeps the policy from settling too early (Williams & Peng 1991): -coef times
    the mean entropy, in nats."""
    return -coef * (weights_R * entropy_R).sum()


def importance_weights(
    old_logp: torch.Tensor,
    sampler_logp: torch.Tensor,
    bound: float,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """min(p_trainer / p_sampler, bound), a constant, for each token [R]; for each sequence [N], of the
    geometric mean of its tokens' ratios, if `offsets` [N + 1] are given (GSPO).

    The advantage is multiplied by it. One a token makes each choice as likely as the trainer's policy makes
    it, but for what the bound cuts off (truncated importance sampling, Ionides 2008); the tokens before and
    after stay the sampler's, as with PPO's ratio. So the gradient is exactly that of the trainer's own policy
    for answers of one token only, and otherwise the nearer, the nearer the two policies are.
    """
    x = (old_logp - sampler_logp).detach().double()
    if offsets is not None:
        ends = torch.cat([x.new_zeros(1), x.cumsum(0)])[offsets.long()]
        x = ends.diff() / offsets.diff().clamp(min=1)
    return x.exp().clamp(max=bound).to(old_logp.dtype)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    weights: torch.Tensor,
    clip: float,
) -> torch.Tensor:
    """PPO's loss of a critic: sum w max((V - R)^2, (V' - R)^2) / 2 with V' = V kept within +-clip of the old
    value (the PPO code of Schulman et al. 2017, not its paper); clip 0 leaves V' out. All [R]."""
    error = (values - returns).square()
    if clip:
        kept = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (kept - returns).square())
    return 0.5 * (weights * error).sum()


def mean_metrics(parts: list[torch.Tensor], n_updates: int) -> dict[str, float]:
    """What a log shows of the metrics of all micro-batches of a step: loss and kl_loss, whose weights are a
    whole batch's in each update, as means over the updates; ratio_max, the largest; cut_off, a count; the
    others as means over the tokens that teach something. Reads the device once."""
    table = (
        torch.stack(parts).double().cpu().numpy() if parts else np.zeros((1, len(POLICY_METRICS)))
    )
    sums = dict(zip(POLICY_METRICS, table.sum(0).tolist(), strict=True))
    tokens = max(1.0, sums.pop("tokens"))
    divisors = {"loss": n_updates, "kl_loss": n_updates, "cut_off": 1, "ratio_max": 1}
    sums["ratio_max"] = float(table[:, POLICY_METRICS.index("ratio_max")].max())
    return {name: value / divisors.get(name, tokens) for name, value in sums.items()}
