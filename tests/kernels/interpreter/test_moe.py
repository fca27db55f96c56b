"""Mixtures of experts as Triton kernels against each expert on all tokens in fp64: values, gradients."""
import pytest
import torch

from r1zero.kernels import chips, moe_triton
from r1zero.kernels.chips import KNOWN_CHIPS
from r1zero.kernels.moe import group_by_expert, moe_mlp
from r1zero.kernels.moe_triton import moe_bwd_op, moe_config, moe_fwd_op

from ..moe_cases import case, exact, results

DTYPES = [torch.float32, torch.float16]


def check(arguments, dy):
    """Every result is right to a rounding of its largest number; returns them."""
    got = results(arguments, "triton", dy)
    floats = [a for a in arguments if a.is_floating_point()]
    assert [x.dtype for x in got] == [floats[0].dtype, *(a.dtype for a in floats)]
    for i, (x, right) in enumerate(zip(got, exact(arguments, dy), strict=True)):
        assert x.shape == right.shape
        tolerance = 2e-6 if floats[0].dtype == torch.float32 else 1.5e-3
        if right.numel():
            error = (x.double() - right).abs().max()
            assert error <= tolerance * right.abs().max(), f"number {i} is {error} off"
    return got


@pytest.mark.parametrize("T, E, K, M, F, choose, dtype", [
    (1, 1, 1, 16, 16, "random", torch.float16), (1, 6, 6, 20, 36, "random", torch.float32),
    (7, 5, 2, 48, 33, "random", torch.float16), (50, 7, 7, 33, 16, "random", torch.float32),
    (150, 5, 1, 80, 48, "one", torch.float32), (150, 4, 3, 64, 80, "one", torch.float16),
    (30, 12, 3, 48, 32, "few", torch.float16), (130, 3, 2, 256, 128, "random", torch.float16),
    (70, 2, 1, 64, 64, "random", torch.float32)])
def test_values_and_gradients_are_those_of_each_expert_on_all_tokens(T, E, K, M, F, choose, dtype):
    arguments = case(T, E, K, M, F, dtype, choose)
    *_, dgate_up, ddown = check(arguments, torch.randn(T, M))
    unused = torch.ones(E, dtype=torch.bool)
    unused[arguments[2].flatten()] = False
    assert not dgate_up[unused].any() and not ddown[unused].any()


def test_two_tokens_among_256_experts():
    arguments, dy = case(2, 256, 8, 16, 16, torch.float32), torch.randn(2, 16)
    expected = exact(arguments, dy)[:3]
    x, gates = leaves = [a.requires_grad_() for a in arguments[:2]]
    y = moe_mlp(*leaves, *arguments[2:], impl="triton")
    y.backward(dy)
    for got, right in zip((y, x.grad, gates.grad), expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


def test_rows_of_many_blocks_of_columns(monkeypatch):
    """A row's dgates are added up over blocks of F; a token's sum has blocks of M."""
    monkeypatch.setattr(moe_triton, "rows_config", lambda columns: (2, 16))
    check(case(5, 4, 2, 40, 56, torch.float32), torch.randn(5, 40))


def test_master_weights_in_fp32_get_their_gradients_in_fp32():
    got = check(case(40, 4, 2, 48, 32, torch.float16, weight_dtype=torch.float32), torch.randn(40, 48))
    assert got[3].dtype == torch.float32 and not torch.equal(got[3], got[3].half().float())


def test_fp16_does_not_overflow_where_only_small_gates_keep_a_gradient_within_its_range():
    """down^T dy is above 65,504, its products with the gates are not."""
    arguments, dy = case(12, 4, 2, 48, 32, torch.float16), torch.randn(12, 48) * 1000
    arguments[1], arguments[4] = arguments[1].abs() * 1e-3 + 1e-4, arguments[4] * 30
    assert (dy @ arguments[4].float()).abs().max() > 70_000
    check(arguments, dy)


def test_no_tokens_at_all():
    arguments = case(0, 4, 2, 16, 16, torch.float32)
    y, dx, dgates, dgate_up, ddown = results(arguments, "triton", torch.randn(0, 16))
    assert y.shape == dx.shape == (0, 16) and not dgate_up.any() and not ddown.any()


def test_views_and_gradients_without_strides_are_taken():
    T, E, K, M, F = 8, 3, 2, 48, 32
    plain = case(T, E, K, M, F, torch.float32)
    x, gates, experts, gate_up, down = plain
    views = [torch.stack((x, x), 1)[:, 0], gates.T.contiguous().T, experts.T.contiguous().T,
             torch.cat((gate_up, gate_up), 1)[:, : 2 * F], torch.cat((down, down), 2)[..., :F]]
    assert not any(view.is_contiguous() for view in views)
    views[1] = torch.cat((gates, gates), 1)[:, :K]  # the op wants contiguous last dimensions
    for dy in (torch.randn(M, T).T, torch.ones(1).expand(T, M)):
        expected = results(plain, "triton", dy.contiguous())
        for got, right in zip(results(views, "triton", dy), expected, strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("needed", range(4), ids=["x", "gates", "gate_up", "down"])
def test_each_gradient_can_be_had_alone(needed):
    arguments, dy = case(9, 4, 2, 32, 16, torch.float32), torch.randn(9, 32)
    floats = [0, 1, 3, 4]
    leaf = arguments[floats[needed]] = arguments[floats[needed]].requires_grad_()
    moe_mlp(*arguments, impl="triton").backward(dy)
    assert torch.equal(leaf.grad, results(arguments, "triton", dy)[1 + needed])


def test_the_sum_begins_with_the_first_choice():
    """1e8 + 1 - 1e8 is 0 in fp32 and not 1: the order of the sum shows."""
    x, gate_up, down = torch.ones(1, 16), torch.ones(3, 32, 16), torch.zeros(3, 16, 16)
    for e, size in enumerate((1e8, 1.0, -1e8)):
        down[e, :, 0] = size
    silu = float(torch.nn.functional.silu(torch.tensor(16.0)) * 16)
    for experts, expected in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0)):
        y = moe_mlp(x, torch.full((1, 3), 1 / silu), torch.tensor([experts]), gate_up, down, impl="triton")
        assert abs(y[0, 0].item() - expected) < 1e-3


def test_the_same_bits_each_time_and_whatever_the_other_tokens():
    """A token that comes first has its row at the same place of a tile. (In NumPy's products, which stand in
    for the chip's here, a row at another place has other bits. tests/kernels/gpu/ shuffles the tokens.)"""
    T, few = 50, 20
    arguments, dy = case(T, 3, 2, 48, 32, torch.float32), torch.randn(T, 48)
    whole, again = results(arguments, "triton", dy), results(arguments, "triton", dy)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    x, gates, experts, *weights = arguments
    alone = results([x[:few], gates[:few], experts[:few], *weights], "triton", dy[:few])
    assert all(torch.equal(a, b[:few]) for a, b in zip(alone[:3], whole[:3], strict=True))
    bad = x.clone()
    bad[few:] = float("nan")
    among_nan = results([bad, gates, experts, *weights], "triton", dy)
    assert all(torch.equal(a[:few], b[:few]) for a, b in zip(among_nan[:3], whole[:3], strict=True))


def test_a_token_of_nan_spoils_the_weights_of_its_own_experts_alone():
    arguments, dy = case(40, 4, 2, 48, 32, torch.float32), torch.randn(40, 48)
    arguments[2][:, :] = torch.tensor([0, 2])
    arguments[2][::3] = torch.tensor([1, 3])
    clean = results(arguments, "triton", dy)
    arguments[0][3] = float("nan")  # its experts are 1 and 3
    for got, right in zip(results(arguments, "triton", dy)[3:], clean[3:], strict=True):
        assert torch.equal(got[[0, 2]], right[[0, 2]]) and got[[1, 3]].isnan().any()


@pytest.mark.parametrize("arch", [80, 86, 90])
def test_every_config_that_can_be_chosen(arch, monkeypatch):
    """Tiles of the other chips, on the same numbers."""
    chip = KNOWN_CHIPS[arch]
    monkeypatch.setattr(chips, "chip_of", lambda device: chip)
    check(case(140, 2, 1, 80, 144, torch.float16), torch.randn(140, 80))
    for dtype in DTYPES:
        for M, F in ((64, 100), (2048, 768)):
            config = moe_config(dtype, chip, M, F)
            assert config["BLOCK_N"] % 32 == 0
            buffers = chip.buffers(config["num_stages"]) * dtype.itemsize
            tiles = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"]
            assert buffers * tiles <= chip.shared_memory


def test_the_ops_keep_torchs_rules_and_compile_as_one_graph():
    x, gates, experts, gate_up, down = case(5, 2, 1, 32, 16, torch.float32)
    leaves = [a.requires_grad_() for a in (x, gates, gate_up, down)]
    groups = group_by_expert(experts, 2)
    torch.library.opcheck(moe_fwd_op, (*leaves, *groups))
    dy, inputs = torch.randn(5, 32), [a.detach() for a in leaves]
    for needs in ((True, False), (False, True)):
        torch.library.opcheck(moe_bwd_op, (dy, *inputs, *groups, *needs))
    compiled = torch.compile(lambda *a: moe_fwd_op(*a).sum(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*leaves, *groups), moe_fwd_op(*leaves, *groups).sum())
