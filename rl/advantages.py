"""How much better was each answer than expected? One function per expectation, and a composition.

    baseline        what is expected of an answer            A =                        source
    group           the mean of its group                    r - mean(group)            GRPO
    leave_one_out   the mean of the others in its group      r - mean(group without it) RLOO
    batch           the mean of all answers of the step      r - mean(batch)            REINFORCE
    critic          what a value head says of each token     GAE                        PPO
    none            nothing                                  sum of rewards to go       REINFORCE++
    teacher         nothing; no reward counts                log p(teacher) - log p     distillation

    scale           what the difference is divided by                                   source
    none            nothing                                                             Dr. GRPO
    std             the standard deviation of what the baseline is the mean of          GRPO
    mean            the mean of the group                                               MaxRL
    parts           each part of the reward: its own std in the group; then all         GDPO
                    answers of the step: the root of their mean square
    batch           (A - mean) / std of A over all response tokens of the step          PPO

Which of these are the gradient of the expected reward, and how far the others are from it, is
checked by enumeration in tests/rl/test_exact.py, and noted at each function.

Shapes: N answers, G groups, R response tokens of all answers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ..kernels.grpo import EQUAL_REWARDS, grpo_advantages
from ..model.distributed import all_sum

BASELINES = ("group", "leave_one_out", "batch", "critic", "none", "teacher")
SCALES = ("std", "mean", "parts", "batch", "none")


@dataclass(frozen=True)
class AdvantageConfig:
    """What an answer's reward is compared with."""

    baseline: str = "group"
    """What is subtracted from a reward. "group": the mean of its group (GRPO). "leave_one_out": the
    mean of the others of its group (RLOO). "batch": the mean of the whole step (REINFORCE).
    "critic": a value head and GAE (PPO). "none": nothing; with the KL in the reward, the reward to
    go (REINFORCE++). "teacher": the KL to a teacher alone teaches, token by token, and no reward
    does (on-policy distillation)."""
    scale: str = "std"
    """What the difference is divided by. "std": the standard deviation of what the baseline is the
    mean of (GRPO). "mean": the mean of the group, for rewards of 0 or more (MaxRL). "parts": each
    part of the reward by its own standard deviation in the group, then all answers of the step by
    theirs (GDPO). "batch": whiten over all tokens of the step (REINFORCE++, PPO). "none": nothing
    (Dr. GRPO, RLOO)."""
    gamma: float = 1.0
    """Discount per token of later rewards, for the critic, and for the reward to go; with a
    teacher, of the KL of later tokens."""
    lam: float = 1.0
    """GAE's lambda, for the critic: 1 trusts rewards alone (no bias), less trusts the critic (less
    variance)."""

    def __post_init__(self):
        if self.baseline not in BASELINES or self.scale not in SCALES:
            raise ValueError(
                f"advantage: baseline is {self.baseline!r} and scale {self.scale!r}; expected a "
                f"baseline of {BASELINES} and a scale of {SCALES}"
            )
        if self.baseline in ("critic", "none", "teacher") and self.scale == "std":
            raise ValueError(
                f"advantage: scale std with baseline {self.baseline}, which is no mean of "
                "rewards that could have a standard deviation; expected scale batch or none"
            )
        if self.baseline != "group" and self.scale in ("mean", "parts"):
            raise ValueError(
                f"advantage: scale {self.scale} with baseline {self.baseline}; what it divides is "
                "the distance to the mean of the group, so expected baseline group"
            )
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"advantage: {name} is {getattr(self, name)}; expected 0 to 1")


# ---- one number per answer ----


def checked_rewards(rewards_N: np.ndarray, group_offsets: np.ndarray) -> np.ndarray:
    """The rewards as float64. Raises ValueError for offsets that do not cover them, or for a reward
    that is not finite, by its index."""
    rewards_N, group_offsets = np.asarray(rewards_N, np.float64), np.asarray(group_offsets)
    falls = (np.diff(group_offsets) < 0).any()
    if group_offsets[0] != 0 or group_offsets[-1] != len(rewards_N) or falls:
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
    return rewards_N


def dead_groups(rewards_N: np.ndarray, group_offsets: np.ndarray) -> np.ndarray:
    """[G] bool: the groups whose rewards are all alike, and teach nothing.

    Rewards are alike if they differ by less than EQUAL_REWARDS, or by less than that fraction of
    the largest one if it is above 1: in floating point 0.1 * 3 and 0.3 differ. A group of no answer
    is dead.
    """
    rewards_N = checked_rewards(rewards_N, group_offsets)
    dead_G = np.ones(len(group_offsets) - 1, bool)
    for g, (start, end) in enumerate(zip(group_offsets[:-1], group_offsets[1:], strict=True)):
        if end > start:
            group = rewards_N[start:end]
            largest = max(1.0, np.abs(group).max())
            dead_G[g] = group.max() - group.min() < EQUAL_REWARDS * largest
    return dead_G


def sum_per_answer(values_R: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[N]: the sum over each answer's tokens; offsets: [N + 1], where the tokens begin."""
    sums_before = np.append(0.0, np.cumsum(values_R))
    return np.diff(sums_before[offsets])


def group_advantages(
    rewards_N: np.ndarray, group_offsets: np.ndarray, normalise_std: bool = True, device="cpu"
) -> np.ndarray:
    """[N] float64: A = (r - mean of group) / (std of group)         (DeepSeek-R1, eq. 3)

    rewards_N: [N], samples sorted by group; group_offsets: [G + 1] from 0 to N. The std is the
    population's: divided by the group size, not by one less. Without `normalise_std` it is
    r - mean, as in Dr. GRPO (arXiv 2503.20783). The answers of a dead group get exactly 0: that is
    decided here, in float64. device: where the rest is computed; on a GPU in float32 by a kernel
    (kernels/grpo.py).

    The expected gradient is that of the expected reward times 1 - 1/n for groups of n, because
    an answer's own reward is in its baseline. Dividing by the std changes the gradient's direction,
    except for rewards of 0 and 1, where it only weighs problems: those solved almost always or
    almost never count more (from groups of 4 on).
    """
    rewards_N = checked_rewards(rewards_N, group_offsets)
    on_cpu = torch.device(device).type == "cpu"
    rewards = torch.from_numpy(rewards_N).to(device, torch.float64 if on_cpu else torch.float32)
    offsets = torch.from_numpy(np.asarray(group_offsets)).to(device)
    advantages, _ = grpo_advantages(rewards, offsets, normalise_std)
    advantages_N = advantages.cpu().double().numpy()
    dead_G = dead_groups(rewards_N, group_offsets)
    advantages_N[np.repeat(dead_G, np.diff(group_offsets))] = 0.0
    return advantages_N


def parts_apart(
    parts: dict[str, np.ndarray],
    weights: dict[str, float],
    group_offsets: np.ndarray,
    device="cpu",
) -> np.ndarray:
    """[N]: sum_k w_k (r_k - mean) / std, each part k of the reward apart   (GDPO: arXiv 2601.05242)

    parts: [N] of each name, not weighted; mean and std are those of its group. A part that is all
    alike in a group says nothing there. The sum of the parts over one std instead (GRPO) gives a
    group of rewards 0 and 1 the same advantages as one of 0 and 2, right and wrong the same as well
    and badly formed; here a weight is worth the same in every group. This is no gradient of any
    reward's expectation.
    """
    apart = [
        weights[name] * group_advantages(part_N, group_offsets, device=device)
        for name, part_N in parts.items()
    ]
    return np.sum(apart, axis=0)


def per_root_mean_square(advantages_N: np.ndarray) -> np.ndarray:
    """[N]: the advantages over their standard deviation in the step (GDPO's last step).

    The mean of each group is 0, so that of the step is 0 too: it is not subtracted, which leaves
    the 0 of dead groups exact. Dead groups count. The step is that of all processes together.
    """
    n, squares = all_sum(np.array([len(advantages_N), np.square(advantages_N).sum()], np.float64))
    scale = np.sqrt(squares / n)
    return np.zeros(len(advantages_N)) if scale < EQUAL_REWARDS else advantages_N / scale


def per_group_mean(
    advantages_N: np.ndarray, rewards_N: np.ndarray, group_offsets: np.ndarray
) -> np.ndarray:
    """[N]: A / mean of the group, so (r - mean) / mean in all   (MaxRL: arXiv 2602.02710)

    For rewards of 0 or 1, summed over an answer's tokens, the expected gradient is that of

        sum over k from 1 to n - 1 of pass@k / k,     pass@k = 1 - (1 - p)^k,

    for groups of n and a chance p to be right: the first terms of log p, the likelihood of being
    right, where the expected reward has the first term alone. (The paper's theorem has n terms, for
    a baseline that is subtracted in all-wrong groups too; with those left at 0, as here and in the
    paper's code, the last term cancels.) So the rarer the right answers, the more each counts.

    Rewards may be multiplied by any number: A is the same. A part of the reward that right and
    wrong answers both have, as the format's, makes the mean larger, and rare right answers count
    less. Raises ValueError for a reward below 0, with which a mean could be 0, or turn A around.
    """
    negative = np.flatnonzero(rewards_N < 0)
    if len(negative):
        raise ValueError(
            f"advantage: scale mean, but reward {negative[0]} is {rewards_N[negative[0]]:g} "
            f"({len(negative)} such in all); expected rewards of 0 or more, or another scale"
        )
    sizes_G = np.diff(group_offsets)
    means_G = sum_per_answer(rewards_N, group_offsets) / np.maximum(sizes_G, 1)
    means_N = np.repeat(means_G, sizes_G)
    return advantages_N / np.where(means_N > 0, means_N, 1.0)  # a mean of 0: all wrong, and dead


def leave_one_out(
    rewards_N: np.ndarray, group_offsets: np.ndarray, normalise_std: bool = False, device="cpu"
) -> np.ndarray:
    """[N]: A = r - mean of the others in the group   (RLOO: Kool et al. 2019; arXiv 2402.14740)

    That is n / (n - 1) times r - mean of all n. A group of one has nobody to be compared with, and
    gets 0. The expected gradient is exactly that of the expected reward.
    """
    sizes_G = np.diff(group_offsets)
    sizes_N = np.repeat(sizes_G, sizes_G)
    advantages = group_advantages(rewards_N, group_offsets, normalise_std, device)
    return advantages * sizes_N / np.maximum(sizes_N - 1, 1)


def standardise(x: np.ndarray, counts: np.ndarray, divide: bool) -> np.ndarray:
    """x - mean, over the population's standard deviation if `divide`; zeros where all x are alike.

    counts: how often each entry counts. Mean and deviation are those of all processes together.
    (Whitening over tokens: REINFORCE++, arXiv 2501.03262, section 3.)
    """
    n, weighted = all_sum(np.array([counts.sum(), (counts * x).sum()], np.float64))
    mean = weighted / n
    [squares] = all_sum(np.array([(counts * np.square(x - mean)).sum()]))
    std = np.sqrt(squares / n)
    if std < EQUAL_REWARDS * max(1.0, abs(mean)):  # before the division: 0 / 0 times 0 is NaN
        return np.zeros(len(x))
    return (x - mean) / (std if divide else 1.0)


def batch_advantages(
    rewards_N: np.ndarray, group_offsets: np.ndarray, normalise_std: bool = False, device="cpu"
) -> np.ndarray:
    """[N]: A = r - mean of all answers of the step   (REINFORCE, Williams 1992)

    The expected gradient is that of the expected reward times 1 - 1/N for N answers.
    """
    return standardise(rewards_N, np.ones(len(rewards_N)), normalise_std)


PER_ANSWER = {
    "group": group_advantages,
    "leave_one_out": leave_one_out,
    "batch": batch_advantages,
}


# ---- one number per token ----


def gae(
    rewards_R: np.ndarray, values_R: np.ndarray, offsets: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """(A [R], returns [R]) by generalised advantage estimation (arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}
        return = A + V

    rewards_R: what each token earned, an answer's reward at its last token; values_R: V of the
    state before each token; V after the last token is 0. offsets: [N + 1], where each answer
    begins. With values of 0, gamma 1 and lam 1, A is the reward to go.

    With lam 1 the expected gradient is that of the expected reward; below 1 only if the critic is
    right.
    """
    advantages = np.zeros(len(rewards_R))
    lengths = np.diff(offsets)
    for back in range(1, int(lengths.max(initial=0)) + 1):  # from the end, all answers at a time
        t = np.asarray(offsets[1:], np.int64)[lengths >= back] - back
        advantages[t] = rewards_R[t] - values_R[t]
        if back > 1:
            advantages[t] += gamma * (values_R[t + 1] + lam * advantages[t + 1])
    return advantages, advantages + values_R


def token_rewards(
    rewards_N: np.ndarray, response_offsets: np.ndarray, kl_R: np.ndarray | None
) -> np.ndarray:
    """[R]: each token pays its own KL, and an answer's reward is earned by its last token."""
    rewards_R = np.zeros(response_offsets[-1]) if kl_R is None else -kl_R
    has_tokens = np.diff(response_offsets) > 0  # an answer of no token has no last one
    last_tokens = np.asarray(response_offsets[1:])[has_tokens] - 1
    rewards_R[last_tokens] += rewards_N[has_tokens]
    return rewards_R


# ---- their composition ----


def advantages(
    rewards_N: np.ndarray,
    group_offsets: np.ndarray,
    response_offsets: np.ndarray,
    config: AdvantageConfig,
    kl_R: np.ndarray | None = None,
    values_R: np.ndarray | None = None,
    device="cpu",
) -> tuple[np.ndarray, np.ndarray | None]:
    """(A [R], returns [R] or None): the advantage of each response token, and a critic's targets.

    response_offsets: [N + 1], where the tokens of each answer begin. kl_R: [R], the KL that each
    token costs, in rewards. With a critic or no baseline it counts for the tokens before it, as the
    reward does; with a mean as the baseline, an answer's whole KL comes off its reward before the
    mean is taken (arXiv 2402.14740, eq. 3). With a teacher nothing but the KL counts; gamma 0 then
    gives A = log p(teacher) - log p of each token. values_R: [R], the critic's. With scale "parts",
    rewards_N is what `parts_apart` made of the parts.
    """
    rewards_N = np.asarray(rewards_N, np.float64)
    lengths = np.diff(response_offsets)
    whiten = config.scale == "batch"
    if config.baseline in PER_ANSWER:
        if kl_R is not None:
            rewards_N = rewards_N - sum_per_answer(kl_R, response_offsets)
        compare = PER_ANSWER[config.baseline]
        found_N = compare(rewards_N, group_offsets, config.scale == "std", device)
        if config.scale == "mean":
            found_N = per_group_mean(found_N, rewards_N, group_offsets)
        elif config.scale == "parts":
            found_N = per_root_mean_square(found_N)
    elif config.baseline == "none" and kl_R is None:
        found_N = rewards_N  # every token of an answer has the same reward to go
    else:
        if config.baseline == "teacher":
            rewards_N = np.zeros_like(rewards_N)
        rewards_R = token_rewards(rewards_N, response_offsets, kl_R)
        is_critic = config.baseline == "critic"
        values_R = np.zeros_like(rewards_R) if values_R is None else values_R
        lam = config.lam if is_critic else 1.0  # without a critic it would be another discount
        found_R, returns_R = gae(rewards_R, values_R, response_offsets, config.gamma, lam)
        if whiten:
            found_R = standardise(found_R, np.ones_like(found_R), divide=True)
        return found_R, returns_R if is_critic else None
    if whiten:
        found_N = standardise(found_N, lengths, divide=True)
    return np.repeat(found_N, lengths), None


@dataclass(frozen=True)
class Advantages:
    """What an update learns from, one number per response token of all rollouts."""

    per_token: np.ndarray
    """[R] float64."""
    values: np.ndarray | None = None
    """[R] float64: what the critic said before the update; None without a critic."""
    returns: np.ndarray | None = None
    """[R] float64: what the critic should have said."""
    metrics: dict = field(default_factory=dict)
    """For the log."""


class NoCritic:
    """In all members of the family but PPO: no values, and nothing to learn."""

    def values(self, rollouts) -> None:
        return None

    def update(self, rollouts, advantages: Advantages, step: int) -> dict:
        return {}


def whole_reward(rewards, group_offsets: np.ndarray, device) -> np.ndarray:
    """[N]: the reward that is trained on."""
    return rewards.training


def reward_of_parts(rewards, group_offsets: np.ndarray, device) -> np.ndarray:
    """[N]: its parts, each normalised apart (GDPO)."""
    return parts_apart(rewards.training_parts, rewards.weights, group_offsets, device)


def no_kl(rollouts) -> None:
    """The reward is the grader's alone."""
    return None


def no_steps(rewards, rollouts) -> tuple[float, dict]:
    """Answers are judged as a whole."""
    return 0.0, {}


class Credit:
    """From rewards to advantages. Made once per run, of the pieces that the algorithm calls for."""

    def __init__(
        self,
        config: AdvantageConfig,
        device="cpu",
        kl_cost: Callable = no_kl,
        critic=None,
        step_credit: Callable = no_steps,
    ):
        """kl_cost: from rollouts to the KL that each token costs, [R], or None. critic: see
        rl/heads.py. step_credit: from (rewards, rollouts) to ([R] what the steps add, metrics)."""
        self.config, self.device = config, device
        self.reward_of = reward_of_parts if config.scale == "parts" else whole_reward
        self.kl_cost = kl_cost
        self.critic = critic or NoCritic()
        self.step_credit = step_credit
        self.advantages = advantages

    def __call__(self, rewards, rollouts) -> Advantages:
        kl_R = self.kl_cost(rollouts)
        values_R = self.critic.values(rollouts)
        rewards_N = self.reward_of(rewards, rollouts.group_offsets, self.device)
        found_R, returns_R = self.advantages(
            rewards_N,
            rollouts.group_offsets,
            rollouts.response_offsets,
            self.config,
            kl_R,
            values_R,
            self.device,
        )
        metrics = {} if kl_R is None else {"kl_in_reward": kl_R.mean()}
        of_steps_R, more = self.step_credit(rewards, rollouts)
        return Advantages(found_R + of_steps_R, values_R, returns_R, metrics | more)
