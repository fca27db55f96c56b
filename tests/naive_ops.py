"""The ops once more, as loops and textbook formulas: what tests hold the real ones against, in fp64."""
import math

import torch


def value_and_gradients(op, inputs, upstream):
    """[outputs..., gradients of inputs...] for upstream gradients; None where an output gets none."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = op(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    used = [(y, dy) for y, dy in zip(outs, upstream, strict=True) if dy is not None]
    return [*outs, *torch.autograd.grad([y for y, _ in used], leaves, [dy for _, dy in used])]


def assert_close(got, expected, tolerance):
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert g.shape == e.shape, i
        if e.numel():
            error = (g.detach().double() - e.detach()).abs().max().item()
            assert error <= tolerance * max(1.0, e.detach().abs().max().item()), f"number {i} is {error} off"


def assert_rounded_once(got, expected):
    """The maths is in fp32: what is left is one rounding to the dtype of the result."""
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        if not e.numel():
            continue
        half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[g.dtype]
        assert bool(((g.double() - e).abs() <= 1.01 * half_ulp * e.abs() + 5e-6 * e.abs().max()).all()), i


def naive_attention(q, k, v, lengths, scale=None, lengths_k=None, window=None, softcap=None, lse=False):
    """One sequence and one formula at a time; rows that see no key give 0 and -inf."""
    per_kv_head = q.shape[1] // k.shape[1]
    served_by = [h // per_kv_head for h in range(q.shape[1])]
    outs, lses, start, start_k = [q[:0]], [q[:0, :, 0]], 0, 0
    for n, m in zip(lengths, lengths_k or lengths, strict=True):
        qs = q[start : start + n]
        ks, vs = (x[start_k : start_k + m, served_by] for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", qs, ks) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = (torch.arange(n)[:, None] + m - n - torch.arange(m)).to(q.device)
        unseen = (distance < 0) | (distance >= (window or m + n + 1))
        blind = unseen.all(1)[:, None]
        p = scores.masked_fill(unseen & ~blind, float("-inf")).softmax(-1).masked_fill(blind, 0)
        outs.append(torch.einsum("hij,jhd->ihd", p, vs))
        lses.append(scores.masked_fill(unseen, float("-inf")).logsumexp(-1).T)
        start, start_k = start + n, start_k + m
    return (torch.cat(outs), torch.cat(lses)) if lse else torch.cat(outs)


def naive_logprob(h, w, targets, temperature):
    log_p = (h @ w.T / temperature).log_softmax(-1)
    return log_p[torch.arange(len(targets)), targets], -(log_p.exp() * log_p).sum(-1)


def naive_rmsnorm(x, w, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w


def naive_swiglu(x):
    gate, up = x.chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def naive_rope(x, positions, theta):
    D = x.shape[-1]
    turns = [[complex(math.cos(a), math.sin(a)) for a in (p * theta ** (-2 * i / D) for i in range(D // 2))]
             for p in positions.tolist()]
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    z = z * torch.tensor(turns, dtype=torch.complex128)[:, None]
    return torch.cat([z.real, z.imag], -1)


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()
