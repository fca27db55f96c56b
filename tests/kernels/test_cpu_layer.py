"""Products of tiles, and the layers of decoding that are made of them."""
import numpy as np
import pytest
import torch

from r1zero.kernels.cpu import compile as cpu
from r1zero.model.config import ModelConfig
from r1zero.model.engine import cache
from r1zero.model.engine.engine import Engine
from r1zero.model.transformer import Transformer

from ..model.engine.cases import Watched, agree, mixed_requests
from .naive_ops import assert_close

PANEL = cpu.LANES
pytestmark = pytest.mark.skipif(not cpu.HAS_NUMBA, reason="Numba is not installed")
if cpu.HAS_NUMBA:
    from r1zero.kernels.cpu.layer import groups_of
    from r1zero.kernels.cpu.tiles import narrow_product, product

    @cpu.loop
    def product_loop(*args):
        for _ in cpu.numba.prange(1):
            product(*args)

    @cpu.loop
    def narrow_loop(*args):
        for _ in cpu.numba.prange(1):
            narrow_product(*args)


@pytest.fixture
def blocks(monkeypatch):
    """Decode by blocks, however few the rows are, in so many groups."""
    return lambda n_groups: monkeypatch.setattr(cache, "groups_of", lambda n, n_threads, n_weights: n_groups)


def piece(*sizes_and_strides):
    """A tensor somewhere in flat memory, all else NaN: (memory, first place, tensor)."""
    sizes, strides = zip(*sizes_and_strides, strict=True)
    memory, at = torch.full((7 + sum(n * stride for n, stride in sizes_and_strides),), torch.nan), 5
    return memory, at, memory[at:].as_strided(sizes, strides).copy_(torch.randn(sizes))


@pytest.mark.parametrize("rows", [*range(1, 15), 25, 97])
@pytest.mark.parametrize("depth", [1, 3, 130])
@pytest.mark.parametrize("turned", [False, True], ids=["a", "a transposed"])
@pytest.mark.parametrize("panels", ["one", "neighbours", "apart"])
def test_product_of_pieces_of_memory(rows, depth, turned, panels):
    a_row, a_step = (1, rows + 2) if turned else (depth + 3, 1)
    row, n = 2 * PANEL + 5, 1 if panels == "one" else 2
    b_next, next = (depth * row + 3, rows * row + 1) if panels == "apart" else (PANEL, PANEL)
    a, a_at, a_RK = piece((rows, a_row), (depth, a_step))
    b, b_at, b_KPC = piece((depth, row), (n, b_next), (PANEL, 1))
    out, out_at, out_RPC = piece((rows, row), (n, next), (PANEL, 1))
    for start, start_row, start_next in ((out.clone(), row, next), (torch.randn(out_at + 2 * PANEL), 0, 0)):
        start_RPC = start[out_at:].as_strided((rows, n, PANEL), (start_row, start_next, 1))
        expected, others = start_RPC.double() + torch.einsum("rk,kpc->rpc", a_RK.double(), b_KPC.double()), \
            out.isnan()
        of_b, of_start, of_out = ((b.numpy(), b_at, row, b_next),
                                  (start.numpy(), out_at, start_row, start_next),
                                  (out.numpy(), out_at, row, next))
        if n == 1:
            narrow_loop(a.numpy(), a_at, a_row, a_step, rows, depth, *of_b[:3], *of_start[:3], *of_out[:3])
        else:
            product_loop(a.numpy(), a_at, a_row, a_step, rows, depth, *of_b, *of_start, *of_out)
        assert_close([out_RPC], [expected], 1e-6)
        assert out.isnan().equal(others)  # nothing else is written


def test_a_number_does_not_depend_on_what_is_computed_beside_it():
    a, (b, zeros, out, alone) = torch.randn(29, 50), (torch.randn(n, 2 * PANEL) for n in (50, 1, 29, 29))
    b, zeros = b.view(-1).numpy(), zeros.zero_().view(-1).numpy()
    product_loop(a.view(-1).numpy(), 0, 50, 1, 29, 50, b, 0, 16, PANEL, zeros, 0, 0, 0, out.view(-1).numpy(),
                 0, 16, PANEL)
    for i in range(29):
        product_loop(a[i].numpy(), 0, 50, 1, 1, 50, b, 0, 16, PANEL, zeros, 0, 0, 0, alone[i].numpy(), 0, 16,
                     PANEL)
    assert out.equal(alone)
    for rows in (29, 1):  # 8 columns, and all rows at once or one by one
        alone.zero_()
        for i, at in ((i, at) for i in range(0, 29, rows) for at in (0, PANEL)):
            narrow_loop(a[i:].reshape(-1).numpy(), 0, 50, 1, rows, 50, b, at, 16, zeros, 0, 0,
                        alone[i:].view(-1).numpy(), at, 16)
        assert out.equal(alone)


@pytest.mark.parametrize("n_groups", [0, 1, 2, 3])  # 0: without blocks
@pytest.mark.parametrize("n_rows", [5, 16, 17, 24])
def test_the_engine_is_the_naive_loop(n_rows, n_groups, blocks):
    blocks(n_groups)
    model, requests = Watched(3.0), mixed_requests()  # a bias, norms of heads, two query heads a kv head
    agree(model, requests, Engine(model, max_rows=n_rows, paged=False).generate(requests))


@pytest.mark.parametrize("change", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"n_kv_heads": 3},
                                    {"d_ff": 7, "d_model": 5, "head_dim": 10}])
def test_logits_are_the_models_own_and_the_same_in_any_company(change, blocks):
    """Bit by bit, for any number of rows, groups and threads."""
    c = ModelConfig(**{"vocab_size": 11, "n_layers": 2, "d_model": 24, "n_heads": 3, "n_kv_heads": 1,
                       "head_dim": 8, "d_ff": 40, "max_seq_len": 64} | change)
    model, n = Transformer(c).init_weights(0), 39
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("norm", "bias")):
                p.add_(torch.randn(p.shape) / 4)
    first, second = torch.randint(11, (2, n))

    def decoded(rows, n_groups, left=n):  # two tokens of each row; their logits
        blocks(n_groups)
        slots, logits = cache.Slots(model, 64), []
        slots.allocate(64 * 64)
        with torch.inference_mode():
            slots.admit(np.arange(len(rows)), [[1]], np.zeros(len(rows), np.int64))
            for tokens in (first[rows], second[rows][:left]):
                slots.cut(len(tokens))
                logits.append(slots.decode(tokens).clone())
        return torch.cat([x[:left] for x in logits], 1)

    def prefilled(row):
        with torch.inference_mode():
            hidden = model.hidden_states(cache.pack([[1, int(first[row]), int(second[row])]]))
            return model.logits(hidden[1:]).flatten()

    whole, n_threads = decoded(np.arange(n), 1), torch.get_num_threads()
    assert_close([whole], [torch.stack([prefilled(row) for row in range(n)])], 2e-5)
    assert whole.equal(decoded(np.arange(n), 3))
    assert whole[:9].equal(decoded(np.arange(n), 2, left=9))
    assert whole[7:9].equal(decoded(np.array([7, 8]), 2))
    assert whole.flip(0).equal(decoded(np.arange(n)[::-1].copy(), 2))
    try:
        torch.set_num_threads(1)
        assert whole.equal(decoded(np.arange(n), 3))
    finally:
        torch.set_num_threads(n_threads)


def test_as_many_groups_for_each_thread_or_none(monkeypatch):
    for capability, pays in (("AVX2", True), ("AVX512", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)  # noqa: B023
        for n_threads in (1, 2, 3, 16):
            for n in (1, 2, 15, 16, 31, 32, 33, 256, 1000, 2048):
                for n_weights, enough in ((4_000_000, 2), (4_000_001, 16 * n_threads)):
                    groups = groups_of(n, n_threads, n_weights)
                    assert groups % n_threads == 0
                    assert (groups > 0) == (pays and n >= enough)
                    assert not groups or -(-n // PANEL) <= groups * 8
