"""The reference of attention with all its options, and what the public function says of input that does not
fit."""
import numpy as np
import pytest
import torch

from r1zero.kernels.attention import attention, rope_attention
from r1zero.kernels.rope import rope, rope_table
from r1zero.model.packed import pack

from .naive_ops import assert_close, cu, naive_attention, value_and_gradients

CASES = {
    "as many keys": ([0, 1, 2, 17, 140], None),
    "caches, and queries that see no key": ([1, 16, 4, 0, 3, 30], [70, 40, 4, 5, 0, 20]),
    "one query each": ([1] * 4, [300, 1, 33, 128]),
    "no keys at all": ([3, 2], [0, 0]),
}


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 20}, {"softcap": 2.0}, {"window": 5,
                                                                                           "softcap": 1.0},
                                     {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("lengths, lengths_k", CASES.values(), ids=CASES)
def test_the_reference_is_the_formula_with_all_its_options(lengths, lengths_k, options):
    shapes = (sum(lengths), 6, 4), *[(sum(lengths_k or lengths), 2, 4)] * 2
    qkv = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    upstream = [torch.randn(sum(lengths), 6, 4).double(), torch.randn(sum(lengths), 6).double()]
    cache = {"cu_seqlens_k": cu(lengths_k), "max_seqlen_k": max(lengths_k)} if lengths_k else {}

    def ours(*x):
        return attention(*x, cu(lengths), max(lengths), return_lse=True, **cache, **options)

    def naive(*x):
        return naive_attention(*x, lengths, lengths_k=lengths_k, lse=True, **options)

    blind = naive(*qkv)[1] == float("-inf")
    assert torch.equal(ours(*qkv)[1] == float("-inf"), blind) and not ours(*qkv)[0][blind].any()

    def without_infinities(op):  # they have no gradient
        return lambda *x: (op(*x)[0], op(*x)[1].masked_fill(blind, 0.0))

    got, expected = (value_and_gradients(without_infinities(op), qkv, upstream) for op in (ours, naive))
    assert_close(got, expected, 1e-12)
    alone = value_and_gradients(lambda *x: ours(*x)[0], qkv, upstream[:1])
    assert_close(alone[1:], value_and_gradients(lambda *x: naive(*x)[0], qkv, upstream[:1])[1:], 1e-12)


@pytest.mark.parametrize("G, D, E", [(2, 4, 7), (6, 10, 3), (1, 16, 1)])
@pytest.mark.parametrize("lengths, lengths_k", CASES.values(), ids=CASES)
def test_values_may_have_another_width_than_keys(lengths, lengths_k, G, D, E):
    n_keys = sum(lengths_k or lengths)
    qkv = [torch.randn(n, heads, width, dtype=torch.float64)
           for n, heads, width in ((sum(lengths), 6, D), (n_keys, G, D), (n_keys, G, E))]
    cache = {"cu_seqlens_k": cu(lengths_k), "max_seqlen_k": max(lengths_k)} if lengths_k else {}
    upstream = [torch.randn(sum(lengths), 6, E, dtype=torch.float64)]
    got, expected = (value_and_gradients(op, qkv, upstream) for op in (
        lambda *x: attention(*x, cu(lengths), max(lengths), 0.3, **cache),
        lambda *x: naive_attention(*x, lengths, 0.3, lengths_k=lengths_k)))
    assert_close(got, expected, 1e-12)


def test_no_query_gives_no_row_of_the_width_of_a_value():
    out, lse = attention(torch.randn(0, 4, 8), torch.randn(0, 2, 8), torch.randn(0, 2, 5), cu([0]), 0,
                         return_lse=True)
    assert out.shape == (0, 4, 5) and lse.shape == (0, 4)


# ---- wrong input


def call(lengths=(3, 2), H=4, G=2, D=8, k=None, v=None, cu_seqlens=None, max_seqlen=3, **options):
    q = torch.randn(sum(lengths), H, D)
    k = torch.randn(sum(lengths), G, D) if k is None else k
    cu_seqlens = cu(lengths) if cu_seqlens is None else cu_seqlens
    return attention(q, k, k if v is None else v, cu_seqlens, max_seqlen, **options)


def test_input_that_fits_is_taken():
    assert call().shape == (5, 4, 8)
    assert call(cu_seqlens=cu([5, 0]), max_seqlen=5).shape == (5, 4, 8)
    assert call(v=torch.randn(5, 2, 3)).shape == (5, 4, 3)


@pytest.mark.parametrize("wrong, message", [
    ({"G": 3}, "H a multiple of G"),
    ({"k": torch.zeros(5, 2, 9)}, r"k \(5, 2, 9\)"),
    ({"v": torch.zeros(5, 1, 8)}, r"v \(5, 1, 8\)"),
    ({"k": torch.zeros(5, 0, 8)}, "H a multiple of G"),
    ({"k": torch.zeros(5, 2, 8, dtype=torch.float16)}, "k torch.float16"),
    ({"k": torch.zeros(5, 2, 8, dtype=torch.int64)}, "k is torch.int64; expected a floating dtype"),
    ({"k": torch.zeros(5, 8, 2).transpose(1, 2)}, r"last dimension of k has stride 2.*contiguous\(\)"),
    ({"k": torch.zeros(5, 2, 8, device="meta")}, "k is on meta"),
    ({"D": 257}, "head_dim is 257, expected 1 to 256"),
    ({"v": torch.zeros(5, 2, 257)}, "the width of values is 257, expected 1 to 256"),
    ({"v": torch.zeros(5, 2, 0)}, "the width of values is 0"),
    ({"v": torch.zeros(5, 16)}, r"v \(5, 16\); expected .*\[Tk, G, E\]"),
    ({"D": 16, "v": torch.zeros(5, 2, 4), "impl": "cpu"},
     "impl is \"cpu\", but (keys are 16 wide and values 4; the compiled loops take one|.*Numba)"),
    ({"cu_seqlens": cu([])}, "is the batch empty"),
    ({"cu_seqlens": cu([3, 2]).long()}, "torch.int64"),
    ({"cu_seqlens": cu([3, 2])[None]}, r"\(1, 3\)"),
    ({"cu_seqlens": cu([3, 2]).to("meta")}, "cu_seqlens is on meta"),
    ({"cu_seqlens": cu([4, -1, 2])}, "never decrease"),
    ({"cu_seqlens": cu([3, 1])}, "end at 5"),
    ({"cu_seqlens": cu([3, 2]) + 1}, "begin at 0"),
    ({"max_seqlen": 2}, "at most 2"),
    ({"cu_seqlens_k": cu([3, 2])}, "cu_seqlens_k and max_seqlen_k together"),
    ({"cu_seqlens_k": cu([5]), "max_seqlen_k": 5}, "as many for k as for q"),
    ({"cu_seqlens_k": cu([2, 2]), "max_seqlen_k": 2}, "cu_seqlens_k is .*end at 5"),
    ({"window": -1}, "window is -1, expected a positive number or None"),
    ({"window": 0}, "window is 0"),
    ({"softcap": 0.0}, "softcap is 0.0"),
    ({"softcap": float("nan")}, "softcap is nan"),
    ({"scale": -0.5}, "scale is -0.5"),
    ({"impl": "cuda"}, "impl is 'cuda'"),
], ids=str)
def test_input_that_does_not_fit_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        call(**wrong)


# ---- RoPE and attention in one call

AFTER = [-1, -1, 0, 0, -1]  # the third and fourth sequences go on after the first
STEPS = [9, 4, 3, 1, 12]


def heads(H, G, D, dtype=torch.float64):
    packed = pack([[1] * n for n in STEPS], after=np.array(AFTER))
    return packed, torch.randn(sum(STEPS), H + 2 * G, D, dtype=dtype), rope_table(packed.positions, D, 1e3)


def in_one_call(packed, cos, sin, G, **options):
    shared = dict(keys=packed.keys, cu_keys=packed.cu_keys, max_keys=packed.max_keys)
    lengths = packed.cu_seqlens, packed.max_seqlen
    return lambda qkv: rope_attention(qkv, cos, sin, *lengths, G, **shared, **options)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("H, G, D", [(4, 2, 6), (3, 1, 16)])
def test_rope_attention_is_rope_then_attention_over_shared_prefixes(H, G, D, impl):
    packed, qkv, (cos, sin) = heads(H, G, D)
    upstream = [torch.randn(len(qkv), H, D, dtype=torch.float64)]

    def naive(qkv):
        q, k = rope(qkv[:, : H + G], cos, sin).split([H, G], dim=1)
        v, lengths_k = qkv[:, -G:], packed.cu_keys.diff().tolist()
        return naive_attention(q, k[packed.keys], v[packed.keys], STEPS, lengths_k=lengths_k)

    expected, ours = value_and_gradients(naive, [qkv], upstream), in_one_call(packed, cos, sin, G, impl=impl)
    assert_close(value_and_gradients(ours, [qkv], upstream), expected, 1e-11)
    got = value_and_gradients(ours, [qkv.float()], [upstream[0].float()])
    assert got[0].dtype == torch.float32
    assert_close(got, expected, 3e-6)


def test_rope_attention_names_what_does_not_fit():
    packed, qkv, (cos, sin) = heads(4, 2, 16, torch.float32)
    assert in_one_call(packed, cos, sin, 2)(qkv).shape == (sum(STEPS), 4, 16)
    for G, impl, message in ((3, None, "n_kv_heads 3; expected .*H a multiple of G"),
                             (0, None, "n_kv_heads 0"), (2, "cuda", "rope_attention: impl is 'cuda'")):
        with pytest.raises(ValueError, match=message):
            in_one_call(packed, cos, sin, G, impl=impl)(qkv)
    with pytest.raises(ValueError, match='impl is "cpu", but .*float32'):
        in_one_call(packed, cos, sin, 2, impl="cpu")(qkv.double())
    with pytest.raises(ValueError, match="give keys, cu_keys and max_keys together, or none of them"):
        rope_attention(qkv, cos, sin, packed.cu_seqlens, 12, 2, keys=packed.keys)
