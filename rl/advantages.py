"""How much better than the rest of its group was each answer?"""
import numpy as np

EQUAL_REWARDS = 1e-6  # a group that spans less has no signal: 0.1 * 3 and 0.3 are the same reward


def group_advantages(rewards_N: np.ndarray, group_offsets: np.ndarray,
                     normalise_std: bool = True) -> np.ndarray:
    """A = (r - mean of group) / (std of group), eq. 3 of DeepSeekMath (arXiv 2402.03300).

    rewards_N: [N], samples sorted by group; group_offsets: [G + 1] from 0 to N. The std is the population's
    (divide by the group size, not by one less). Without `normalise_std` it is r - mean, as in Dr. GRPO (arXiv
    2503.20783). A group whose rewards span less than EQUAL_REWARDS gets exactly 0. Returns [N] float64.
    Raises ValueError for offsets that do not cover the rewards, or a reward that is not finite, by its index.
    """
    rewards_N = np.asarray(rewards_N, np.float64)
    if group_offsets[0] != 0 or group_offsets[-1] != len(rewards_N) or (np.diff(group_offsets) < 0).any():
        raise ValueError(f"group_advantages: offsets {group_offsets[0]}…{group_offsets[-1]} for "
                         f"{len(rewards_N)} rewards; expected rising offsets from 0 to the number of rewards")
    bad = np.flatnonzero(~np.isfinite(rewards_N))
    if len(bad):
        raise ValueError(f"group_advantages: reward {bad[0]} is {rewards_N[bad[0]]} ({len(bad)} such in "
                         "all); rewards must be finite, so look at the reward function")
    advantages = np.zeros_like(rewards_N)
    for start, end in zip(group_offsets[:-1], group_offsets[1:], strict=True):
        group = rewards_N[start:end]
        if end > start and np.ptp(group) >= EQUAL_REWARDS:
            centred = group - group.mean()
            advantages[start:end] = centred / centred.std() if normalise_std else centred
    return advantages


def dead_groups(rewards_N: np.ndarray, group_offsets: np.ndarray) -> float:
    """Share of groups whose rewards are all equal, so that they teach nothing."""
    pairs = list(zip(group_offsets[:-1], group_offsets[1:], strict=True))
    dead = [end == start or np.ptp(rewards_N[start:end]) < EQUAL_REWARDS for start, end in pairs]
    return sum(dead) / len(pairs)
