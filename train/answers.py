"""Sampled answers and what each is worth: what a collection chooses by.

    Judge(task, rewards)(samples)    the answers to one problem, graded
    repeated_share(tokens)           how much of a text it has said before

The reward is that of `r1zero grpo`, with the same flags and plug-ins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..eval.response import Sample, has_language, language_of
from ..eval.tasks.base import Task
from ..rl.plugin import load_reward
from ..rl.rewards import RewardConfig, judge
from ..rl.shaping import efficiency, weighted_sum

N_GRAM = 4  # tokens in a row that count as one piece of a repetition


@dataclass(frozen=True)
class Answer:
    """A sampled answer and what it is worth."""

    number: int
    """Which of the problem's samples it is, from 0."""
    sample: Sample
    parts: dict[str, float]
    """Each part of the reward before its weight; always accuracy and format."""
    reward: float
    """Their weighted sum."""
    language: float | None
    """Share of words in the prompt's language; None where the task does not tell."""

    @property
    def right(self) -> bool:
        return self.parts["accuracy"] == 1.0

    @property
    def n_tokens(self) -> int:
        return len(self.sample.tokens)

    @property
    def repetition(self) -> float:
        return repeated_share(self.sample.tokens)


def repeated_share(tokens: Sequence[int], n: int = N_GRAM) -> float:
    """seq-rep-n: the share of n-grams that stand in the text before; 0 for fewer than n tokens.

    1 - different n-grams / all n-grams (Welleck et al., arXiv 1908.04319, section 6.1).
    """
    n_grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    n_repeats = len(n_grams) - len(set(n_grams))
    return n_repeats / len(n_grams) if n_grams else 0.0


class Judge:
    """From the samples of a problem to what each is worth."""

    def __init__(self, task: Task, rewards: RewardConfig):
        self.task = task
        self.rewards = rewards
        self.plugin = load_reward(rewards.plugin) if rewards.plugin else None
        self.tells_language = has_language(task)

    def __call__(self, samples: list[Sample]) -> list[Answer]:
        """The answers. Raises ValueError for a grader or a plug-in of the user's that fails."""
        _, parts = judge(self.task, samples, self.rewards, self.plugin)
        if "efficiency" in self.rewards.weights:
            lengths_N = np.array([len(sample.tokens) for sample in samples])
            one_group = np.array([0, len(samples)])
            parts["efficiency"] = efficiency(lengths_N, parts["accuracy"], one_group)
        rewards_N = weighted_sum(parts, self.rewards.weights)
        return [
            Answer(
                number=n,
                sample=sample,
                parts={name: float(part_N[n]) for name, part_N in parts.items()},
                reward=float(rewards_N[n]),
                language=float(language_of(self.task, sample)) if self.tells_language else None,
            )
            for n, sample in enumerate(samples)
        ]
