"""The compiled loops of decoding on a CPU: attention against the cache, its rows, and draws."""
import numpy as np
import pytest
import torch

from r1zero.kernels.cpu import compile as cpu
from r1zero.kernels.cpu import decode_attention as cpu_attention
from r1zero.kernels.cpu import sampling as cpu_decode
from r1zero.kernels.rope import rope_table
from r1zero.model.engine.sampling import sample_tokens

from .naive_ops import assert_close, same

pytestmark = pytest.mark.skipif(not cpu.HAS_NUMBA, reason="Numba is not installed")
NAN, INF, NEAR_ONE, f32, f64 = torch.nan, torch.inf, 1 - 2.0**-53, np.float32, torch.float64


def naive_decode(qkv, cos, sin, scale, lengths, keys, values, G):
    """One row and one head at a time, in fp64: ([B, H, D], new keys)."""
    H, outs, new_keys = qkv.shape[1] - 2 * G, [], []
    for new, n, past_k, past_v in zip(qkv.double(), lengths, keys.double(), values.double(), strict=True):
        z = torch.complex(*new.chunk(2, 1)) * torch.complex(cos[n].double(), sin[n].double())
        turned = torch.cat([z.real, z.imag], 1)
        k, v = torch.cat([past_k[:n], turned[None, H : H + G]]), torch.cat([past_v[:n], new[None, H + G :]])
        weights = [(k[:, h * G // H] @ turned[h] * scale).softmax(0) for h in range(H)]
        outs.append(torch.stack([weights[h] @ v[:, h * G // H] for h in range(H)]))
        new_keys.append(turned[H : H + G])
    return torch.stack(outs), torch.stack(new_keys)


@pytest.mark.parametrize("H,G,D,block", [(2, 2, 2, 8), (4, 2, 8, 8), (4, 2, 8, 1), (4, 1, 32, 8),
                                         (6, 2, 10, 8), (7, 7, 10, 1)])
@pytest.mark.parametrize("low", [False, True], ids=["any scores", "scores below -150"])
@pytest.mark.parametrize("tile", [None, 16], ids=["one tile", "tiles"])
def test_decode_attention(H, G, D, block, low, tile):
    run, S, scale = cpu_attention.decode_attention_loop, 40, 2.0**-7 if low else D**-0.5
    cos, sin = rope_table(torch.arange(S), D, 1e4)
    for B in (1, 7, 8, 9, 17):
        row, qkv = np.arange(B), torch.randn(B, H + 2 * G, D)
        lengths = np.array([0, 5, 17, 1, 0, 33, 2, 39])[(3 * row + B) % 8]
        at = row // block, slice(None), lengths, slice(None), row % block
        k, v = torch.randn(2, -(-B // block), G, S, D, block)
        if low:  # whole numbers, so that scores of this size are exact
            cos, sin, k = torch.ones(S, D // 2), torch.zeros(S, D // 2), k.round() - 100
            qkv[:, :H], qkv[:, H : H + G] = 100, -101
        for b, n in enumerate(lengths):  # what a row has not written, but is read beside the others
            k[b // block, :, n:, :, b % block] = v[b // block, :, n:, :, b % block] = 1e6
        before, C = (k.clone(), v.clone()), tile or B + 3  # columns may be padded
        n_tiles = -(-B // C)
        out = torch.full((n_tiles, H, D, C), NAN)
        by_row = (x.permute(0, 4, 2, 1, 3).flatten(0, 1)[:B] for x in before)  # [B, S, G, D]
        expected, new_k = naive_decode(qkv, cos, sin, scale, lengths, *by_row, G)
        padded = torch.full((n_tiles * C, H + 2 * G, D), NAN)
        padded[:B] = qkv
        padded = padded.unflatten(0, (-1, C)).permute(0, 2, 3, 1)
        qkv_INDC, *tables = (cpu.array(x) for x in (padded, cos, sin))
        run(qkv_INDC, *tables, f32(scale), lengths, k.numpy(), v.numpy(), out.numpy())
        out = out.permute(0, 3, 1, 2).flatten(0, 1)
        assert_close([out[:B], k[at], v[at]], [expected, new_k, qkv[:, H + G :]], 2e-6)
        assert out[B:].isnan().all()
        k[at], v[at] = (x[at] for x in before)
        assert same((k, v), before)  # nothing else has changed


@pytest.mark.parametrize("block", [1, 8])
def test_rows_of_the_cache_are_written_and_moved(block):
    G, S, D, n_rows = 3, 12, 10, 20
    cache, new = torch.randn(-(-n_rows // block), G, S, D, block), torch.randn(30, G, D)
    expected = cache.permute(0, 4, 2, 1, 3).reshape(-1, S, G, D).clone()  # [rows, S, G, D]
    rows, firsts, lengths = np.array([3, 17, 0, 9]), np.array([5, 5, 29, 0]), np.array([12, 7, 1, 5])
    for row, first, n in zip(rows, firsts, lengths, strict=True):
        expected[row, :n] = new[first : first + n]
    cpu_attention.write_rows_loop(new.numpy(), firsts, lengths, rows, cache.numpy())
    assert same(cache.permute(0, 4, 2, 1, 3).reshape(-1, S, G, D), expected)
    by, to, lengths = np.array([19, 17, 12]), np.array([1, 3, 8]), np.array([12, 7, 0])
    for a, b, n in zip(by, to, lengths, strict=True):
        expected[b, :n] = expected[a, :n]
    cpu_attention.move_rows_loop(by, lengths, to, cache.numpy())
    assert same(cache.permute(0, 4, 2, 1, 3).reshape(-1, S, G, D), expected)


@pytest.mark.parametrize("V", [1, 31, 32, 33, 1000])
def test_draws_are_where_the_cumulative_sum_passes(V, monkeypatch):
    for spread in (1.0, 8.0, 60.0):
        logits, u = torch.randn(V) * spread, torch.rand(20_000, dtype=f64)
        u[:4] = torch.tensor([0.0, NEAR_ONE, 0.5, 2.0**-53], dtype=f64)
        tokens, logp = cpu_decode.draw(logits.expand(len(u), V), u)
        log_p = logits.double().log_softmax(-1)
        mean, sums = log_p.exp() * len(u), log_p.exp().cumsum(-1)
        expected = torch.searchsorted(sums / sums[-1], u, right=True).clamp_(max=V - 1)
        edge = (sums - u[:, None]).abs().amin(-1) < 5e-7  # either side of it will do
        monkeypatch.setattr(cpu, "HAS_NUMBA", False)  # which asks sample_tokens only
        plain, _ = sample_tokens(logits.expand(len(u), V), 1.0, u)
        assert edge.double().mean() < 0.01 and all(((x == expected) | edge).all() for x in (tokens, plain))
        assert_close([logp], [log_p[tokens]], 2e-6)
        counts = torch.bincount(tokens, minlength=V)
        assert ((counts - mean).abs() <= 5 * mean.sqrt())[mean > 20].all()


@pytest.mark.parametrize("V", [1, 31, 32, 33, 65, 200])
def test_probability_zero_is_never_drawn_and_a_broken_row_gives_no_token(V):
    u = torch.rand(21, dtype=f64)
    u[:5] = torch.tensor([0.0, NEAR_ONE, 0.5, 1 - 2.0**-25, 1 - 2.0**-24], dtype=f64)
    for first in {0, V - 1, V // 2, min(31, V - 1), min(32, V - 1)}:
        for wanted in ({first}, {first, (first + 1) % V}, {first, (first + 32) % V}):
            logits = torch.full((V, 29), -1e4).t()[4:25]  # tokens first in memory
            logits[:, sorted(wanted)] = torch.rand(len(wanted))
            clean = tokens, logp = cpu_decode.draw(logits, u)
            assert set(tokens.tolist()) == wanted and bool(logp.isfinite().all())
            assert tokens[0] == min(wanted) and tokens[1] == max(wanted)
            assert same(cpu_decode.draw(logits.contiguous(), u), clean)
        for bad in (NAN, INF, -INF):
            logits[9, first] = bad
            drawn, others = cpu_decode.draw(logits, u), torch.arange(21) != 9
            assert drawn[0][9] == -1 and same([x[others] for x in drawn], [x[others] for x in clean])
