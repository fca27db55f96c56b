"""Every op against a naive oracle in fp64, forward and gradients, at odd shapes and hostile values."""
import pytest
import torch

from r1zero.kernels import reference
from r1zero.kernels.attention import attention
from r1zero.kernels.decode_attention import decode_attention
from r1zero.kernels.grpo import grpo_advantages, policy_loss
from r1zero.kernels.linear_logprob import linear_logprob
from r1zero.kernels.mlp import swiglu
from r1zero.kernels.rmsnorm import rmsnorm
from r1zero.kernels.rope import rope, rope_table

from .naive_ops import (
    assert_close,
    assert_rounded_once,
    cu,
    naive_attention,
    naive_rmsnorm,
    naive_rope,
    naive_swiglu,
    rmsnorm_of_open_models,
    value_and_gradients,
)

LENGTHS = {
    "ragged": [0, 1, 2, 17, 63],
    "empty at the ends and in the middle": [0, 0, 5, 0, 1, 0, 9, 0],
    "one token": [1],
    "equal, so nothing is padded": [7] * 9,
    "sorted": list(range(40)),
    "unsorted": [3, 31, 0, 2, 8, 1, 1, 29, 30, 5, 0, 40, 2, 2, 1, 1, 3, 17, 1, 2, 0, 0, 0, 33, 1, 4],
    "longer than a block of queries": [130, 3, 0, 128, 129, 257],
    "runs of empty ones": [0] * 12 + [20] + [0] * 12 + [1] * 10 + [0],
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6}


# ---- attention

@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_and_its_gradients(lengths, heads):
    (H, G), D, T = heads, 6, sum(lengths)
    q, k, v = (torch.randn(T, n, D, dtype=torch.float64) for n in (H, G, G))
    dout = torch.randn(T, H, D, dtype=torch.float64)
    for scale in (None, 0.7):
        expected = value_and_gradients(lambda *x, s=scale: naive_attention(*x, lengths, s), (q, k, v), [dout])
        for dtype, tolerance in TOLERANCE.items():
            inputs = [x.to(dtype) for x in (q, k, v)]
            got = value_and_gradients(
                lambda *x, s=scale: attention(*x, cu(lengths), max(lengths), s), inputs, [dout.to(dtype)])
            assert got[0].dtype == dtype
            assert_close(got, expected, tolerance)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_padding_runs_cover_the_batch_and_waste_little(lengths):
    runs = reference.length_runs(lengths)
    assert [a for a, _ in runs] == [0, *(b for _, b in runs[:-1])] and runs[-1][1] == len(lengths)
    assert all(a < b for a, b in runs)
    for a, b in runs:
        assert b - a <= 8 or (b - a) * max(lengths[a:b]) <= 1.25 * sum(lengths[a:b])


def test_attention_of_no_tokens_is_empty():
    q, k = torch.zeros(0, 4, 8), torch.zeros(0, 2, 8)
    assert attention(q, k, k, cu([0, 0]), 0).shape == (0, 4, 8)


def test_the_cases_of_attention_hold_several_runs():
    assert all(len(reference.length_runs(LENGTHS[name])) >= 3 for name in ("sorted", "unsorted"))


def test_decode_attention_is_the_last_row_of_attention():
    H, G, D, page = 6, 2, 4, 3
    lengths, table = [1, 9, 4, 8], torch.randperm(16).view(4, 4).int()
    for dtype, tolerance in TOLERANCE.items():
        q = torch.randn(4, H, D, dtype=dtype)
        k, v = (torch.randn(16, G, page, D, dtype=dtype) * 3 for _ in range(2))
        flat = [x[table.long()].transpose(2, 3).flatten(1, 2) for x in (k, v)]  # [row, place, G, D]
        for b, n in enumerate(lengths):  # what lies behind a row's length must not count
            for place in range(n, 4 * page):
                for x in (k, v):
                    x[table[b, place // page], :, place % page] = float("nan")
        for scale, window, softcap in ((None, None, None), (0.3, None, None), (None, 1, None), (None, 3, 0.5),
                                       (0.3, 4, None), (None, 99, 2.0)):
            got = decode_attention(q, k, v, table, torch.tensor(lengths, dtype=torch.int32), scale, window,
                                   softcap)
            for b, n in enumerate(lengths):
                keys, values = (x[b, :n].double() for x in flat)
                queries = q[b].double().expand(n, H, D)
                expected = naive_attention(queries, keys, values, [n], scale, None, window, softcap)[-1]
                assert_close([got[b]], [expected], tolerance)


# ---- rmsnorm, swiglu, rope

def test_rmsnorm_gives_what_it_gives_by_hand():
    x = torch.tensor([[3.0, 4.0]])
    assert torch.allclose(rmsnorm(x, torch.tensor([1.0, 2.0]), 0.0), torch.tensor([[3, 8]]) / 12.5**0.5)
    assert torch.allclose(rmsnorm(x, torch.ones(2), 12.5), x / 5)
    zero = torch.zeros(1, 2, requires_grad=True)
    rmsnorm(zero, torch.ones(2)).sum().backward()
    assert torch.allclose(zero.grad, torch.full((1, 2), 1e3))
    assert rmsnorm(torch.full((1, 4), 6e4, dtype=torch.float16), torch.ones(4)).tolist() == [[1.0] * 4]


def test_rmsnorm_and_swiglu_pass_gradcheck():
    x, w = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(rmsnorm, (x.requires_grad_(), w.requires_grad_(), 1e-3))
    assert torch.autograd.gradcheck(rmsnorm, (x, w, 1e-3, torch.randn_like(x, requires_grad=True)))
    gate_up = (torch.randn(2, 3, 10, dtype=torch.float64) * 3).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, gate_up)
    with pytest.raises(ValueError, match="the last dimension of gate_up has stride 6"):
        swiglu(torch.zeros(4, 3, 2).transpose(0, 2))
    assert torch.allclose(rmsnorm(x, w, 0.1), naive_rmsnorm(x, w, 0.1))
    assert torch.allclose(swiglu(gate_up), naive_swiglu(gate_up))


def test_rmsnorm_with_a_residual_is_the_norm_of_the_sum():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, residual, w = torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.randn(7)
        x, residual = x.to(dtype), residual.to(dtype)
        y, total = rmsnorm(x, w, 0.1, residual)
        assert torch.equal(total, x + residual) and torch.equal(y, rmsnorm(x + residual, w, 0.1))


def test_ops_without_a_gradient_give_the_same():
    x, w, (cos, sin) = torch.randn(5, 3, 8), torch.rand(8), rope_table(torch.arange(5), 8, 1e4)
    for op in (lambda: rmsnorm(x, w, 0.3), lambda: rope(x, cos, sin), lambda: swiglu(x)):
        with torch.no_grad():
            plain = op()
        assert_close([plain], [op()], 1e-6)


def test_backward_leaves_its_inputs_alone_and_can_run_twice():
    x, w = torch.randn(3, 8), torch.randn(11, 8)
    for op, inputs in ((swiglu, [x]), (rmsnorm, [x, w[0]]),
                       (lambda x: attention(*[x.view(3, 1, 8)] * 3, cu([3]), 3), [x]),
                       (lambda h, w: linear_logprob(h, w, torch.arange(3)), [x, w])):
        leaves = [y.clone().requires_grad_() for y in inputs]
        outs = op(*leaves)
        total = sum(y.sum() for y in outs) if isinstance(outs, tuple) else outs.sum()
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        again = torch.autograd.grad(total, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(leaves, inputs, strict=True))


def test_swiglu_at_gates_of_ten_thousand():
    x = torch.tensor([[1e4, -1e4, 0.0, 2.0, 3.0, 4.0]], requires_grad=True)
    y = swiglu(x)
    y.sum().backward()
    assert y.tolist() == [[2e4, 0.0, 0.0]]
    assert x.grad.tolist() == [[2.0, 0.0, 2.0, 1e4, 0.0, 0.0]]


def test_rope_is_a_complex_product():
    positions = torch.tensor([0, 1, 2, 77, 100_000])
    for D, theta in ((2, 10.0), (8, 1e4), (64, 1e6)):
        x, dy = torch.randn(2, 5, 3, D, dtype=torch.float64)
        cos, sin = rope_table(positions, D, theta)
        expected = naive_rope(x, positions, theta)
        got, dx = value_and_gradients(lambda x, c=cos, s=sin: rope(x, c, s), [x], [dy])
        assert_close([got, dx], [expected, naive_rope(dy, -positions, theta)], 2e-7)  # the table is fp32
        assert torch.equal(got[0], x[0])
        assert rope(x.float(), cos, sin).dtype == torch.float32


def test_rope_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 6, 1, 16, dtype=torch.float64)

    def scores(shift):
        cos, sin = rope_table(torch.arange(6) * 3 + shift, 16, 1e4)
        return rope(q, cos, sin)[:, 0] @ rope(k, cos, sin)[:, 0].T

    for shift in (1, 1000, 100_000):
        assert torch.allclose(scores(0), scores(shift), atol=1e-5)
    assert not torch.allclose(scores(0), q[:, 0] @ k[:, 0].T, atol=0.1)


# ---- 16 bit

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rmsnorm_rounds_where_the_open_models_do(dtype):
    """The same bits as transformers' Llama and Qwen, where the weights are numbers of that dtype."""
    x, w = torch.randn(200, 896).to(dtype) * 3, torch.randn(896).to(dtype)
    theirs = rmsnorm_of_open_models(x, w, 1e-6)
    for weight in (w, w.float()):  # a master weight is fp32
        assert torch.equal(rmsnorm(x, weight, 1e-6), theirs)
    rounded_once = naive_rmsnorm(x.double(), w.double(), 1e-6).to(dtype)
    assert (rounded_once != theirs).float().mean() > 0.05

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["attention", "rmsnorm", "swiglu", "rope"])
def test_16_bit_ops_round_once(name, dtype):
    lengths, positions = LENGTHS["ragged"], torch.arange(83)
    cos, sin = rope_table(positions, 16, 1e4)

    def eager_rope(x):
        first, second, c, s = *x.chunk(2, -1), cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return torch.cat([first * c - second * s, first * s + second * c], -1)

    op, naive, eager, shapes = {
        "attention": (lambda *x: attention(*x, cu(lengths), 63), lambda *x: naive_attention(*x, lengths),
                      None, [(83, 6, 16), (83, 2, 16), (83, 2, 16)]),
        "rmsnorm": (rmsnorm, lambda *x: naive_rmsnorm(*x, 1e-6), None, [(33, 65), (65,)]),
        "swiglu": (swiglu, naive_swiglu, None, [(33, 130)]),
        "rope": (lambda x: rope(x, cos, sin), lambda x: naive_rope(x, positions, 1e4), eager_rope,
                 [(83, 3, 16)]),
    }[name]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    upstream = [torch.randn_like(op(*inputs))]
    got = value_and_gradients(op, inputs, upstream)
    expected = value_and_gradients(naive, [x.double() for x in inputs], [upstream[0].double()])
    assert all(g.dtype == dtype for g in got)
    if name == "rmsnorm":  # rounded before the weight too, and so are the gradients of that, by autograd
        assert_rounded_once(got[:1], expected[:1], first=2)
    else:
        assert_rounded_once(got, expected)
    # FlashAttention's rule: at most twice the error of the same maths written out in 16 bit
    for g, e, plain in zip(got, expected, value_and_gradients(eager or naive, inputs, upstream), strict=True):
        assert (g - e).abs().max() <= 2 * (plain - e).abs().max() + 1e-5


# ---- what the user gave wrong

def zeros(*shape):
    return torch.zeros(shape)


LONG_5 = torch.zeros(5, dtype=torch.int64)
PAGES_5 = zeros(7, 2, 9, 8)
TABLE_5, LENGTHS_5 = torch.zeros(5, 2, dtype=torch.int32), torch.ones(5, dtype=torch.int32)


@pytest.mark.parametrize("call", [
    lambda: attention(zeros(5, 4, 8), zeros(5, 3, 8), zeros(5, 3, 8), cu([5]), 5),
    lambda: attention(zeros(5, 4, 8), zeros(5, 2, 6), zeros(5, 2, 6), cu([5]), 5),
    lambda: attention(zeros(5, 4, 8), zeros(6, 2, 8), zeros(6, 2, 8), cu([5]), 5),
    lambda: attention(zeros(5, 4, 8), zeros(5, 2, 8), zeros(5, 4, 8), cu([5]), 5),
    lambda: attention(zeros(5, 4), zeros(5, 4), zeros(5, 4), cu([5]), 5),
    lambda: decode_attention(zeros(5, 4, 8), zeros(7, 3, 9, 8), zeros(7, 3, 9, 8), TABLE_5, LENGTHS_5),
    lambda: decode_attention(zeros(5, 4, 8), zeros(7, 2, 9, 8), zeros(7, 2, 8, 8), TABLE_5, LENGTHS_5),
    lambda: decode_attention(zeros(5, 4, 8), zeros(7, 2, 9, 6), zeros(7, 2, 9, 6), TABLE_5, LENGTHS_5),
    lambda: decode_attention(zeros(5, 4, 8), zeros(7, 2, 9, 8), zeros(7, 2, 9, 8), TABLE_5, LENGTHS_5[:4]),
    lambda: decode_attention(zeros(5, 4, 8), zeros(7, 2, 9, 8), zeros(7, 2, 9, 8), TABLE_5[:4], LENGTHS_5),
    lambda: decode_attention(zeros(5, 4, 8), zeros(7, 2, 9, 8), zeros(7, 2, 9, 8), TABLE_5, LONG_5),
    lambda: decode_attention(zeros(5, 4, 8), zeros(7, 2, 9, 8).half(), zeros(7, 2, 9, 8), TABLE_5, LENGTHS_5),
    lambda: decode_attention(zeros(5, 4, 8), zeros(7, 2, 9, 8), zeros(7, 2, 9, 8), TABLE_5, LENGTHS_5, -1.0),
    lambda: decode_attention(zeros(5, 4, 8), PAGES_5, PAGES_5, TABLE_5, LENGTHS_5, window=0),
    lambda: decode_attention(zeros(5, 4, 8), PAGES_5, PAGES_5, TABLE_5, LENGTHS_5, softcap=0.0),
    lambda: linear_logprob(zeros(5, 4), zeros(7, 3), LONG_5),
    lambda: linear_logprob(zeros(5, 4), zeros(7, 4), LONG_5[:4]),
    lambda: linear_logprob(zeros(5, 4, 1), zeros(7, 4), LONG_5),
    lambda: linear_logprob(zeros(5, 4), zeros(7, 4), LONG_5, 0.0),
    lambda: linear_logprob(zeros(5, 4), zeros(7, 4), LONG_5, -1.0),
    lambda: linear_logprob(zeros(5, 4), zeros(7, 4), LONG_5, float("nan")),
    lambda: linear_logprob(zeros(5, 4), zeros(0, 4), LONG_5),
    lambda: linear_logprob(zeros(5, 4), zeros(7, 4), LONG_5.int()),
    lambda: linear_logprob(zeros(5, 4), zeros(7, 4), LONG_5[:3], rows=LONG_5[:2]),
    lambda: linear_logprob(zeros(5, 4), zeros(7, 4), LONG_5[:3], rows=LONG_5[:3].bool()),
    lambda: linear_logprob(zeros(5, 4), zeros(7, 4), LONG_5, softcap=0.0),
    lambda: grpo_advantages(zeros(5, 1), LONG_5),
    lambda: grpo_advantages(zeros(5), zeros(5)),
    lambda: grpo_advantages(zeros(5), LONG_5[:0]),
    lambda: policy_loss(zeros(5), zeros(4), None, zeros(5), zeros(5), LONG_5),
    lambda: policy_loss(zeros(5), zeros(5), zeros(6), zeros(5), zeros(5), LONG_5),
    lambda: policy_loss(zeros(5), zeros(5), None, zeros(4), zeros(5), LONG_5),
    lambda: policy_loss(zeros(5), zeros(5), None, zeros(5), zeros(4), LONG_5),
    lambda: policy_loss(zeros(5), zeros(5), None, zeros(5, 1), zeros(5), LONG_5),
    lambda: policy_loss(zeros(5, 1), zeros(5, 1), None, zeros(5, 1), zeros(5, 1), LONG_5),
    lambda: policy_loss(LONG_5, zeros(5), None, zeros(5), zeros(5), LONG_5),
    lambda: policy_loss(zeros(5), zeros(5), None, zeros(5), zeros(5), zeros(5)),
    lambda: policy_loss(zeros(5), zeros(5), None, zeros(5), zeros(5), LONG_5, objective="ppo"),
    lambda: policy_loss(zeros(5), zeros(5), None, zeros(5), zeros(5), LONG_5, kl_estimator="k4"),
    lambda: rmsnorm(zeros(5, 4), zeros(3)),
    lambda: rmsnorm(zeros(5, 4), zeros(1)),
    lambda: rmsnorm(zeros(5, 4), zeros(5, 4)),
    lambda: swiglu(zeros(5, 7)),
    lambda: rope(zeros(5, 2, 8), zeros(5, 3), zeros(5, 3)),
    lambda: rope(zeros(5, 2, 8), zeros(4, 4), zeros(4, 4)),
    lambda: rope(zeros(5, 2, 8), zeros(5, 4), zeros(5, 3)),
    lambda: rope(zeros(5, 2, 7), zeros(5, 3), zeros(5, 3)),
    lambda: rope(zeros(5, 8), zeros(5, 4), zeros(5, 4)),
])
def test_wrong_shapes_are_named(call):
    ops = "attention|linear_logprob|rmsnorm|swiglu|rope|grpo_advantages|policy_loss"
    with pytest.raises(ValueError, match=f"({ops}): "):
        call()
