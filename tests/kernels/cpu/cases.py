"""What the tests of the compiled loops share, some of it run in processes of their own."""
from functools import partial

import torch

from r1zero.kernels.attention import attention
from r1zero.kernels.cpu import elementwise
from r1zero.kernels.mlp import swiglu
from r1zero.kernels.rmsnorm import rmsnorm
from r1zero.kernels.rope import rope, rope_table
from r1zero.kernels.sampling import sample_logits

from ..naive_ops import cu, value_and_gradients


def all_loops():
    """What every element-wise loop gives for some inputs, and sampling."""
    torch.manual_seed(0)
    x, residual, w, a, b = *torch.randn(2, 129, 24), torch.randn(24), *torch.randn(2, 129)
    outs = value_and_gradients(lambda x, w, r: rmsnorm(x, w, 0.1, r, "cpu"), [x, w, residual], [x * 2, x * 3])
    outs += value_and_gradients(partial(swiglu, impl="cpu"), [x], [x[:, 5:17]])
    heads, table = x.view(129, 4, 6), rope_table(torch.arange(129), 6, 1e4)
    outs += value_and_gradients(lambda x: rope(x, *table, "cpu"), [heads], [heads])
    targets, (peak, total, weighted) = torch.arange(129) % 24, torch.zeros(3, 129)
    exps = elementwise.accumulate(x.clone(), peak, total, weighted)
    return [*outs, peak, total, weighted, exps,
            elementwise.dlogits_of_exps(exps.clone(), total, a, targets, 0),
            elementwise.dlogits_of_logits(x.clone(), total.log(), b, a, b, targets, 3),
            *sample_logits(x, torch.rand(129, dtype=torch.float64), "cpu")]


# ---- attention ----

def of(lengths, lengths_k=None, impl="cpu", lse=True, **options):
    """attention of q, k, v over sequences of these lengths."""
    keys = {"cu_seqlens_k": cu(lengths_k), "max_seqlen_k": max(lengths_k)} if lengths_k else {}
    options |= {**keys, "return_lse": lse, "impl": impl}
    return lambda q, k, v: attention(q, k, v, cu(lengths), max(lengths), **options)


def inputs(lengths, lengths_k, H, G, D):
    """(q, k, v), and upstream gradients of out and lse."""
    shapes = (sum(lengths), H, D), *[(sum(lengths_k or lengths), G, D)] * 2
    upstream = [torch.randn(shapes[0]), torch.randn(shapes[0][:2])]
    return [torch.randn(shape) for shape in shapes], upstream


def by_sequence(tensors, lengths, lengths_k):
    """Of (out, lse, dq) and (dk, dv), by sequence."""
    queries, keys = (list(zip(*[x.split(n) for x in part], strict=True))
                     for part, n in ((tensors[:3], lengths), (tensors[3:], lengths_k)))
    return [[*a, *b] for a, b in zip(queries, keys, strict=True)]


def results(qkv, upstream, lengths, lengths_k):
    found = value_and_gradients(of(lengths, lengths_k), list(qkv), upstream)
    return by_sequence(found, lengths, lengths_k)


def all_results():
    torch.manual_seed(0)
    lengths, lengths_k = [5, 100, 1, 64, 200], [5, 107, 9, 71, 200]
    return sum(results(*inputs(lengths, lengths_k, 4, 2, 32), lengths, lengths_k), [])
