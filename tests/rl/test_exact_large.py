"""Beyond what can be enumerated: GAE on ragged answers against the textbook's sum, and groups of four answers
from a toy with 121 of them, sampled, against their exact expectation by a z-test.

The expectation over groups is one over an answer and the rewards of the three others, for nothing else of
them is in its part of the loss: 121 answers, and 20 multisets of rewards for each.
"""
from collections import Counter
from dataclasses import replace
from itertools import product
from math import prod

import numpy as np
import pytest
import torch

from r1zero.rl.advantages import advantages, gae
from r1zero.rl.losses import loss_weights, policy_loss
from r1zero.train.lab.mistakes import flipped_clip

from .exact_cases import Case, Toy, dials, make_case, naive_answers
from .exact_papers import BETA, KL_IN_LOSS, clipped, mean, normalised

GROUPS, SIZE = 20_000, 4


def large_case(off_policy: bool) -> Case:
    case = make_case(off_policy=off_policy, toy=Toy(4, 4))
    return replace(case, theta=(0.5 * case.theta).detach().requires_grad_(), old=0.5 * case.old,
                   sampler=0.5 * case.sampler)


def expected_grpo(case: Case) -> torch.Tensor:
    """[P, V] of arXiv 2402.03300, eq. 3, in groups of four."""
    answers, chance_of = naive_answers(case), Counter()
    for y in answers:
        chance_of[y.reward] += y.chance
    others = Counter()
    for rewards in product(chance_of, repeat=SIZE - 1):
        others[tuple(sorted(rewards))] += prod(chance_of[r] for r in rewards)
    total = 0.0
    for y in answers:
        a = [chance * normalised([y.reward, *rewards])[0] for rewards, chance in others.items()]
        up, down = sum(x for x in a if x > 0), -sum(x for x in a if x < 0)  # the surrogate of c A, c > 0, is
        total = total + y.chance * mean(                                    # c times that of A
            up * clipped(s.ratio, 1.0, 0.2, 0.2) + down * clipped(s.ratio, -1.0, 0.2, 0.2)
            - BETA * KL_IN_LOSS["k3"](s) for s in y.steps)
    return case.gradient(total)


def z_scores(case: Case, config, expected: torch.Tensor, loss_of=policy_loss) -> torch.Tensor:
    """[P * V] how many standard errors the shipped update is from `expected`, over GROUPS sampled groups."""
    (advantage, loss), toy = config, case.toy
    lengths_of = np.array([len(y) for y in toy.answers])
    drawn = np.random.default_rng(0).choice(len(toy.answers), GROUPS * SIZE,
                                            p=toy.answer_logp(case.sampler).exp().numpy())
    lengths = lengths_of[drawn]
    offsets = np.append(0, lengths.cumsum())
    a, _ = advantages(case.rewards[drawn], np.arange(0, len(drawn) + 1, SIZE), offsets, advantage)
    w = np.repeat(loss_weights(lengths, loss.mean, toy.longest) * GROUPS, lengths)
    row_R, token_R = (torch.tensor(x) for x in toy.places([toy.answers[i] for i in drawn]))
    logp, old, ref = (p.detach().log_softmax(-1)[row_R, token_R] for p in (case.theta, case.old, case.ref))
    total, _ = loss_of(logp.requires_grad_(), old, ref, torch.from_numpy(a), torch.from_numpy(w),
                       torch.from_numpy(offsets), loss)
    slope_R, = torch.autograd.grad(-total, logp)
    p = case.theta.detach().softmax(-1)
    score_RV = torch.nn.functional.one_hot(token_R, toy.vocab) - p[row_R]  # dlogp / dlogits
    group_R = torch.arange(GROUPS).repeat_interleave(SIZE).repeat_interleave(torch.from_numpy(lengths))
    each = p.new_zeros(GROUPS * len(p), toy.vocab).index_add_(0, group_R * len(p) + row_R,
                                                              slope_R[:, None] * score_RV)
    each = each.view(GROUPS, -1)
    return (each.mean(0) - expected.flatten()) / (each.std(0) / GROUPS ** 0.5)


def test_sampled_grpo_off_policy_is_the_papers_and_the_maximum_is_not():
    case = large_case(off_policy=True)
    expected = expected_grpo(case)
    assert float(z_scores(case, dials("grpo"), expected).abs().max()) < 4.5  # of 160 figures
    assert float(z_scores(case, dials("grpo"), expected, flipped_clip).abs().max()) > 100


@pytest.mark.parametrize("algo, share, other", [("rloo", 1, "dr_grpo"), ("dr_grpo", 3 / 4, "rloo")])
def test_sampled_rloo_is_the_true_gradient_and_dr_grpo_three_quarters_of_it(algo, share, other):
    case = large_case(off_policy=False)
    expected = share * case.true_gradient() / case.toy.longest
    assert float(z_scores(case, dials(algo, kl_coef=0.0), expected).abs().max()) < 4.5
    assert float(z_scores(case, dials(other, kl_coef=0.0), expected).abs().max()) > 20


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.0, 1.0)])
def test_gae_is_the_sum_of_all_later_errors(gamma, lam):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, 40)
    offsets = np.append(0, lengths.cumsum())
    rewards, values = rng.normal(size=(2, offsets[-1]))
    found, returns = gae(rewards, values, offsets, gamma, lam)
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        for t in range(start, end):
            expected = sum((gamma * lam) ** (k - t) * (
                rewards[k] + (gamma * values[k + 1] if k + 1 < end else 0.0) - values[k])
                for k in range(t, end))
            assert found[t] == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(returns, found + values, atol=1e-12)
