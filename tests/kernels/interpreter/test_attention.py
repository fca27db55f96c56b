"""Attention as Triton kernels, forward, log-sum-exp and every gradient, against one formula in fp64."""
import pytest
import torch

from r1zero.kernels.attention import attention, attention_bwd_op, attention_fwd_op

from ..naive_ops import cu, naive_attention, value_and_gradients

RAGGED, LONGER = [0, 1, 2, 17, 63], [129, 5]
CACHES = [1, 16, 4, 0, 3, 30], [70, 40, 4, 5, 0, 20]  # the last two hold queries that see no key at all


def inputs(lengths, lengths_k, H, G, D, dtype, E=None):
    n_keys = sum(lengths_k or lengths)
    shapes = (sum(lengths), H, D), (n_keys, G, D), (n_keys, G, E or D)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def finite(op):
    """The outputs (out, lse) with 0 for -inf, which has no gradient."""
    def finite_op(*args):
        out, lse = op(*args)
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    return finite_op


def check(lengths, heads, D, dtype=torch.float32, lengths_k=None, E=None, **options):
    H, G = heads
    qkv = inputs(lengths, lengths_k, H, G, D, dtype, E)
    upstream = [torch.randn(sum(lengths), H, E or D).to(dtype), torch.randn(sum(lengths), H)]
    cache = {} if lengths_k is None else {"cu_seqlens_k": cu(lengths_k), "max_seqlen_k": max(lengths_k)}

    def ours(q, k, v):
        return attention(q, k, v, cu(lengths), max(lengths), impl="triton", return_lse=True, **cache,
                         **options)

    def naive(q, k, v):
        return naive_attention(q, k, v, lengths, lengths_k=lengths_k, lse=True, **options)

    got = value_and_gradients(finite(ours), qkv, upstream)
    expected = value_and_gradients(finite(naive), [x.double() for x in qkv], [x.double() for x in upstream])
    eager = value_and_gradients(finite(naive), qkv, [upstream[0], upstream[1].to(dtype)])
    assert torch.equal(ours(*qkv)[1] == float("-inf"), naive(*qkv)[1] == float("-inf"))
    assert got[1].dtype == torch.float32 and all(g.dtype == dtype for g in [got[0], *got[2:]])
    for name, g, e, plain in zip(("out", "lse", "dq", "dk", "dv"), got, expected, eager, strict=True):
        assert g.shape == e.shape
        error = (g.double() - e).abs().max().item()
        limit = 3e-6 * e.abs().max().item() if dtype == torch.float32 or name == "lse" else \
            2 * (plain.double() - e).abs().max().item() + 1e-5
        assert error <= limit, f"{name} is {error} off, at most {limit}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads,D", [((2, 2), 32), ((6, 2), 64), ((5, 1), 16)], ids=str)
def test_attention_of_ragged_sequences(heads, D, dtype):
    check(RAGGED, heads, D, dtype)


@pytest.mark.parametrize("heads,D", [((1, 1), 80), ((3, 1), 96), ((2, 1), 128), ((1, 1), 256), ((7, 1), 24)],
                         ids=str)
def test_attention_at_other_head_dims_and_group_sizes(heads, D):
    check([17, 33], heads, D)


WIDTHS = [(192, 128), (48, 32), (24, 16), (16, 40), (5, 3), (32, 64)]


@pytest.mark.parametrize("D,E,dtype", [*((*widths, torch.float32) for widths in WIDTHS),
                                       (192, 128, torch.float16), (16, 40, torch.float16)], ids=str)
def test_values_of_another_width_than_keys(D, E, dtype):
    check([2, 17, 36], (2, 1), D, dtype, E=E)


@pytest.mark.parametrize("D,E", [(24, 16), (16, 40)], ids=str)
@pytest.mark.parametrize("options", [{"window": 3}, {"softcap": 3.0, "scale": 0.7},
                                     {"window": 25, "softcap": 2.0}], ids=str)
def test_values_of_another_width_with_all_options_and_longer_keys(options, D, E):
    check([1, 16, 0, 3, 30], (2, 1), D, lengths_k=[70, 40, 5, 0, 20], E=E, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 2}, {"softcap": 2.0}, {"window": 40, "softcap": 1.5},
                                     {"scale": 0.7}, {"window": 1}], ids=str)
def test_attention_over_several_blocks_with_all_options(options, dtype):
    check(LONGER, (2, 1), 32, dtype, **options)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 3.0}, {"window": 25, "softcap": 2.0}],
                         ids=str)
@pytest.mark.parametrize("lengths,lengths_k", [CACHES, ([1] * 3, [100, 1, 33]), ([16, 1], [150, 90])],
                         ids=str)
def test_queries_at_the_end_of_longer_keys(lengths, lengths_k, options):
    check(lengths, (4, 2), 32, lengths_k=lengths_k, **options)


@pytest.mark.parametrize("window", [129, 2**30, 2**31 - 2, 2**31 - 1])
def test_a_window_that_hides_nothing_is_none_whatever_its_size(window):
    """Positions are added to it in 32 bits; the largest must not overflow into gradients of zero."""
    qkv = inputs(LONGER, None, 2, 1, 32, torch.float32)
    upstream = [torch.randn(sum(LONGER), 2, 32)]

    def with_window(window):
        return value_and_gradients(
            lambda *x: attention(*x, cu(LONGER), max(LONGER), impl="triton", window=window), qkv, upstream)

    assert all(torch.equal(a, b) for a, b in zip(with_window(window), with_window(None), strict=True))


def test_views_are_read_in_place():
    """Slices of one projection, as the model has them, and q, k and v each with strides of its own."""
    lengths, H, G, D = [9, 40], 4, 2, 32
    base, upstream = torch.randn(49, H + 2 * G, D), torch.randn(49, H, D)

    def of(copied):
        def op(base):
            q, k, v = base.split([H, G, G], dim=1)
            q, k, v = (x.contiguous() if name in copied else x for name, x in (("q", q), ("k", k), ("v", v)))
            return attention(q, k, v, cu(lengths), 40, impl="triton")

        return value_and_gradients(op, [base], [upstream])

    expected = of("qkv")
    for copied in ("", "q", "k", "v"):
        assert all(torch.equal(a, b) for a, b in zip(of(copied), expected, strict=True)), copied


@pytest.mark.parametrize("D,E", [(24, 10), (16, 40)], ids=str)
def test_views_as_latent_attention_has_them_are_read_in_place(D, E):
    """Values are a part of what keys are made of, and nothing of what lies beside a head is read."""
    T, H, N = 45, 3, D - 8

    def of(copied):
        def op(made, k_rope, q_nope, q_rope):
            k_nope, v = made.split([N, E], dim=2)
            k = torch.cat([k_nope, k_rope.expand(-1, H, -1)], dim=2)
            q = torch.cat([q_nope, q_rope], dim=2)
            return attention(q, k, v.contiguous() if copied else v, cu([5, 40]), 40, 0.3, impl="triton")

        return value_and_gradients(op, tensors, upstream)

    tensors = [torch.randn(T, heads, width) for heads, width in ((H, N + E), (1, 8), (H, N), (H, 8))]
    upstream = [torch.full((T + 1, H, E), float("nan"))[:T].copy_(torch.randn(T, H, E))]
    assert all(torch.equal(a, b) for a, b in zip(of(False), of(True), strict=True))

    among_nan = [torch.full((T, H, width + 7), float("nan")) for width in (D, D, E)]
    views = [x[..., 3 : width + 3] for x, width in zip(among_nan, (D, D, E), strict=True)]
    qkv = inputs([T], None, H, H, D, torch.float32, E)
    for view, x in zip(views, qkv, strict=True):
        view.copy_(x)
    got, expected = ([out, *torch.autograd.grad(out, leaves, upstream)] for leaves in (
        [x.requires_grad_() for x in views], [x.requires_grad_() for x in qkv])
        for out in [attention(*leaves, cu([5, 40]), 40, impl="triton")])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("E", [32, 16])
def test_a_sequence_has_the_same_bits_whatever_its_neighbours(E):
    q, k, v = inputs([20, 37, 50], None, 4, 2, 32, torch.float32, E)
    upstream = torch.randn(107, 4, E)
    alone = value_and_gradients(lambda *x: attention(*x, cu([37]), 37, impl="triton"),
                                [x[20:57] for x in (q, k, v)], [upstream[20:57]])
    for x in (q, k, v):  # and nothing of a neighbour is read
        x[:20], x[57:] = float("nan"), float("nan")
    among, again = (value_and_gradients(lambda *x: attention(*x, cu([20, 37, 50]), 50, impl="triton"),
                                        [q, k, v], [upstream]) for _ in range(2))
    for a, b, c in zip(alone, among, again, strict=True):
        assert torch.equal(a, b[20:57]) and torch.equal(b[20:57], c[20:57])


def test_a_maximum_longer_than_any_sequence_changes_nothing():
    q, k, v = inputs([20, 3], None, 2, 1, 32, torch.float32)
    results = [value_and_gradients(lambda *x, m=m: attention(*x, cu([20, 3]), m, impl="triton"), [q, k, v],
                                   [q])
               for m in (20, 100)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("size", [1e-4, 30.0, 300.0])
def test_small_and_huge_scores_keep_their_precision(size):
    q, k, v = (x.double() for x in inputs([40], None, 1, 1, 32, torch.float32))
    args = (q * size, k, v)
    got = value_and_gradients(lambda *x: attention(*x, cu([40]), 40, impl="triton"), [x.float() for x
                                                                                      in args],
                              [v.float()])
    expected = value_and_gradients(lambda *x: naive_attention(*x, [40]), args, [v])
    for g, e in zip(got, expected, strict=True):  # rounding of the scores themselves grows with them
        assert (g - e).abs().max() <= 3e-6 * max(1.0, size) * max(1.0, e.abs().max())


def test_no_queries_and_no_keys_give_zeros():
    q = torch.zeros(0, 4, 32)
    assert attention(q, q[:, :2], q[:, :2], cu([0, 0]), 0, impl="triton").shape == (0, 4, 32)
    out, lse = attention(torch.ones(3, 1, 32), q[:, :1], q[:, :1], cu([3]), 3, cu_seqlens_k=cu([0]),
                         max_seqlen_k=0, return_lse=True, impl="triton")
    assert torch.equal(out, torch.zeros(3, 1, 32)) and torch.equal(lse, torch.full((3, 1), float("-inf")))
    narrow = torch.zeros(0, 1, 8)
    assert attention(q, q[:, :1], narrow, cu([0, 0]), 0, impl="triton").shape == (0, 4, 8)
    out = attention(torch.ones(3, 2, 32), q[:, :1], narrow, cu([3]), 3, cu_seqlens_k=cu([0]), max_seqlen_k=0,
                    impl="triton")
    assert torch.equal(out, torch.zeros(3, 2, 8))


def test_the_ops_keep_torchs_rules():
    q, k, v = (x.requires_grad_() for x in inputs([3, 9], None, 2, 1, 16, torch.float32, E=10))
    args = (q, k, v, cu([3, 9]), cu([3, 9]), 9, 9, 0.25, -1, 0.0)
    torch.library.opcheck(attention_fwd_op, args)
    out, lse = attention_fwd_op(*args)
    torch.library.opcheck(attention_bwd_op, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in (
        torch.randn(12, 2, 10), q, k, v, out, lse, None, *args[3:])))


def test_attention_compiles_as_one_graph():
    q, k, v = inputs([3, 9], None, 2, 1, 16, torch.float32, E=10)

    def f(q, k, v):
        return attention(q * 2, k, v, cu_seqlens, 9, impl="triton").sum()

    cu_seqlens = cu([3, 9])
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for op in (f, compiled):
        op.got = value_and_gradients(op, [q, k, v], [torch.ones(())])
    assert all(torch.allclose(a, b) for a, b in zip(f.got, compiled.got, strict=True))
