"""How much better was each answer than could be expected? One function a way to expect, and their
composition.

    baseline        what is expected of an answer             A =                              source
    group           the mean of its group                     r - mean(group)                  GRPO, Dr. GRPO
    leave_one_out   the mean of the others in its group       r - mean(group without it)       RLOO
    batch           the mean of all answers of the step       r - mean(batch)                  REINFORCE
    critic          what a value head says, token by token    GAE                              PPO
    none            nothing: the reward to go                 sum of rewards from here on      REINFORCE++

    scale           none, or
    std             over the standard deviation of what the baseline is the mean of            GRPO
    batch           (A - mean) / std of A over all response tokens of the step                REINFORCE++, PPO

In expectation on-policy, summed over tokens and undiscounted: leave_one_out, critic with lam 1 (below 1 only
if the critic is right), and none give the gradient of the expected reward; group gives it times 1 - 1/n for
groups of n and batch times 1 - 1/N for N answers, for an answer's own reward is in its baseline. The group's
`std` turns it, unless the rewards are 0 and 1: then it weighs problems anew, those nearly always or never
solved up (not in groups of 2 or 3; the larger the group, the more). Scale `batch` turns it in either case.
tests/test_exact.py enumerates all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.grpo import grpo_advantages
from ..kernels.reference import EQUAL_REWARDS

BASELINES = ("group", "leave_one_out", "batch", "critic", "none")
SCALES = ("std", "batch", "none")


@dataclass(frozen=True)
class AdvantageConfig:
    """What an answer's reward is compared with. A dial that is not given is as --algo has it."""

    baseline: str | None = None
    """"group": the mean of its group (GRPO). "leave_one_out": the mean of the others of its group (RLOO).
    "batch": the mean of the whole step (REINFORCE). "critic": a value head and GAE (PPO). "none": the reward
    itself, or what is left of it where the KL is in the reward (REINFORCE++)."""
    scale: str | None = None
    """"std": divide by the standard deviation of what the baseline is the mean of (GRPO). "batch": whiten
    over all tokens of the step (REINFORCE++, PPO). "none" (Dr. GRPO, RLOO)."""
    gamma: float | None = None
    """Discount of rewards that come a token later; of critic, and of none where the KL is in the reward."""
    lam: float | None = None
    """GAE's lambda, of critic alone: 1 trusts rewards alone (no bias), less trusts the critic (less
    variance)."""

    def __post_init__(self):
        if self.baseline not in (None, *BASELINES) or self.scale not in (None, *SCALES):
            raise ValueError(
                f"advantage: baseline is {self.baseline!r} and scale {self.scale!r}; expected a "
                f"baseline of {BASELINES} and a scale of {SCALES}"
            )
        if self.baseline in ("critic", "none") and self.scale == "std":
            raise ValueError(
                f"advantage: scale std with baseline {self.baseline}, which is no mean of "
                "rewards that could have a standard deviation; expected scale batch or none"
            )
        for name in ("gamma", "lam"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"advantage: {name} is {value}; expected 0 to 1")


def group_advantages(
    rewards_N: np.ndarray, group_offsets: np.ndarray, normalise_std: bool = True
) -> tuple[np.ndarray, np.ndarray]:
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
    if (
        group_offsets[0] != 0
        or group_offsets[-1] != len(rewards_N)
        or (np.diff(group_offsets) < 0).any()
    ):
        raise ValueError(
            f"group_advantages: offsets {group_offsets[0]}…{group_offsets[-1]} for "
            f"{len(rewards_N)} rewards; expected rising offsets from 0 to the number of rewards"
        )
    bad = np.flatnonzero(~np.isfinite(rewards_N))
    if len(bad):
        raise ValueError(
            f"group_advantages: reward {bad[0]} is {rewards_N[bad[0]]} ({len(bad)} such in "
            "all); rewards must be finite, so look at the reward function"
        )
    advantages, dead = grpo_advantages(
        torch.from_numpy(rewards_N),
        torch.from_numpy(group_offsets),
        normalise_std,
        impl="reference",
    )
    return advantages.numpy(), dead.numpy() > 0


def leave_one_out(
    rewards_N: np.ndarray, group_offsets: np.ndarray, normalise_std: bool = False
) -> np.ndarray:
    """[N]: A = r - mean of the others in the group, RLOO (Kool et al. 2019; arXiv 2402.14740, section 3).

    That is n / (n - 1) times r - mean of all n. A group of one has nobody to be compared with, and gets 0.
    """
    sizes = np.repeat(np.diff(group_offsets), np.diff(group_offsets))
    return (
        group_advantages(rewards_N, group_offsets, normalise_std)[0]
        * sizes
        / np.maximum(sizes - 1, 1)
    )


def gae(
    rewards_R: np.ndarray, values_R: np.ndarray, offsets: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """(A [R], returns [R]) by generalised advantage estimation (arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}      return = A + V

    rewards_R: what each token earned, an answer's reward at its last token; values_R: V of the state before
    each token; V after the last token is 0. offsets: [N + 1], where each answer begins. With values of 0,
    gamma 1 and lam 1, A is the reward to go.
    """
    advantages, lengths = np.zeros(len(rewards_R)), np.diff(offsets)
    for back in range(1, int(lengths.max(initial=0)) + 1):  # from the end, all answers at a time
        here = np.asarray(offsets[1:], np.int64)[lengths >= back] - back
        advantages[here] = rewards_R[here] - values_R[here]
        if back > 1:
            advantages[here] += gamma * (values_R[here + 1] + lam * advantages[here + 1])
    return advantages, advantages + values_R


def standardise(
    x: np.ndarray, counts: np.ndarray, divide: bool, total: Callable = np.asarray
) -> np.ndarray:
    """x - mean, over the population's standard deviation if `divide`; zeros where all x are alike.

    counts: how often each entry counts; total: adds an array up over processes. (As whitening over tokens:
    REINFORCE++, arXiv 2501.03262, section 3.)
    """
    n, weighted = total(np.array([counts.sum(), (counts * x).sum()], np.float64))
    mean = weighted / n
    [squares] = total(np.array([(counts * np.square(x - mean)).sum()]))
    std = np.sqrt(squares / n)
    if std < EQUAL_REWARDS * max(1.0, abs(mean)):  # before the division: 0 / 0 times 0 is NaN
        return np.zeros(len(x))
    return (x - mean) / (std if divide else 1.0)


def advantages(
    rewards_N: np.ndarray,
    group_offsets: np.ndarray,
    response_offsets: np.ndarray,
    c: AdvantageConfig,
    kl_R: np.ndarray | None = None,
    values_R: np.ndarray | None = None,
    total: Callable = np.asarray,
) -> tuple[np.ndarray, np.ndarray | None]:
    """(A, returns): the advantage of each answer [N], or of each token [R]; returns [R] for a critic, or
    None.

    response_offsets: [N + 1], where the tokens of each answer begin. kl_R: [R], the KL that each token costs,
    in rewards. With a critic or no baseline it counts for the tokens before it, as the reward does; with a
    mean for a baseline an answer's whole KL comes off its reward before the mean is taken (arXiv 2402.14740,
    eq. 3). values_R: [R], the critic's. total: adds an array up over processes.
    """
    if None in (c.baseline, c.scale, c.gamma, c.lam):
        raise ValueError(
            f"advantages: {c} has dials that are not given; expected all of them, as "
            'rl.algorithms.from_preset(algo, "advantage", config) fills them in'
        )
    rewards_N, normalise = np.asarray(rewards_N, np.float64), c.scale == "std"
    counts, returns_R = np.diff(response_offsets), None
    if kl_R is not None and c.baseline in ("group", "leave_one_out", "batch"):
        rewards_N = rewards_N - np.diff(np.append(0.0, np.cumsum(kl_R))[response_offsets])
    if c.baseline == "group":
        found, _ = group_advantages(rewards_N, group_offsets, normalise)
    elif c.baseline == "leave_one_out":
        found = leave_one_out(rewards_N, group_offsets, normalise)
    elif c.baseline == "batch":
        found = standardise(rewards_N, np.ones(len(rewards_N)), normalise, total)
    elif c.baseline == "none" and kl_R is None:
        found = rewards_N
    else:
        rewards_R = np.zeros(response_offsets[-1]) if kl_R is None else -kl_R
        said = counts > 0  # an answer of no token has no last one
        rewards_R[np.asarray(response_offsets[1:])[said] - 1] += rewards_N[said]
        values_R = np.zeros_like(rewards_R) if values_R is None else values_R
        lam = (
            c.lam if c.baseline == "critic" else 1.0
        )  # without a critic it would be another discount
        found, returns_R = gae(rewards_R, values_R, response_offsets, c.gamma, lam)
        counts, returns_R = np.ones_like(found), None if c.baseline == "none" else returns_R
    return standardise(found, counts, True, total) if c.scale == "batch" else found, returns_R
