"""Attention against pages on a CUDA device, and the engine on CUDA graphs, at real sizes.

The rule is FlashAttention's: at most twice the error that plain PyTorch makes in the same dtype.
"""
import pytest
import torch

from r1zero.kernels.decode_attention import decode_attention
from r1zero.model.config import preset
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.requests import group_requests
from r1zero.model.engine.sampling import sample_seeds
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer

from ..naive_ops import naive_decode_attention

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [1, 700, 2, 129, 4096, 0, 64, 256, 257, 1023]


def in_pages(lengths, G, D, dtype, page=16):
    """Pages [P, G, page, D] that are NaN where nobody looks, the table, and each row's keys and values."""
    width = -(-max(lengths) // page)
    n_pages = len(lengths) * width
    table = torch.randperm(n_pages, device="cuda").view(-1, width).int()
    k, v = (torch.randn(n_pages, G, page, D, device="cuda").to(dtype) for _ in "kv")
    places = torch.arange(width * page, device="cuda").view(width, page)
    rows = []
    for x in (k, v):
        for b, n in enumerate(lengths):
            unseen = (places >= n)[:, None, :, None].expand(-1, G, -1, D)
            x[table[b].long()] = x[table[b].long()].masked_fill(unseen, float("nan"))
        rows.append([x[table[b].long()].transpose(1, 2).reshape(-1, G, D)[:n] for b, n in enumerate(lengths)])
    return k, v, table, torch.tensor(lengths, dtype=torch.int32, device="cuda"), *rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_group", [1, 6, 7, 20])
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])
def test_decode_attention_at_every_head_dim_and_group_size(D, per_group, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    k, v, table, lengths, keys, values = in_pages(LENGTHS, 2, D, dtype)
    q = torch.randn(len(LENGTHS), 2 * per_group, D, device="cuda").to(dtype)
    got = decode_attention(q, k, v, table, lengths, impl="triton")
    truth = naive_decode_attention(q.double(), [x.double() for x in keys], [x.double() for x in values])
    limit = 2 * (naive_decode_attention(q, keys, values).double() - truth).abs().max() + 1e-5
    assert (got.double() - truth).abs().max() <= limit
    for b in range(len(LENGTHS)):
        alone = decode_attention(q[b : b + 1], k, v, table[b : b + 1], lengths[b : b + 1], impl="triton")
        assert torch.equal(alone[0], got[b]), "a row depends on its neighbours"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window,softcap", [(100, None), (17, 20.0), (None, 20.0)])
def test_decode_attention_with_a_window_and_a_softcap(window, softcap, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    k, v, table, lengths, keys, values = in_pages(LENGTHS, 2, 64, dtype)
    q = torch.randn(len(LENGTHS), 12, 64, device="cuda").to(dtype)
    got = decode_attention(q, k, v, table, lengths, None, window, softcap, impl="triton")
    exact_keys, exact_values = [x.double() for x in keys], [x.double() for x in values]
    truth = naive_decode_attention(q.double(), exact_keys, exact_values, None, window, softcap)
    plain = naive_decode_attention(q, keys, values, None, window, softcap)
    assert (got.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + 1e-5


def test_the_engine_on_graphs_is_the_engine_without(monkeypatch):
    config = preset("qwen2.5-0.5b", 1000, n_layers=3, max_seq_len=512)
    model = Transformer(config, torch.bfloat16).init_weights(0).cuda()
    prompts = [[5, 6, 7], list(range(230)), [9]]  # one grows past a split, into a wider table
    requests = group_requests(prompts, 9, 60, 1.0, sample_seeds(27, 0), (3,))
    engine = Engine(model, max_rows=27)
    assert engine.cache.weights is not model and engine.cache.weights.embed.dtype == torch.bfloat16
    for _ in range(2):
        with_graphs = engine.generate(requests)
        assert engine.cache.graphs
        plain = Engine(model, max_rows=27)
        monkeypatch.setattr(plain.cache, "captures", False)
        for a, b in zip(with_graphs, plain.generate(requests), strict=True):
            assert a.tokens.tolist() == b.tokens.tolist() and abs(a.logp - b.logp).max() == 0
        with torch.no_grad():  # the same graphs see new weights
            for p in model.parameters():
                p.mul_(1.01)
        engine.refresh()
    found = engine.generate(requests)
    for r, c in list(zip(requests, found, strict=True))[:9]:
        tokens = torch.from_numpy(c.tokens).cuda()
        with torch.no_grad():
            hidden = model.hidden_states(pack([[*r.prompt, *c.tokens.tolist()]], "cuda"))
            logp, _ = model.logprobs(hidden[len(r.prompt) - 1 : -1], tokens)
        assert abs(logp.float().cpu().numpy() - c.logp).max() < 0.3
