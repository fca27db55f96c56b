"""Each estimator is what its paper says: its expectation over all that a toy policy can say, to 1e-10.

First against the definition, on-policy and off; then, where theory knows it, against what it should be: the
gradient of the expected reward, a share of it, or another vector, and how far that one is off. The numbers
in the docstrings are those of the toy of exact_cases.py: they show that a bias is there, not how large
it is elsewhere. test_exact_large.py goes beyond what can be enumerated.
"""
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch

from r1zero.rl.advantages import BASELINES, advantages
from r1zero.rl.family import PRESETS

from .exact_cases import Toy, dials, expected_paper, expected_update, make_case, plain
from .exact_papers import KL_IN_LOSS, LONGEST, PAPERS, any_advantages, clipped, mean, normalised, over_tokens

# "mean" and "parts" are MaxRL's and GDPO's alone, which are tested as presets
PAIRS = [(b, s) for b in BASELINES for s in ("std", "batch", "none")
         if s != "std" or b not in ("critic", "none", "teacher")]


def same(found, expected, tolerance=1e-10):
    largest = float(expected.abs().max())
    assert largest > 1e-3  # there is something to be equal to
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest)


def cosine(x, y) -> float:
    return float((x * y).sum() / x.norm() / y.norm())


# ---- against the definitions ----

@pytest.mark.parametrize("rewards, off_policy", [("graded", False), ("graded", True), ("right", True)])
@pytest.mark.parametrize("algo", PRESETS)
def test_a_preset_is_its_papers_definition(algo, rewards, off_policy):
    case, shows = make_case(rewards, off_policy), ()
    if off_policy and algo not in ("rloo", "reinforce"):
        shows = ("clipped_high",) if algo == "cispo" else ("clipped_low", "clipped_high")
    same(expected_update(case, dials(algo), shows=shows), expected_paper(case, PAPERS[algo]))


@pytest.mark.parametrize("baseline, scale, estimator", [(*pair, k) for pair, k in
                                                        zip(PAIRS, cycle(("k1", "k2", "k3")), strict=False)])
def test_every_baseline_and_scale_is_its_definition(baseline, scale, estimator):
    """Off-policy, the KL in the reward, and every discount in use."""
    case, discounts = make_case(off_policy=True), dict(gamma=0.9, lam=0.7)

    def definition(group):
        a = any_advantages(group, baseline, scale, 0.3, estimator, **discounts)
        return over_tokens([[clipped(s.ratio, x, 0.2, 0.2) for s, x in zip(y.steps, of_y, strict=True)]
                            for y, of_y in zip(group, a, strict=True)])

    config = dials(baseline=baseline, scale=scale, kl_coef=0.3, kl_in="reward", kl_estimator=estimator,
                   **discounts)
    same(expected_update(case, config), expected_paper(case, definition))


@pytest.mark.parametrize("estimator", KL_IN_LOSS)
def test_each_kl_in_the_loss_off_policy_is_its_definition(estimator):
    """The derivative of the estimator at the tokens that the old policy said: no ratio corrects for it."""
    case = make_case(off_policy=True)
    config = dials("grpo", kl_coef=1.0, kl_estimator=estimator)
    same(expected_update(case, config), expected_paper(case, lambda group: mean(
        mean(clipped(s.ratio, a, 0.2, 0.2) - KL_IN_LOSS[estimator](s) for s in y.steps)
        for y, a in zip(group, normalised([y.reward for y in group]), strict=True))))


@pytest.mark.parametrize("level, objective", [
    ("token", "clip"), ("sequence", "clip"), ("geometric", "clip"), ("sequence", "gspo"), ("token", "gspo")])
@pytest.mark.parametrize("mask", [False, True])
def test_importance_weights_are_lowered_to_the_cap_or_dropped_beyond_it(level, objective, mask):
    """One a token, or one a sequence: the product, or the geometric mean, as gspo has it for "token" too. The
    bounds cut on either side."""
    case = make_case(off_policy=True)
    case, seen = replace(case, old=case.theta.detach()), set()

    def bounded(w):
        side = "high" if w > 1.2 else "low" if w < 0.8 else "inside"
        seen.add(side)
        return w if side == "inside" or (side == "low" and not mask) else 1.2 * (not mask)

    def definition(group):
        a = any_advantages(group, "group", "none", 0.0, "k1", 1.0, 1.0)
        weights = [[np.exp(s.old - s.sampler) for s in y.steps] for y in group]
        if level == "sequence":
            weights = [[np.prod(w)] * len(w) for w in weights]
        elif level == "geometric" or objective == "gspo":
            weights = [[np.prod(w) ** (1 / len(w))] * len(w) for w in weights]
        return mean(mean(bounded(w) * of_y[0] * s.ratio for w, s in zip(of_w, y.steps, strict=True))
                    for of_w, of_y, y in zip(weights, a, group, strict=True))

    bounds = dict(min_importance=0.8, importance_mask=True) if mask else {}
    config = dials(scale="none", objective=objective, mean="sequence", max_importance=1.2, importance=level,
                   **bounds)
    same(expected_update(case, config), expected_paper(case, definition))
    assert seen == {"low", "inside", "high"}


def test_an_answer_that_was_cut_off_can_be_left_out_and_still_counts_in_the_baseline():
    def definition(group):
        a = any_advantages(group, "group", "none", 0.0, "k1", 1.0, 1.0)
        kept = [[x * s.ratio for s in y.steps] for y, [x, *_] in zip(group, a, strict=True) if y.ended]
        return over_tokens(kept) if kept else 0.0

    case = make_case()
    same(expected_update(case, dials(scale="none", overlong_filter=True)), expected_paper(case, definition))


# ---- the gradient of the expected reward, or a share of it ----

@pytest.mark.parametrize("objective", ["reinforce", "clip"])
@pytest.mark.parametrize("baseline, sizes, share", [
    ("none", (2,), 1), ("none", (2, 2), 1), ("critic", (2, 2), 1),
    ("leave_one_out", (2,), 1), ("leave_one_out", (3,), 1), ("leave_one_out", (2, 2), 1),
    ("group", (2,), 1 / 2), ("group", (3,), 2 / 3), ("group", (2, 2), 1 / 2),  # 1 - 1/n
    ("batch", (2,), 1 / 2), ("batch", (3,), 2 / 3), ("batch", (2, 2), 3 / 4),  # 1 - 1/N
])
def test_the_share_of_the_true_gradient_that_each_baseline_leaves(baseline, sizes, share, objective):
    """1, but 1 - 1/n for the mean of n answers of which one's own is one. On-policy all objectives agree."""
    case = make_case(toy=Toy(2, 2) if sizes != (2,) else None)
    found = expected_update(case, plain(baseline=baseline, objective=objective), sizes)
    same(case.toy.longest * found, share * case.true_gradient())


@pytest.mark.parametrize("rewards", ["graded", "right"])
@pytest.mark.parametrize("algo, share", [("rloo", 1), ("dr_grpo", 1 / 2), ("reinforce", 1 / 2)])
def test_rloo_is_the_true_gradient_and_dr_grpo_and_reinforce_are_half_of_it_in_a_batch_of_two(
        algo, share, rewards):
    case = make_case(rewards)
    same(LONGEST * expected_update(case, dials(algo, kl_coef=0.0)), share * case.true_gradient())


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_with_the_true_values_is_the_true_gradient_for_any_lam(lam):
    case = make_case()
    p = case.toy.answer_logp(case.theta).detach().exp().numpy()
    for i, prefix in enumerate(case.toy.prefixes):
        below = np.array([y[:len(prefix)] == prefix and len(y) > len(prefix) for y in case.toy.answers])
        case.values[i] = (p * case.rewards)[below].sum() / p[below].sum()
    same(LONGEST * expected_update(case, plain(baseline="critic", lam=lam)), case.true_gradient())


def test_gae_with_a_wrong_critic_is_biased_below_lam_1():
    """A random critic: cosine 1 at lam 1, 0.97 at 0.95, 0.83 at 0.5."""
    case = make_case()
    for lam, expected in ((1.0, 1.0), (0.95, 0.9742), (0.5, 0.8267)):
        found = expected_update(case, plain(baseline="critic", lam=lam))
        assert cosine(found, case.true_gradient()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_maxrl_climbs_the_first_terms_of_the_likelihood_of_being_right(size):
    """pass@1 / 1 + ... + pass@(n - 1) / (n - 1) in groups of n: one term less than in the paper's theorem,
    whose baseline is subtracted in all-wrong groups, too. In groups of two that is the expected reward."""
    case = make_case(toy=Toy(2, 2))
    case.rewards = np.array([0.0, 1.0, 0.0])
    right = (case.toy.answer_logp(case.theta).exp() * torch.from_numpy(case.rewards)).sum()
    terms = [(1 - (1 - right) ** k) / k for k in range(1, size)]
    found = case.toy.longest * expected_update(case, dials("maxrl"), (size,))
    same(found, case.gradient(sum(terms)))
    case.rewards = 7 * case.rewards  # the scale of rewards does not matter
    same(case.toy.longest * expected_update(case, dials("maxrl"), (size,)), found)


# ---- what std and length do ----

@pytest.mark.parametrize("rewards, expected", [("right", 1.0), ("graded", 0.8941)])
def test_std_in_groups_of_two_climbs_the_chance_to_win_against_a_copy(rewards, expected):
    """A is +-1 where rewards differ: the gradient of P(better than the old policy's) - P(worse). With 0/1
    rewards that is the expected reward, so twice Dr. GRPO; graded, it is off by a cosine of 0.89."""
    case = make_case(rewards)
    p = case.toy.answer_logp(case.old).exp().tolist()
    wins = [sum(q * np.sign(r - other) for q, other in zip(p, case.rewards, strict=True))
            for r in case.rewards]
    found = LONGEST * expected_update(case, plain(scale="std"))
    same(found, case.true_gradient(wins))
    assert cosine(found, case.true_gradient()) == pytest.approx(expected, abs=1e-4)
    if rewards == "right":
        same(found, 2 * LONGEST * expected_update(case, dials("dr_grpo")))


@pytest.mark.parametrize("size, weight", [
    (2, lambda p: 1), (3, lambda p: 2 ** 0.5), (4, lambda p: 3 ** 0.5 - (2 * 3 ** 0.5 - 3) * p * (1 - p))])
def test_with_0_1_rewards_std_keeps_a_problems_direction(size, weight):
    """Its weight: 1 in groups of 2, sqrt(2) in groups of 3 whatever the chance p to be right, in groups of 4
    between sqrt(3) for p near 0 or 1 and 1.62 for 1/2. Only larger ones weigh problems anew by much."""
    case = make_case(toy=Toy(2, 2))
    case.rewards = np.array([1.0, 0.0, 0.0])
    p = float(case.toy.answer_logp(case.old)[0].exp())
    found = case.toy.longest * expected_update(case, plain(scale="std"), (size,))
    same(found, weight(p) * case.true_gradient())


def test_the_mean_over_a_sequence_climbs_the_reward_a_token():
    """(1 - 1/G) sum_y dp(y) (r(y) - J) / |y|: a cosine of 0.956 with the true gradient."""
    case = make_case()
    p, lengths = case.toy.answer_logp(case.old).exp().numpy(), np.array([len(y) for y in case.toy.answers])
    found = expected_update(case, plain(mean="sequence"))
    same(found, case.true_gradient((case.rewards - (p * case.rewards).sum()) / lengths) / 2)
    assert cosine(found, case.true_gradient()) == pytest.approx(0.9562, abs=1e-4)


def test_the_mean_over_tokens_is_biased_less():
    """sum_y dp(y) E[(r(y) - r') / (|y| + |y'|)] over the other answer y': a cosine of 0.992."""
    case = make_case()
    p, lengths = case.toy.answer_logp(case.old).exp().numpy(), np.array([len(y) for y in case.toy.answers])
    apart, together = (op.outer(x, x) for op, x in ((np.subtract, case.rewards), (np.add, lengths)))
    found = expected_update(case, plain(mean="token"))
    same(found, case.true_gradient((apart / together) @ p))
    assert cosine(found, case.true_gradient()) == pytest.approx(0.9922, abs=1e-4)


# ---- the KL, in the loss and in the reward ----

def forward(logp, ref):
    return (ref.exp() * (ref - logp)).sum(-1)


def reverse(logp, ref):
    return (logp.exp() * (logp - ref)).sum(-1)


def kl_descent(case, estimator: str, where: str):
    """The expected gradient of the KL's part alone, summed over tokens."""
    config = plain(baseline="none", kl_coef=1.0, kl_in=where, kl_estimator=estimator)
    return -case.toy.longest * expected_update(case, config)


def test_k1_in_the_loss_is_0_and_k2_and_k3_are_the_kl_of_each_step_one_in_either_direction():
    case = make_case("alike")
    assert float(kl_descent(case, "k1", "loss").abs().max()) < 1e-14
    same(kl_descent(case, "k2", "loss"), case.local_gradient(reverse))
    same(kl_descent(case, "k3", "loss"), case.local_gradient(forward))


def test_the_kl_of_each_step_is_that_of_whole_answers_only_if_they_have_one_token():
    """k2 in the loss leaves out that a token leads to others: off by 37 % of the gradient at 3 tokens."""
    case = make_case("alike", toy=Toy(3, 1))
    same(kl_descent(case, "k2", "loss"), case.kl_gradient())
    case = make_case("alike")
    off = kl_descent(case, "k2", "loss") - case.kl_gradient()
    assert float(off.norm() / case.kl_gradient().norm()) == pytest.approx(0.3726, abs=1e-4)


@pytest.mark.parametrize("baseline", ["leave_one_out", "none", "critic"])
def test_k1_in_the_reward_is_the_expected_reward_minus_the_kl_of_whole_answers(baseline):
    case = make_case()
    found = LONGEST * expected_update(case, plain(baseline=baseline, kl_coef=0.3, kl_in="reward",
                                                  kl_estimator="k1"))
    same(found, case.true_gradient() - 0.3 * case.kl_gradient())


@pytest.mark.parametrize("toy", [None, Toy(3, 1)])
def test_distillation_is_the_gradient_of_the_reverse_kl_to_the_teacher(toy):
    """With gamma 0 of the KL at each step, prefixes as likely as they are; with gamma 1 of the KL of whole
    answers. For answers of one token they are one. Rewards make no difference."""
    case = make_case("graded", toy=toy)
    longest = case.toy.longest
    step, whole = (longest * expected_update(case, dials("distill", mean="constant", gamma=gamma))
                   for gamma in (0.0, 1.0))
    same(step, -case.local_gradient(reverse))
    same(whole, -case.kl_gradient())
    assert cosine(step, whole) == pytest.approx(1.0 if toy else 0.9930, abs=1e-4)


def test_k2_and_k3_in_the_reward_lack_what_they_have_in_the_loss():
    """The mean of k3 is the KL, but nothing differentiates a reward: what is left of the KL's gradient lacks
    what k3 has in the loss. Cosine 0.43 and -0.13 with the KL's for k2 and k3; for answers of one token
    only the second order is left."""
    case = make_case("alike")
    same(kl_descent(case, "k3", "reward"), case.kl_gradient() - case.local_gradient(forward))
    for estimator, expected in (("k2", 0.4326), ("k3", -0.1302)):
        found = cosine(kl_descent(case, estimator, "reward"), case.kl_gradient())
        assert found == pytest.approx(expected, abs=1e-4)
    left = []
    for distance in (1e-2, 1e-3):
        case = make_case("alike", toy=Toy(3, 1))
        case = replace(case, ref=case.theta.detach() + distance * case.ref)
        left.append(float(kl_descent(case, "k3", "reward").norm() / case.kl_gradient().norm()))
    assert left[0] < 0.02 and left[1] < 0.002


# ---- another policy's answers, entropy, and groups without signal ----

@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_importance_weights_are_exact_for_answers_of_one_token(baseline):
    case = make_case(off_policy=True, toy=Toy(5, 1))
    case = replace(case, old=case.theta.detach())
    same(expected_update(case, plain(baseline=baseline, max_importance=1e9)), case.true_gradient())


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_importance_weights_of_whole_sequences_are_exact_for_answers_of_any_length(baseline):
    """Where those of tokens are off by a cosine of 0.92, as the next test has it."""
    case = make_case(off_policy=True)
    case = replace(case, old=case.theta.detach())
    config = plain(baseline=baseline, max_importance=1e9, importance="sequence")
    same(LONGEST * expected_update(case, config), case.true_gradient())


@pytest.mark.parametrize("mask", [False, True])
def test_with_bounds_on_whole_sequences_the_gradient_is_that_of_the_rewards_that_they_leave(mask):
    """sum_y dp(y) r(y) b(y) / w(y) for the weight w and what the bounds make of it, b: the bias of the bounds
    alone, since the gradient of an answer is still that of the trainer's policy."""
    case = make_case(off_policy=True)
    case = replace(case, old=case.theta.detach())
    toy = case.toy
    w = (toy.answer_logp(case.theta) - toy.answer_logp(case.sampler)).exp().detach().numpy()
    inside = (w >= 0.5) & (w <= 2)
    assert {*inside} == {True, False} and (w > 2).any()
    config = plain(baseline="none", max_importance=2.0, importance="sequence", importance_mask=mask,
                   min_importance=0.5 * mask)
    left = inside if mask else np.minimum(w, 2) / w
    same(LONGEST * expected_update(case, config), case.true_gradient(case.rewards * left))


def test_importance_weights_correct_each_choice_but_not_how_it_is_come_to_nor_what_follows():
    """sum_s q(s) sum_a dpi(a|s) Q_q(s, a): the sampler q's prefixes, the sampler's continuations. For one
    that is far off: cosine 0.92 with the true gradient, 0.69 without weights. PPO's ratio does the same."""
    case = make_case(off_policy=True)
    toy, sampler = case.toy, case.sampler
    q, chances = toy.answer_logp(sampler).exp().numpy(), toy.prefix_chances(sampler)
    pi, total = case.theta.softmax(-1), 0.0
    for i, s in enumerate(toy.prefixes):
        for a in range(toy.vocab):
            below = np.array([y[:len(s) + 1] == (*s, a) for y in toy.answers])
            total = total + chances[i] * pi[i, a] * (q * case.rewards)[below].sum() / q[below].sum()
    expected = case.gradient(total)
    unbounded = plain(baseline="none", objective="clip", clip_low=1.0, clip_high=1e9)
    same(LONGEST * expected_update(case, unbounded), expected)
    case = replace(case, old=case.theta.detach())
    same(LONGEST * expected_update(case, plain(baseline="none", max_importance=1e9)), expected)
    without = expected_update(case, plain(baseline="none"))
    found = [cosine(x, case.true_gradient()) for x in (expected, without)]
    assert found == pytest.approx([0.9222, 0.6918], abs=1e-4)


def test_the_entropy_bonus_climbs_the_entropy_of_each_step():
    case = make_case("alike")
    found = LONGEST * expected_update(case, plain(entropy_coef=0.7))
    same(found, 0.7 * case.local_gradient(lambda logp, ref: -(logp.exp() * logp).sum(-1)))


@pytest.mark.parametrize("algo", [algo for algo in PRESETS if algo != "ppo"])
def test_rewards_that_differ_by_rounding_teach_exactly_nothing(algo):
    case = make_case()
    case.rewards = 0.3 + 1e-16 * np.arange(15)
    assert len(set(case.rewards)) > 1
    assert (expected_update(case, dials(algo, kl_coef=0.0)) == 0).all()


def test_a_dead_group_is_0_beside_a_live_one():
    for baseline in ("group", "leave_one_out"):
        config, _ = dials(baseline=baseline)
        found, _ = advantages(np.array([0.1 * 3, 0.3, 0.0, 1.0]), np.array([0, 2, 4]), np.arange(5), config)
        assert (found[:2] == 0).all() and (found[2:] != 0).all()
