"""linear_logprob and the GRPO kernels on a CUDA device, at real sizes, in every configuration."""
import pytest
import torch

from r1zero.kernels import reference
from r1zero.kernels.grpo import KL_ESTIMATORS, OBJECTIVES, grpo_advantages, policy_loss
from r1zero.kernels.linear_logprob import linear_logprob

from ..naive_ops import naive_logprob, value_and_gradients

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def case(T, M, V, dtype, w_dtype=None):
    h = torch.randn(T, M, device="cuda", dtype=dtype)
    w = (torch.randn(V, M, device="cuda") * M**-0.5).to(w_dtype or dtype)
    targets = torch.randint(V, (T,), device="cuda")
    targets[0], targets[-1] = V - 1, 0
    return h, w, targets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("T,M,V", [(1, 64, 7), (300, 896, 5003), (1000, 100, 9000), (700, 2048, 50257)])
def test_linear_logprob_and_its_gradients(T, M, V, softcap, dtype):
    h, w, targets = case(T, M, V, dtype)
    upstream = [torch.randn(T, device="cuda"), torch.randn(T, device="cuda")]

    def ours(h, w):
        return linear_logprob(h, w, targets, 0.8, None, softcap, impl="triton")

    got, again = (value_and_gradients(ours, (h, w), upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    truth = value_and_gradients(lambda h, w: naive_logprob(h, w, targets, 0.8, softcap),
                                (h.double(), w.double()), [dy.double() for dy in upstream])
    plain = value_and_gradients(lambda h, w: naive_logprob(h, w, targets, 0.8, softcap), (h, w),
                                [dy.to(dtype) for dy in upstream])
    for i, (g, t, p) in enumerate(zip(got, truth, plain, strict=True)):
        tiny = 1e-5 * max(1.0, t.abs().max().item())
        error, allowed = (g - t).abs().max().item(), 2 * (p - t).abs().max().item() + tiny
        assert error <= allowed, f"number {i} is {error} off, {allowed} allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_master_weight_and_dead_rows(dtype):
    h, w, _ = case(500, 896, 20_000, dtype, torch.float32)
    rows = torch.randperm(500, device="cuda")[:77]
    targets, upstream = torch.randint(20_000, (77,), device="cuda"), [torch.randn(77, device="cuda")] * 2
    got = value_and_gradients(lambda h, w: linear_logprob(h, w, targets, 0.8, rows, impl="triton"), (h, w),
                              upstream)
    truth = value_and_gradients(lambda h, w: naive_logprob(h[rows], w, targets, 0.8),
                                (h.double(), w.to(dtype).double()), [dy.double() for dy in upstream])
    assert got[2].dtype == dtype and got[3].dtype == torch.float32
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for g, t in zip(got, truth, strict=True):
        assert torch.linalg.vector_norm(g - t) <= tolerance * torch.linalg.vector_norm(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_at_any_place_in_any_batch(dtype):
    h, w, targets = case(1000, 896, 20_000, dtype)
    logp, entropy = linear_logprob(h, w, targets, 0.8, impl="triton")
    order = torch.randperm(1000, device="cuda")
    for rows in (order, order[:1], order[:77]):
        found = linear_logprob(h, w, targets[rows], 0.8, rows=rows, impl="triton")
        assert torch.equal(found[0], logp[rows]) and torch.equal(found[1], entropy[rows])


def test_linear_logprob_reads_offsets_beyond_32_bits():
    """V * M of 2^31 and more."""
    T, M, V = 64, 16_384, 140_000
    h = torch.randn(T, M, device="cuda", dtype=torch.bfloat16)
    w = torch.empty(V, M, device="cuda", dtype=torch.bfloat16).normal_(0, M**-0.5)
    targets = torch.randint(V - 10, V, (T,), device="cuda")
    logp, entropy = linear_logprob(h, w, targets, impl="triton")
    expected = reference.linear_logprob(h, w, targets, 1.0)
    torch.testing.assert_close(logp, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective,own_advantages", [(objective, own) for objective in OBJECTIVES
                                                      for own in (False, True)
                                                      if not (own and objective == "gspo")])
@pytest.mark.parametrize("kl_estimator", [None, *KL_ESTIMATORS])
def test_advantages_and_policy_loss_are_the_references_in_fp64(objective, own_advantages, kl_estimator):
    sizes = torch.tensor([0, 1, 5000, 64, 700, 0, 3, 1024])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int().cuda()
    R, N = int(sizes.sum()), len(sizes)
    old = -3 * torch.rand(R, device="cuda")
    logp, ref = (old + 0.3 * torch.randn(R, device="cuda") for _ in range(2))
    logp[7] += 200
    rewards = torch.randn(N, device="cuda")
    rewards[:2] = 1.0
    groups = torch.tensor([0, 2, 5, 8], device="cuda")
    advantages, dead = grpo_advantages(rewards, groups, impl="triton")
    expected, expected_dead = reference.grpo_advantages(rewards.double(), groups)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-5, atol=1e-5)
    for found_dead in (dead, expected_dead):
        assert torch.equal(found_dead.long(), torch.tensor([1, 0, 0], device="cuda"))
    weights = torch.rand(N, device="cuda").repeat_interleave(sizes.cuda())
    advantages = advantages.repeat_interleave(sizes.cuda())
    if own_advantages:
        advantages, weights = torch.randn(R, device="cuda"), torch.rand(R, device="cuda")
        advantages[::5], weights[::7] = 0.0, 0.0
    found = []
    for impl in ("triton", "triton", "reference"):
        parts = [x if x is None or impl == "triton" else x.double()
                 for x in (logp, old, ref if kl_estimator else None, advantages, weights)]
        leaf = parts[0].clone().requires_grad_()
        loss, metrics = policy_loss(leaf, *parts[1:], offsets, kl_coef=0.1, objective=objective,
                                    kl_estimator=kl_estimator or "k3", impl=impl)
        loss.backward()
        found.append((metrics, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True)), "two runs differ"
    (metrics, grad), _, (exact_metrics, exact_grad) = found  # the last in fp64
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-5)
    # k3 of a token is a difference of numbers near 1, and under gspo all tokens round alike
    torch.testing.assert_close(metrics.double(), exact_metrics, rtol=1e-4, atol=R * 2**-23)
