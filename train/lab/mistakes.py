"""Classic mistakes, to be made on purpose: `r1zero grpo --break NAME`.

`r1zero compare` runs one beside the right thing and plots both. Each mistake replaces one function
of a Learner; nothing outside this file knows of them. Most were found in public implementations,
where they went unnoticed because the curves still rose, only less, or because nobody looked.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ...eval.console import say
from ...kernels.grpo import POLICY_METRICS
from ...rl.advantages import advantages
from ...rl.losses import loss_weights, policy_loss


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What sets the second run of a comparison apart, and where it shows."""

    what: str
    """What is done, and what is right."""
    watch: str
    """The metric in which it shows."""
    seen: str
    """What was seen of it, or that it was not."""
    shows_with: dict = field(default_factory=dict)
    """Options of grpo that both runs need for it to show, as on the command line."""

    @property
    def flags(self) -> str:
        """`shows_with` as on the command line."""
        return " ".join(
            f"--{name.replace('_', '-')} {value:g}" for name, value in self.shows_with.items()
        )


@dataclass(frozen=True, kw_only=True)
class Mistake(Difference):
    replaces: str
    """Which function of the learner is wrong: "advantages", "loss_weights" or "policy_loss"."""
    wrong: Callable
    """The wrong function, with the right one's arguments."""

    def make(self, learner) -> None:
        """Make the mistake in a Learner (rl/step.py)."""
        owner = learner.credit if self.replaces == "advantages" else learner
        setattr(owner, self.replaces, self.wrong)


# ---- wrong losses: (logp, old_logp, ref_logp, advantages, weights, offsets, config) ----


def with_kl(loss, metrics, kl, config):
    """`loss` with the KL added, and the metrics that say so."""
    loss = loss + config.kl_coef * kl
    metrics = metrics.clone()
    for name, value in (("loss", loss), ("kl_loss", kl)):
        metrics[POLICY_METRICS.index(name)] = value.detach()
    return loss, metrics


def k1_loss(logp, old_logp, ref_logp, advantages, weights, offsets, config):
    config = replace(config, kl_estimator="k1")
    return policy_loss(logp, old_logp, ref_logp, advantages, weights, offsets, config)


def flipped_k3(logp, old_logp, ref_logp, advantages, weights, offsets, config):
    """e^-d + d - 1 with d = ref_logp - logp."""
    without = replace(config, kl_coef=0.0)
    loss, metrics = policy_loss(logp, old_logp, None, advantages, weights, offsets, without)
    if ref_logp is None:
        return loss, metrics
    d = (logp - ref_logp).clamp(-20, 20)
    kl = (weights * (d.exp() - d - 1)).sum()
    return with_kl(loss, metrics, kl, config)


def flipped_clip(logp, old_logp, ref_logp, advantages, weights, offsets, config):
    """max(r A, clip(r) A), the optimist's choice: minus the loss of -A has it. The KL keeps its
    sign."""
    without = replace(config, kl_coef=0.0)
    loss, metrics = policy_loss(logp, old_logp, None, -advantages, weights, offsets, without)
    kl = logp.new_zeros(())
    if ref_logp is not None and config.kl_coef:
        alone, nothing = replace(config, kl_coef=1.0), torch.zeros_like(advantages)
        kl, _ = policy_loss(logp, old_logp, ref_logp, nothing, weights, offsets, alone)
    return with_kl(-loss, metrics, kl, config)


def no_end_token(logp, old_logp, ref_logp, advantages, weights, offsets, config):
    """The last token of every answer gives no gradient, as with a mask for a pad token that equals
    the end token."""
    is_last = torch.zeros_like(logp, dtype=torch.bool)
    is_last[offsets[1:].long()[offsets.diff() > 0] - 1] = True
    logp = torch.where(is_last, logp.detach(), logp)
    return policy_loss(logp, old_logp, ref_logp, advantages, weights, offsets, config)


def micro_batch_mean(logp, old_logp, ref_logp, advantages, weights, offsets, config):
    weights = (weights != 0).to(weights.dtype) / max(1, len(logp))
    return policy_loss(logp, old_logp, ref_logp, advantages, weights, offsets, config)


# ---- wrong weights: (lengths_N, mean, max_new_tokens) ----


def own_length(lengths_N, mean, max_new_tokens):
    return loss_weights(lengths_N, "sequence", max_new_tokens)


def summed(lengths_N, mean, max_new_tokens):
    return loss_weights(lengths_N, mean, max_new_tokens) * len(lengths_N)


# ---- wrong advantages: see rl/advantages.py ----


def instead_of_advantages(wrong: Callable) -> Callable:
    """A function with the arguments of `advantages` that gives wrong(rewards_N, group_offsets,
    config), [N]; a critic's returns stay."""

    def replacement(rewards_N, group_offsets, response_offsets, config, *rest):
        _, returns_R = advantages(rewards_N, group_offsets, response_offsets, config, *rest)
        wrong_N = wrong(np.asarray(rewards_N, np.float64), group_offsets, config)
        return np.repeat(wrong_N, np.diff(response_offsets)), returns_R

    return replacement


def bare_rewards(rewards_N, group_offsets, config):
    return rewards_N


def unguarded(rewards_N, group_offsets, config):
    """A group's rewards differ by rounding, and are divided by their standard deviation all the
    same."""
    rng = np.random.default_rng(len(rewards_N))
    noisy = rewards_N + 1e-9 * rng.standard_normal(len(rewards_N))
    groups = [noisy[a:b] for a, b in zip(group_offsets[:-1], group_offsets[1:], strict=True)]
    return np.concatenate([(g - g.mean()) / (g.std() or 1.0) for g in groups if len(g)])


def neighbours(rewards_N, group_offsets, config):
    """Each answer is compared with the group before its own, the first with the last: an index off
    by one."""
    sizes = np.diff(group_offsets)

    def mean_of(values_N):
        sums = np.diff(np.append(0.0, np.cumsum(values_N))[group_offsets])
        return sums / np.maximum(sizes, 1)

    mean_G = mean_of(rewards_N)
    std_G = np.ones(len(mean_G))
    if config.scale == "std":
        std_G = np.sqrt(np.maximum(mean_of(rewards_N**2) - mean_G**2, 0))
    std_G[std_G < 1e-6] = 1.0
    mean_N, std_N = (np.repeat(np.roll(x, 1), sizes) for x in (mean_G, std_G))
    return (rewards_N - mean_N) / std_N


# The numbers in `seen` are those of 16 steps on Countdown with 3 numbers, from the demo's base
# model of 0.9 M parameters.
MISTAKES = {
    "k1_loss": Mistake(
        what="the KL's estimator k1 as a loss: k3's gradient pulls to the reference, k1's is 0 on "
        "average",
        watch="kl_to_reference",
        seen="Four times as far from the reference (0.016 nats per token, not 0.004), as without "
        "any KL.",
        replaces="policy_loss",
        wrong=k1_loss,
        shows_with={"loss.kl_coef": 1.0},
    ),
    "flipped_k3": Mistake(
        what="k3 with the sign of the log-ratio flipped: the same to second order, but another "
        "distance further out",
        watch="kl_to_reference",
        seen="Nothing: both stay within 0.004 nats per token, where the two are the same. Far out "
        "this one prices only what has become more likely, without bound, and not what was "
        "given up.",
        replaces="policy_loss",
        wrong=flipped_k3,
        shows_with={"loss.kl_coef": 1.0},
    ),
    "flipped_clip": Mistake(
        what="the maximum of the two surrogates: beyond the bound it pulls on; the minimum is the "
        "trust region",
        watch="kl_to_reference",
        seen="The run falls apart: 0 % right instead of 78 %, every answer cut off, 5 nats from "
        "the reference.",
        replaces="policy_loss",
        wrong=flipped_clip,
        shows_with={"updates_per_step": 8},
    ),
    "length_bias": Mistake(
        what="each answer divided by its own length, GRPO's first form: a wrong answer costs less "
        "the longer it is",
        watch="length",
        seen="Nothing at this scale (44 tokens and 45, 44 % right and 43 %): it needs long wrong "
        "answers.",
        replaces="loss_weights",
        wrong=own_length,
    ),
    "micro_batch_mean": Mistake(
        what="each micro-batch's own mean, added up: the gradient depends on the cut",
        watch="gradient_norm",
        seen="Ten times the gradient (1.3, not 0.13) with --micro-tokens 2048, and another one "
        "with another cut. Adam hides it as a higher learning rate (46 % right, not 43 %).",
        replaces="policy_loss",
        wrong=micro_batch_mean,
    ),
    "sum_of_groups": Mistake(
        what="the sum over answers, not the mean: the gradient grows with the batch",
        watch="gradient_norm",
        seen="A gradient of 44, not 0.13, which clipping and Adam hide. It acts as a higher "
        "learning rate, which even helps here (49 % right, not 43 %), and changes with the "
        "batch size.",
        replaces="loss_weights",
        wrong=summed,
    ),
    "no_end_token": Mistake(
        what="the end token masked, as if it were padding: nothing teaches when to stop",
        watch="truncated",
        seen="Nothing from a base that stops by itself, as this one does (1.4 % and 1.6 % cut "
        "off). From random weights, paid for brevity alone, the right run answers in 2 tokens "
        "where the broken one still takes 14: it learns to stop only by what other tokens lose.",
        replaces="policy_loss",
        wrong=no_end_token,
    ),
    "no_baseline": Mistake(
        what="the reward instead of the advantage: every answer that earns anything is made more "
        "likely",
        watch="accuracy",
        seen="39 % right, not 43 %, at the edge of what chance does: it is right on average, but "
        "has more noise.",
        replaces="advantages",
        wrong=instead_of_advantages(bare_rewards),
    ),
    "unguarded_std": Mistake(
        what="a standard deviation that is rounding alone: groups without signal count as much as "
        "the others",
        watch="trained_samples",
        seen="All 128 answers of a step are trained on, where 70 have something to teach. The rest "
        "is noise, which 16 steps do not show in accuracy (32 % both).",
        replaces="advantages",
        wrong=instead_of_advantages(unguarded),
        shows_with={"group_size": 2, "prompts_per_step": 64},
    ),
    "wrong_group": Mistake(
        what="answers compared with another problem's group: hard problems are punished, easy ones "
        "praised",
        watch="accuracy",
        seen="Nothing in 16 steps (43 % right both): a mean of other answers is a fair baseline, "
        "but says nothing about this problem. The gradient is right on average, with more noise.",
        replaces="advantages",
        wrong=instead_of_advantages(neighbours),
    ),
}


def warn_of(name: str) -> None:
    """Show a banner that nobody overlooks."""
    mistake, line = MISTAKES[name], "!" * 100
    shows = f" (shows with {mistake.flags})" if mistake.flags else ""
    banner = [
        line,
        f"! BROKEN ON PURPOSE: --break {name}",
        f"! {mistake.what}",
        f"! Look at: {mistake.watch}{shows}. Keep nothing of this run but the lesson.",
        line,
    ]
    say("\n".join(banner))
