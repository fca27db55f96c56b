"""Attention on a CUDA device, at real sizes: every head_dim that picks its own block sizes, in every dtype.

The rule is FlashAttention's: at most twice the error that plain PyTorch makes in the same dtype.
"""
import numpy as np
import pytest
import torch

from r1zero.kernels.attention import attention
from r1zero.model.config import preset
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer

from ..naive_ops import cu as cu_on_host
from ..naive_ops import naive_attention, value_and_gradients

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RAGGED = [1, 700, 2, 129, 1024, 0, 64]


def cu(lengths):
    return cu_on_host(lengths).cuda()


def inputs(lengths, lengths_k, H, G, D, dtype, E=None):
    shapes = (sum(lengths), H, D), (sum(lengths_k), G, D), (sum(lengths_k), G, E or D)
    return [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]


def run(lengths, lengths_k, qkv, upstream, impl, **options):
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out, lse = attention(*leaves, cu(lengths), max(lengths), cu_seqlens_k=cu(lengths_k),
                         max_seqlen_k=max(lengths_k), return_lse=True, impl=impl, **options)
    grads = torch.autograd.grad(out, leaves, upstream)
    return [out.detach(), lse.detach(), *grads]


def eager(lengths, lengths_k, qkv, upstream, **options):
    """Plain attention that stays in the dtype of its inputs from end to end."""
    return value_and_gradients(lambda *x: naive_attention(*x, lengths, lengths_k=lengths_k, **options), qkv,
                               [upstream])


def check(lengths, H, G, D, dtype, lengths_k=None, E=None, **options):
    torch.backends.cuda.matmul.allow_tf32 = False
    lengths_k = lengths_k or lengths
    qkv = inputs(lengths, lengths_k, H, G, D, dtype, E)
    upstream = torch.randn(sum(lengths), H, E or D, device="cuda", dtype=dtype)
    got = run(lengths, lengths_k, qkv, upstream, "triton", **options)
    again = run(lengths, lengths_k, qkv, upstream, "triton", **options)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    truth = run(lengths, lengths_k, [x.double() for x in qkv], upstream.double(), "reference", **options)
    plain = eager(lengths, lengths_k, qkv, upstream, **options)
    plain.insert(1, None)  # its log-sum-exp is not asked for
    for name, g, t, p in zip(("out", "lse", "dq", "dk", "dv"), got, truth, plain, strict=True):
        error = (g.double() - t).abs().max().item()
        limit = 1e-4 if name == "lse" else 2 * (p.double() - t).abs().max().item() + 1e-5
        assert error <= limit, f"{name} is {error} off, at most {limit}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 32, 64, 80, 96, 128, 256])
def test_attention_at_every_head_dim(D, dtype):
    check(RAGGED, 6, 2, D, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D, E", [(192, 128), (48, 32), (32, 80)])
def test_values_of_another_width_than_keys(D, E, dtype):
    check(RAGGED, 6, 2, D, dtype, E=E)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 33, "softcap": 5.0}], ids=str)
def test_latent_attentions_widths_with_options_and_a_long_cache(options, dtype):
    check(RAGGED, 3, 3, 192, dtype, E=128, **options)
    check([16, 3], 3, 3, 192, dtype, lengths_k=[4096, 70], E=128, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"window": 100}, {"softcap": 20.0}, {"window": 33, "softcap": 5.0}],
                         ids=str)
@pytest.mark.parametrize("D", [32, 64, 128, 256])
def test_attention_with_a_window_and_a_softcap(D, options, dtype):
    check(RAGGED, 4, 2, D, dtype, **options)


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("per_group", [1, 3, 5, 7])
def test_attention_with_groups_of_any_size(G, per_group):
    check([300, 129], G * per_group, G, 64, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [32, 64, 128, 256])
@pytest.mark.parametrize("lengths,lengths_k", [([1] * 40, [1000] * 39 + [1]), ([16, 3], [4096, 70]),
                                               ([200, 17], [1500, 17])], ids=["1", "16", "200"])
def test_queries_against_a_long_cache(lengths, lengths_k, D, dtype):
    check(lengths, 4, 2, D, dtype, lengths_k=lengths_k)


@pytest.mark.parametrize("D", [64, 128])
def test_attention_of_long_sequences(D):
    check([16_384], 2, 1, D, torch.bfloat16)


def test_latent_attention_reads_its_views_in_place():
    """One head of latent attention has keys and values of 192 and 128, made by one product."""
    T, H, lengths = 1829, 2, cu([1, 700, 1128])
    made, rest = torch.randn(T, H, 256, device="cuda"), torch.randn(T, H, 256, device="cuda")
    made, rest = made.bfloat16(), rest.bfloat16()
    k_nope, v = made.split([128, 128], dim=2)
    q, k = rest[..., :192].contiguous(), torch.cat([k_nope, rest[..., 192:]], dim=2)
    results = []
    for values in (v, v.contiguous()):
        leaves = [x.detach().requires_grad_() for x in (q, k, values)]
        out = attention(*leaves, lengths, 1128)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attention_reads_offsets_beyond_32_bits():
    """2.4 billion elements of q: the last sequence must be that of a small batch."""
    n, H, D = 147_456, 128, 128
    q = torch.zeros(n, H, D, device="cuda", dtype=torch.bfloat16)
    k = torch.zeros(n, 1, D, device="cuda", dtype=torch.bfloat16)
    q[-64:], k[-64:] = torch.randn_like(q[-64:]), torch.randn_like(k[-64:])
    lengths = [1024] * 143 + [1024 - 64, 64]
    out = attention(q, k, k, cu(lengths), 1024)
    assert torch.equal(out[-64:], attention(q[-64:].clone(), k[-64:].clone(), k[-64:].clone(), cu([64]), 64))


def test_more_sequences_than_a_grid_axis_takes():
    n = 70_000
    q = torch.randn(n, 2, 32, device="cuda", dtype=torch.float16)
    out = attention(q, q, q, torch.arange(n + 1, device="cuda", dtype=torch.int32), 1)
    assert torch.equal(out, q)


# PyTorch adds up the gradients of few keys in another way than those of many
@pytest.mark.parametrize("n_samples", [8, 64], ids=["few keys", "many keys"])
def test_samples_that_share_a_prompt(n_samples):
    model = Transformer(preset("demo", 512, max_seq_len=512)).init_weights(0).to("cuda")
    prompt, *tails = (torch.randint(512, (n,)).tolist() for n in (100, *range(20, 20 + n_samples)))
    shared = pack([prompt, *tails], "cuda", after=np.array([-1] + [0] * n_samples))
    whole, results = pack([prompt + tail for tail in tails], "cuda"), []
    for packed in (shared, shared, whole):
        hidden, ends = model.hidden_states(packed), packed.cu_seqlens[-n_samples:].tolist()
        own = torch.cat([hidden[end - len(tail) : end] for end, tail in zip(ends, tails, strict=True)])
        model.zero_grad()
        (own * torch.linspace(-1, 1, own.numel(), device="cuda").view_as(own)).sum().backward()
        results.append([own.detach(), *(p.grad.clone() for p in model.parameters())])
    for first, again, plain in zip(*results, strict=True):
        assert torch.equal(first, again) and (first - plain).norm() < 1e-4 * plain.norm()
