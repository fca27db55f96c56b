"""Attention against pages as Triton kernels, held against one formula in fp64."""
import pytest
import torch

from r1zero.kernels.decode_attention import decode_attention, decode_attention_fwd

from ..naive_ops import naive_decode_attention

PAGE = 16
LENGTHS = [1, 2, 17, 63, 129, 16, 0, 32]


def in_pages(lengths, G, D, dtype, page=PAGE):
    """Keys and values of each row [n, G, D], and the same in pages in any order; what nobody sees is NaN."""
    width = -(-max(lengths) // page)
    table = (torch.randperm(len(lengths) * width + 3)[: len(lengths) * width] + 1).view(-1, width).int()
    rows = [[torch.randn(n, G, D).to(dtype) for n in lengths] for _ in "kv"]
    pages = [torch.full((len(lengths) * width + 4, G, page, D), float("nan"), dtype=dtype) for _ in "kv"]
    for x, cache in zip(rows, pages, strict=True):
        for b, row in enumerate(x):
            for place, entry in enumerate(row):
                cache[table[b, place // page], :, place % page] = entry
        for b, n in enumerate(lengths):
            table[b, -(-n // page):] = 2**31 - 1  # a page that is not there
    return *rows, *pages, table, torch.tensor(lengths, dtype=torch.int32)


def check(lengths, per_group, G, D, dtype, page=PAGE, scale=None, window=None, softcap=None, **options):
    keys, values, k_pages, v_pages, table, lengths_B = in_pages(lengths, G, D, dtype, page)
    q = torch.randn(len(lengths), G * per_group, D).to(dtype)
    if window:  # pages wholly before it are not there
        for b, n in enumerate(lengths):
            table[b, : max(0, n - window) // page] = 2**31 - 1
    if options:
        got = decode_attention_fwd(q, k_pages, v_pages, table, lengths_B, D**-0.5, window, softcap, **options)
    else:
        got = decode_attention(q, k_pages, v_pages, table, lengths_B, scale, window, softcap, impl="triton")
    exact_keys, exact_values = [k.double() for k in keys], [v.double() for v in values]
    truth = naive_decode_attention(q.double(), exact_keys, exact_values, scale, window, softcap)
    plain = naive_decode_attention(q, keys, values, scale, window, softcap)
    assert got.dtype == dtype and got.shape == q.shape
    error, limit = (got.double() - truth).abs().max().item(), (plain.double() - truth).abs().max().item()
    assert error <= (3e-6 if dtype == torch.float32 else 2 * limit + 1e-5), (error, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("split", [32, 256])
def test_decode_attention_of_ragged_lengths_in_splits_of_any_size(split, dtype):
    check(LENGTHS, 2, 2, 32, dtype, split=split)


@pytest.mark.parametrize("per_group", [1, 2, 3, 5, 7, 17])
def test_decode_attention_with_groups_of_any_size(per_group):
    check([5, 70, 16], per_group, 2, 16, torch.float32)


@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])
def test_decode_attention_at_every_head_dim(D):
    check([1, 33, 16], 3, 1, D, torch.float32)
    check([1, 33, 16], 3, 1, D, torch.float16)


@pytest.mark.parametrize("page", [1, 3, 16, 64])
def test_decode_attention_at_the_boundaries_of_pages_of_any_size(page):
    check([page, page + 1, 2 * page, max(1, page - 1), 5], 2, 1, 16, torch.float32, page, scale=0.4)


@pytest.mark.parametrize("window", [1, PAGE - 1, PAGE, PAGE + 1, 33, 2**31 - 1, 2**40])
def test_decode_attention_sees_the_last_positions_within_a_window(window):
    check([1, 70, 0, 17, 32, 49], 2, 1, 16, torch.float32, window=window, split=32)


@pytest.mark.parametrize("window", [1, 100])
def test_a_window_within_one_split_of_several_and_over_two(window):
    check([300, 257, 256], 1, 1, 16, torch.float16, window=window)


@pytest.mark.parametrize("window", [None, PAGE + 1])
def test_decode_attention_with_a_softcap(window):
    check([1, 40, 16], 3, 1, 16, torch.float32, scale=2.0, window=window, softcap=2.0)


def test_a_window_that_holds_all_changes_no_bit():
    _, _, *pages, table, lengths = in_pages([129, 5, 0], 1, 16, torch.float32)
    q = torch.randn(3, 2, 16)
    whole, windowed = (decode_attention(q, *pages, table, lengths, None, window, impl="triton")
                       for window in (None, 129))
    assert torch.equal(whole, windowed)


@pytest.mark.parametrize("window", [None, 20])
def test_a_row_has_the_same_bits_in_any_batch(window):
    _, _, k_pages, v_pages, table, lengths = in_pages(LENGTHS, 2, 32, torch.float32)
    q = torch.randn(len(LENGTHS), 6, 32)
    whole = decode_attention(q, k_pages, v_pages, table, lengths, window=window, impl="triton")
    for b in range(len(LENGTHS)):  # alone, and with a table as narrow as its own pages
        width = max(1, -(-LENGTHS[b] // PAGE))
        alone = decode_attention(q[b : b + 1], k_pages, v_pages, table[b : b + 1, :width].contiguous(),
                                 lengths[b : b + 1], window=window, impl="triton")
        assert torch.equal(alone[0], whole[b])


def test_decode_attention_reads_views_and_takes_no_rows():
    keys, values, k_pages, v_pages, table, lengths = in_pages([9, 20], 2, 16, torch.float32)
    qkv = torch.randn(2, 8, 16)
    got = decode_attention(qkv[:, 1:5], k_pages, v_pages, table, lengths, impl="triton")
    assert torch.equal(got, decode_attention(qkv[:, 1:5].contiguous(), k_pages, v_pages, table, lengths,
                                             impl="triton"))
    none = decode_attention(qkv[:0, :4], k_pages, v_pages, table[:0], lengths[:0], impl="triton")
    assert none.shape == (0, 4, 16)
