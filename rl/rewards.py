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
from .advantages import dead_groups


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

    parts: dict[str, np.ndarray]
    """Each part by its name, not weighted: always "accuracy" (1 for a right answer, else 0) and
    "format" (1 for a well-formed response, else 0)."""
    weights: dict[str, float]
    """The weight of each part, and of each training part."""
    total: np.ndarray
    """The weighted sum of the parts: what is logged."""
    training_parts: dict[str, np.ndarray]
    """The parts that are trained on: those above, "overlong" (the penalty for long answers) where
    there is one, all dealt out at random in the control."""
    training: np.ndarray
    """The weighted sum of the training parts: what the advantage is computed from."""
    why: list[str]
    """The grader's reason in plain words, one per answer."""

    @property
    def accuracy(self) -> np.ndarray:
        return self.parts["accuracy"]

    @property
    def format(self) -> np.ndarray:
        return self.parts["format"]

    def dead(self, group_offsets: np.ndarray) -> np.ndarray:
        """[G] bool: the groups whose training rewards are alike, and teach nothing."""
        return dead_groups(self.training, group_offsets)


def weighted_sum(parts: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """[N]: the sum of the parts, each times its weight."""
    return sum(weights[name] * part_N for name, part_N in parts.items())


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
        """Each takes (training parts, rollouts) and returns the parts to train on."""
        if config.overlong_buffer:
            limit, buffer = config.max_new_tokens, config.overlong_buffer
            self.adjustments.append(partial(lower_overlong, max_new_tokens=limit, buffer=buffer))
        if config.control:
            self.adjustments.append(partial(permute_within_groups, seed=config.seed))

    def __call__(self, task, rollouts) -> Rewards:
        """Grade all answers of the rollouts."""
        graded = [reward_one(task, sample, self.config) for sample in rollouts.samples()]
        parts = {
            name: np.array([row[name] for row in graded], np.float64)
            for name in ("accuracy", "format")
        }
        weights = {
            "accuracy": self.config.accuracy_weight,
            "format": self.config.format_weight,
            "overlong": 1.0,
        }
        training_parts = parts
        for adjust in self.adjustments:
            training_parts = adjust(training_parts, rollouts)
        return Rewards(
            parts=parts,
            weights=weights,
            total=weighted_sum(parts, weights),
            training_parts=training_parts,
            training=weighted_sum(training_parts, weights),
            why=[row["why"] for row in graded],
        )


def overlong_penalty(lengths_N: np.ndarray, max_new_tokens: int, buffer: float) -> np.ndarray:
    """[N], from 0 down to -1 over the last `buffer` share of max_new_tokens.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13). lengths_N: tokens per answer.
    """
    tokens = buffer * max_new_tokens
    if not tokens:
        return np.zeros(len(lengths_N))
    return np.clip((max_new_tokens - tokens - np.asarray(lengths_N)) / tokens, -1.0, 0.0)


def lower_overlong(parts: dict, rollouts, max_new_tokens: int, buffer: float) -> dict:
    """The parts, and beside them the penalty of answers that come near the limit."""
    penalty_N = overlong_penalty(rollouts.response_lengths, max_new_tokens, buffer)
    return parts | {"overlong": penalty_N}


def permute_within_groups(parts: dict, rollouts, seed: int) -> dict:
    """The control: the same rewards, dealt out at random within each group.

    Every group keeps its mean and its spread, so the updates are as large as in the real run, but
    a reward says nothing about the answer that it lands on. All parts of a reward land on the same
    answer. The shuffle is a fixed function of the seed and of the step that the rollouts were
    sampled in.
    """
    keys = [abs(seed), abs(rollouts.weights_version)]
    rng = np.random.default_rng(np.random.SeedSequence(keys))
    starts, sizes = rollouts.group_offsets[:-1], np.diff(rollouts.group_offsets)
    order = [start + rng.permutation(size) for start, size in zip(starts, sizes, strict=True)]
    order_N = np.concatenate(order)
    return {name: part_N[order_N] for name, part_N in parts.items()}
