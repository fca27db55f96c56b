"""The control: the same training with rewards that say nothing about the answers.

What it does to a model is what the machinery does by itself. A gain that the control has too is no
reasoning learned from the rewards (arXiv 2506.10947: random rewards lift some base models by 20
points).

    permute   the rewards of each group, dealt out at random among its answers
    random    a reward of 0 or 1 for each answer, by the toss of a coin

"permute" keeps the mean and the spread of every group, so the updates are as large as in the real
run, and dead groups stay dead. "random" knows nothing of the answers at all, not even which
problems are hard: every group has a signal, of noise alone.

Both are a fixed function of the seed, of the step that the answers were sampled in, and, for
"random", of the group's tokens. So a run that is resumed, or answers that are graded twice, have
the same.
"""

import zlib
from collections.abc import Callable

import numpy as np

Parts = dict[str, np.ndarray]


def generator(rollouts, seed: int, *more: int) -> np.random.Generator:
    keys = [abs(seed), abs(rollouts.weights_version), *more]
    return np.random.default_rng(np.random.SeedSequence(keys))


def permute_within_groups(parts: Parts, rollouts, seed: int) -> Parts:
    """Each part [N], dealt out within each group; all parts of a reward land on the same answer."""
    rng = generator(rollouts, seed)
    starts, sizes = rollouts.group_offsets[:-1], np.diff(rollouts.group_offsets)
    order = [start + rng.permutation(size) for start, size in zip(starts, sizes, strict=True)]
    order_N = np.concatenate(order)
    return {name: part_N[order_N] for name, part_N in parts.items()}


def random_rewards(parts: Parts, rollouts, seed: int) -> Parts:
    """One part "random", [N]: 0 or 1 with equal chances."""
    offsets = rollouts.group_offsets
    tossed = []
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        # Dynamic sampling grades a group in its round, and again among those that it keeps. Its
        # position has changed by then, its tokens have not.
        tokens = np.concatenate([np.arange(0), *rollouts.sequences[start:end]])
        rng = generator(rollouts, seed, zlib.crc32(tokens.astype(np.int64).tobytes()))
        tossed.append(rng.integers(0, 2, end - start))
    return {"random": np.concatenate(tossed).astype(np.float64)}


CONTROLS: dict[str, Callable] = {"permute": permute_within_groups, "random": random_rewards}
