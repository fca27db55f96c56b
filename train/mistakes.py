"""Classic mistakes, to be made on purpose: `r1zero grpo --break NAME`, or `r1zero compare`, which runs each
beside the right thing and plots both.

Each is the right pieces put together wrongly; nothing outside this file knows of them. Most were found in
public implementations, where they went unnoticed because the curves still rose, only less, or because nobody
looked.
"""
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..rl.advantages import advantages
from ..rl.algorithms import Pieces
from ..rl.losses import grpo_loss, token_weights


@dataclass(frozen=True)
class Mistake:
    what: str
    """What is done, and what is right."""
    watch: str
    """Where it shows."""
    pieces: Pieces
    shows_with: dict = field(default_factory=dict)
    """Flags of grpo that both runs need for it to show, as on the command line."""


def k1_loss(logp, old_logp, ref_logp, advantages, weights, offsets, c):
    return grpo_loss(logp, old_logp, ref_logp, advantages, weights, offsets, replace(c, kl_estimator="k1"))


def flipped_k3(logp, old_logp, ref_logp, advantages, weights, offsets, c):
    """e^-d + d - 1: the log-ratio with the wrong sign, by mirroring the reference at the policy."""
    mirrored = None if ref_logp is None else 2 * logp.detach() - ref_logp
    loss, metrics = grpo_loss(logp, old_logp, ref_logp, advantages, weights, offsets, replace(c, kl_coef=0.0))
    if mirrored is None:
        return loss, metrics
    d = (mirrored - logp).clamp(-20, 20)
    return loss + c.kl_coef * (weights.repeat_interleave(offsets.diff()) * (d.exp() - d - 1)).sum(), metrics


def flipped_clip(logp, old_logp, ref_logp, advantages, weights, offsets, c):
    """max(r A, clip(r) A), the optimist's choice: minus the loss of -A has it."""
    loss, metrics = grpo_loss(logp, old_logp, ref_logp, -advantages, weights, offsets, c)
    return -loss, metrics


def no_end_token(logp, old_logp, ref_logp, advantages, weights, offsets, c):
    """The last token of every answer left out, as by a mask for a pad token that equals the end token."""
    ends = offsets[1:].long() - 1
    kept = torch.ones_like(logp, dtype=torch.bool)
    kept[ends[offsets.diff() > 0]] = False
    shorter = torch.cat([offsets[:1], (offsets.diff() - 1).clamp(min=0).cumsum(0).to(offsets.dtype)])
    return grpo_loss(logp[kept], old_logp[kept], None if ref_logp is None else ref_logp[kept], advantages,
                     weights, shorter, c)


def micro_batch_mean(logp, old_logp, ref_logp, advantages, weights, offsets, c):
    weights = torch.full_like(weights, 1 / max(1, len(logp)))
    return grpo_loss(logp, old_logp, ref_logp, advantages, weights, offsets, c)


def own_length(lengths_N, mean, max_new_tokens, total=np.asarray):
    return token_weights(lengths_N, "sequence", max_new_tokens, total)


def no_mean(lengths_N, mean, max_new_tokens, total=np.asarray):
    return (np.asarray(lengths_N) > 0) / max_new_tokens


def reward_as_advantage(rewards_N, *rest, **more):
    return np.asarray(rewards_N, np.float64), None


def unguarded_std(rewards_N, group_offsets, response_offsets, c, *rest, **more):
    """A group's rewards differ by rounding, and are divided by their standard deviation all the same."""
    noisy = rewards_N + 1e-9 * np.random.default_rng(len(rewards_N)).standard_normal(len(rewards_N))
    groups = [noisy[a:b] for a, b in zip(group_offsets[:-1], group_offsets[1:], strict=True)]
    return np.concatenate([(g - g.mean()) / g.std() for g in groups]), None


def neighbours_group(rewards_N, group_offsets, *rest, **more):
    """Each answer is compared with the next group: what a wrong reshape does."""
    size = int(group_offsets[1])
    return advantages(np.asarray(rewards_N), group_offsets, *rest, **more)[0] * 0 + (
        rewards_N - np.roll(np.add.reduceat(rewards_N, group_offsets[:-1]) / size, 1).repeat(size)), None


MISTAKES = {
    "k1_loss": Mistake(
        "the KL's estimator k1 as a loss: k3's gradient pulls to the reference, k1's is 0 on average",
        "kl_to_reference", Pieces(loss=k1_loss), {"loss.kl_coef": 0.05}),
    "flipped_k3": Mistake(
        "k3 with the sign of the log-ratio flipped",
        "kl_to_reference", Pieces(loss=flipped_k3), {"loss.kl_coef": 0.05}),
    "flipped_clip": Mistake(
        "the maximum of the two surrogates; the minimum is the trust region",
        "ratio_max", Pieces(loss=flipped_clip), {"updates_per_step": 8}),
    "length_bias": Mistake(
        "each answer divided by its own length: a wrong answer costs less the longer it is",
        "length", Pieces(weights=own_length)),
    "micro_batch_mean": Mistake(
        "each micro-batch's own mean, added up: the gradient depends on the cut",
        "gradient_norm", Pieces(loss=micro_batch_mean)),
    "sum_of_groups": Mistake(
        "the sum over groups, not the mean: the gradient grows with the batch",
        "gradient_norm", Pieces(weights=no_mean)),
    "no_end_token": Mistake(
        "the end token masked, as if it were padding: nothing teaches when to stop",
        "truncated", Pieces(loss=no_end_token)),
    "no_baseline": Mistake(
        "the reward in the place of the advantage: every answer that earns anything is made likelier",
        "entropy", Pieces(advantages=reward_as_advantage)),
    "unguarded_std": Mistake(
        "a standard deviation that is rounding alone: groups without signal shout as loud as the others",
        "accuracy", Pieces(advantages=unguarded_std)),
    "wrong_group": Mistake(
        "answers compared with another problem's group: hard problems are punished, easy ones praised",
        "accuracy", Pieces(advantages=neighbours_group)),
}


def warn_of(name: str) -> None:
    """A banner that nobody overlooks."""
    line = "!" * 100
    print(f"{line}\n! BROKEN ON PURPOSE: --break {name}\n! {MISTAKES[name].what}\n! Look at: "
          f"{MISTAKES[name].watch}. Keep nothing of this run but the lesson.\n{line}", file=sys.stderr)
