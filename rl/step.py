"""One step of GRPO: sample, grade, compare, update.

`grpo_step` is the algorithm as the paper writes it, and holds no conditional. What differs between
the members of the family is decided once, by the objects in a `Learner`, which rl/family.py
chooses. rl/naive.py is the same step in plain loops.

Nothing here owns anything: model, optimizer, engine and tokenizer are handed in by the loop
(train/grpo.py), which also measures time and memory.

Sources: DeepSeekMath (arXiv 2402.03300), section 4; R1-Zero (arXiv 2501.12948), section 2.2.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ..eval.tasks.base import Task
from ..model.balance import load_metrics
from ..model.loss_scale import LossScaler
from ..model.transformer import Transformer
from .advantages import Advantages, Credit
from .losses import loss_weights, policy_loss
from .rewards import Grader, Rewards
from .rollouts import GroupSampler, Rollouts
from .update import Reference, kl_to_reference, update_policy


def look_away(rollouts: Rollouts, rewards: Rewards, advantages: Advantages | None) -> None:
    """The observer of a learner whose samples nobody keeps."""


@dataclass
class Learner:
    """The policy, and the objects that make it this member of the family."""

    policy: Transformer
    optimizer: torch.optim.Optimizer
    reference: Reference | None
    """The model that the KL is measured to."""
    sampler: GroupSampler
    """Which problems are answered, and by how many samples."""
    grader: Grader
    """From answers to rewards."""
    credit: Credit
    """From rewards to advantages."""
    loss_weights: Callable = loss_weights
    """The weight of each answer's tokens in the mean. (This one always, unless
    train/lab/mistakes.py breaks it on purpose; the same goes for policy_loss.)"""
    policy_loss: Callable = policy_loss
    """The objective that is minimised."""
    scaler: LossScaler = field(default_factory=LossScaler)
    """The scale of the losses: for fp16, and off elsewhere."""
    observe: Callable = look_away
    """Is shown the (rollouts, rewards, advantages) of each step, and decides nothing; advantages
    are None for the groups that dynamic sampling has replaced."""


def grpo_step(learner: Learner, task: Task, config, step: int) -> dict:
    """One step; returns its metrics. config: an Algorithm (rl/family.py); step: from 0."""

    # 1. Sample a group of answers to each problem.
    rollouts = learner.sampler.sample(task, config, step)

    # 2. Grade each answer by rule: is it right, is it well formed?
    rewards = learner.grader(task, rollouts)

    # 3. How much better than the rest of its group was each answer?         (DeepSeek-R1, eq. 3)
    advantages = learner.credit(rewards, rollouts)

    # 4. Make the better ones more likely, within the trust region.          (DeepSeek-R1, eq. 1)
    metrics = update_policy(learner, rollouts, advantages, config, step)

    return metrics | {
        **sampling_metrics(learner, task, rollouts, rewards, advantages),
        **kl_to_reference(learner.reference, rollouts, config, step),
    }


def expert_metrics(parts: list[Rollouts], policy: Transformer) -> dict:
    """How busy a mixture's experts were in sampling all parts, as in pretraining's log."""
    if parts[0].routes is None:
        return {}
    n_experts = policy.config.moe.n_experts
    routes_TLK = np.concatenate([array for rollouts in parts for array in rollouts.routes])
    layers = routes_TLK.swapaxes(0, 1)
    counts_LE = np.stack([np.bincount(layer.ravel(), minlength=n_experts) for layer in layers])
    return load_metrics(torch.from_numpy(counts_LE / counts_LE.mean(1, keepdims=True)))


def sampling_metrics(
    learner: Learner, task: Task, rollouts: Rollouts, rewards: Rewards, advantages: Advantages
) -> dict:
    """What the log shows of everything that was sampled in a step, the replaced groups included.

    A mean over the kept groups alone would leave out the easy and the hopeless problems. Whoever
    keeps the samples (train/rollout_log.py) is shown them here, where all of them are graded.
    """
    parts = [(rollouts, rewards)]
    learner.observe(rollouts, rewards, advantages)
    if rollouts.replaced is not None:
        graded = learner.grader(task, rollouts.replaced)
        parts.append((rollouts.replaced, graded))
        learner.observe(rollouts.replaced, graded, None)

    def over_all(value_of: Callable) -> np.ndarray:
        return np.concatenate([value_of(sampled, graded) for sampled, graded in parts])

    accuracy = over_all(lambda sampled, graded: graded.accuracy)
    lengths = over_all(lambda sampled, graded: sampled.response_lengths)
    reasons = over_all(lambda sampled, graded: sampled.finish_reasons)
    # The share of right answers in each group: 1 and 0 are the groups that are all right or wrong.
    right_G = over_all(
        lambda sampled, graded: (
            np.add.reduceat(graded.accuracy, sampled.group_offsets[:-1])
            / np.diff(sampled.group_offsets)
        )
    )
    dead_G = over_all(lambda sampled, graded: graded.dead(sampled))
    # What long answers lost. (The control's shuffle within groups leaves the mean as it is.)
    penalty = over_all(lambda sampled, graded: graded.penalty)
    # The parts of the reward beside accuracy and format, where they have a weight.
    others = {
        f"reward_{name}": np.concatenate([graded.parts[name] for _, graded in parts]).mean()
        for name in rewards.parts
        if name not in ("accuracy", "format")
    }
    return {
        "reward": over_all(lambda sampled, graded: graded.total).mean(),
        "accuracy": accuracy.mean(),
        "format": over_all(lambda sampled, graded: graded.format).mean(),
        "penalty": penalty.mean(),
        "length": lengths.mean(),
        "length_max": lengths.max(),
        "truncated": (reasons == "length").mean(),
        "dead_groups": dead_G.mean(),
        "all_right": (right_G == 1).mean(),
        "all_wrong": (right_G == 0).mean(),
        "groups_sampled": len(dead_G),
        "replaced_tokens": int(lengths.sum() - rollouts.response_lengths.sum()),
        "tokens": int(lengths.sum()),
        "position": learner.sampler.position,
        **expert_metrics([sampled for sampled, _ in parts], learner.policy),
        **others,
    }
