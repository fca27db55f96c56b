"""Classic mistakes, to be made on purpose: `r1zero grpo --break NAME`, or `r1zero compare`, which runs each
beside the right thing and plots both.

Each is the right pieces put together wrongly; nothing outside this file knows of them. Most were found in
public implementations, where they went unnoticed because the curves still rose, only less, or because nobody
looked.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ...kernels.grpo import POLICY_METRICS
from ...rl.advantages import advantages
from ...rl.family import Pieces
from ...rl.losses import grpo_loss, token_weights


@dataclass(frozen=True)
class Mistake:
    what: str
    """What is done, and what is right."""
    watch: str
    """The figure of the log in which it shows."""
    seen: str
    """What was seen of it, or that it was not."""
    pieces: Pieces
    shows_with: dict = field(default_factory=dict)
    """Flags of grpo that both runs need for it to show, as on the command line."""


def with_kl(loss, metrics, kl, c):
    """`loss` with the KL added, and the metrics that say so."""
    loss = loss + c.kl_coef * kl
    metrics = metrics.clone()
    for name, value in (("loss", loss), ("kl_loss", kl)):
        metrics[POLICY_METRICS.index(name)] = value.detach()
    return loss, metrics


def k1_loss(logp, old_logp, ref_logp, advantages, weights, offsets, c):
    return grpo_loss(
        logp, old_logp, ref_logp, advantages, weights, offsets, replace(c, kl_estimator="k1")
    )


def flipped_k3(logp, old_logp, ref_logp, advantages, weights, offsets, c):
    """e^-d + d - 1 with d = ref_logp - logp."""
    if ref_logp is None:
        return grpo_loss(logp, old_logp, ref_logp, advantages, weights, offsets, c)
    loss, metrics = grpo_loss(
        logp, old_logp, None, advantages, weights, offsets, replace(c, kl_coef=0.0)
    )
    d = (logp - ref_logp).clamp(-20, 20)
    kl = (weights.repeat_interleave(offsets.diff()) * (d.exp() - d - 1)).sum()
    return with_kl(loss, metrics, kl, c)


def flipped_clip(logp, old_logp, ref_logp, advantages, weights, offsets, c):
    """max(r A, clip(r) A), the optimist's choice: minus the loss of -A has it. The KL keeps its sign."""
    loss, metrics = grpo_loss(
        logp, old_logp, None, -advantages, weights, offsets, replace(c, kl_coef=0.0)
    )
    kl = logp.new_zeros(())
    if ref_logp is not None and c.kl_coef:
        alone = replace(c, kl_coef=1.0)
        kl, _ = grpo_loss(
            logp, old_logp, ref_logp, torch.zeros_like(advantages), weights, offsets, alone
        )
    return with_kl(-loss, metrics, kl, c)


def no_end_token(logp, old_logp, ref_logp, advantages, weights, offsets, c):
    """The last token of every answer gives no gradient, as with a mask for a pad token that equals the end
    token."""
    ends = torch.zeros_like(logp, dtype=torch.bool)
    ends[offsets[1:].long()[offsets.diff() > 0] - 1] = True
    logp = torch.where(ends, logp.detach(), logp)
    return grpo_loss(logp, old_logp, ref_logp, advantages, weights, offsets, c)


def micro_batch_mean(logp, old_logp, ref_logp, advantages, weights, offsets, c):
    weights = (weights != 0).to(weights.dtype) / max(1, len(logp))
    return grpo_loss(logp, old_logp, ref_logp, advantages, weights, offsets, c)


def own_length(lengths_N, mean, max_new_tokens, total=np.asarray):
    return token_weights(lengths_N, "sequence", max_new_tokens, total)


def summed(lengths_N, mean, max_new_tokens, total=np.asarray):
    return token_weights(lengths_N, mean, max_new_tokens, total) * len(lengths_N)


def in_place_of_advantages(wrong: Callable) -> Callable:
    """The piece that gives wrong(rewards [N], group_offsets, c) for advantages; a critic's returns stay."""

    def piece(rewards_N, group_offsets, response_offsets, c, *rest):
        returns_R = advantages(rewards_N, group_offsets, response_offsets, c, *rest)[1]
        return wrong(np.asarray(rewards_N, np.float64), group_offsets, c), returns_R

    return piece


def unguarded(rewards_N, group_offsets, c):
    """A group's rewards differ by rounding, and are divided by their standard deviation all the same."""
    noisy = rewards_N + 1e-9 * np.random.default_rng(len(rewards_N)).standard_normal(len(rewards_N))
    groups = [noisy[a:b] for a, b in zip(group_offsets[:-1], group_offsets[1:], strict=True)]
    return np.concatenate([(g - g.mean()) / (g.std() or 1.0) for g in groups if len(g)])


def neighbours(rewards_N, group_offsets, c):
    """Each answer is compared with the group before its own, the first with the last: an index off by one."""
    sizes = np.diff(group_offsets)
    mean, square = (
        np.diff(np.append(0.0, np.cumsum(x))[group_offsets]) / np.maximum(sizes, 1)
        for x in (rewards_N, rewards_N**2)
    )
    std = np.sqrt(np.maximum(square - mean**2, 0)) if c.scale == "std" else np.ones(len(mean))
    std[std < 1e-6] = 1.0
    mean, std = (np.repeat(np.roll(x, 1), sizes) for x in (mean, std))
    return (rewards_N - mean) / std


# The figures of `seen`: 16 steps on Countdown with 3 numbers, from the demo's base (0.9 M parameters).
MISTAKES = {
    "k1_loss": Mistake(
        "the KL's estimator k1 as a loss: k3's gradient pulls to the reference, k1's is 0 on average",
        "kl_to_reference",
        "Four times as far from the reference (0.016 nats a token, not 0.004), as without any KL.",
        Pieces(loss=k1_loss),
        {"loss.kl_coef": 1.0},
    ),
    "flipped_k3": Mistake(
        "k3 with the sign of the log-ratio flipped: the same to second order, further out another distance",
        "kl_to_reference",
        "Not to be seen: both stay within 0.004 nats a token, where the two are the same. Far out this one "
        "prices only what has become likelier, without bound, and not what was given up.",
        Pieces(loss=flipped_k3),
        {"loss.kl_coef": 1.0},
    ),
    "flipped_clip": Mistake(
        "the maximum of the two surrogates: beyond the bound it pulls on; the minimum is the trust region",
        "kl_to_reference",
        "The run falls apart: 0 % right instead of 78 %, every answer cut off, 5 nats from the reference.",
        Pieces(loss=flipped_clip),
        {"updates_per_step": 8},
    ),
    "length_bias": Mistake(
        "each answer divided by its own length, GRPO's first form: a wrong one costs less the longer it is",
        "length",
        "Not to be seen at this scale (44 tokens and 45, 44 % right and 43 %): it needs long wrong answers.",
        Pieces(weights=own_length),
    ),
    "micro_batch_mean": Mistake(
        "each micro-batch's own mean, added up: the gradient depends on the cut",
        "gradient_norm",
        "Ten times the gradient (1.3, not 0.13) with --micro-tokens 2048, another one with another cut; Adam "
        "hides it as a higher learning rate (46 % right, not 43 %).",
        Pieces(loss=micro_batch_mean),
    ),
    "sum_of_groups": Mistake(
        "the sum over answers, not the mean: the gradient grows with the batch",
        "gradient_norm",
        "A gradient of 44, not 0.13, which clipping and Adam hide: it acts as a higher learning rate, which "
        "here even helps (49 % right, not 43 %), and is another one with every batch size.",
        Pieces(weights=summed),
    ),
    "no_end_token": Mistake(
        "the end token masked, as if it were padding: nothing teaches when to stop",
        "truncated",
        "Not to be seen from a base that stops by itself, as this one does (1.4 % and 1.6 % cut off). From "
        "random weights, paid for brevity alone, the right run answers in 2 tokens where the broken one "
        "still takes 14: it learns to stop only by what is taken from all other tokens.",
        Pieces(loss=no_end_token),
    ),
    "no_baseline": Mistake(
        "the reward in the place of the advantage: every answer that earns anything is made likelier",
        "accuracy",
        "39 % right, not 43 %, at the edge of what chance does: right on average, too, but with more noise.",
        Pieces(advantages=in_place_of_advantages(lambda rewards_N, *_: rewards_N)),
    ),
    "unguarded_std": Mistake(
        "a standard deviation that is rounding alone: groups without signal shout as loud as the others",
        "trained_samples",
        "All 128 answers of a step are trained on, where 70 have something to teach; the rest is noise, "
        "which 16 steps do not show in accuracy (32 % both).",
        Pieces(advantages=in_place_of_advantages(unguarded)),
        {"group_size": 2, "prompts_per_step": 64},
    ),
    "wrong_group": Mistake(
        "answers compared with another problem's group: hard problems are punished, easy ones praised",
        "accuracy",
        "Not to be seen in 16 steps (43 % right both): a mean of other answers is a fair baseline, only one "
        "that says nothing about this problem, so the gradient is right on average and noisier.",
        Pieces(advantages=in_place_of_advantages(neighbours)),
    ),
}


def warn_of(name: str) -> None:
    """A banner that nobody overlooks."""
    mistake, line = MISTAKES[name], "!" * 100
    flags = " ".join(
        f"--{dial.replace('_', '-')} {value:g}" for dial, value in mistake.shows_with.items()
    )
    print(
        f"{line}\n! BROKEN ON PURPOSE: --break {name}\n! {mistake.what}\n! Look at: {mistake.watch}"
        + (f" (shows with {flags})" if flags else "")
        + f". Keep nothing of this run but the lesson.\n{line}",
        file=sys.stderr,
    )
