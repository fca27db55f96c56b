"""The ops once more, as loops and textbook formulas: what tests hold the real ones against, in fp64."""
import math

import numpy as np
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


def assert_rounded_once(got, expected, first=1):
    """The maths is in fp32: what is left is one rounding to the dtype of the result.

    first: how often the first of them is rounded.
    """
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        if not e.numel():
            continue
        half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[g.dtype]
        half_ulp *= first if i == 0 else 1
        assert bool(((g.double() - e).abs() <= 1.01 * half_ulp * e.abs() + 5e-6 * e.abs().max()).all()), i


def naive_attention(q, k, v, lengths, scale=None, lengths_k=None, window=None, softcap=None, lse=False):
    """One sequence and one formula at a time; rows that see no key give 0 and -inf."""
    per_kv_head = q.shape[1] // k.shape[1]
    served_by = [h // per_kv_head for h in range(q.shape[1])]
    outs, lses, start, start_k = [q.new_zeros(0, q.shape[1], v.shape[2])], [q[:0, :, 0]], 0, 0
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


def naive_decode_attention(q, keys, values, scale=None, window=None, softcap=None):
    """[B, H, D] row by row, in the dtype of its inputs: one query of each row against its keys [n, G, D]."""
    outs, R = [], q.shape[1] // keys[0].shape[1]
    for q_row, k, v in zip(q, keys, values, strict=True):
        k, v = (x[-window if window else None:].repeat_interleave(R, 1) for x in (k, v))
        scores = torch.einsum("hd,nhd->hn", q_row, k) * (scale or q.shape[-1] ** -0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        outs.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v))
    return torch.stack(outs)


def naive_logprob(h, w, targets, temperature, softcap=None):
    logits = h @ w.T if softcap is None else softcap * torch.tanh(h @ w.T / softcap)
    log_p = (logits / temperature).log_softmax(-1)
    return log_p[torch.arange(len(targets)), targets], -(log_p.exp() * log_p).sum(-1)


def rmsnorm_of_open_models(x, w, eps):
    """LlamaRMSNorm and Qwen2RMSNorm of transformers, in their own steps: the norm in fp32, rounded, then the
    weight in the model's dtype."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return w.to(x.dtype) * normed.to(x.dtype)


def naive_rmsnorm(x, w, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w


def naive_swiglu(x):
    gate, up = x.chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def naive_moe(x, gates, experts, gate_up, down):
    """Each expert's MLP on all tokens, times its gate, which is 0 for most of them."""
    y = 0.0
    for e, (up, back) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        gate = (gates * (experts == e)).sum(1, keepdim=True)
        y = y + gate * (naive_swiglu(x @ up.T) @ back.T)
    return y


def naive_rope(x, positions, theta, rescale=lambda frequency: frequency):
    D = x.shape[-1]
    frequencies = [rescale(theta ** (-2 * i / D)) for i in range(D // 2)]
    turns = [[complex(math.cos(p * f), math.sin(p * f)) for f in frequencies] for p in positions.tolist()]
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    z = z * torch.tensor(turns, dtype=torch.complex128)[:, None]
    return torch.cat([z.real, z.imag], -1)


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def naive_advantages(rewards, sizes, normalise, tolerance=1e-6):
    """One group at a time; ([N] advantages, [G] which groups are dead)."""
    advantages, dead, start = [], [], 0
    for size in sizes:
        group = [float(r) for r in rewards[start : start + size]]
        start += size
        dead.append(size == 0 or max(group) - min(group) < tolerance)
        mean = sum(group) / max(size, 1)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / max(size, 1)) if normalise else 1.0
        advantages += [0.0 if dead[-1] else (r - mean) / std for r in group]
    return advantages, dead


def naive_policy_loss(logp, old, ref, advantages, weights, sizes, objective, bound, clip_low, clip_high,
                      kl_coef, kl_estimator="k3"):
    """One token at a time, in Python's floats, all of them lists with one number per token: (gradient of each
    token's logp, metrics by name)."""
    grads, start = [], 0
    m = dict.fromkeys(("loss", "tokens", "clipped_low", "clipped_high", "k1", "k3", "ratio", "ratio_max",
                       "cut_off", "kl_loss"), 0.0)
    for size in sizes:
        tokens = range(start, start + size)
        start += size
        live = [t for t in tokens if weights[t] != 0 and (advantages[t] != 0 or ref is not None)]
        for t in tokens:
            if t not in live:
                grads.append(0.0)
                continue
            a, w = advantages[t], weights[t]
            x = logp[t] - old[t]
            if objective == "gspo":
                x = sum(logp[u] - old[u] for u in live) / len(live)
            d = 0.0 if ref is None else ref[t] - logp[t]
            x_cut, d_cut = abs(x) > bound, abs(d) > bound
            x, d = (min(max(y, -bound), bound) for y in (x, d))
            r = math.exp(x)
            c = min(max(r, 1 - clip_low), 1 + clip_high)
            clips = objective != "reinforce"
            if not clips:
                gain, slope = a * logp[t], a
            elif objective == "cispo":
                gain, slope = c * a * logp[t], c * a
            elif objective == "dppo":
                moved = (math.exp(logp[t]) - math.exp(old[t])) * (1 if a > 0 else -1)
                gain = slope = 0.0 if moved > (clip_high if a > 0 else clip_low) else r * a
            else:
                gain = min(r * a, c * a)
                slope = r * a if 1 - clip_low <= r <= 1 + clip_high or r * a < c * a else 0.0
            k, k_slope = {"k1": (-d, 1.0), "k2": (d * d / 2, -d),
                          "k3": (math.exp(d) - d - 1, 1 - math.exp(d))}[kl_estimator]
            grads.append(w * (-slope * (not x_cut or not clips)
                              + kl_coef * k_slope * (ref is not None and not d_cut)))
            m["loss"] += w * (-gain + kl_coef * k)
            m["tokens"] += 1
            low, high = clips and r < 1 - clip_low, clips and r > 1 + clip_high
            if objective == "dppo":
                low = high = gain == 0
            m["clipped_low"] += low and (objective == "cispo" or a < 0)
            m["clipped_high"] += high and (objective == "cispo" or a > 0)
            m["k1"] -= x
            m["k3"] += r - 1 - x
            m["ratio"] += r
            m["ratio_max"] = max(m["ratio_max"], r)
            m["cut_off"] += x_cut or d_cut
            m["kl_loss"] += w * k
    return grads, m


def same(got, expected):
    """Bit for bit, NaN like NaN."""
    pairs = zip(got, expected, strict=True)
    return all(np.array_equal(g.detach(), e.detach(), equal_nan=True) for g, e in pairs)
