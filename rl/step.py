"""What a step of GRPO learns from: groups of answers, sampled and graded, and, if asked, drawn anew where
they have no signal.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..eval.tasks.base import Task
from ..model.engine.engine import Engine
from ..model.engine.sampling import sample_seeds
from ..model.transformer import Transformer
from .advantages import group_advantages
from .family import PIECES, Pieces
from .heads import Critic
from .rewards import Rewards, overlong_penalty, permute_within_groups, score
from .rollouts import Rollouts, merge, sample_groups, samples_of


@dataclass
class Learner:
    """What a run trains and samples with, and the one figure that moves besides."""

    policy: Transformer
    reference: Transformer
    engine: Engine
    optimizer: torch.optim.Optimizer
    critic: Critic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    pieces: Pieces = PIECES
    position: int = 0
    """The next problem."""


@dataclass(frozen=True)
class Drawn:
    """Groups that were sampled and graded."""

    rollouts: Rollouts
    rewards: Rewards
    training_N: np.ndarray
    """[N] the rewards that are trained on: dealt out anew in the control, lower near the limit of length."""
    dead_G: np.ndarray
    """[G] groups without signal."""


def draw(s: Learner, task: Task, c, step: int, n_prompts: int, *round_: int) -> Drawn:
    """Sample a group of answers to each of the next problems, and grade each by rule: is it right, is it well
    formed?"""
    problems = task.problems("train", n_prompts, start=s.position)
    s.position += n_prompts
    seeds = sample_seeds(n_prompts * c.group_size, c.seed, step, *round_)
    rollouts = sample_groups(
        s.engine,
        [task.prompt(p) for p in problems],
        c.group_size,
        c.max_new_tokens,
        c.temperature,
        seeds,
    )
    rewards = score(
        task, [p for p in problems for _ in range(c.group_size)], rollouts.texts, c.rewards
    )
    training_N = rewards.total
    if c.overlong_buffer:
        training_N = training_N + overlong_penalty(
            rollouts.response_lengths, c.max_new_tokens, c.overlong_buffer
        )
    if c.control:
        training_N = permute_within_groups(
            training_N, rollouts.group_offsets, seed=(c.seed, step, *round_)
        )
    return Drawn(
        rollouts, rewards, training_N, group_advantages(training_N, rollouts.group_offsets)[1]
    )


def draw_with_signal(
    s: Learner, task: Task, c, step: int
) -> tuple[Rollouts, np.ndarray, list[Drawn]]:
    """(what to train on, its rewards, all that was drawn): with --dynamic-sampling, groups without signal are
    replaced by groups of new problems (after DAPO, arXiv 2503.14476, eq. 11) as long as there are draws
    left."""
    drawn = [draw(s, task, c, step, c.prompts_per_step)]
    if c.dynamic_sampling == 1:
        return drawn[0].rollouts, drawn[0].training_N, drawn
    left = (c.dynamic_sampling - 1) * c.prompts_per_step
    while (
        wanted := min(left, c.prompts_per_step - sum(int((~d.dead_G).sum()) for d in drawn))
    ) > 0:
        drawn.append(draw(s, task, c, step, wanted, len(drawn)))
        left -= wanted
    kept = [np.flatnonzero(~d.dead_G) for d in drawn]
    if not any(
        map(len, kept)
    ):  # nothing to learn from: a step like any other, that changes nothing
        kept[0] = np.arange(len(drawn[0].dead_G))
    training_N = np.concatenate(
        [
            d.training_N[samples_of(d.rollouts, groups)]
            for d, groups in zip(drawn, kept, strict=True)
        ]
    )
    return merge([d.rollouts for d in drawn], kept), training_N, drawn


def figures_of(drawn: list[Drawn], kept_lengths: np.ndarray, seconds: float) -> dict:
    """What a log shows of all that was sampled in a step, kept or not: a mean over the kept groups alone
    would leave out the easy and the hopeless ones."""
    rewards = {
        name: np.concatenate([getattr(d.rewards, name) for d in drawn])
        for name in ("total", "accuracy", "format")
    }
    lengths = np.concatenate([d.rollouts.response_lengths for d in drawn])
    right_G = np.concatenate(
        [
            np.add.reduceat(d.rewards.accuracy, d.rollouts.group_offsets[:-1])
            / np.diff(d.rollouts.group_offsets)
            for d in drawn
        ]
    )
    dead_G = np.concatenate([d.dead_G for d in drawn])
    cut = np.concatenate(
        [[reason == "length" for reason in d.rollouts.finish_reasons] for d in drawn]
    )
    replaced = int(lengths.sum() - kept_lengths.sum())
    # what overlong answers lost; the control's shuffle leaves the mean as it is
    penalty = np.concatenate([d.rewards.total - d.training_N for d in drawn]).mean()
    return {
        "reward": rewards["total"].mean(),
        "accuracy": rewards["accuracy"].mean(),
        "format": rewards["format"].mean(),
        "penalty": penalty,
        "length": lengths.mean(),
        "length_max": lengths.max(),
        "truncated": cut.mean(),
        "dead_groups": dead_G.mean(),
        "all_right": (right_G == 1).mean(),
        "all_wrong": (right_G == 0).mean(),
        "groups_drawn": len(dead_G),
        "replaced_tokens": replaced,
        "replaced_s": seconds * replaced / lengths.sum(),
        "tokens": int(lengths.sum()),
        "rollout_s": seconds,
        "rollout_tokens_per_s": lengths.sum() / seconds,
    }
