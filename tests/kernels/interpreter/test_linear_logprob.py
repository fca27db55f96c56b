"""linear_logprob as Triton kernels against a log-softmax of all logits in fp64: values and every gradient."""
import pytest
import torch

from r1zero.kernels import chips
from r1zero.kernels import linear_logprob as file
from r1zero.kernels.chips import KNOWN_CHIPS
from r1zero.kernels.linear_logprob import linear_logprob, logprob_bwd_op, logprob_config, logprob_fwd_op

from ..naive_ops import assert_close, naive_logprob, value_and_gradients

DTYPES = [torch.float32, torch.float16]


def case(T: int, M: int, V: int, dtype: torch.dtype, w_dtype: torch.dtype | None = None):
    """h, weight and targets, the ends of the vocabulary among them; logits of order 1."""
    h, w = torch.randn(T, M).to(dtype), (torch.randn(V, M) * M**-0.5).to(w_dtype or dtype)
    targets = torch.randint(V, (T,))
    targets[: min(T, 2)] = torch.tensor([0, V - 1])[: min(T, 2)]
    return h, w, targets


def check(h, w, targets, upstream, temperature=0.8, rows=None, softcap=None):
    got = value_and_gradients(
        lambda h, w: linear_logprob(h, w, targets, temperature, rows, softcap, "triton"), (h, w), upstream)

    def naive(h, w):
        h = h if rows is None else h[rows]
        return naive_logprob(h, w, targets, temperature, softcap)

    # a master weight is rounded to h's dtype, as h was
    expected = value_and_gradients(naive, (h.double(), w.to(h.dtype).double()),
                                   [None if x is None else x.double() for x in upstream])
    assert [x.dtype for x in got] == [torch.float32, torch.float32, h.dtype, w.dtype]
    # values are exact to fp32 in both dtypes; the gradient of the logits is rounded to h's once
    assert_close(got[:2], expected[:2], 2e-6)
    assert got[1].min() >= -1e-6
    for g, e in zip(got[2:], expected[2:], strict=True):
        largest = e.abs().max().item()
        assert (g.double() - e).abs().max().item() <= largest * (2e-6 if h.dtype == torch.float32 else 2e-3)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T,M,V", [(1, 48, 7), (65, 64, 1000), (300, 96, 1031), (65, 48, 7), (1, 64, 1031)])
def test_values_and_gradients_are_those_of_a_log_softmax(T, M, V, dtype):
    h, w, targets = case(T, M, V, dtype)
    a, b = torch.randn(2, T)
    check(h, w, targets, [a, b])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_one_slice_and_a_master_weight(dtype, monkeypatch):
    """The last slice is one of its own, narrower than a tile; the weight is fp32 and so is its gradient."""
    monkeypatch.setattr(file, "SLICE", 256)
    h, w, targets = case(70, 48, 2 * 256 + 7, dtype, torch.float32)
    targets[2:6] = torch.tensor([255, 256, 511, 512])
    for upstream in ([torch.randn(70), torch.randn(70)], [torch.randn(70), None], [None, torch.randn(70)]):
        check(h, w, targets, upstream)


def test_more_tiles_than_are_put_together_at_one_time():
    h, w, targets = case(3, 48, 2300, torch.float32)
    w[2100:] *= 3  # the maximum moves from one block of tiles to the next
    check(h, w, targets, [torch.ones(3), torch.ones(3)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_dead_rows_are_left_out_whatever_they_hold(dtype, softcap):
    h, w, _ = case(50, 48, 300, dtype)
    rows = torch.tensor([31, 4, 0, 49, 7])
    h_bad = h.clone()
    dead = torch.ones(50, dtype=torch.bool)
    dead[rows] = False
    h_bad[dead] = float("nan")
    targets, a, b = torch.tensor([0, 299, 17, 17, 100]), torch.randn(5), torch.randn(5)
    got = value_and_gradients(lambda h, w: linear_logprob(h, w, targets, 0.8, rows, softcap, impl="triton"),
                              (h_bad, w), [a, b])
    clean = check(h, w, targets, [a, b], rows=rows, softcap=softcap)
    assert all(torch.equal(x, y) for x, y in zip(got, clean, strict=True))
    assert (got[2][dead] == 0).all() and (got[2][rows] != 0).any(1).all()


def test_all_rows_may_be_dead_and_one_may_be_alive():
    h, w, _ = case(9, 48, 300, torch.float32)
    nothing = torch.empty(0, dtype=torch.int64)
    logp, entropy, dh, dw = value_and_gradients(
        lambda h, w: linear_logprob(h, w, nothing, 1.0, nothing, impl="triton"), (h, w),
        [torch.ones(0), torch.ones(0)])
    assert logp.shape == entropy.shape == (0,) and not dh.any() and not dw.any()
    check(h, w, torch.tensor([299]), [torch.ones(1), torch.ones(1)], rows=torch.tensor([8]))


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4])
def test_a_soft_cap_far_below_and_far_above_the_logits(softcap):
    h, w, targets = case(70, 50, 300, torch.float32)
    check(h, w, targets, [torch.randn(70), torch.randn(70)], softcap=softcap)


def test_columns_behind_the_vocabulary_end_do_not_reach_the_gradient():
    """A sure token in the last column: its own gradient is 0; that of a copy behind it would overflow."""
    h, w = torch.zeros(2, 48, dtype=torch.float16), torch.zeros(70, 48, dtype=torch.float16)
    h[0], w[69] = 30 / 48, 1.0
    got = value_and_gradients(lambda h, w: linear_logprob(h, w, torch.tensor([69, 3]), impl="triton"), (h, w),
                              [torch.tensor([1e6, 1.0]), torch.zeros(2)])
    assert got[0][0] > -1e-6 and all(x.isfinite().all() for x in got)


def test_each_gradient_can_be_had_alone():
    h, w, targets = case(20, 48, 300, torch.float32)
    ones = torch.ones(20)
    both = value_and_gradients(lambda h, w: linear_logprob(h, w, targets, impl="triton"), (h, w), [ones] * 2)
    for needs_h, needs_w in ((True, False), (False, True)):
        leaves = h.clone().requires_grad_(needs_h), w.clone().requires_grad_(needs_w)
        sum(linear_logprob(*leaves, targets, impl="triton")).sum().backward()
        for leaf, needed, grad in zip(leaves, (needs_h, needs_w), both[2:], strict=True):
            assert torch.equal(leaf.grad, grad) if needed else leaf.grad is None


def test_logits_of_ten_thousand_do_not_overflow():
    h = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.0, 100.0], [0.0, 0.0]])
    w = torch.tensor([[100.0, 0.0], [-100.0, 100.0], [100.0, -100.0], [0.0, 100.0], [-100.0, 0.0]])
    for target in range(5):
        targets = torch.full((4,), target)
        got = linear_logprob(h, w, targets, impl="triton")
        assert_close(got, naive_logprob(h.double(), w.double(), targets, 1.0), 1e-6)


def test_the_same_bits_each_time_and_whatever_the_neighbours():
    """At the same place in a tile: the product of NumPy, which stands in for the chip's here, has other bits
    for a row at another place. tests/gpu/ shuffles the rows."""
    h, w, targets = case(200, 48, 700, torch.float32)
    logp, entropy = linear_logprob(h, w, targets, 0.8, impl="triton")
    tile = logprob_config("tiles", h.dtype, KNOWN_CHIPS[80], 48)["BLOCK_T"]
    for first, last in ((0, 1), (tile, 3 * tile - 5), (2 * tile, 200)):
        alone = linear_logprob(h[first:last], w, targets[first:last], 0.8, impl="triton")
        assert torch.equal(alone[0], logp[first:last]) and torch.equal(alone[1], entropy[first:last])
    others = torch.randn(200, 48)
    others[77], others[150] = h[77], h[150]
    among_others = linear_logprob(others, w, targets, 0.8, impl="triton")
    for t in (77, 150):
        assert among_others[0][t] == logp[t] and among_others[1][t] == entropy[t]
    upstream = torch.randn(2, 200)
    first, second = (value_and_gradients(lambda h, w: linear_logprob(h, w, targets, impl="triton"), (h, w),
                                         upstream) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_config_that_can_be_chosen(arch, monkeypatch):
    """Tiles of the other chips, on the same numbers."""
    chip = KNOWN_CHIPS[arch]
    monkeypatch.setattr(chips, "chip_of", lambda device: chip)
    h, w, targets = case(150, 80, 600, torch.float16)
    check(h, w, targets, list(torch.randn(2, 150)))
    for config in (logprob_config("tiles", dtype, chip, M, cap)
                   for dtype in DTYPES for M in (100, 512) for cap in (0.0, 1.0)):
        assert file.SLICE % config["BLOCK_V"] == 0 == config["BLOCK_V"] % config["BLOCK_K"]


def test_the_ops_keep_torchs_rules_and_compile_as_one_graph():
    h, w, targets = case(10, 48, 70, torch.float32)
    leaves = h.requires_grad_(), w.requires_grad_()
    for rows, n in ((None, 10), (torch.tensor([3, 1]), 2)):
        torch.library.opcheck(logprob_fwd_op, (*leaves, targets[:n], rows, 0.8, 0.0))
    logp, entropy, lse = logprob_fwd_op(*leaves, targets, None, 0.8, 5.0)
    upstream = torch.randn(10), torch.randn(10)
    torch.library.opcheck(logprob_bwd_op, (*upstream, h.detach(), w.detach(), targets, None, lse.detach(),
                                           entropy.detach(), 0.8, 5.0, True, True))
    compiled = torch.compile(lambda h, w: linear_logprob(h, w, targets, impl="triton")[0].sum(),
                             backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*leaves), linear_logprob(*leaves, targets, impl="triton")[0].sum())
