"""Decoding by the loops against the model itself, by blocks of rows and by PyTorch's products."""
import numpy as np
import pytest
import torch

from r1zero.kernels.cpu import compile as cpu
from r1zero.kernels.cpu.decoder import groups_of
from r1zero.kernels.decoder import Decoder, decoder_refuses
from r1zero.model.config import ModelConfig
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.pages import Pages
from r1zero.model.engine.slots import Slots, gather_weights
from r1zero.model.packed import pack
from r1zero.model.transformer import Block, Transformer

from ...model.engine.cases import Watched, agree, mixed_requests
from ..naive_ops import assert_close

PANEL = cpu.LANES
pytestmark = pytest.mark.skipif(not cpu.HAS_NUMBA, reason="Numba is not installed")


@pytest.mark.parametrize("n_groups", [0, 1, 2, 3])  # 0: without blocks
@pytest.mark.parametrize("n_rows", [5, 16, 17, 24])
def test_the_engine_is_the_naive_loop(n_rows, n_groups):
    model, requests = Watched(3.0), mixed_requests()  # a bias, norms of heads, two query heads a kv head
    engine = Engine(model, max_rows=n_rows, paged=False)
    engine.cache.decoder.n_groups = n_groups
    agree(model, requests, engine.generate(requests))


@pytest.mark.parametrize("change", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"n_kv_heads": 3},
                                    {"d_ff": 7, "d_model": 5, "head_dim": 10}])
def test_logits_are_the_models_own_and_the_same_in_any_company(change):
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
        slots, logits = Slots(model, 64), []
        slots.decoder.n_groups = n_groups
        slots.allocate(64 * 64)
        with torch.inference_mode():
            slots.admit(np.arange(len(rows)), [[1]], np.zeros(len(rows), np.int64))
            for tokens in (first[rows], second[rows][:left]):
                slots.cut(len(tokens))
                logits.append(slots.decode(tokens).clone())
        return torch.cat([x[:left] for x in logits], 1)

    def prefilled(row):
        with torch.inference_mode():
            hidden = model.hidden_states(pack([[1, int(first[row]), int(second[row])]]))
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


CONFIG = ModelConfig(vocab_size=11, n_layers=2, d_model=24, n_heads=3, n_kv_heads=1, head_dim=8, d_ff=40,
                     max_seq_len=64)


@pytest.mark.parametrize("n_groups", [0, 2])
def test_without_a_head_it_ends_at_the_hidden_states(n_groups):
    model = Transformer(CONFIG).init_weights(0)
    weights, found = gather_weights(model), []
    for given in (weights, weights._replace(head=None)):
        decoder = Decoder(given, 16, n_heads=3, n_kv_heads=1, head_dim=8, norm_eps=CONFIG.norm_eps,
                          rope_theta=CONFIG.rope_theta)
        decoder.n_slots, decoder.n_groups = 16 * 64, n_groups
        decoder.n = 13  # rows without a prompt
        found.append(decoder.decode(torch.arange(13) % 11).clone())
    assert found[0].shape == (13, 11) and found[1].shape == (13, 24)
    assert_close([found[0]], [found[1] @ model.head.detach().T], 1e-5)


def test_what_it_refuses_is_said_in_words():
    model = Transformer(CONFIG).init_weights(0)
    weights = gather_weights(model)
    assert decoder_refuses(weights, torch.float32) is None
    assert "computes in torch.bfloat16" in decoder_refuses(weights, torch.bfloat16)
    layer = weights.layers[1]._replace(down=weights.layers[1].down.double())
    other = weights._replace(layers=[weights.layers[0], layer])
    assert "torch.float64 on cpu" in decoder_refuses(other, torch.float32)
    with pytest.raises(ValueError, match="decoder: the compiled loops take float32.*torch.float64"):
        Decoder(other, 8, n_heads=3, n_kv_heads=1, head_dim=8, norm_eps=1e-6, rope_theta=1e4)


class OtherMLP(torch.nn.Module):
    """Stands in for a mixture of experts."""

    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def forward(self, x, routing=None):
        return self.dense(x)

    def can_capture(self, dtype):
        return True


class OtherBlock(Block):
    """Half of what a block adds."""

    def forward(self, x, residual, cos, sin, kv, routing=None):
        x, residual = super().forward(x, residual, cos, sin, kv, routing)
        return x / 2, residual


class OtherModel(Watched):
    def forward(self, tokens, positions, kv, routing=None):
        return super().forward(tokens, positions, kv, routing) / 2


def test_a_forward_of_its_own_goes_by_pages():
    """The decoder reads weights alone, and would pass over it."""
    model, requests = Watched(1.5), mixed_requests(6)
    assert Slots.serves(model) and not Slots.serves(OtherModel())
    other = OtherBlock(model.config, 1)
    other.load_state_dict(model.blocks[1].state_dict())
    model.blocks[1] = other
    assert not Slots.serves(model)
    agree(model, requests, Engine(model).generate(requests))


def test_other_layers_go_by_pages():
    model, requests = Watched(1.0), mixed_requests(6)
    assert Slots.serves(model)
    model.blocks[1].mlp = OtherMLP(model.blocks[1].mlp)
    assert not Slots.serves(model)
    with pytest.raises(ValueError, match="paged is False, but the model is more than attention and dense"):
        Engine(model, paged=False)
    engine = Engine(model)
    assert isinstance(engine.cache, Pages)
    agree(model, requests, engine.generate(requests))
