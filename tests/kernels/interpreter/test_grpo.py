"""The GRPO kernels against loops over groups, sequences and tokens in fp64."""
import math

import numpy as np
import pytest
import torch

from r1zero.kernels.grpo import (
    KL_ESTIMATORS,
    MAX_LOG_RATIO,
    OBJECTIVES,
    POLICY_METRICS,
    grpo_advantages,
    grpo_advantages_op,
    policy_loss,
    policy_loss_op,
)

from ..naive_ops import naive_advantages, naive_policy_loss

SIZES = [[1], [2], [7], [64], [1, 2, 7, 64, 3, 300], [0, 5, 0]]
SETTINGS = dict(clip_low=0.2, clip_high=0.28, kl_coef=0.3)
# the objectives in which each token has an advantage and a weight of its own
ANY_TOKEN = [objective for objective in OBJECTIVES if objective != "gspo"]


def each_token(x_N, sizes) -> torch.Tensor:
    """[R] the number of its sequence for each token."""
    return x_N.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))


def cumulative(sizes, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(dtype)


# ---- advantages ----

@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_advantages_are_those_of_a_loop_over_groups(sizes, normalise, dtype):
    rewards = (torch.randn(sum(sizes)) + 100).to(dtype)  # a large mean: sum of squares minus its square fails
    for impl in ("triton", "reference"):
        advantages, dead = grpo_advantages(rewards, cumulative(sizes), normalise, impl=impl)
        expected, dead_groups = naive_advantages(rewards.double().numpy(), sizes, normalise)
        assert advantages.dtype == dead.dtype == torch.float32
        np.testing.assert_allclose(advantages.numpy(), expected, atol=5e-5)
        assert (dead.numpy() == dead_groups).all()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_rewards_that_differ_by_rounding_teach_nothing(impl):
    f = np.float32
    rewards = torch.tensor([f(0.1) + f(0.6), 0.7, 1.4, f(0.6) + f(0.8), 0.0, 1e-3])
    assert len(set(rewards[:2].tolist())) == 2
    advantages, dead = grpo_advantages(rewards, cumulative([2, 2, 2]), impl=impl)
    assert advantages[:4].tolist() == [0, 0, 0, 0] and dead.tolist() == [1, 1, 0]
    assert advantages[4:].tolist() == pytest.approx([-1, 1], abs=1e-6)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_large_rewards_keep_their_differences(impl):
    """Neither does their mean lose what differs, nor is their rounding a signal."""
    rewards = torch.tensor([1e6, 1e6 + 0.0625, 1e6 + 0.125, 30.1, 30.3, 0.0])
    rewards[3] += 0.2
    assert rewards[3] != rewards[4]
    advantages, dead = grpo_advantages(rewards, cumulative([3, 2, 1]), normalise_std=False, impl=impl)
    assert dead.tolist() == [1, 1, 1] and not advantages.any()
    advantages, dead = grpo_advantages(torch.tensor([0.0, 2, 4]) + 1e6, cumulative([3]), False, impl=impl)
    assert advantages.tolist() == [-2, 0, 2] and dead.tolist() == [0]
    advantages, _ = grpo_advantages(torch.tensor([1e6 + 0.5, 1e6 - 3, 1e6 + 1]), cumulative([3]), impl=impl)
    np.testing.assert_allclose(advantages, naive_advantages([0.5, -3, 1], [3], True)[0], rtol=1e-6)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_reward_that_is_nan_is_not_hidden(impl):
    advantages, dead = grpo_advantages(torch.tensor([1.0, float("nan"), 1.0, 0.0, 1.0]), cumulative([3, 2]),
                                       impl=impl)
    assert advantages[:3].isnan().all() and not dead.any() and advantages[3:].isfinite().all()


# ---- loss ----

def batch(sizes, spread=0.3):
    """Sequences with all signs of advantage, dead ones, masked ones."""
    N, R = len(sizes), sum(sizes)
    old = -3 * torch.rand(R)
    logp, ref = (old + spread * torch.randn(R) for _ in range(2))
    advantages, weights = torch.randn(N), torch.rand(N) + 0.1
    advantages[1::4], weights[2::5] = 0.0, 0.0
    return dict(logp=logp, old_logp=old, ref_logp=ref, advantages=each_token(advantages, sizes),
                weights=each_token(weights, sizes))


def check(b, sizes, objective, offsets=None, **settings):
    settings = SETTINGS | settings
    with_ref = b["ref_logp"] is not None
    expected = naive_policy_loss(*(None if b[name] is None else b[name].double().tolist() for name in
                            ("logp", "old_logp", "ref_logp", "advantages", "weights")), sizes, objective,
                          MAX_LOG_RATIO, **settings)
    assert list(expected[1]) == list(POLICY_METRICS)
    for impl in ("triton", "reference"):
        logp = b["logp"].clone().requires_grad_()
        loss, metrics = policy_loss(**(b | {"logp": logp}), objective=objective, impl=impl, **settings,
                                  offsets=cumulative(sizes) if offsets is None else offsets)
        (3 * loss).backward()
        assert not metrics.requires_grad and float(loss.detach()) == float(metrics[0])
        scale = max(1.0, max(map(abs, expected[0]), default=0.0))
        np.testing.assert_allclose(logp.grad.numpy() / 3, expected[0], rtol=1e-5, atol=1e-6 * scale,
                                   err_msg=f"{impl}, reference {with_ref}")
        np.testing.assert_allclose(metrics.double().numpy(), list(expected[1].values()), rtol=2e-5, atol=2e-5,
                                   err_msg=impl)


@pytest.mark.parametrize("sizes", [[1], [5, 3], [0, 4, 0], [7, 1, 1030, 2, 64, 9, 0, 33]], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("with_ref", [False, True])
def test_loss_gradient_and_metrics_are_those_of_a_loop_over_tokens(sizes, objective, with_ref):
    b = batch(sizes)
    check(b if with_ref else b | {"ref_logp": None}, sizes, objective)
    check(b | {"ref_logp": None}, sizes, objective, offsets=cumulative(sizes, torch.int64), clip_high=0.2)


@pytest.mark.parametrize("sizes", [[2], [5, 3], [0, 4, 0], [0, 0], [7, 1, 1030, 2, 64, 9, 0, 33]], ids=str)
@pytest.mark.parametrize("objective", ANY_TOKEN)
def test_advantages_and_weights_may_differ_from_token_to_token(sizes, objective):
    b = batch(sizes) | {"advantages": torch.randn(sum(sizes)), "weights": torch.rand(sum(sizes))}
    b["advantages"][::3], b["weights"][1::4] = 0.0, 0.0
    check(b, sizes, objective)
    check(b | {"ref_logp": None}, sizes, objective, offsets=cumulative(sizes, torch.int64))


@pytest.mark.parametrize("with_ref", [False, True])
def test_the_ratio_of_gspo_is_that_of_the_live_tokens(with_ref):
    """Those of weight 0, which the policy did not write, have no say in it."""
    sizes = [7, 1, 130, 5]
    b = batch(sizes) | {"advantages": each_token(torch.tensor([1.0, -2.0, 0.5, 1.0]), sizes),
                        "weights": each_token(torch.tensor([0.1, 0.2, 0.3, 0.4]), sizes)}
    b["weights"][[0, 3, 8, 9, 60, 138]] = 0.0
    b["logp"][[3, 60]] += 5.0  # such a token would pull the mean off
    check(b if with_ref else b | {"ref_logp": None}, sizes, "gspo")


@pytest.mark.parametrize("sizes", [[1], [0, 4, 0], [0, 0], [7, 1, 1030, 2, 64, 9, 0, 33]], ids=str)
@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
def test_each_kl_estimator_has_its_value_and_gradient(sizes, kl_estimator):
    b = batch(sizes)
    check(b, sizes, "clip", kl_estimator=kl_estimator)
    check(b | {"advantages": torch.randn(sum(sizes))}, sizes, "reinforce", kl_estimator=kl_estimator)
    check(b | {"ref_logp": None}, sizes, "clip", kl_estimator=kl_estimator)  # then it does not matter


@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_log_ratios_of_200_are_cut_off(objective, kl_estimator):
    sizes, gaps = [2] * 8, [200.0, -200.0, 19.99, -19.99, 20.01, -20.01, 0.0, 90.0]
    old = torch.full((16,), -210.0)
    logp, ref = old.clone(), old.clone()
    for n, gap in enumerate(gaps):
        logp[2 * n] += gap
        ref[2 * n + 1] += gap
    for sign in (1.0, -1.0):
        b = dict(logp=logp, old_logp=old, ref_logp=ref, advantages=torch.full((16,), sign),
                 weights=torch.full((16,), 1e-3))
        check(b, sizes, objective, kl_estimator=kl_estimator)
        if objective != "gspo":
            check(b | {"advantages": sign * torch.arange(16.0)}, sizes, objective, kl_estimator=kl_estimator)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_dead_and_masked_tokens_never_reach_exp(impl, objective):
    """Whatever stands there: inf, NaN, a log-ratio that overflows."""
    sizes, bad = [3, 2, 4], torch.tensor([math.inf, math.nan, 1e30])
    logp = torch.cat([bad, torch.tensor([-1.0, -2.0]), bad, bad[:1]]).requires_grad_()
    old = torch.cat([bad.flip(0), torch.tensor([-1.1, -2.0]), -bad, bad[1:2]])
    advantages = each_token(torch.tensor([0.0, 1.0, 2.0]), sizes)
    weights = each_token(torch.tensor([1.0, 0.5, 0.0]), sizes)
    loss, metrics = policy_loss(logp, old, None, advantages, weights, cumulative(sizes), objective=objective,
                                impl=impl)
    loss.backward()
    assert metrics.isfinite().all() and metrics[POLICY_METRICS.index("tokens")] == 2
    assert (logp.grad[:3] == 0).all() and (logp.grad[5:] == 0).all() and (logp.grad[3:5] < 0).all()


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("objective", ANY_TOKEN)
@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
def test_with_a_reference_only_the_weight_masks(objective, kl_estimator, impl):
    bad = torch.tensor([-math.inf, math.nan, 1e30, -math.inf])
    logp = torch.cat([bad, torch.tensor([-1.0, -2.0, -3.0])]).requires_grad_()
    other = torch.cat([bad.flip(0), torch.tensor([-1.0, -2.0, -math.inf])])  # the last ratio is infinite
    advantages = torch.cat([bad.flip(0), torch.tensor([0.0, 2.0, 0.0])])
    weights = each_token(torch.tensor([0.0, 0.5]), [4, 3])
    loss, metrics = policy_loss(logp, other, other, advantages, weights, cumulative([4, 3]),
                                objective=objective, kl_coef=0.3, kl_estimator=kl_estimator, impl=impl)
    loss.backward()
    assert metrics.isfinite().all() and metrics[POLICY_METRICS.index("tokens")] == 3
    # d is 0, where k1 alone has a slope, then cut off
    assert metrics[POLICY_METRICS.index("cut_off")] == 1
    slope = 0.15 * (kl_estimator == "k1")
    torch.testing.assert_close(logp.grad, torch.tensor([0.0, 0, 0, 0, slope, slope - 1, 0]))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("objective", ANY_TOKEN)
def test_without_a_reference_a_token_without_an_advantage_is_not_read(objective, impl):
    logp = torch.tensor([-1.0, math.nan, -3.0, math.inf]).requires_grad_()
    advantages, weights = torch.tensor([1.0, 0.0, 2.0, 3.0]), torch.tensor([0.5, 0.5, 0.5, 0.0])
    loss, metrics = policy_loss(logp, torch.tensor([-1.0, -2.0, -3.0, -4.0]), None, advantages, weights,
                                cumulative([4]), objective=objective, impl=impl)
    loss.backward()
    assert metrics.isfinite().all() and metrics[POLICY_METRICS.index("tokens")] == 2
    assert logp.grad.tolist() == [-0.5, 0.0, -1.0, 0.0]


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_live_nan_shows_in_loss_and_gradient(objective, impl):
    old, one, nan = torch.full((3,), -1.0), torch.ones(3), torch.full((3,), float("nan"))
    for logp, a in ((torch.tensor([-1.0, float("nan"), -2.0]), one), (old, nan)):
        leaf = logp.clone().requires_grad_()
        loss, metrics = policy_loss(leaf, old, None, a, one, cumulative([3]), objective=objective, impl=impl)
        loss.backward()
        assert loss.isnan() and metrics[0].isnan()
        # the gradient of reinforce is the advantage, whatever the log-prob is
        assert leaf.grad[1].isnan() or (objective == "reinforce" and a is one and leaf.grad[1] == -1)
        assert metrics[POLICY_METRICS.index("cut_off")] == 0
        assert a is nan or metrics[POLICY_METRICS.index("ratio_max")].isnan()


def test_what_offsets_leave_out_has_no_gradient_and_views_of_them_are_refused():
    logp, ones = torch.randn(6, requires_grad=True), torch.ones(6)
    for impl in ("triton", "reference"):
        logp.grad = None
        policy_loss(logp, torch.randn(6), None, ones, ones, cumulative([4]), impl=impl)[0].backward()
        assert not logp.grad[4:].any() and logp.grad[:4].any()
    with pytest.raises(ValueError, match="stride"):
        policy_loss(logp, torch.randn(6), None, ones, ones, torch.tensor([0, 9, 6, 9])[::2], impl="triton")
    with pytest.raises(ValueError, match="stride"):
        grpo_advantages(torch.randn(6), torch.tensor([0, 9, 6, 9])[::2], impl="triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_log_probs_of_other_dtypes_are_subtracted_in_fp32(dtype):
    logp, old = torch.tensor([-8.0, -4.0, -1.0], dtype=dtype), torch.tensor([-8.0017, -4.001, -1.0003])
    logp.requires_grad_()
    loss, _ = policy_loss(logp, old, None, torch.ones(3), torch.ones(3), cumulative([3]), impl="triton")
    loss.backward()
    assert float(loss) == pytest.approx(-float((logp.detach().float() - old).exp().sum()), rel=1e-6)
    assert logp.grad.dtype == dtype


def test_a_second_derivative_is_an_error():
    logp = torch.randn(3, requires_grad=True)
    loss, _ = policy_loss(logp, torch.randn(3), None, torch.ones(3), torch.ones(3), cumulative([3]),
                          impl="triton")
    grad, = torch.autograd.grad(loss, logp, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_samples_and_no_live_tokens_give_zero(impl):
    empty = torch.empty(0)
    loss, metrics = policy_loss(empty, empty, None, empty, empty, cumulative([]), impl=impl)
    assert loss == 0 and not metrics.any()
    logp = torch.randn(5, requires_grad=True)
    loss, metrics = policy_loss(logp, torch.randn(5), None, torch.zeros(5), torch.ones(5), cumulative([2, 3]),
                                impl=impl)
    loss.backward()
    assert loss == 0 and not metrics.any() and not logp.grad.any()


@pytest.mark.parametrize("own_advantages", [False, True])
def test_micro_batches_add_up_and_the_order_does_not_matter(own_advantages):
    sizes = [5, 9, 1, 30, 12]
    b, starts = batch(sizes), cumulative(sizes).tolist()
    b["advantages"] = torch.randn(57) if own_advantages else b["advantages"]

    def run(samples):
        rows = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in samples])
        part = {name: x[rows] for name, x in b.items()}
        logp = part["logp"].clone().requires_grad_()
        loss, metrics = policy_loss(**part | {"logp": logp}, offsets=cumulative([sizes[n] for n in samples]),
                                    impl="triton", **SETTINGS)
        loss.backward()
        return metrics, torch.zeros(sum(sizes)).index_copy_(0, rows, logp.grad)

    whole, grad = run([0, 1, 2, 3, 4])
    for cut in ([[0], [1], [2], [3], [4]], [[3, 1], [4, 0, 2]]):
        parts = [run(samples) for samples in cut]
        assert torch.equal(sum(g for _, g in parts), grad)  # not a bit depends on the neighbours
        torch.testing.assert_close(sum(m for m, _ in parts)[:7], whole[:7])
        assert max(float(m[7]) for m, _ in parts) == float(whole[7])


def test_the_ops_keep_torchs_rules():
    b, offsets = batch([3, 4]), cumulative([3, 4])
    torch.library.opcheck(grpo_advantages_op, (torch.randn(7), offsets, True))
    logp, rest = b["logp"].requires_grad_(), (b["advantages"], b["weights"], offsets)
    for ref in (None, b["ref_logp"]):
        torch.library.opcheck(policy_loss_op, (logp, b["old_logp"], ref, *rest, 0.2, 0.28, 0.1, "clip", "k3"))
    torch.library.opcheck(policy_loss_op, (logp, b["old_logp"], b["ref_logp"], *rest, 0.2, 0.28, 0.1,
                                           "reinforce", "k2"))
