"""Mixtures of experts on a CUDA device, at real sizes: the kernels against each expert on all tokens in fp64.

The rule is FlashAttention's: at most twice the error that plain PyTorch makes in the same dtype."""
import pytest
import torch

from r1zero.kernels.moe import moe_mlp

from ..moe_cases import case, exact, results

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check(arguments):
    torch.backends.cuda.matmul.allow_tf32 = False
    x, _, _, gate_up, _ = arguments
    dy = torch.randn(x.shape, device="cuda").to(x.dtype)
    got, again = (results(arguments, "triton", dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    rounded = [*arguments[:3], *(w.to(x.dtype) for w in arguments[3:])]
    truth, plain = exact(arguments, dy), results(rounded, "naive", dy)
    assert got[3].dtype == gate_up.dtype
    for name, g, t, p in zip(("y", "dx", "dgates", "dgate_up", "ddown"), got, truth, plain, strict=True):
        error = (g.double() - t).abs().max().item()
        limit = 2 * (p.double() - t).abs().max().item() + 1e-5 * t.abs().max().item()
        assert error <= limit, f"{name} is {error} off, at most {limit}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, E, K, M, F, choose", [
    (1, 64, 8, 128, 96, "random"), (3000, 1, 1, 256, 128, "random"), (700, 256, 8, 256, 128, "random"),
    (300, 5, 4, 100, 36, "random"), (40, 64, 3, 48, 32, "few"), (2000, 16, 1, 128, 96, "one")])
def test_a_mixture_and_its_gradients(T, E, K, M, F, choose, dtype):
    check(case(T, E, K, M, F, dtype, choose, device="cuda"))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=["same", "master"])
def test_a_layer_of_an_open_model(weight_dtype):
    check(case(2000, 32, 8, 2048, 768, torch.bfloat16, weight_dtype=weight_dtype, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_at_any_place_in_any_batch(dtype):
    x, gates, experts, *weights = case(1000, 16, 4, 256, 128, dtype, device="cuda")
    dy = torch.randn(1000, 256, device="cuda")
    whole = results([x, gates, experts, *weights], "triton", dy)
    order = torch.randperm(1000, device="cuda")
    for rows in (order, order[:1], order[:77]):
        found = results([x[rows], gates[rows], experts[rows], *weights], "triton", dy[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(found[:3], whole[:3], strict=True))


def test_a_mixture_reads_offsets_beyond_32_bits():
    """2.4 billion numbers in the rows: the last tokens must be those of a small batch."""
    T, K, M = 147_456, 8, 2048
    arguments = case(64, 8, K, M, 128, torch.bfloat16, device="cuda")
    small = moe_mlp(*arguments, impl="triton")
    x, gates, experts, *weights = arguments
    many = [torch.cat([a.new_zeros(T - 64, a.shape[1]), a]) for a in (x, gates)]
    choice = torch.cat([torch.arange(K, device="cuda").expand(T - 64, K), experts])
    y = moe_mlp(*many, choice, *weights, impl="triton")
    assert torch.equal(y[-64:], small) and bool((y[:-64] == 0).all())


def test_a_graph_holds_forward_and_backward():
    """No step waits for the host, and another choice of experts is another result of the same graph."""
    first, second = (case(64, 16, 4, 256, 128, torch.bfloat16, device="cuda") for _ in range(2))
    second[3:] = first[3:]
    dy = torch.randn(64, 256, device="cuda")
    static = [a.clone() for a in first]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(static, "triton", dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = results(static, "triton", dy)
    for arguments in (first, second):
        for target, source in zip(static, arguments, strict=True):
            target.copy_(source)
        graph.replay()
        expected = results(arguments, "triton", dy)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
