"""What each estimator of the family is, from its paper: loops over answers and tokens, apart from rl/.

Each function takes a group (one update's whole batch) of exact_cases.py's Answers, and returns the
number that its paper maximises; what the paper holds constant is a float here. Answers have 3 tokens at most.
The weight of the KL is R1-Zero's, 0.001, in all.
"""
import math
from dataclasses import replace

BETA, LONGEST = 0.001, 3


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def deviation(values) -> float:
    """The population's standard deviation."""
    return math.sqrt(mean((x - mean(values)) ** 2 for x in values))


def normalised(values) -> list[float]:
    """(x - mean) / std; nothing to learn where all are alike."""
    centre, std = mean(values), deviation(values)
    return [(x - centre) / std if std > 1e-9 else 0.0 for x in values]


def rewards_of(group) -> list[float]:
    return [y.reward for y in group]


def clipped(ratio, a, low, high):
    """PPO, eq. 7 (arXiv 1707.06347)."""
    return min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def k1(s) -> float:
    return s.sampler - s.ref


KL_IN_REWARD = {"k1": k1, "k2": lambda s: k1(s) ** 2 / 2, "k3": lambda s: math.exp(-k1(s)) + k1(s) - 1}
KL_IN_LOSS = {"k1": lambda s: s.now - s.ref, "k2": lambda s: (s.now - s.ref) ** 2 / 2,
              "k3": lambda s: (s.ref - s.now).exp() - (s.ref - s.now) - 1}  # k3: DeepSeekMath, eq. 4


def over_tokens(per_answer):
    """The mean over all tokens of a group, from a list for each answer."""
    return mean(x for answer in per_answer for x in answer)


def grpo(group, beta=BETA):
    """arXiv 2402.03300, eq. 3: (1/G) sum_i (1/|o_i|) sum_t of the surrogate minus beta k3."""
    return mean(mean(clipped(s.ratio, a, 0.2, 0.2) - beta * KL_IN_LOSS["k3"](s) for s in y.steps)
                for y, a in zip(group, normalised(rewards_of(group)), strict=True))


def r1_zero(group):
    """arXiv 2501.12948, eq. 1: the same."""
    return grpo(group)


def dr_grpo(group):
    """arXiv 2503.20783: neither std nor length."""
    centre = mean(rewards_of(group))
    return mean(sum(clipped(s.ratio, y.reward - centre, 0.2, 0.2) for s in y.steps) / LONGEST for y in group)


def dapo(group):
    """arXiv 2503.14476, eq. 8."""
    return over_tokens([[clipped(s.ratio, a, 0.2, 0.28) for s in y.steps]
                        for y, a in zip(group, normalised(rewards_of(group)), strict=True)])


def gspo(group):
    """arXiv 2507.18071, eq. 5 and 7: s_i = (pi(y) / pi_old(y))^(1 / |y|)."""
    return mean(clipped(math.prod(s.ratio for s in y.steps) ** (1 / len(y.steps)), a, 3e-4, 4e-4)
                for y, a in zip(group, normalised(rewards_of(group)), strict=True))


def cispo(group):
    """arXiv 2506.13585, eq. 4 and 5: the weight is a constant, and has no lower bound."""
    return over_tokens([[min(s.ratio.item(), 6.0) * a * s.now for s in y.steps]
                        for y, a in zip(group, normalised(rewards_of(group)), strict=True)])


def rloo(group):
    """arXiv 2402.14740, section 3: R = r - beta log(pi / ref), against the mean of the others' R."""
    returns = [y.reward - BETA * sum(k1(s) for s in y.steps) for y in group]
    baselines = [mean(returns[:i] + returns[i + 1:]) for i in range(len(group))]
    return mean((r - b) * sum(s.now for s in y.steps) / LONGEST
                for y, r, b in zip(group, returns, baselines, strict=True))


def whitened(group, advantages, low=0.2, high=0.2):
    """The surrogate over all tokens, with advantages [[one a token] an answer] normalised over all tokens."""
    flat = iter(normalised([a for answer in advantages for a in answer]))
    return over_tokens([[clipped(s.ratio, next(flat), low, high) for s in y.steps] for y in group])


def reinforce_pp(group):
    """arXiv 2501.03262: A_t = r - beta * the KL from t on, over the batch's mean and standard deviation."""
    return whitened(group, [[y.reward - BETA * sum(k1(s) for s in y.steps[t:]) for t in range(len(y.steps))]
                            for y in group])


def reinforce(group):
    """Williams 1992, the baseline being the batch's mean."""
    centre = mean(rewards_of(group))
    return mean((y.reward - centre) * sum(s.now for s in y.steps) / LONGEST for y in group)


def gae_of(y, beta, lam=1.0, gamma=1.0, estimator="k1", critic=True) -> list[float]:
    """arXiv 1506.02438, eq. 16: A_t = sum_l (gamma lam)^l delta_{t + l}, for one answer."""
    values = [s.value * critic for s in y.steps] + [0.0]
    earned = [-beta * KL_IN_REWARD[estimator](s) for s in y.steps]
    earned[-1] += y.reward
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(earned)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


def ppo(group):
    """arXiv 1707.06347, eq. 7 and 11; the KL in the reward as in InstructGPT (arXiv 2203.02155, eq. 2), and
    advantages normalised over the batch as in the code of the paper."""
    return whitened(group, [gae_of(y, BETA) for y in group])


def any_advantages(group, baseline, scale, beta, estimator, gamma, lam) -> list[list[float]]:
    """One a token, for each answer: rl/advantages.py's table, read literally. A group is the whole batch."""
    if baseline in ("critic", "none"):
        critic = baseline == "critic"
        found = [gae_of(y, beta, lam if critic else 1.0, gamma, estimator, critic) for y in group]
    elif baseline == "teacher":
        unpaid = [replace(y, reward=0.0) for y in group]
        found = [gae_of(y, beta, 1.0, gamma, estimator, critic=False) for y in unpaid]
    else:
        returns = [y.reward - beta * sum(KL_IN_REWARD[estimator](s) for s in y.steps) for y in group]
        others = [returns[:i] + returns[i + 1:] if baseline == "leave_one_out" else returns
                  for i in range(len(group))]
        std = deviation(returns) if scale == "std" else 1.0
        found = [[(r - mean(o)) / (std if std > 1e-9 else 1.0)] * len(y.steps)
                 for y, r, o in zip(group, returns, others, strict=True)]
    if scale == "batch":
        flat = iter(normalised([a for answer in found for a in answer]))
        found = [[next(flat) for _ in answer] for answer in found]
    return found


def gdpo(group):
    """arXiv 2601.05242: each part of the reward normalised in its group, their weighted sum, normalised over
    all answers; the surrogate of GRPO. The reward is the accuracy, 0 or 1, plus 0.2 for the form."""
    right = [float(y.reward >= 1) for y in group]
    formed = [float(y.reward - x > 0.1) for x, y in zip(right, group, strict=True)]
    summed = [a + 0.2 * f for a, f in zip(normalised(right), normalised(formed), strict=True)]
    return mean(mean(clipped(s.ratio, a, 0.2, 0.2) for s in y.steps)
                for y, a in zip(group, normalised(summed), strict=True))


def maxrl(group):
    """arXiv 2602.02710, algorithm 1: (r - mean) / mean, and 0 where no answer earned anything."""
    centre = mean(rewards_of(group))
    if centre == 0:
        return 0.0
    return mean(sum(clipped(s.ratio, (y.reward - centre) / centre, 0.2, 0.2) for s in y.steps) / LONGEST
                for y in group)


def dppo(group):
    """arXiv 2602.04879, the binary total variation: r A, masked where the sampled token's probability has
    moved by more than 0.15 the way that A drives it; A as in Dr. GRPO."""
    centre = mean(rewards_of(group))

    def masked(s, a):
        moved = s.now.exp().item() - math.exp(s.old)
        return 0.0 if (moved > 0.15 and a > 0) or (moved < -0.15 and a < 0) else s.ratio * a

    return mean(sum(masked(s, y.reward - centre) for s in y.steps) / LONGEST for y in group)


def demo(group):
    """No paper's: grpo, whose KL has a larger weight."""
    return grpo(group, beta=0.05)


def distill(group):
    """thinkingmachines.ai/blog/on-policy-distillation: A = -(log p(student) - log p(teacher)) of each token
    as it is sampled; here as PPO's surrogate. The rewards teach nothing."""
    return over_tokens([[clipped(s.ratio, s.ref - s.sampler, 0.2, 0.2) for s in y.steps] for y in group])


PAPERS = {f.__name__: f for f in (r1_zero, grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, reinforce,
                                  ppo, gdpo, maxrl, dppo, distill, demo)}
