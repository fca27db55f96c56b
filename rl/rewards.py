"""R1-Zero's two rule rewards (arXiv 2501.12948, section 2.2.2): is the answer right, and is the response well
formed?

Accuracy is the task's grader's word on the last answer block. Format is 1 for exactly one think block
followed by exactly one answer block and nothing else. No model judges anything, so there is nothing to hack
but the rules.
"""

import math
from dataclasses import dataclass

import numpy as np

from ..eval.response import grade_response


@dataclass(frozen=True)
class RewardConfig:
    """How the two parts add up: reward = accuracy_weight * accuracy + format_weight * format."""

    accuracy_weight: float = 1.0
    """Worth of a right answer."""
    format_weight: float = 0.2
    """Worth of a well-formed response, right or wrong. A large one pulls everything to short, wrong, tidy
    answers."""

    def __post_init__(self):
        parts = (self.accuracy_weight, self.format_weight)
        if not all(0 <= weight < math.inf for weight in parts) or sum(parts) == 0:
            raise ValueError(
                f"rewards: weights are accuracy {self.accuracy_weight} and format "
                f"{self.format_weight}; expected numbers of 0 or more, not both 0"
            )


@dataclass(frozen=True)
class Rewards:
    """The parts and the sum, one a sample; all [N] float64."""

    accuracy: np.ndarray
    format: np.ndarray
    total: np.ndarray
    why: list[str]
    """The grader's reason in plain words, one a sample."""


def reward_one(task, problem, response: str, config: RewardConfig) -> dict:
    """Grade a single response: a dict of accuracy, format, reward, answer and why."""
    graded = grade_response(task, problem, response)
    why = graded.why if graded.format else f"{graded.why} Format: {graded.why_format}"
    return {
        "accuracy": graded.accuracy,
        "format": graded.format,
        "reward": config.accuracy_weight * graded.accuracy + config.format_weight * graded.format,
        "answer": graded.answer,
        "why": why,
    }


def score(task, problems, responses: list[str], config: RewardConfig) -> Rewards:
    """Grade sample n, the answer to problems[n]. Raises ValueError if the two lists differ in length."""
    parts = [reward_one(task, p, r, config) for p, r in zip(problems, responses, strict=True)]
    names = ("accuracy", "format", "reward")
    column = {name: np.array([part[name] for part in parts], np.float64) for name in names}
    return Rewards(
        column["accuracy"], column["format"], column["reward"], [part["why"] for part in parts]
    )


def overlong_penalty(lengths_N: np.ndarray, max_new_tokens: int, buffer: float) -> np.ndarray:
    """[N], 0 down to -1, over the last `buffer` share of max_new_tokens: DAPO's soft overlong punishment
    (arXiv 2503.14476, eq. 13). lengths_N: tokens of each answer."""
    tokens = buffer * max_new_tokens
    if not tokens:
        return np.zeros(len(lengths_N))
    return np.clip((max_new_tokens - tokens - np.asarray(lengths_N)) / tokens, -1.0, 0.0)


def permute_within_groups(
    rewards_N: np.ndarray, group_offsets: np.ndarray, seed: tuple[int, ...]
) -> np.ndarray:
    """The control: the same rewards, dealt out at random within each group.

    Every group keeps its mean and its spread, so the updates are as large as in the real run, but a reward
    says nothing about the answer that it lands on. seed: the integers that the shuffle is a fixed function
    of.
    """
    rng = np.random.default_rng(np.random.SeedSequence([abs(s) for s in seed]))
    dealt = rewards_N.copy()
    for start, end in zip(group_offsets[:-1], group_offsets[1:], strict=True):
        dealt[start:end] = rng.permutation(dealt[start:end])
    return dealt
