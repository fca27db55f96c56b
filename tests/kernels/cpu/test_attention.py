"""Attention over packed sequences as compiled loops for a CPU, against the textbook's in fp64."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from r1zero.kernels.cpu import compile as cpu
from r1zero.kernels.cpu.attention import rope_attention, rope_attention_refuses
from r1zero.kernels.cpu.attention_tiles import KEYS, QUERIES
from r1zero.kernels.rope import rope_table
from r1zero.model.packed import pack

from ..naive_ops import assert_close, cu, naive_attention, same, value_and_gradients
from .cases import inputs, of, results

pytestmark = pytest.mark.skipif(not cpu.HAS_NUMBA, reason="Numba is not installed")
NAN, INF = torch.nan, torch.inf
CASES = {
    "as many keys": ([1, 2, 5, 6, 7, 16, 17, 31, 33, QUERIES, QUERIES + 1], None),
    "more keys, or fewer, or none": ([3, 6, 64, 0, 20, 1, 40, 8, 0], [70, 6, 71, 5, 0, 300, 13, 7, 0]),
    "several blocks": ([2 * QUERIES + 5, 7, QUERIES + 20], [2 * QUERIES + 5, KEYS + 7, 50]),
}


@pytest.fixture(autouse=True)
def nan_in_new_tensors():
    """Whatever is not written is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def wide(tensors):
    return [None if x is None else x.double() for x in tensors]


@pytest.mark.parametrize("H,G,D", [(1, 1, 16), (4, 2, 32), (3, 3, 48), (6, 2, 64)])
@pytest.mark.parametrize("lengths,lengths_k", CASES.values(), ids=CASES)
def test_values_and_gradients(lengths, lengths_k, H, G, D):
    qkv, upstream = inputs(lengths, lengths_k, H, G, D)
    exact = naive_attention(*wide(qkv), lengths, lengths_k=lengths_k, scale=0.3, lse=True)
    ours, blind = of(lengths, lengths_k, scale=0.3), exact[1] == -INF
    ours(*[x * NAN for x in qkv])  # working memory holds NaN from now on
    out, lse = ours(*qkv)
    assert torch.equal(lse == -INF, blind) and not out[blind].any()

    def naive(*x):
        return naive_attention(*x, lengths, lengths_k=lengths_k, scale=0.3, lse=True)

    def finite(op):  # -inf has no gradient
        return lambda *x: (op(*x)[0], op(*x)[1].masked_fill(blind, 0.0))

    for dy in (upstream, [upstream[0], None], [None, upstream[1]]):
        zero_for_none = [torch.zeros_like(x) if y is None else y for x, y in zip(upstream, dy, strict=True)]
        expected = value_and_gradients(finite(naive), wide(qkv), wide(zero_for_none))
        assert_close(value_and_gradients(finite(ours), qkv, dy), expected, 2e-6)


@pytest.mark.parametrize("layout", ["plain", "heads first", "features first", "expanded", "every second"])
def test_views_of_any_strides(layout):
    lengths, H, G, D = [40, 7, 17], 4, 2, 32
    T = sum(lengths)
    packed = torch.randn(T, H + 2 * G + 1, D + 3)
    packed[:, -1], packed[:, :, D:] = NAN, NAN  # others' numbers
    qkv = [packed[:, a:b, :D] for a, b in ((0, H), (H, H + G), (H + G, H + 2 * G))]
    dy = {"plain": lambda: torch.randn(T, H, D), "heads first": lambda: torch.randn(H, T, D).transpose(0, 1),
          "features first": lambda: torch.randn(D, H, T).permute(2, 1, 0),
          "expanded": lambda: torch.randn(()).expand(T, H, D),
          "every second": lambda: torch.randn(2 * T, H, 2 * D)[::2, :, D:]}[layout]()
    leaves, plain = ([turn(x).requires_grad_() for x in qkv] for turn in (torch.detach, torch.clone))
    dlse = torch.randn(H, T).T
    got = torch.autograd.grad(of(lengths)(*leaves), leaves, [dy, dlse])
    assert same(got, torch.autograd.grad(of(lengths)(*plain), plain, [dy.contiguous(), dlse.contiguous()]))
    expected = value_and_gradients(lambda *x: naive_attention(*x, lengths, lse=True), wide(qkv),
                                   wide([dy, dlse]))
    assert_close(got, expected[2:], 2e-6)


@pytest.mark.parametrize("size", [2.0**4, 2.0**10, 2.0**60])
def test_large_scores(size):
    """Whole numbers times powers of two: scores are exact, and so is which of them win."""
    lengths, ((q, k, v), (dy, _)) = [50, 9], inputs([50, 9], None, 2, 1, 16)
    qkv = [q.round() * size, k.round(), v]
    got = value_and_gradients(of(lengths, lse=False, scale=0.25), qkv, [dy])
    exact = value_and_gradients(lambda *x: naive_attention(*x, lengths, scale=0.25), wide(qkv), wide([dy]))
    assert_close(got, exact, 1e-5)


AFTER = [-1, -1, -1, 0, 0, 1, -1, 2, 2, 0]
LENGTHS = [7, 0, 130, 12, 20, 5, 9, 0, 100, 1]


@pytest.mark.parametrize("after", [None, AFTER], ids=["each its own", "shared prefixes"])
@pytest.mark.parametrize("H,G,D", [(1, 1, 16), (4, 2, 32), (3, 3, 48), (6, 2, 64)])
@pytest.mark.parametrize("layout", ["plain", "turned", "expanded"])
def test_all_heads_with_rope_and_shared_prefixes(after, H, G, D, layout):
    packed = pack([[1] * n for n in LENGTHS], after=after and np.array(after))
    T, (cos, sin) = len(packed.tokens), rope_table(packed.positions, D, 1e3)
    cu_k, keys = (packed.cu_seqlens, torch.arange(T)) if after is None else (packed.cu_keys, packed.keys)
    dy = {"plain": torch.randn(T, H, D), "turned": torch.randn(D, H, T).permute(2, 1, 0),
          "expanded": torch.randn(()).expand(T, H, D)}[layout]

    def ours(qkv):
        return rope_attention(qkv, cos, sin, packed.cu_seqlens, packed.max_seqlen, G, packed.keys, cu_k)

    def naive(qkv):
        z = torch.complex(*qkv.chunk(2, -1)) * torch.complex(cos, sin).to(torch.complex128)[:, None]
        q, k, _ = torch.cat([z.real, z.imag], -1).split([H, G, G], dim=1)
        return naive_attention(q, k[keys], qkv[keys, -G:], LENGTHS, lengths_k=cu_k.diff().tolist())

    qkv, n_threads = torch.randn(T, H + 2 * G, D), torch.get_num_threads()
    value_and_gradients(ours, [qkv * NAN], [dy])  # working memory holds NaN from now on
    got = value_and_gradients(ours, [qkv], [dy])
    assert_close(got, value_and_gradients(naive, [qkv.double()], [dy.double()]), 2e-6)
    with torch.no_grad():
        assert same([ours(qkv)], got[:1])
    try:
        torch.set_num_threads(1)
        assert same(value_and_gradients(ours, [qkv], [dy]), got)
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.parametrize("bad,message", [
    ({"cu_seqlens": cu([5])}, r"cu_q is \[0, 5\]; .* end at 6"),
    ({"cu_keys": cu([7, -1])}, "cu_k is .*never decrease"),
    ({"cos": torch.zeros(5, 8)}, r"cos \(5, 8\), .*expected \(6, 8\)"),
    ({"keys": torch.arange(1, 7)}, "keys are 1 to 6; expected indices of the 6 tokens"),
    ({"keys": torch.tensor([0, 1, 2, 3, 4, 4])}, "each at least once")])
def test_indices_outside_are_refused(bad, message):
    cos, sin = rope_table(torch.arange(6), 16, 1e4)
    given = {"qkv": torch.randn(6, 3, 16), "cos": cos, "sin": sin, "cu_seqlens": cu([6]), "max_seqlen": 6,
             "n_kv_heads": 1, "keys": torch.arange(6), "cu_keys": cu([6])}
    turned = given | {"qkv": given["qkv"].mT.contiguous().mT}
    assert same([rope_attention(**given)], [rope_attention(**turned)])
    with pytest.raises(ValueError, match=message):
        rope_attention(**given | bad)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_sequences_do_not_touch_each_other(bad):
    lengths, lengths_k = [5, 100, 0, 64, 17, 30], [5, 107, 9, 71, 3, 30]
    qkv, upstream = inputs(lengths, lengths_k, 4, 2, 32)
    together, by_q, by_k = results(qkv, upstream, lengths, lengths_k), cu(lengths), cu(lengths_k)
    for n, (a, b) in enumerate(zip(lengths, lengths_k, strict=True)):
        if a:
            ours, theirs = slice(by_q[n], by_q[n + 1]), slice(by_k[n], by_k[n + 1])
            alone = results([x[at] for x, at in zip(qkv, (ours, theirs, theirs), strict=True)],
                            [x[ours] for x in upstream], [a], [b])
            assert same(alone[0], together[n])
    for i in range(3):
        broken = [x.clone() for x in qkv]
        broken[i][(by_q, by_k, by_k)[i][3] + 9, 1, 3] = bad
        got = results(broken, upstream, lengths, lengths_k)
        assert all(same(got[n], together[n]) for n in (0, 1, 2, 4, 5))
        assert not all(x.isfinite().all() for x in got[3])


def test_the_same_bits_for_one_thread_and_two():
    """In a process of its own, for Numba never has more threads than it began with."""
    code = """if True:
        import numba, torch
        from tests.kernels.cpu.cases import all_results
        torch.set_num_threads(1)
        one = all_results()
        torch.set_num_threads(2)
        two = all_results()
        assert torch.get_num_threads() == numba.get_num_threads() == 2
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3],
                   env=os.environ | {"NUMBA_NUM_THREADS": "2"}, check=True)


def test_a_long_sequence_takes_memory_for_one_block():
    lengths, (qkv, upstream) = [3000], inputs([3000], None, 1, 1, 16)
    got = value_and_gradients(of(lengths), qkv, upstream)
    plain = value_and_gradients(of(lengths, impl="reference"), wide(qkv), wide(upstream))
    assert_close(got, plain, 4e-6)


def test_who_is_served_and_by_what(monkeypatch):
    lengths = [4, 3]
    qkv, _ = inputs(lengths, None, 4, 2, 16)
    for options, got in (({"window": 2}, "window 2, softcap None"),
                         ({"softcap": 5.0}, "window None, softcap 5.0")):
        with pytest.raises(ValueError, match=f'is "cpu", but head_dim is 16, {got};.*expected impl=None'):
            of(lengths, **options)(*qkv)
        assert same(of(lengths, impl=None, **options)(*qkv), of(lengths, impl="reference", **options)(*qkv))
    with pytest.raises(ValueError, match="head_dim is 8, .*a multiple of 16"):
        of(lengths)(*[x[..., :8] for x in qkv])
    with pytest.raises(ValueError, match=r"float32 tensors.*torch.float64 on cpu"):
        of(lengths)(*wide(qkv))
    with pytest.raises(ValueError, match=r"none of them empty.*\(0, 2, 16\)"):
        of(lengths, [0, 0])(qkv[0], qkv[1][:0], qkv[2][:0])
    loops, plain = of(lengths)(*qkv), of(lengths, impl="reference")(*qkv)
    assert not same(loops, plain)  # or else this test would see no difference
    qkv[0].requires_grad_()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            got = of(lengths, impl=None)(*qkv)
        assert same(got, loops) and got[0].requires_grad == (context is torch.enable_grad)
        assert same([of(lengths, impl=None, lse=False)(*qkv)], loops[:1])
    monkeypatch.setattr(cpu, "HAS_NUMBA", False)
    assert same(of(lengths, impl=None)(*qkv), plain)
    with pytest.raises(ValueError, match="missing: pip install numba"):
        of(lengths)(*qkv)


def test_what_rope_attention_refuses():
    qkv, (cos, sin) = torch.randn(6, 3, 16), rope_table(torch.arange(6), 16, 1e4)
    rest = cu([6]), 6, 1
    assert rope_attention_refuses(qkv, cos, sin, *rest) is None
    assert "torch.float64" in rope_attention_refuses(qkv.double(), cos, sin, *rest)
    assert "head_dim is 8" in rope_attention_refuses(qkv[..., :8], cos[:, :4], sin[:, :4], *rest)
