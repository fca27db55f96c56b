"""One new token per row against a cache of latents: the reference against the formula, in fp64."""
import pytest
import torch

from r1zero.kernels import reference
from r1zero.kernels.latent_attention import latent_decode_attention

from .naive_ops import assert_close, naive_decode_attention

PAGE = 4


def cache_of(lengths, L, R, width, dtype=torch.float64):
    """(queries, pages, table, latents and rotated keys of each row); NaN wherever no row has a token."""
    B, n_pages = len(lengths), 1 + len(lengths) * width
    table = 1 + torch.randperm(B * width).view(B, width).int()
    pages = [torch.full((n_pages, 1, PAGE, w), float("nan"), dtype=dtype) for w in (L, R)]
    rows = [[torch.randn(n, w, dtype=dtype) for w in (L, R)] for n in lengths]
    for b, parts in enumerate(rows):
        for cache, part in zip(pages, parts, strict=True):
            for j, numbers in enumerate(part):
                cache[table[b, j // PAGE], 0, j % PAGE] = numbers
    return pages, table, rows


@pytest.mark.parametrize("positions", [1, 24, 10**6])  # that are read at one time
@pytest.mark.parametrize("lengths", [[1, 20, 3, 8], [5], [0, 7, 0], [24] * 3], ids=str)
def test_it_is_attention_with_one_wide_key_whose_first_part_is_the_value(lengths, positions, monkeypatch):
    monkeypatch.setattr(reference, "POSITIONS", positions)
    (latents, ropes), table, rows = cache_of(lengths, 5, 4, 6)
    q_latent, q_rope = (torch.randn(len(lengths), 3, w, dtype=torch.float64) for w in (5, 4))
    got = latent_decode_attention(q_latent, q_rope, latents, ropes, table,
                                  torch.tensor(lengths, dtype=torch.int32), 0.3)
    some = [b for b, n in enumerate(lengths) if n]
    keys = [torch.cat(rows[b], 1)[:, None] for b in some]
    values = [rows[b][0][:, None] for b in some]
    expected = torch.zeros_like(got)
    expected[some] = naive_decode_attention(torch.cat([q_latent, q_rope], -1)[some], keys, values, 0.3)
    assert_close([got], [expected], 1e-12)


def test_sums_of_16_bit_latents_are_in_fp32():
    (latents, ropes), table, rows = cache_of([300], 64, 16, 75, torch.bfloat16)
    q = [torch.randn(1, 4, w).bfloat16() for w in (64, 16)]
    got = latent_decode_attention(*q, latents, ropes, table, torch.tensor([300], dtype=torch.int32), 0.1)
    wide = [x.double() for x in (*q, *rows[0])]
    expected = naive_decode_attention(torch.cat(wide[:2], -1), [torch.cat(wide[2:], 1)[:, None]],
                                      [wide[2][:, None]], 0.1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=2.0**-8, atol=1e-5)


def test_no_rows_give_no_rows():
    (latents, ropes), table, _ = cache_of([3], 5, 4, 6)
    q = [torch.randn(0, 3, w, dtype=torch.float64) for w in (5, 4)]
    got = latent_decode_attention(*q, latents, ropes, table[:0], torch.zeros(0, dtype=torch.int32), 0.3)
    assert got.shape == (0, 3, 5)


@pytest.mark.parametrize("wrong, message", [
    ({"q_latent": torch.zeros(2, 3, 6)}, r"\(2, 3, 6\), .*expected \[B, H, L\]"),
    ({"q_rope": torch.zeros(2, 2, 4)}, r"\(2, 2, 4\)"),
    ({"q_rope": torch.zeros(2, 4)}, r"\(2, 4\)"),
    ({"rope_pages": torch.zeros(7, 1, 3, 4)}, r"\(7, 1, 3, 4\)"),
    ({"latent_pages": torch.zeros(7, 2, PAGE, 5), "rope_pages": torch.zeros(7, 2, PAGE, 4)}, r"7, 2, 4, 5"),
    ({"q_rope": torch.zeros(2, 3, 4).half()}, "torch.float16, .*expected one dtype"),
    ({"table": torch.zeros(2, 3)}, "table is torch.float32"),
    ({"lengths": torch.zeros(3, dtype=torch.int32)}, r"lengths is torch.int32 \(3,\).*2 rows"),
    ({"lengths": torch.zeros(2, dtype=torch.int32, device="meta")}, "on meta"),
    ({"scale": 0.0}, "scale is 0.0"),
    ({"impl": "triton"}, "impl is 'triton'; expected \"reference\" or None"),
], ids=str)
def test_input_that_does_not_fit_is_named(wrong, message):
    right = dict(q_latent=torch.zeros(2, 3, 5), q_rope=torch.zeros(2, 3, 4),
                 latent_pages=torch.zeros(7, 1, PAGE, 5), rope_pages=torch.zeros(7, 1, PAGE, 4),
                 table=torch.zeros(2, 3, dtype=torch.int32), lengths=torch.ones(2, dtype=torch.int32),
                 scale=0.3)
    assert latent_decode_attention(**right).shape == (2, 3, 5)
    with pytest.raises(ValueError, match=message):
        latent_decode_attention(**{**right, **wrong})
