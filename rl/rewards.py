"""R1-Zero's two rule rewards: is the answer right, and is the response well formed?

Accuracy is the task's grader's verdict on the last answer block. Format is 1 for exactly one think
block followed by exactly one answer block and nothing else, and 0 for an answer that was cut off.
No model judges anything, so there is nothing to hack but the rules (arXiv 2501.12948, section
2.2.2).

What is graded is a `Sample` (eval/response.py): the problem, the text, the tokens and how sampling
ended.

A `Grader` is made once per run. It may change what is trained on (DAPO's penalty for long answers,
the control's shuffle), never what is logged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..eval.response import Sample, grade_response


@dataclass(frozen=True)
class RewardConfig:
    """How the two parts add up: reward = accuracy_weight * accuracy + format_weight * format."""

    accuracy_weight: float = 1.0
    """Reward for a right answer."""
    format_weight: float = 0.2
    """Reward for a well-formed response, right or wrong. A large one favours short, tidy, wrong
    answers."""

    def __post_init__(self):
        weights = (self.accuracy_weight, self.format_weight)
        if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
            raise ValueError(
                f"rewards: weights are accuracy {self.accuracy_weight} and format "
                f"{self.format_weight}; expected numbers of 0 or more, not both 0"
            )


@dataclass(frozen=True)
class Rewards:
    """What each of the N answers earned; all arrays are [N] float64."""

    accuracy: np.ndarray
    """1 for a right answer, else 0."""
    format: np.ndarray
    """1 for a well-formed response, else 0."""
    total: np.ndarray
    """The weighted sum of the two."""
    training: np.ndarray
    """What the advantage is computed from: the total, less the penalty for long answers, or dealt
    out at random in the control."""
    why: list[str]
    """The grader's reason in plain words, one per answer."""


def reward_one(task, sample: Sample, config: RewardConfig) -> dict:
    """Grade a single response: a dict of accuracy, format, reward, answer and why."""
    graded = grade_response(task, sample)
    reward = config.accuracy_weight * graded.accuracy + config.format_weight * graded.format
    return {
        "accuracy": graded.accuracy,
        "format": graded.format,
        "reward": reward,
        "answer": graded.answer,
        "why": graded.why if graded.format else f"{graded.why} Format: {graded.why_format}",
    }


class Grader:
    """From answers to rewards. Made once per run from the run's Algorithm (rl/family.py)."""

    def __init__(self, config):
        self.config: RewardConfig = config.rewards
        self.adjustments: list[Callable] = []
        """Each takes (rewards_N, rollouts) and returns the rewards to train on."""
        if config.overlong_buffer:
            limit, buffer = config.max_new_tokens, config.overlong_buffer
            self.adjustments.append(partial(lower_overlong, max_new_tokens=limit, buffer=buffer))
        if config.control:
            self.adjustments.append(partial(permute_within_groups, seed=config.seed))

    def __call__(self, task, rollouts) -> Rewards:
        """Grade all answers of the rollouts."""
        graded = [reward_one(task, sample, self.config) for sample in rollouts.samples()]

        def column(name: str) -> np.ndarray:
            return np.array([row[name] for row in graded], np.float64)

        total = training = column("reward")
        for adjust in self.adjustments:
            training = adjust(training, rollouts)
        why = [row["why"] for row in graded]
        return Rewards(column("accuracy"), column("format"), total, training, why)


def overlong_penalty(lengths_N: np.ndarray, max_new_tokens: int, buffer: float) -> np.ndarray:
    """[N], from 0 down to -1 over the last `buffer` share of max_new_tokens.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13). lengths_N: tokens per answer.
    """
    tokens = buffer * max_new_tokens
    if not tokens:
        return np.zeros(len(lengths_N))
    return np.clip((max_new_tokens - tokens - np.asarray(lengths_N)) / tokens, -1.0, 0.0)


def lower_overlong(rewards_N: np.ndarray, rollouts, max_new_tokens: int, buffer: float):
    """[N]: the rewards, less the penalty of answers that come near the limit."""
    return rewards_N + overlong_penalty(rollouts.response_lengths, max_new_tokens, buffer)


def permute_within_groups(rewards_N: np.ndarray, rollouts, seed: int) -> np.ndarray:
    """[N], the control: the same rewards, dealt out at random within each group.

    Every group keeps its mean and its spread, so the updates are as large as in the real run, but
    a reward says nothing about the answer that it lands on. The shuffle is a fixed function of the
    seed and of the step that the rollouts were sampled in.
    """
    keys = [abs(seed), abs(rollouts.weights_version)]
    rng = np.random.default_rng(np.random.SeedSequence(keys))
    dealt = rewards_N.copy()
    for start, end in zip(rollouts.group_offsets[:-1], rollouts.group_offsets[1:], strict=True):
        dealt[start:end] = rng.permutation(dealt[start:end])
    return dealt
