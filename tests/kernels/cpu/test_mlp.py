"""The MLP of training as compiled loops for a CPU, against the formulas in fp64."""
import pytest
import torch
from torch.nn.functional import silu

from r1zero.kernels.cpu import compile as cpu
from r1zero.kernels.cpu import mlp as cpu_mlp
from r1zero.model.config import ModelConfig
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer

from ..naive_ops import assert_close, value_and_gradients

pytestmark = pytest.mark.skipif(not cpu.HAS_NUMBA, reason="Numba is not installed")
NAN, INF = torch.nan, torch.inf
FEW = 40  # tokens of a part, in these tests


@pytest.fixture(autouse=True)
def small_parts_and_nan_in_new_tensors(monkeypatch):
    monkeypatch.setattr(cpu_mlp, "FEWEST", FEW)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    torch.use_deterministic_algorithms(True)  # whatever is not written is seen
    yield
    torch.use_deterministic_algorithms(False)


def naive(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (silu(gate) * up) @ down.T


def inputs(T, M, F):
    return [torch.randn(T, M), torch.randn(2 * F, M) / M ** 0.5, torch.randn(M, F) / F ** 0.5]


def check(tensors, dy, tolerance=2e-6):
    expected = value_and_gradients(naive, [x.double() for x in tensors], [dy.double()])
    assert_close(value_and_gradients(cpu_mlp.swiglu_mlp, tensors, [dy]), expected, tolerance)
    with torch.no_grad():
        assert_close([cpu_mlp.swiglu_mlp(*tensors)], expected[:1], tolerance)


# parts of more and of fewer tokens than are taken at one time; products deeper than one pass
@pytest.mark.parametrize("M,F", [(16, 16), (16, 48), (48, 16), (32, 208), (400, 64)])
@pytest.mark.parametrize("T", [FEW, 2 * FEW + 1, 5 * FEW - 1, cpu_mlp.PARTS * cpu_mlp.TOKENS + 77])
def test_values_and_gradients(T, M, F):
    check(inputs(T, M, F), torch.randn(T, M))


@pytest.mark.parametrize("turned", [False, True])
def test_more_dimensions_and_any_strides(turned):
    (x, gate_up, down), dy = inputs(90, 32, 48), torch.randn(32, 90).T
    check([x.view(5, 18, 32), gate_up, down], dy.reshape(5, 18, 32))
    check([x, gate_up, down], torch.randn(()).expand(90, 32))
    if turned:
        x, gate_up, down = (y.T.contiguous().T for y in (x, gate_up, down))
    check([x, gate_up, down], dy)


@pytest.mark.parametrize("scale,tolerance", [(1e-4, 2e-6), (30.0, 2e-6), (1e4, 1e-4)])
def test_gates_of_any_size(scale, tolerance):
    """e^-gate overflows, and vanishes; the rounding of a gate of 1e4 is that of 1e-3 in one near 0."""
    x, gate_up, down = inputs(2 * FEW, 32, 16)
    gate_up[:16] *= scale
    check([x, gate_up, down], torch.randn(2 * FEW, 32), tolerance)


@pytest.mark.parametrize("gate", [-1e8, 40.0, 3e4, 1e8])
def test_the_slope_of_a_large_gate_is_1(gate):
    """It is 1 + gate (1 - s), not 1 + gate - gate s."""
    x, gate_up, down = torch.eye(16).repeat(5, 1), torch.ones(32, 16), torch.randn(16, 16)
    gate_up[:16] = gate
    check([x, gate_up, down], torch.randn(80, 16))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_not_finite_stays_in_its_row(bad):
    (x, gate_up, down), T = inputs(3 * FEW, 32, 16), 3 * FEW
    x[50, 3] = bad
    y, dx, *dw = value_and_gradients(cpu_mlp.swiglu_mlp, [x, gate_up, down], [torch.ones(T, 32)])
    for found in (y, dx):
        assert found[50].isnan().all() and torch.cat([found[:50], found[51:]]).isfinite().all()
    assert all(g.isnan().any() for g in dw)


def test_the_same_bits_for_any_number_of_threads_and_beside_any_others():
    (x, gate_up, down), n_threads = inputs(8 * FEW + 3, 64, 96), torch.get_num_threads()
    dy = torch.randn(x.shape)
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(value_and_gradients(cpu_mlp.swiglu_mlp, [x, gate_up, down], [dy]))
    finally:
        torch.set_num_threads(n_threads)
    assert all(a.equal(b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    with torch.no_grad():
        assert found[0][0][:FEW].equal(cpu_mlp.swiglu_mlp(x[:FEW], gate_up, down))


def test_a_second_gradient_is_refused():
    x, gate_up, down = (y.requires_grad_() for y in inputs(FEW, 16, 16))
    first, = torch.autograd.grad(cpu_mlp.swiglu_mlp(x, gate_up, down).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_which_ones_fit(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, gate_up, down = inputs(4 * FEW, 32, 48)
    assert cpu_mlp.refuses(x, gate_up, down) is None
    assert cpu_mlp.refuses(x.view(4, FEW, 32), gate_up, down) is None
    for other in ((x[: 2 * FEW - 1], gate_up, down), (x[:, :16], gate_up, down), (x, gate_up[:48], down),
                  inputs(4 * FEW, 32, 40), inputs(4 * FEW, 24, 48), (x.double(), gate_up, down),
                  (x, gate_up.bfloat16(), down), (x, gate_up, down.double())):
        assert cpu_mlp.refuses(*other)
    monkeypatch.setattr(cpu_mlp, "MOST", 3 * 32 * 48 - 1)
    assert cpu_mlp.refuses(x, gate_up, down)
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert cpu_mlp.refuses(*inputs(10_000, 32, 48))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for n_threads, T in ((1, 1024), (2, 1024), (3, 4096), (4, 2048), (16, 8192), (17, 8192)):
        monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)  # noqa: B023
        assert cpu_mlp.refuses(*inputs(T, 32, 48)) is None and cpu_mlp.refuses(*inputs(T - 1, 32, 48))
    for n_threads in (5, 12, 20, 64):  # some would have nothing to do, or as much again as the others
        monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)  # noqa: B023
        assert cpu_mlp.refuses(*inputs(10_000, 32, 48))
    assert [cpu_mlp.parts_of(n) for n in (0, 511, 512, 1023, 1024, 2047, 2048, 1 << 20)] == \
        [0, 0, 1, 1, 2, 2, 4, 16]


def test_a_model_that_takes_them(monkeypatch):
    c = ModelConfig(vocab_size=40, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48,
                    max_seq_len=256)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model, batch = Transformer(c).init_weights(0), pack([[i % 40 for i in range(n)] for n in (200, 9, 131)])
    calls, ours, upstream = [], cpu_mlp.swiglu_mlp, torch.randn(len(batch.tokens), 32)
    monkeypatch.setattr(cpu_mlp, "swiglu_mlp", lambda *args: calls.append(1) or ours(*args))

    def hidden_and_gradients():
        hidden = model.hidden_states(batch)
        return [hidden, *torch.autograd.grad(hidden, list(model.parameters()), upstream)]

    found = hidden_and_gradients()
    assert len(calls) == 2
    monkeypatch.setattr(cpu_mlp, "MOST", 0)
    assert_close(found, hidden_and_gradients(), 1e-5)
    assert len(calls) == 2
