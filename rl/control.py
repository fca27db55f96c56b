"""The control: the same training with rewards that say nothing about the answers.

What it does to a model is what the machinery does by itself. A gain that the control has too is no
reasoning learned from the rewards (arXiv 2506.10947: random rewards lift some base models by 20
points).

    permute   the rewards of each group, dealt out at random among its answers
    random    a reward of 0 or 1 for each answer, by the toss of a coin

"permute" keeps the mean and the spread of every group, so the updates are as large as in the real
run, and dead groups stay dead. "random" knows nothing of the answers at all, not even which
problems are hard: every group has a signal, of noise alone.

Both are a fixed function of the seed and of the step that the answers were sampled in, so a run
that is resumed has the same. "random" follows from the group's tokens, too: answers that dynamic
sampling grades twice, at two positions, have the same. With "permute" they may not.
"""

import zlib
from collections.abc import Callable

import numpy as np

from .shaping import Parts, indices_of_groups


def generator(rollouts, seed: int, *more: int) -> np.random.Generator:
    step = rollouts.weights_version
    sequence = np.random.SeedSequence([abs(seed), abs(step), *more])
    return np.random.default_rng(sequence)


def permute_within_groups(parts: Parts, rollouts, seed: int) -> Parts:
    """Each part [N], dealt out within each group; all parts of a reward land on the same answer."""
    rng = generator(rollouts, seed)
    groups = indices_of_groups(rollouts.group_offsets)
    order = [rng.permutation(group) for group in groups]
    order_N = np.concatenate(order)
    return {name: part_N[order_N] for name, part_N in parts.items()}


def permute_steps(steps, rollouts, seed: int):
    """The scores of each group's steps, dealt out among the steps of the group."""
    rng = generator(rollouts, seed, 1)
    offsets_G = steps.group_offsets(rollouts.response_offsets, rollouts.group_offsets)
    order = [rng.permutation(group) for group in indices_of_groups(offsets_G)]
    order_K = np.concatenate(order)
    return steps._replace(scores=steps.scores[order_K])


def random_steps(steps, rollouts, seed: int):
    """A score of 0 or 1 for each step, with equal chances."""
    rng = generator(rollouts, seed, 2)
    tossed_K = rng.integers(0, 2, len(steps.scores))
    return steps._replace(scores=tossed_K.astype(np.float64))


def random_rewards(parts: Parts, rollouts, seed: int) -> Parts:
    """One part "random", [N]: 0 or 1 with equal chances."""
    tossed = []
    for group in indices_of_groups(rollouts.group_offsets):
        # Dynamic sampling grades a group in its round, and again among those that it keeps. Its
        # position has changed by then, its tokens have not.
        checksum = 0
        for n in group:
            tokens = np.asarray(rollouts.sequences[n], np.int64)
            checksum = zlib.crc32(tokens.tobytes(), checksum)
        rng = generator(rollouts, seed, checksum)
        tossed.append(rng.integers(0, 2, len(group)))
    return {"random": np.concatenate(tossed).astype(np.float64)}


CONTROLS: dict[str, Callable] = {"permute": permute_within_groups, "random": random_rewards}
# The same of the scores of steps, where a process reward gives some.
STEP_CONTROLS: dict[str, Callable] = {"permute": permute_steps, "random": random_steps}
