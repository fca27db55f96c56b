"""The compiled loops of decoding on a CPU: attention against the cache, and the rows of the cache."""
import numpy as np
import pytest
import torch

from r1zero.kernels.cpu import compile as cpu
from r1zero.kernels.cpu import decode_attention as cpu_attention
from r1zero.kernels.rope import rope_table

from ..naive_ops import assert_close, same

pytestmark = pytest.mark.skipif(not cpu.HAS_NUMBA, reason="Numba is not installed")
NAN, f32 = torch.nan, np.float32


@pytest.fixture(autouse=True)
def prepared():
    """These tests call loops without the decoder."""
    cpu.prepare()


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
