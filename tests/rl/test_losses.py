"""Rewards, advantages and the GRPO loss: against slow and plain oracles, by hand, and at their edges."""
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from r1zero.kernels import grpo as kernel
from r1zero.kernels.grpo import MAX_LOG_RATIO, POLICY_METRICS
from r1zero.rl.advantages import (
    AdvantageConfig,
    Credit,
    advantages,
    dead_groups,
    group_advantages,
    parts_apart,
)
from r1zero.rl.control import permute_within_groups
from r1zero.rl.losses import LossConfig, loss_weights, mean_metrics, policy_loss
from r1zero.rl.rewards import Grader
from r1zero.rl.rollouts import Rollouts
from r1zero.rl.shaping import weighted_sum

from .cases import Bandit, algorithm, loss_config
from .exact_cases import WEIGHTS

# ---- rewards ----

def test_rewards_are_the_weighted_sum_of_two_parts_that_stay_apart():
    responses = ["<think>x</think><answer>1</answer>", "<think>x</think>",
                 "é<think></think><answer></answer>"]
    grader = Grader(algorithm(rewards=dict(accuracy_weight=2.0, format_weight=0.5)))
    rest = dict(sequences=[np.zeros(2, int)] * 3, prompt_lengths=np.ones(3, int), sampler_logp=[],
                finish_reasons=["stop"] * 3, temperature=1.0, weights_version=0, texts=responses)
    rollouts = Rollouts([0, 1], group_offsets=np.array([0, 2, 3]), **rest)
    found = grader(Bandit(), rollouts)
    assert (found.training == found.total).all() and found.training_parts is found.parts
    assert list(found.parts) == ["accuracy", "format"] and not found.dead(rollouts).all()
    assert found.accuracy.tolist() == [1, 1, 0] and found.format.tolist() == [1, 0, 0]
    assert found.total.tolist() == [2.5, 2.0, 0.0]
    assert "Format" not in found.why[0] and "Format: There is no <answer> tag." in found.why[1]
    with pytest.raises(ValueError):
        grader(Bandit(), Rollouts([0], group_offsets=np.array([0, 2]), **rest))


def shuffled(rewards, offsets, seed, step):
    rollouts = SimpleNamespace(group_offsets=offsets, weights_version=step)
    dealt = permute_within_groups({"a": rewards, "b": 2 * rewards}, rollouts, seed)
    assert (dealt["b"] == 2 * dealt["a"]).all()  # all parts of a reward land on the same answer
    return dealt["a"]


def test_the_controls_shuffle_keeps_each_group_and_is_a_function_of_the_seed():
    rewards, offsets = np.arange(40.0), np.array([0, 1, 3, 20, 40])
    dealt = shuffled(rewards, offsets, 7, 3)
    assert (rewards == np.arange(40)).all()  # the real ones are not overwritten
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        assert sorted(dealt[start:end]) == list(rewards[start:end])
    assert (dealt[20:] != rewards[20:]).any() and (dealt[3:20] != rewards[3:20]).any()
    assert (shuffled(rewards, offsets, 7, 3) == dealt).all()
    for other in [(7, 4), (8, 3)]:
        assert (shuffled(rewards, offsets, *other) != dealt).any()


def test_the_controls_shuffle_deals_every_order_alike():
    orders = [tuple(shuffled(np.arange(4), np.array([0, 4]), 0, step)) for step in range(2400)]
    counts = Counter(orders)
    assert len(counts) == 24 and all(abs(n - 100) < 5 * np.sqrt(100) for n in counts.values())


# ---- advantages ----

def test_advantages_of_groups_of_mixed_sizes():
    rewards = np.array([5.0, 0.0, 1.0, 1, 0, 0, 0, 0, 0, 1.1])
    found = group_advantages(rewards, np.array([0, 1, 3, 10]))
    assert dead_groups(rewards, np.array([0, 1, 3, 10])).tolist() == [True, False, False]
    last = rewards[3:]
    std = np.sqrt(((last - last.mean()) ** 2).sum() / 7)  # the population's: divided by 7, not by 6
    np.testing.assert_allclose(found, [0, -1, 1, *((last - last.mean()) / std)], rtol=1e-12)
    centred = group_advantages(rewards, np.array([0, 1, 3, 10]), normalise_std=False)
    np.testing.assert_allclose(centred, [0, -0.5, 0.5, *(last - last.mean())], rtol=1e-12)


@pytest.mark.parametrize("normalise_std", [True, False])
def test_rewards_that_differ_by_rounding_teach_nothing(normalise_std):
    rewards = np.array([0.1 * 3, 0.3, 1.1, 1.0 + 0.1, 0.0, 1.0])
    assert rewards[0] != rewards[1]
    found, dead = (f(rewards, np.array([0, 2, 4, 6])) for f in (group_advantages, dead_groups))
    assert (group_advantages(rewards, np.array([0, 2, 4, 6]), normalise_std)[:4] == 0).all()
    assert (found[:4] == 0).all() and (found[4:] != 0).all() and dead.tolist() == [True, True, False]
    # one alone has nothing to be compared with, nor has none at all
    assert dead_groups(rewards, np.array([0, 1, 6])).tolist() == [True, False]
    assert dead_groups(rewards, np.array([0, 0, 6])).tolist() == [True, False]


def test_small_but_real_differences_count():
    found = group_advantages(np.array([0.0, 1e-3]), np.array([0, 2]))
    np.testing.assert_allclose(found, [-1, 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match=rf"reward 1 is {bad} \(3 such"):
        group_advantages(np.array([0.0, bad, bad, bad]), np.array([0, 2, 4]))


@pytest.mark.parametrize("offsets", [[0, 3], [1, 4], [0, 3, 2, 4], [0, 5]])
def test_offsets_that_do_not_cover_the_rewards(offsets):
    with pytest.raises(ValueError, match="offsets"):
        group_advantages(np.zeros(4), np.array(offsets))


def test_gdpo_normalises_the_parts_apart_by_hand():
    """The form is worth the same in every group, right answers more where they are rare; a part that is all
    alike says nothing, and a dead group has exactly 0."""
    accuracy, form = np.array([1.0, 0, 0, 0, 1, 1, 0, 0, 0]), np.array([1.0, 1, 0, 0, 1, 0, 1, 1, 1])
    groups = np.array([0, 4, 6, 9])
    found = parts_apart({"accuracy": accuracy, "format": form}, {"accuracy": 1.0, "format": 0.2}, groups)
    std = np.sqrt(3) / 4
    expected = np.array([0.75 / std + 0.2, -0.25 / std + 0.2, *[-0.25 / std - 0.2] * 2, 0.2, -0.2, 0, 0, 0])
    np.testing.assert_allclose(found, expected, atol=1e-12)
    whole, _ = advantages(found, groups, np.arange(10), AdvantageConfig(scale="parts"))
    np.testing.assert_allclose(whole, expected / np.sqrt(np.square(expected).mean()), atol=1e-12)
    assert (whole[6:] == 0).all() and np.square(whole).mean() == pytest.approx(1)
    nothing, _ = advantages(0 * found, groups, np.arange(10), AdvantageConfig(scale="parts"))
    assert (nothing == 0).all()


def test_the_credit_of_gdpo_is_of_the_parts_that_are_trained_on_and_not_of_their_sum():
    parts = {"accuracy": np.array([1.0, 0, 0, 0]), "format": np.array([0.0, 1, 1, 0])}
    rewards = SimpleNamespace(training=weighted_sum(parts, WEIGHTS), training_parts=parts, weights=WEIGHTS)
    rollouts = SimpleNamespace(group_offsets=np.array([0, 4]), response_offsets=np.array([0, 1, 3, 4, 5]))
    found = Credit(AdvantageConfig(scale="parts"))(rewards, rollouts).per_token
    right = np.array([3, -1, -1, -1, -1]) / np.sqrt(3)  # a token each, of the second answer two
    expected = right + 0.2 * np.array([-1, 1, 1, 1, -1])
    rms = np.sqrt(np.square(expected[[0, 1, 3, 4]]).mean())
    np.testing.assert_allclose(found, expected / rms, atol=1e-12)


def test_maxrl_divides_by_the_mean_and_has_a_word_for_negative_rewards():
    rewards, groups = np.array([1.0, 0, 0, 0, 0.0, 0.0, 1, 1, 0.2, 1.2]), np.array([0, 4, 6, 8, 10])
    config = AdvantageConfig(scale="mean")
    found, _ = advantages(rewards, groups, np.arange(11), config)
    expected = [3, -1, -1, -1, 0, 0, 0, 0, -0.5 / 0.7, 0.5 / 0.7]  # all wrong, all right: nothing
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found[4:8] == 0).all()
    again, _ = advantages(3 * rewards, groups, np.arange(11), config)
    np.testing.assert_allclose(again, found, atol=1e-12)
    rewards[[2, 5]] = -0.1
    with pytest.raises(ValueError, match=r"scale mean, but reward 2 is -0.1 \(2 such in all\); expected"):
        advantages(rewards, groups, np.arange(11), config)


# ---- the loss ----

def column(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_and_grad(logp, old, advantages, ref=None, weights=1.0, **dials):
    """The loss of single tokens and its gradient in logp; old, ref and weights may be one number for all."""
    logp = column(*logp).requires_grad_()
    old, advantages, weights, ref = (
        None if x is None else torch.as_tensor(x, dtype=torch.float64).expand(len(logp)).contiguous()
        for x in (old, advantages, weights, ref))
    loss, metrics = each_alone(logp, old, ref, advantages, weights, loss_config(**dials))
    loss.backward()
    return float(loss.detach()), logp.grad.tolist(), metrics


def each_alone(logp, old, ref, advantages, weights, c: LossConfig):
    """The loss of tokens that are a sequence each, and its metrics by name."""
    loss, metrics = policy_loss(logp, old, ref, advantages, weights, torch.arange(len(logp) + 1), c)
    return loss, dict(zip(POLICY_METRICS, metrics, strict=True))


def plain_loss(logp, old, ref, advantages, weights, low, high, kl_coef) -> float:
    """The formula of the paper, a token at a time, in Python's floats."""
    total = 0.0
    for lp, o, r, a, w in zip(logp, old, ref, advantages, weights, strict=True):
        ratio = math.exp(lp - o)
        clipped = min(max(ratio, 1 - low), 1 + high)
        k3 = math.exp(r - lp) - (r - lp) - 1
        total += w * (-min(ratio * a, clipped * a) + kl_coef * k3)
    return total


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_gradient_on_a_toy_policy_equals_finite_differences_of_the_plain_formula(kl_coef):
    states, actions, n = 3, 5, 40
    theta = torch.randn(states, actions, dtype=torch.float64)
    state, action = torch.randint(states, (n,)), torch.randint(actions, (n,))
    old = (theta + 0.5 * torch.randn_like(theta)).log_softmax(-1)[state, action]
    ref = (theta + 0.5 * torch.randn_like(theta)).log_softmax(-1)[state, action]
    advantages, weights = torch.randn(n, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    dials = dict(clip_low=0.2, clip_high=0.28, kl_coef=kl_coef)

    def plain(values) -> float:
        logp = values.log_softmax(-1)[state, action]
        return plain_loss(logp.tolist(), old.tolist(), ref.tolist(), advantages.tolist(), weights.tolist(),
                          0.2, 0.28, kl_coef)

    leaf = theta.clone().requires_grad_()
    logp = leaf.log_softmax(-1)[state, action]
    loss, metrics = each_alone(logp, old, ref, advantages, weights, loss_config(**dials))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(plain(theta), rel=1e-12)
    assert metrics["clipped_low"] > 0 and metrics["clipped_high"] > 0  # the case has what it is meant to test
    for i in range(states):
        for j in range(actions):
            step = torch.zeros_like(theta)
            step[i, j] = 1e-6
            slope = (plain(theta + step) - plain(theta - step)) / 2e-6
            assert float(leaf.grad[i, j]) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.0, 1.0, -1.0, -1.0),   # on-policy: the whole gradient, not the half that a tie in min() could leave
    (1.0, -2.0, 2.0, 2.0),
    (1.1, 1.0, -1.1, -1.1),   # inside the region
    (1.5, 1.0, -1.28, 0.0),   # good and already likelier: nothing more to earn
    (0.5, 1.0, -0.5, -0.5),   # good, but less likely than before: the gradient stays
    (1.5, -1.0, 1.5, 1.5),    # bad and likelier: the gradient stays (mistake 5 has it reversed)
    (0.5, -1.0, 0.8, 0.0),    # bad and already less likely
    (1.5, 0.0, 0.0, 0.0),
])
def test_clipping_by_hand(ratio, advantage, loss, gradient):
    found, grad, _ = loss_and_grad([math.log(ratio)], 0.0, advantage, clip_low=0.2, clip_high=0.28)
    assert found == pytest.approx(loss, abs=1e-12) and grad == pytest.approx([gradient], abs=1e-12)


def test_reinforce_by_hand():
    """No ratio in it, so neither clip nor cut touch the gradient; the metrics see the ratio, cut off."""
    loss, grad, metrics = loss_and_grad([25.0, 1.0, -2.0], 0.0, column(2, -1, 3), objective="reinforce")
    assert loss == -(50 - 1 - 6) and grad == [-2, 1, -3]
    assert metrics["clipped_low"] == metrics["clipped_high"] == 0 and metrics["cut_off"] == 1
    assert metrics["k1"] == -19 and float(metrics["ratio_max"]) == pytest.approx(math.exp(20))


@pytest.mark.parametrize("old, now, advantage, gradient", [
    (0.001, 0.1, 1.0, 100.0),  # rare, a hundred times likelier, but by 0.099 only: it goes on
    (0.8, 0.96, 1.0, 0.0),     # frequent, and up by 0.16: held, where a ratio of 1.2 would not be
    (0.8, 0.94, 1.0, 0.94 / 0.8),
    (0.8, 0.6, 1.0, 0.75),     # good, but less likely than before: the gradient stays
    (0.8, 0.6, -1.0, 0.0),     # bad, and down by 0.2
    (0.8, 0.7, -1.0, -0.875),
    (0.8, 0.96, -1.0, -1.2),   # bad and likelier: the gradient stays
    (0.8, 0.8, -2.0, -2.0),    # on-policy: all of it
])
def test_dppo_by_hand(old, now, advantage, gradient):
    dials = dict(objective="dppo", clip_low=0.15, clip_high=0.15)
    loss, grad, metrics = loss_and_grad([math.log(now)], math.log(old), advantage, **dials)
    assert loss == pytest.approx(-gradient) and grad == pytest.approx([-gradient])
    held = gradient == 0
    assert metrics["clipped_high"] == (held and advantage > 0)
    assert metrics["clipped_low"] == (held and advantage < 0)
    # each bound is of its own side
    _, grad, _ = loss_and_grad([math.log(0.6), math.log(0.96)], math.log(0.8), column(-1, 1),
                               **dials | dict(clip_low=0.3))
    assert grad == pytest.approx([0.75, 0.0])


def test_gspo_has_one_ratio_per_sequence():
    """Two tokens whose log-ratios cancel: the ratio is 1 for both, where clip would have 1.5 and 2/3."""
    logp, old = column(0.0, math.log(1.5), -math.log(1.5)), torch.zeros(3).double()
    ones, offsets = torch.ones(3).double(), torch.tensor([0, 1, 3])
    for objective, largest in (("gspo", 1.0), ("clip", 1.5)):
        _, metrics = policy_loss(logp, old, None, ones, ones, offsets, loss_config(objective=objective))
        assert float(metrics[POLICY_METRICS.index("ratio_max")]) == pytest.approx(largest)


def test_metrics_by_hand():
    ratios, advantages = (1.5, 1.5, 1.4, 0.5, 0.5, 1.0, 7.0), column(1, -1, 2, 1, -1, 1, 0)
    logp = [math.log(r) for r in ratios]
    _, _, metrics = loss_and_grad([*logp, 30.0], 0.0, column(*advantages, 1), weights=column(*[0.1] * 8))
    ratios, logp = [*ratios[:-1], math.exp(20.0)], [*logp[:-1], 20.0]  # the one with advantage 0 is not live
    assert metrics["tokens"] == 7 and metrics["clipped_high"] == 3 and metrics["clipped_low"] == 1
    assert float(metrics["ratio"]) == pytest.approx(sum(ratios))
    assert float(metrics["ratio_max"]) == pytest.approx(math.exp(20)) and metrics["cut_off"] == 1
    assert float(metrics["k1"]) == pytest.approx(-sum(logp))
    assert float(metrics["k3"]) == pytest.approx(sum(r - 1 - x for r, x in zip(ratios, logp, strict=True)))


def test_mean_metrics_over_micro_batches_and_updates():
    def part(loss, tokens, low, largest, cut):
        found = dict.fromkeys(POLICY_METRICS, 0.0) | {"loss": loss, "tokens": tokens, "clipped_low": low,
                                                    "ratio_max": largest, "cut_off": cut}
        return torch.tensor(list(found.values()))

    found = mean_metrics([part(1.0, 3, 2, 1.5, 1), part(3.0, 5, 0, 1.25, 2)], n_updates=2)
    assert found == dict.fromkeys(found, 0.0) | {"loss": 2.0, "clipped_low": 2 / 8, "ratio_max": 1.5,
                                                 "cut_off": 3.0}
    assert set(found) == {*POLICY_METRICS} - {"tokens"} and not any(mean_metrics([], 1).values())


def test_k3_by_hand_and_its_direction():
    loss, grad, metrics = loss_and_grad([math.log(0.5)], math.log(0.5), 0.0, ref=math.log(0.25), kl_coef=2.0)
    assert float(metrics["kl_loss"]) == pytest.approx(0.5 + math.log(2) - 1)
    assert loss == pytest.approx(2 * (0.5 + math.log(2) - 1))
    assert grad == pytest.approx([2 * (1 - 0.5)])  # likelier than for the reference: descent lowers it
    _, grad, _ = loss_and_grad([math.log(0.25)], math.log(0.25), 0.0, ref=math.log(0.5), kl_coef=2.0)
    assert grad == pytest.approx([2 * (1 - 2.0)])  # less likely than for the reference: descent raises it


def test_k3_expects_to_the_kl_and_leads_to_the_reference():
    """Over the policy's own actions k3 has the KL as its mean, and following it ends at the reference."""
    theta = column(1.0, -0.5, 0.3, 0.0).requires_grad_()
    ref = column(-1.0, 0.5, 0.0, 1.0).log_softmax(-1)
    kls = []
    for _ in range(200):
        logp = theta.log_softmax(-1)
        kls.append(float((logp.exp() * (logp - ref)).sum().detach()))
        weights, c = logp.exp().detach(), loss_config(kl_coef=1.0)
        loss, metrics = each_alone(logp, logp.detach(), ref, torch.zeros(4), weights, c)
        assert float(metrics["kl_loss"]) == pytest.approx(kls[-1], abs=1e-12)
        theta.grad = None
        loss.backward()
        with torch.no_grad():
            theta -= 0.5 * theta.grad
    assert kls[0] > 0.5 and kls[-1] < 1e-4 and kls == sorted(kls, reverse=True)


@pytest.mark.parametrize("kl_estimator, kl", [
    ("k1", lambda logp, ref: 0 * logp.sum()),
    ("k2", lambda logp, ref: (logp.exp() * (logp - ref)).sum()),  # KL(policy || reference)
    ("k3", lambda logp, ref: (ref.exp() * (ref - logp)).sum()),  # KL(reference || policy)
])
def test_which_divergence_each_estimator_descends(kl_estimator, kl):
    """In expectation over the policy's own actions, each of which is a token of that weight."""
    theta, ref = torch.randn(7, dtype=torch.float64).requires_grad_(), torch.randn(7).double().log_softmax(-1)
    expected, = torch.autograd.grad(kl(theta.log_softmax(-1), ref), theta)
    logp = theta.log_softmax(-1)
    loss, _ = kernel.policy_loss(logp, logp.detach(), ref, torch.zeros(7).double(), logp.detach().exp(),
                                 torch.arange(8), kl_coef=1.0, kl_estimator=kl_estimator)
    found, = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("gap", [200.0, -200.0, 1e4, -1e4])
def test_extreme_log_ratios_are_finite_and_without_gradient(gap, advantage, dtype):
    logp = torch.tensor([gap, 0.0], dtype=dtype, requires_grad=True)
    zeros, a = torch.zeros(2, dtype=dtype), torch.tensor([advantage, 1.0], dtype=dtype)
    loss, metrics = each_alone(logp, zeros, zeros, a, torch.ones(2, dtype=dtype), loss_config(kl_coef=0.1))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(m) for m in metrics.values())
    assert metrics["cut_off"] == 1
    assert logp.grad[0] == 0 and logp.grad[1] == -1  # the token beside it learns as ever


@pytest.mark.parametrize("side", [-1, 1])
def test_the_gradient_ends_just_beyond_the_bound_and_not_before(side):
    """A < 0 keeps its gradient above the clip; k3 keeps its own on both sides; both end at the bound."""
    inside, beyond = side * (MAX_LOG_RATIO - 0.01), side * (MAX_LOG_RATIO + 0.01)
    _, grad, _ = loss_and_grad([inside, beyond], 0.0, -1.0)
    expected = math.exp(inside) if side > 0 else 0.0
    assert grad == pytest.approx([expected, 0.0])
    _, grad, _ = loss_and_grad([-inside, -beyond], [-inside, -beyond], 0.0, ref=0.0, kl_coef=1.0)
    assert grad == pytest.approx([1 - math.exp(inside), 0.0])


def test_the_three_means_against_loops():
    rng = np.random.default_rng(0)
    lengths, longest = [4, 1, 7, 2], 10
    answers = [rng.normal(size=n) for n in lengths]  # the loss of each token of each answer
    total = 0.0
    for answer in answers:
        for value in answer:
            total += value
    expected = {
        "token": total / sum(lengths),
        "sequence": sum(sum(answer) / len(answer) for answer in answers) / len(answers),
        "constant": sum(sum(answer) / longest for answer in answers) / len(answers),
    }
    for mean, value in expected.items():
        weights = loss_weights(np.array(lengths), mean, longest)
        assert weights.shape == (4,)
        found = sum(w * answer.sum() for w, answer in zip(weights, answers, strict=True))
        assert found == pytest.approx(value, rel=1e-12), mean


def test_without_kl_the_reference_is_not_looked_at():
    with_ref = loss_and_grad([0.1], 0.0, 1.0, ref=float("nan"), kl_coef=0.0)
    assert with_ref[:2] == loss_and_grad([0.1], 0.0, 1.0)[:2] and with_ref[2]["kl_loss"] == 0
