"""The mixture's op against a loop over tokens and experts in fp64: values, gradients, order, bad input."""
import pytest
import torch
from torch.autograd import gradcheck

from r1zero.kernels import moe
from r1zero.kernels.dispatch import HAS_TRITON
from r1zero.kernels.moe import expert_counts, group_by_expert, moe_mlp, top_experts, why_not_grouped
from r1zero.kernels.moe_triton import row_tiles

from .moe_cases import case, results

CPU = torch.device("cpu")


SIZES = [(7, 5, 2, "random"), (1, 1, 1, "random"), (1, 8, 8, "random"), (9, 4, 4, "random"),
         (6, 256, 8, "random"), (5, 3, 1, "one"), (12, 64, 3, "few"), (33, 2, 1, "random"),
         (10, 16, 7, "one")]


@pytest.mark.parametrize("T, E, K, choose", SIZES)
def test_values_and_gradients_are_those_of_the_loop_over_tokens(T, E, K, choose):
    arguments, dy = case(T, E, K, choose=choose), torch.randn(T, 8, dtype=torch.float64)
    expected = results(arguments, "reference", dy)
    for impl in ("loop", "naive"):
        for got, right in zip(results(arguments, impl, dy), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    narrow = [a.float() if a.is_floating_point() else a for a in arguments]
    for impl in ("grouped", "loop", None):
        for got, right in zip(results(narrow, impl, dy), expected, strict=True):
            torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_a_finite_difference():
    x, gates, experts, gate_up, down = case(5, 4, 2, M=3, F=2)
    leaves = [a.requires_grad_() for a in (x, gates, gate_up, down)]
    assert gradcheck(lambda x, gates, up, down: moe_mlp(x, gates, experts, up, down, impl="loop"), leaves)


def test_in_bf16_the_back_ends_agree_and_stay_near_the_oracle():
    arguments = case(40, 6, 3, M=16, F=8, dtype=torch.bfloat16)
    dy = torch.randn(40, 16)
    arguments[3], arguments[4] = arguments[3].float(), arguments[4].float()  # masters in fp32
    pair = (results(arguments, impl, dy) for impl in ("grouped", "reference"))
    for got, right in zip(*pair, strict=True):
        assert got.dtype == right.dtype
        error = (got.double() - right.double()).norm() / right.double().norm()
        assert error < 0.02
    assert results(arguments, "loop", dy)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("impl", ["grouped", "loop"])
def test_the_same_bits_in_every_run(impl):
    arguments = case(30, 5, 3, dtype=torch.float32)
    first, second = (moe_mlp(*arguments, impl=impl) for _ in range(2))
    assert torch.equal(first, second)


def test_the_sum_begins_with_the_first_choice():
    """1e8 + 1 - 1e8 is 0 in fp32 and not 1: the order of the sum shows."""
    x, down = torch.ones(1, 4), torch.zeros(3, 4, 4)
    gate_up = torch.ones(3, 8, 4)
    for e, value in enumerate((1e8, 1.0, -1e8)):
        down[e, :, 0] = value
    for experts, expected in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0)):
        y = moe_mlp(x, torch.full((1, 3), 1 / float(torch.nn.functional.silu(torch.tensor(4.0)) * 4)),
                    torch.tensor([experts]), gate_up, down)
        assert abs(y[0, 0].item() - expected) < 1e-3


def test_pairs_are_sorted_by_expert_and_equal_ones_stay_in_order():
    experts = torch.tensor([[2, 0], [3, 2], [0, 3]])
    groups = group_by_expert(experts, 5)
    assert groups.order.tolist() == [1, 4, 0, 3, 2, 5] and groups.ends.tolist() == [2, 2, 4, 6, 6]
    assert groups.order[groups.place.flatten()].tolist() == list(range(6))
    assert expert_counts(experts, 5).tolist() == [2, 0, 2, 2, 0]
    assert groups.ends.dtype == torch.int32
    experts = torch.randint(3, (5000, 2))
    expected = experts.flatten().numpy().argsort(kind="stable").tolist()
    assert group_by_expert(experts, 3).order.tolist() == expected


@pytest.mark.parametrize("block", [1, 2, 32, 128])
@pytest.mark.parametrize("counts", [[0], [5], [0, 3, 0], [128, 0, 1, 129, 127], [1] * 40, [0] * 9 + [300]],
                         ids=str)
def test_each_row_is_in_one_tile_of_its_expert(counts, block):
    ends = torch.tensor(counts).cumsum(0).int()
    tiles = row_tiles(ends, sum(counts), block)
    assert tiles.dtype == torch.int32 and len(tiles[0]) <= sum(counts) // block + len(counts)
    seen = [(e, row) for e, first, end in tiles.T.tolist() for row in range(first, min(first + block, end))]
    assert seen == [(e, sum(counts[:e]) + i) for e in range(len(counts)) for i in range(counts[e])]


def test_there_is_room_for_the_most_tiles_that_there_can_be():
    for n_rows, n_experts, block in ((1, 8, 128), (8, 8, 128), (260, 3, 128), (1000, 7, 32), (0, 4, 64)):
        # as many rows as fill tiles, and one more, on all experts but one
        few = min(n_experts, n_rows)
        counts = [1] * few + [0] * (n_experts - few)
        for i in range(n_rows - few):
            counts[i // block % few] += 1
        needed = sum(-(-count // block) for count in counts)
        tiles = row_tiles(torch.tensor(counts).cumsum(0).int(), n_rows, block)
        assert needed <= tiles.shape[1] <= needed + 1
        assert (tiles[1] < tiles[2]).sum() == needed


def test_the_lower_index_wins_a_tie_and_the_highest_score_comes_first():
    inf = float("inf")
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0], [0.0, -0.0, 0.0, -0.0], [-inf, -3.0, -inf, -4.0],
                           [-1.0, -1.0, -2.0, -1.0]])
    assert top_experts(scores, 3).tolist() == [[1, 2, 0], [0, 1, 2], [1, 3, 0], [0, 1, 3]]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        scores = torch.randint(-3, 4, (50, 256)).to(dtype) / 8
        expected = scores.float().sort(dim=-1, descending=True, stable=True).indices[:, :8]
        assert torch.equal(top_experts(scores, 8), expected)
    scores = torch.full((2, 6), float("nan"))
    assert [sorted(row) for row in top_experts(scores, 6).tolist()] == [list(range(6))] * 2


def test_a_token_of_nan_spoils_no_other():
    arguments = case(6, 4, 2, dtype=torch.float32)
    clean = moe_mlp(*arguments)
    arguments[0][2] = float("nan")
    y = moe_mlp(*arguments)
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    arguments, dy = case(4, 6, 2, choose="few", dtype=torch.float32), torch.randn(4, 8)
    for impl in ("grouped", "loop"):
        *_, dgate_up, ddown = results(arguments, impl, dy)
        unused = [1, 3, 5]
        assert not dgate_up[unused].any() and not ddown[unused].any() and ddown[0].any()


@pytest.mark.parametrize("impl", ["grouped", "loop"])
def test_an_upstream_gradient_without_strides_is_taken(impl):
    """PyTorch's grouped products raise on it; sum() makes one."""
    leaves = [a.requires_grad_() if a.is_floating_point() else a for a in case(6, 4, 2, dtype=torch.float32)]
    moe_mlp(*leaves, impl=impl).sum().backward()
    got = [leaf.grad for leaf in leaves if leaf.is_floating_point()]
    leaves = [a.detach() for a in leaves]
    _, *expected = results(leaves, "reference", torch.ones(6, 8))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch, dtype, waits", [
    (90, torch.float16, not HAS_TRITON), (80, torch.float32, not HAS_TRITON), (90, torch.float64, True),
    (75, torch.float16, True)])
def test_on_a_gpu_only_what_the_kernels_do_not_serve_waits_for_the_host(arch, dtype, waits, monkeypatch):
    monkeypatch.setattr(moe, "arch_of", lambda device: arch)
    assert moe.waits_for_host(dtype, torch.device("cuda"), 100, 36) == waits
    assert moe.waits_for_host(torch.float32, CPU, 100, 35)
    assert not moe.waits_for_host(torch.float32, CPU, 8, 4)


@pytest.mark.parametrize("impl", ["grouped", "loop", "reference"])
@pytest.mark.parametrize("wrong", [-1, 4, 70_000])
def test_an_expert_that_is_not_there_is_refused(impl, wrong):
    arguments = case(3, 4, 2, dtype=torch.float32)
    arguments[2][1, 1] = wrong
    with pytest.raises(ValueError, match=f"^moe_mlp: there is an expert {wrong}, expected 0 to 3$"):
        moe_mlp(*arguments, impl=impl)


@pytest.mark.parametrize("impl", ["grouped", "loop", "reference"])
def test_no_tokens_make_no_rows_and_gradients_of_zero(impl):
    y, dx, *others = results(case(0, 4, 2, dtype=torch.float32), impl, torch.randn(0, 8))
    assert y.shape == dx.shape == (0, 8)
    if impl != "reference":  # which takes no part of the weights without a token
        dgates, dgate_up, ddown = others
        assert dgates.shape == (0, 2) and dgate_up.shape == (4, 8, 8) and ddown.shape == (4, 8, 4)
        assert not dgate_up.any() and not ddown.any()


def test_bad_input_is_refused_in_words():
    x, gates, experts, gate_up, down = case(3, 4, 2)
    for arguments, part in [
        ((x, gates[:2], experts[:2], gate_up, down), "expected [T, M], [T, K]"),
        ((x, gates, experts[:, :1], gate_up, down), "experts (3, 1)"),
        ((x[:, :7], gates, experts, gate_up, down), "x is (3, 7)"),
        ((x, gates, experts, gate_up[:, :6], down), "gate_up (4, 6, 8)"),
        ((x, gates.repeat(1, 3), experts.repeat(1, 3), gate_up, down), "6 experts per token of 4"),
        ((x, gates, gates, gate_up, down), "as torch.float64"),
    ]:
        with pytest.raises(ValueError, match="moe_mlp") as error:
            moe_mlp(*arguments)
        assert part in str(error.value)
    with pytest.raises(ValueError, match="not torch.float64"):
        moe_mlp(x, gates, experts, gate_up, down, impl="grouped")
    assert "16 bytes" in why_not_grouped(torch.float32, CPU, 10, 8)
    assert "16 bytes" in why_not_grouped(torch.bfloat16, CPU, 8, 12)
    assert why_not_grouped(torch.float32, CPU, 12, 8) is None
    assert "not torch.float32" in why_not_grouped(torch.float32, torch.device("cuda"), 8, 8)
    assert "mps" in why_not_grouped(torch.float32, torch.device("mps"), 8, 8)
