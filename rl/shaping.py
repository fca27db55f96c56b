"""Rewards of the form of an answer, beside those of the answer itself: its length, its equations.

    efficiency   is it shorter than the others of its group?         Kimi k1.5, section 2.3.3
    coherence    are the equations on its way true?                  Countdown alone
    overlong     does it come near the limit of its length?          DAPO, eq. 13

Efficiency and coherence say nothing of whether the answer is right. In a group whose answers are
equal in accuracy, format and plug-in they would be all that differs, and be blown up by the group's
standard deviation. So there they count nothing, unless `--dead-groups reward` asks for it. (The
overlong penalty counts everywhere, as in DAPO.)

A part that is a share, such as the consistency of the language, hardly ever makes a group equal: an
all-right group still teaches the language, and dynamic sampling keeps it. With `--dead-groups
accuracy` groups that are all right or all wrong teach nothing, whatever else differs.

Shapes: N answers, G groups.
"""

from itertools import pairwise

import numpy as np

SHAPING = ("efficiency", "coherence")  # the parts that do not count in dead groups
OVERLONG = "overlong"  # the part that `lower_overlong` adds
Parts = dict[str, np.ndarray]


def weighted_sum(parts: Parts, weights: dict[str, float]) -> np.ndarray:
    """[N]: the sum of the parts, each times its weight."""
    return sum(weights[name] * part_N for name, part_N in parts.items())


def indices_of_groups(group_offsets: np.ndarray) -> list[np.ndarray]:
    """The indices of the answers of each group."""
    bounds = pairwise(group_offsets.tolist())
    return [np.arange(start, end) for start, end in bounds]


def groups_alike(rewards_N: np.ndarray, group_offsets: np.ndarray) -> np.ndarray:
    """[G] bool: `dead_groups`, of any rewards."""
    from .advantages import dead_groups  # not above: `r1zero grade` does not wait for torch

    return dead_groups(rewards_N, group_offsets)


def efficiency(
    lengths_N: np.ndarray, accuracy_N: np.ndarray, group_offsets: np.ndarray
) -> np.ndarray:
    """[N], from 0.5 for the shortest answer of a group to -0.5 for the longest.

        lambda = 0.5 - (length - shortest) / (longest - shortest)
        right answers: lambda        wrong ones: min(0, lambda)

    (Kimi k1.5, arXiv 2501.12599, section 2.3.3.) So no wrong answer is paid for being short. Where
    all are of one length, all get 0. lengths_N: tokens per answer; accuracy_N: 1 for a right one.
    """
    lengths_N = np.asarray(lengths_N, np.float64)
    earned_N = np.zeros(len(lengths_N))
    for group in indices_of_groups(group_offsets):
        lengths = lengths_N[group]
        spread = np.ptp(lengths) if len(group) else 0
        if spread == 0:
            continue
        by_length = 0.5 - (lengths - lengths.min()) / spread
        is_right = accuracy_N[group] == 1
        earned_N[group] = np.where(is_right, by_length, np.minimum(0, by_length))
    return earned_N


def extras_of(dead_groups: str, weights: dict[str, float]) -> list[str]:
    """The parts that count nothing in groups where the others are equal, for a --dead-groups."""
    if dead_groups == "rules":
        return [name for name in SHAPING if name in weights]
    if dead_groups == "accuracy":
        # a reward model judges where no rule can say what is right
        return [name for name in weights if name not in ("accuracy", "model", OVERLONG)]
    return []


def without_extras_in_dead_groups(
    parts: Parts, rollouts, weights: dict[str, float], extras: list[str]
) -> Parts:
    """The parts, the extras 0 in the groups whose other parts, but the overlong penalty, add up to
    the same."""
    judging = {name: parts[name] for name in parts if name not in (*extras, OVERLONG)}
    judged_N = weighted_sum(judging, weights)
    dead_G = groups_alike(judged_N, rollouts.group_offsets)
    sizes_G = np.diff(rollouts.group_offsets)
    counts_N = np.repeat(~dead_G, sizes_G)
    given = [name for name in extras if name in parts]
    return parts | {name: parts[name] * counts_N for name in given}


def overlong_penalty(lengths_N: np.ndarray, max_new_tokens: int, buffer: float) -> np.ndarray:
    """[N], from 0 down to -1 over the last `buffer` share of max_new_tokens.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13). lengths_N: tokens per answer.
    """
    tokens = buffer * max_new_tokens
    if not tokens:
        return np.zeros(len(lengths_N))
    return np.clip((max_new_tokens - tokens - np.asarray(lengths_N)) / tokens, -1.0, 0.0)


def lower_overlong(parts: Parts, rollouts, max_new_tokens: int, buffer: float) -> Parts:
    """The parts, and beside them the penalty of answers that come near the limit."""
    penalty_N = overlong_penalty(rollouts.response_lengths, max_new_tokens, buffer)
    return parts | {OVERLONG: penalty_N}
