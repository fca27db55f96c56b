"""How much better than the rest of its group was each answer?"""
import numpy as np
import torch

from ..kernels.grpo import grpo_advantages


def group_advantages(rewards_N: np.ndarray, group_offsets: np.ndarray,
                     normalise_std: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(A [N] float64, dead [G] bool): A = (r - mean of group) / (std of group), eq. 3 of DeepSeekMath (arXiv
    2402.03300).

    rewards_N: [N], samples sorted by group; group_offsets: [G + 1] from 0 to N. The std is the population's
    (divide by the group size, not by one less). Without `normalise_std` it is r - mean, as in Dr. GRPO (arXiv
    2503.20783). A group whose rewards span less than EQUAL_REWARDS of kernels/reference_grpo.py is dead: it
    gets exactly 0 and teaches nothing. Rule rewards are made on the host, and what is dead must be known
    there, to be left out of the batches: so this stays on the host.
    Raises ValueError for offsets that do not cover the rewards, or a reward that is not finite, by its index.
    """
    rewards_N, group_offsets = np.asarray(rewards_N, np.float64), np.asarray(group_offsets)
    if group_offsets[0] != 0 or group_offsets[-1] != len(rewards_N) or (np.diff(group_offsets) < 0).any():
        raise ValueError(f"group_advantages: offsets {group_offsets[0]}…{group_offsets[-1]} for "
                         f"{len(rewards_N)} rewards; expected rising offsets from 0 to the number of rewards")
    bad = np.flatnonzero(~np.isfinite(rewards_N))
    if len(bad):
        raise ValueError(f"group_advantages: reward {bad[0]} is {rewards_N[bad[0]]} ({len(bad)} such in "
                         "all); rewards must be finite, so look at the reward function")
    advantages, dead = grpo_advantages(torch.from_numpy(rewards_N), torch.from_numpy(group_offsets),
                                       normalise_std, impl="reference")
    return advantages.numpy(), dead.numpy() > 0
