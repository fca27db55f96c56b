"""The element-wise loops for a CPU, and slices of logits, against fp64: values, gradients, extremes."""
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from r1zero.kernels import reference
from r1zero.kernels.cpu import compile as cpu
from r1zero.kernels.cpu import elementwise, sampling
from r1zero.kernels.linear_logprob import linear_logprob
from r1zero.kernels.mlp import swiglu
from r1zero.kernels.rmsnorm import rmsnorm
from r1zero.kernels.rope import rope, rope_table

from ..naive_ops import assert_close, same, value_and_gradients

pytestmark = pytest.mark.skipif(not cpu.HAS_NUMBA, reason="Numba is not installed")
NAN, INF, f32, f64 = torch.nan, torch.inf, np.float32, torch.float64


def laid_out(layout, shape):
    """A gradient as autograd may hand it down."""
    turned = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    return {"plain": torch.randn(shape), "turned": turned, "expanded": torch.randn(()).expand(shape)}[layout]


def check(op, inputs, upstream, tolerance=2e-6):
    got = value_and_gradients(partial(op, impl="cpu"), inputs, upstream)
    expected = value_and_gradients(partial(op, impl="reference"), [x.double() for x in inputs],
                                   [None if dy is None else dy.double() for dy in upstream])
    assert_close(got, expected, tolerance)


def outputs(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


@pytest.mark.parametrize("layout", ["plain", "turned", "expanded"])
@pytest.mark.parametrize("shape", [(1, 384), (3, 5), (7, 1), (64, 5), (2, 3, 7), (129, 384)], ids=str)
def test_rmsnorm_and_swiglu(shape, layout):
    x, residual, w = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    dy, dsum = laid_out(layout, shape), laid_out(layout, shape)
    check(lambda x, w, impl: rmsnorm(x, w, 0.1, impl=impl), [x, w], [dy])
    for upstream in ([dy, dsum], [dy, None]):
        check(lambda x, w, r, impl: rmsnorm(x, w, 0.1, r, impl), [x, w, residual], upstream)
    check(lambda x, r, impl: rmsnorm(x, w.to(x.dtype), 0.1, r, impl), [x, residual], [None, dsum])
    check(swiglu, [torch.randn(*shape[:-1], 2 * shape[-1]) * 3], [dy])


def test_rows_of_wider_tensors_and_features_first():
    wide, w = torch.randn(9, 17), torch.randn(10)
    check(lambda x, impl: swiglu(x[1::2, 3:13], impl), [wide], [torch.randn(4, 5)])
    check(lambda x, impl: rmsnorm(x[::2, :10], w.to(x.dtype), 0.1, x[:5, 4:14], impl), [wide],
          list(torch.randn(2, 5, 10)))
    for M, B in ((1, 1), (6, 63), (5, 64), (7, 129)):  # as the decoder has them
        x, y, w = torch.randn(2, M, B), torch.empty(M, B), torch.randn(M)
        cpu.prepare()
        elementwise.swiglu_fwd_loop(x.numpy().reshape(-1), B, M * B, y.numpy())
        normed = reference.rmsnorm(x.double().mT, w.double(), 0.1)
        assert_close([y], [reference.swiglu(x.double().view(-1, B).T).T], 1e-6)
        elementwise.rmsnorm_columns_loop(x.numpy(), w.numpy(), f32(0.1), x.numpy())
        assert_close([x.mT], [normed], 2e-6)


@pytest.mark.parametrize("layout", ["plain", "turned", "expanded"])
@pytest.mark.parametrize("T,H,D", [(1, 1, 2), (3, 2, 6), (7, 3, 32), (129, 5, 2)])
def test_rope(T, H, D, layout):
    cos, sin = (torch.cat([x, x], 1)[:, : D // 2] for x in rope_table(torch.arange(T) * 7, D, 1e4))  # views
    views = {(T, H + 3, D + 5): lambda x: x[:, 1 : H + 1, 4 : 4 + D], (H, T, D): lambda x: x.transpose(0, 1),
             (2 * T, H + 1, D): lambda x: x[::2, :H], (T, 2, D): lambda x: x[:, :1].expand(T, H, D)}
    for shape, view in views.items():
        check(lambda x, impl, view=view: rope(view(x), cos.to(x.dtype), sin.to(x.dtype), impl),
              [torch.randn(shape)], [laid_out(layout, (T, H, D))])


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("T", [1, 7, 129])
@pytest.mark.parametrize("V,columns", [(1, 4), (7, 3), (7, 16), (70, 64), (128, 64)])
def test_linear_logprob(V, columns, T, softcap, monkeypatch):
    monkeypatch.setattr(reference, "VOCAB_SLICE", columns)
    h, w, targets = torch.randn(T + 2, 5), torch.randn(V, 5), torch.randint(V, (T,))
    targets[:4] = torch.tensor([0, V - 1, min(columns, V) - 1, min(columns, V - 1)])[:T]  # slices' edges
    rows, (a, b) = torch.randperm(T + 2)[:T], torch.randn(2, T)
    for upstream in ([a, b], [a, None], [None, b], [a[:1].expand(T), torch.randn(T, 3)[:, 1]]):
        check(partial(linear_logprob, targets=targets, temperature=0.7, rows=rows, softcap=softcap), [h, w],
              upstream, 4e-6)
        check(partial(linear_logprob, targets=targets, softcap=softcap), [h[:T], w], upstream, 4e-6)


@pytest.mark.parametrize("columns", [5, 20])
def test_linear_logprob_can_run_backward_again(columns, monkeypatch):
    monkeypatch.setattr(reference, "VOCAB_SLICE", columns)
    leaves = torch.randn(6, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    logp, entropy = linear_logprob(*leaves, torch.arange(6), 0.7, impl="cpu")
    before, ones = [x.detach().clone() for x in (*leaves, logp, entropy)], torch.ones(6)
    gradients = partial(torch.autograd.grad, inputs=leaves, retain_graph=True)
    first = gradients(logp, grad_outputs=ones)  # uses up what forward kept
    assert_close(gradients(logp, grad_outputs=2 * ones), [2 * x for x in first], 2e-6)
    both, again = (gradients((logp, entropy), grad_outputs=(ones, ones)) for _ in range(2))
    assert same(again, both)
    assert same(before, [x.detach() for x in (*leaves, logp, entropy)])


def test_exp_over_the_whole_range():
    x = torch.tensor([0.0, -0.0, 1e4, -1e4, INF, -INF, 3e38, -3e38, 88.0, -87.0, NAN, 1e-3, -1e-3, 1e-7])
    x = torch.cat([x, torch.linspace(-200, 200, 400_001)])
    y, ends = torch.empty_like(x), np.empty(-(-len(x) // sampling.SUM_BLOCK))
    compiled = cpu.numba.njit(fastmath=cpu.EXACT_ENOUGH, error_model="numpy")(sampling.exp_and_sum)
    compiled(x.numpy(), f32(0), y.numpy(), ends)  # that is, exp of each
    exact, inside = x.double().exp(), (x >= -87) & (x <= 88)
    assert ((y - exact).abs() / exact)[inside].max() <= 3e-7
    assert not y[x < -87.4].any() and bool((y[x > 88.8] == INF).all()) and bool((y[x == 0] == 1).all())
    assert torch.equal(y.isnan(), x.isnan()) and (y - exact)[(x >= -87.4) & (x < -87)].abs().max() <= 2e-38


def test_large_gates_and_logits(monkeypatch):
    gates = torch.tensor([1e4, -1e4, 87.5, -87.5, 89.0, -89.0, 200.0, -200.0, 0.0, 1e-30])
    check(swiglu, [torch.cat([gates, torch.randn(10)])[None].expand(3, 20)], [torch.randn(3, 10)], 1e-6)
    h = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.0, 100.0], [0.0, 0.0]])
    w = torch.tensor([[100.0, 0.0], [-100.0, 100.0], [100.0, -100.0], [0.0, 100.0], [-100.0, 0.0]])
    for columns, target in ((c, t) for c in (2, 8) for t in range(5)):
        monkeypatch.setattr(reference, "VOCAB_SLICE", columns)
        op = partial(linear_logprob, targets=torch.full((4,), target))
        check(op, [h, w], torch.randn(2, 4), 2e-3)  # of the log-sum-exp, which fp32 rounds to 5e-4 at 1e4
        assert_close(op(h, w, impl="cpu"), op(h.double(), w.double()), 1e-6)


def ops_by_row(T):
    """name -> (op of some rows and their numbers, the shape of a row)."""
    w, weight, (cos, sin) = torch.randn(12), torch.randn(40, 12), rope_table(torch.arange(T), 6, 1e4)
    return {"rmsnorm": (lambda x, at: rmsnorm(x, w, impl="cpu"), (12,)),
            "residual": (lambda x, at: rmsnorm(x, w, 1e-6, x.flip(-1), "cpu"), (12,)),
            "swiglu": (lambda x, at: swiglu(x, impl="cpu"), (12,)),
            "rope": (lambda x, at: rope(x, cos[at], sin[at], "cpu"), (2, 6)),
            "linear_logprob": (lambda x, at: linear_logprob(x, weight, at % 40, 0.7, impl="cpu"), (12,))}


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ops_by_row(1))
def test_rows_do_not_touch_each_other_and_nan_stays_nan(name, bad, monkeypatch):
    monkeypatch.setattr(reference, "VOCAB_SLICE", 16)
    (op, shape), rows, others = ops_by_row(129)[name], torch.arange(129), torch.arange(129) != 4
    clean, broken = torch.randn(129, *shape).expand(2, 129, *shape).clone()
    broken[4].view(-1)[5] = bad
    upstream = [torch.randn(y.shape) for y in outputs(op(clean, rows))]
    results = lambda x, at: value_and_gradients(  # noqa: E731
        lambda x: op(x, at), [x[at]], [dy[at] for dy in upstream])
    expected, got = results(clean, rows), results(broken, rows)
    assert same([y[others] for y in got], [y[others] for y in expected])
    assert not got[0][4].isfinite().all() and (bad == bad or got[0][4].isnan().any())
    assert got[-1][4].isnan().all() or name not in ("linear_logprob", "rmsnorm")  # a row that is one sum
    for at in (torch.tensor([5]), torch.tensor([128, 3, 77])):  # matrix products are PyTorch's
        assert_close(results(clean, at), [y[at] for y in expected], 4e-6 * (name == "linear_logprob"))


def test_the_same_bits_for_one_thread_and_two():
    """In a process of its own, for Numba never has more threads than it began with."""
    code = """if True:
        import numba, torch
        from tests.kernels.cpu.cases import all_loops
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append([x.detach() for x in all_loops()])
            assert torch.get_num_threads() == numba.get_num_threads() == n  # PyTorch's are left alone
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3],
                   env=os.environ | {"NUMBA_NUM_THREADS": "2"}, check=True)


X, W, TABLE = torch.ones(4, 2, 6), torch.ones(9, 6), torch.ones(4, 3)
CALLS = {"rmsnorm": (rmsnorm, [X, W[0]]), "swiglu": (swiglu, [X]), "rope": (rope, [X, TABLE, TABLE]),
         "linear_logprob": (linear_logprob, [X[:, 0], W, torch.arange(4)])}


@pytest.mark.parametrize("name", CALLS)
def test_who_is_served_and_by_what(name, monkeypatch):
    op, inputs = CALLS[name]
    for dtype, i in ((f64, 0), (torch.bfloat16, 0), (f64, min(1, len(inputs) - 1))):
        with pytest.raises(ValueError, match=rf'"cpu".*float32.*installed.*{dtype} on cpu.*None'):
            op(*inputs[:i], inputs[i].to(dtype), *inputs[i + 1 :], impl="cpu")
    empty = [x[:0] if len(x) == 4 else x for x in inputs]
    with pytest.raises(ValueError, match=r"none of them empty.*\(0, .*expected impl=None"):
        op(*empty, impl="cpu")
    given = [torch.randn(x.shape) if x.is_floating_point() else x for x in inputs]
    loops, plain = (outputs(op(*given, impl=impl)) for impl in ("cpu", "reference"))
    given[0].requires_grad_()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            got = outputs(op(*given))
        assert same(got, loops) and got[0].requires_grad == (context is torch.enable_grad)
    monkeypatch.setattr(cpu, "HAS_NUMBA", False)
    assert same(outputs(op(*given)), plain)
    with pytest.raises(ValueError, match="missing: pip install numba"):
        op(*inputs, impl="cpu")
