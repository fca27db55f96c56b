"""linear_logprob against a log-softmax of all logits in fp64: values, gradients, extremes, memory."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from r1zero.kernels import reference
from r1zero.kernels.linear_logprob import check_targets, linear_logprob

from .naive_ops import assert_close, assert_rounded_once, naive_logprob, value_and_gradients


@pytest.mark.parametrize("V,columns", [(7, 1), (7, 3), (7, 7), (7, 8), (1000, 64), (1000, 250), (1000, 999),
                                       (1031, 70), (1031, 4096)])
def test_linear_logprob_and_its_gradients(V, columns, monkeypatch):
    monkeypatch.setattr(reference, "VOCAB_SLICE", columns)
    T, M = 11, 5
    h, w = torch.randn(T, M, dtype=torch.float64), torch.randn(V, M, dtype=torch.float64)
    targets = torch.randint(V, (T,))
    targets[:4] = torch.tensor([0, V - 1, min(columns, V) - 1, min(columns, V - 1)])  # a slice's edges
    a, b = torch.randn(2, T, dtype=torch.float64)
    for temperature in (0.3, 1.0, 1.7):
        for upstream in ([a, b], [a, None], [None, b]):
            expected = value_and_gradients(
                lambda h, w, t=temperature: naive_logprob(h, w, targets, t), (h, w), upstream)
            for dtype, tolerance in {torch.float64: 1e-11, torch.float32: 1e-5}.items():
                got = value_and_gradients(
                    lambda h, w, t=temperature: linear_logprob(h, w, targets, t), (h.to(dtype), w.to(dtype)),
                    [None if x is None else x.to(dtype) for x in upstream])
                assert got[1].min() >= 0
                assert got[0].dtype == got[1].dtype == dtype
                assert_close(got, expected, tolerance)


@pytest.mark.parametrize("columns", [64, 301, 400])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("entropy", [True, False])
def test_dead_rows_are_left_out_with_and_without_a_softcap(columns, softcap, entropy, monkeypatch):
    monkeypatch.setattr(reference, "VOCAB_SLICE", columns)
    h, w = torch.randn(20, 5, dtype=torch.float64), torch.randn(301, 5, dtype=torch.float64)
    rows, targets = torch.tensor([17, 3, 0, 19]), torch.tensor([0, 300, 64, 63])
    upstream = [torch.randn(4).double(), torch.randn(4).double() if entropy else None]
    expected = value_and_gradients(lambda h, w: naive_logprob(h[rows], w, targets, 0.8, softcap), (h, w),
                                   upstream)
    dead = torch.ones(20, dtype=torch.bool)
    dead[rows] = False
    bad = h.clone()
    bad[dead] = float("nan")  # whatever stands there
    got = value_and_gradients(lambda h, w: linear_logprob(h, w, targets, 0.8, rows, softcap), (bad, w),
                              upstream)
    assert_close(got, expected, 1e-12)
    none = torch.empty(0, dtype=torch.int64)
    got = value_and_gradients(lambda h, w: linear_logprob(h, w, none, 0.8, none, softcap), (h, w),
                              [torch.empty(0).double()] * 2)
    assert got[0].shape == got[1].shape == (0,) and not got[2].any() and not got[3].any()


def test_targets_outside_the_vocabulary_are_named():
    check_targets(torch.tensor([0, 6]), 7)
    for bad in (-1, 7):
        with pytest.raises(ValueError, match=rf"target 1 is token id {bad} \(2 such in all\).* 0 to 6"):
            check_targets(torch.tensor([3, bad, 0, bad]), 7)


def test_linear_logprob_computes_only_the_gradients_asked_for():
    h, w, targets, ones = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6), torch.ones(6)
    both = value_and_gradients(lambda h, w: linear_logprob(h, w, targets), (h, w), [ones, ones])
    for needs_h, needs_w in ((True, False), (False, True), (False, False)):
        leaves = h.clone().requires_grad_(needs_h), w.clone().requires_grad_(needs_w)
        logp, entropy = linear_logprob(*leaves, targets)
        assert torch.equal(logp, both[0]) and torch.equal(entropy, both[1])
        assert logp.requires_grad == entropy.requires_grad == (needs_h or needs_w)
        if needs_h or needs_w:
            (logp + entropy).sum().backward()
        for leaf, needed, grad in zip(leaves, (needs_h, needs_w), both[2:], strict=True):
            assert torch.allclose(leaf.grad, grad, atol=1e-6) if needed else leaf.grad is None


def test_linear_logprob_at_logits_of_ten_thousand(monkeypatch):
    monkeypatch.setattr(reference, "VOCAB_SLICE", 2)
    h = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.0, 100.0], [0.0, 0.0]])
    w = torch.tensor([[100.0, 0.0], [-100.0, 100.0], [100.0, -100.0], [0.0, 100.0], [-100.0, 0.0]])
    for target in range(5):
        op, naive = (lambda h, w, f=f, t=target: f(h, w, torch.full((4,), t), 1.0)
                     for f in (linear_logprob, naive_logprob))
        got = value_and_gradients(op, (h, w), [torch.ones(4)] * 2)
        expected = value_and_gradients(naive, (h.double(), w.double()), [torch.ones(4).double()] * 2)
        assert_close(got[:1], expected[:1], 1e-7)
        assert_close(got[1:2], expected[1:2], 1e-6)
        assert_close(got[2:], expected[2:], 2e-3)  # from the log-sum-exp, which fp32 rounds to 5e-4 at 1e4


def test_cost_falls_with_the_live_rows_and_a_frozen_head(monkeypatch):
    monkeypatch.setattr(reference, "VOCAB_SLICE", 100)
    T, M, V = 50, 8, 400
    h, w = torch.randn(T, M, requires_grad=True), torch.randn(V, M, requires_grad=True)

    def products(w, rows):  # in units of 2 T M V
        targets = torch.randint(V, (T if rows is None else len(rows),))
        with FlopCounterMode(display=False) as counter:
            linear_logprob(h, w, targets, rows=rows)[0].sum().backward()
        return counter.get_total_flops() / (2 * T * M * V)

    # forward, logits anew but for the slice that is kept, and dw; what is added in place is not counted
    assert products(w, None) == pytest.approx(3 - 1 / 4, abs=2 / V)
    assert products(w, torch.arange(0, T, 10)) == pytest.approx((3 - 1 / 4) / 10, abs=1 / V)
    assert products(w.detach(), None) == pytest.approx(2 - 1 / 4, abs=2 / V)


class SizesOfTensors(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any op made."""
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_linear_logprob_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(reference, "VOCAB_SLICE", 128)
    T, M, V = 64, 8, 4096
    h, w = torch.randn(T, M, requires_grad=True), torch.randn(V, M, requires_grad=True)
    kept = []
    with SizesOfTensors() as sizes, torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x) or x, lambda x: x):
        logp, entropy = linear_logprob(h, w, torch.randint(V, (T,)), 0.9)
        (logp - entropy).sum().backward()
    assert T * 128 <= sizes.largest <= V * M < T * V / 4
    assert sum(x.numel() for x in kept if x.data_ptr() not in (h.data_ptr(), w.data_ptr())) <= T * (128 + 8)


@pytest.mark.parametrize("h_dtype,w_dtype", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
                                             (torch.bfloat16, torch.float32)], ids=str)
def test_16_bit_linear_logprob_rounds_once(h_dtype, w_dtype, monkeypatch):
    monkeypatch.setattr(reference, "VOCAB_SLICE", 100)
    h, w = torch.randn(70, 24).to(h_dtype), torch.randn(301, 24).to(w_dtype)
    targets, (a, b) = torch.randint(301, (70,)), torch.randn(2, 70)
    got = value_and_gradients(lambda h, w: linear_logprob(h, w, targets, 0.8), (h, w), [a, b])
    expected = value_and_gradients(lambda h, w: naive_logprob(h, w, targets, 0.8), (h.double(), w.double()),
                                   [a.double(), b.double()])
    assert [x.dtype for x in got] == [torch.float32, torch.float32, h_dtype, w_dtype]
    assert_rounded_once(got, expected)
