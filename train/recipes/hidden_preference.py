"""Whom a toy's answers please: a preference that models never see, and what is measured by it.

    preference = 2 if the answer is right, + 1/2 if it is well formed, - 1/100 per token

It stands for people. It ranks answers for a reward model, and says afterwards which of two policies
is better, which the reward model cannot: a policy may have learned to please that alone.

Shapes: P problems, S answers to each.
"""

import json
import math

import numpy as np
import torch

from ...eval.harness import Z95, Estimate, interval
from ...eval.response import grade_response
from ...eval.tasks.base import Task
from ...model.engine.engine import Engine
from ...model.engine.sampling import sample_seeds
from ...rl.preferences import agreement
from ...rl.rollouts import Rollouts, sample_groups
from ...rl.shaping import indices_of_groups
from ..selection import ranks_of

RIGHT, WELL_FORMED, PER_TOKEN = 2.0, 0.5, -0.01


def preferences(task: Task, rollouts: Rollouts) -> np.ndarray:
    """[N]: how much each answer is liked."""
    graded = [grade_response(task, sample) for sample in rollouts.samples()]
    right_N = np.array([grade.accuracy for grade in graded])
    formed_N = np.array([grade.format for grade in graded])
    return RIGHT * right_N + WELL_FORMED * formed_N + PER_TOKEN * rollouts.response_lengths


# ---- answers, and rankings of them ----


def sample_answers(
    engine: Engine, task: Task, problems: list, n_samples: int, max_new_tokens: int, seed: int
) -> Rollouts:
    """n_samples answers to each problem, at temperature 1; those of problem i are a fixed function
    of (seed, i)."""
    seeds = torch.cat([sample_seeds(n_samples, seed, i) for i in range(len(problems))])
    prompts = [task.prompt(problem) for problem in problems]
    return sample_groups(engine, prompts, n_samples, max_new_tokens, 1.0, seeds, problems)


def ranking_lines(task: Task, rollouts: Rollouts) -> list[str]:
    """A line of JSON for `r1zero reward-model` per problem whose answers differ in preference.

    An answer that was cut off has no end, and is left out.
    """
    liked_N = preferences(task, rollouts)
    samples = rollouts.samples()
    groups = indices_of_groups(rollouts.group_offsets)
    lines = []
    for problem, group in zip(rollouts.problems, groups, strict=True):
        ended = [n for n in group if not samples[n].cut_off]
        ranks = ranks_of([liked_N[n] for n in ended])
        if len(set(ranks)) < 2:
            continue
        line = {
            "prompt": task.prompt(problem),
            "answers": [samples[n].text for n in ended],
            "ranks": ranks,
            "right": [grade_response(task, samples[n]).accuracy == 1 for n in ended],
        }
        lines.append(json.dumps(line) + "\n")
    return lines


# ---- which of two is better ----


def mean_of(values_P: np.ndarray) -> Estimate:
    """The mean over problems, with its 95 % interval (normal, since it is no share)."""
    half = Z95 * values_P.std() / math.sqrt(len(values_P))
    mean = float(values_P.mean())
    return Estimate(mean, mean - half, mean + half)


def win_rate(ours_PS: np.ndarray, theirs_PS: np.ndarray) -> Estimate:
    """How often an answer of ours is liked better than one of theirs to the same problem, a tie
    counting half, with its 95 % interval over problems."""
    difference_PSS = ours_PS[:, :, None] - theirs_PS[:, None, :]
    wins_PSS = agreement(difference_PSS)
    wins_P = wins_PSS.mean((1, 2))
    return interval(wins_P.tolist(), ours_PS.shape[1])


def kl_of_best_of(n: int) -> float:
    """KL(best of n || one sample) = log n - (n - 1) / n, in nats per answer."""
    return math.log(n) - (n - 1) / n


def best_of(n: int, score_PS: np.ndarray, values_PS: np.ndarray) -> np.ndarray:
    """[P]: the expected value of the answer with the best score among n of the S, taken without
    replacement: the unbiased estimator of WebGPT (arXiv 2112.09332, appendix I)."""
    n_samples = score_PS.shape[1]
    assert 1 <= n <= n_samples
    order_PS = np.argsort(score_PS, axis=1, kind="stable")
    by_score_PS = np.take_along_axis(values_PS, order_PS, axis=1)
    # The k-th lowest score (from 0) is the best of n if the n - 1 others are among the k below it.
    ways = [math.comb(k, n - 1) for k in range(n_samples)]
    return by_score_PS @ np.array(ways) / math.comb(n_samples, n)
