"""Every op in plain torch: the oracle of the tests, the text to learn from, and what runs where neither
Triton nor a compiled loop (kernels/cpu.py) does. Those of GRPO are in kernels/reference_grpo.py.

Maths is done in `promote_types(dtype, float32)`, so 16-bit inputs accumulate in fp32 and fp64 stays fp64.
Shapes: N sequences, T flat tokens, S padded length, H query heads, G kv heads, D head_dim, M d_model, F d_ff,
V vocabulary.
"""

import sys
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

VOCAB_SLICE = 4096  # columns of logits that exist at one time in linear_logprob
QUERY_BLOCK = 128  # rows of attention scores that exist at one time


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rmsnorm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. With a residual: the pair (that of
    x + residual, x + residual)."""
    if residual is not None:
        total = x + residual
        return rmsnorm(total, weight, eps), total
    n = wide(x)
    return (n * (n.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + D/2]) by the angle of (token, i). x: [T, H, D]; cos, sin: [T, D/2]."""
    (first, second), cos, sin = wide(x).chunk(2, -1), cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, for [..., 2F] that holds gate, then up."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def put_rows(x: torch.Tensor, rows: torch.Tensor, n: int) -> torch.Tensor:
    """[n, ...] that holds x at the distinct `rows`, and 0 elsewhere."""
    return x.new_zeros(n, *x.shape[1:]).index_copy_(0, rows, x)


class PutRows(torch.autograd.Function):
    """put_rows and its gradient, a plain copy."""

    @staticmethod
    def forward(ctx, x, rows, n):
        ctx.save_for_backward(rows)
        return put_rows(x, rows, n)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy.index_select(0, ctx.saved_tensors[0]), None, None


class TakeRows(torch.autograd.Function):
    """x[rows] for distinct rows: the gradient is a plain copy back, where autograd's own has to add up."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.n = len(x)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return put_rows(dy, ctx.saved_tensors[0], ctx.n), None


def length_runs(lengths: list[int], ends: Iterable[int] = ()) -> list[tuple[int, int]]:
    """Cut the sequences into runs (first, end) that waste little when each is padded to its own longest.

    A run ends where padding would pass a quarter of it, so a batch that is sorted by length pads least; and
    before the sequences `ends`.
    """
    runs, first, longest, total, ends = [], 0, 0, 0, set(ends)
    for i, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        if i in ends or i - first >= 8 and (i + 1 - first) * longest > 1.25 * total:
            runs.append((first, i))
            first, longest, total = i, length, length
    return [*runs, (first, len(lengths))]


def causal_mask(
    rows: range, n_keys: int, shift, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """0 where query i may see key j, -inf elsewhere: 0 <= i + shift - j, and < window where there is one.

    shift: how many more keys than queries a sequence has, a number or a tensor [n, 1, 1, 1].
    """
    i = torch.arange(rows.start, rows.stop, device=like.device)[:, None] + shift
    j = torch.arange(n_keys, device=like.device)
    hidden = (j > i) if window is None else (j > i) | (j <= i - window)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(
        hidden, float("-inf")
    )


def attention_scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """scale q k^T, bent by softcap tanh(. / softcap) where asked. [n, R, B, D], [n, S, D] -> [n, R, B, S]."""
    scores = (q.flatten(1, 2) @ k.transpose(1, 2)).mul_(scale).view(*q.shape[:3], k.shape[1])
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


class Attention(torch.autograd.Function):
    """One block of queries at a time against the keys up to its end: never all S x S scores of a long run.

    With P = softmax(s + mask), O = P v, L = log sum exp and upstream gradients dO and dL:
        dv = P^T dO     ds = P (dO v^T - rowsum(dO O) + dL)     dq = scale ds k     dk = scale ds^T q
    and ds times 1 - (s / softcap)^2 where the scores were bent. Backward computes P anew, unless a run is one
    block only: then it is small and kept.

    q: [n, R, Sq, D], n sequences x kv heads, R query heads for each; k, v: [n, Sk, D]; shift: see
    causal_mask, max_shift its largest value. Returns O [n, R, Sq, D] and L [n, R, Sq], None unless asked for.
    A row that sees no key gives 0 and -inf.
    """

    @staticmethod
    def probs(q, k, rows, scale, shift, max_shift, window, softcap, with_lse):
        n_keys = min(max(rows.stop + max_shift, 1), k.shape[1])
        scores = attention_scores(q[:, :, rows.start : rows.stop], k[:, :n_keys], scale, softcap)
        mask = causal_mask(rows, n_keys, shift, window, q)
        bend = None if softcap is None else 1 - (scores / softcap).square()
        p = scores.add_(mask).softmax(-1)
        if not isinstance(shift, int):  # rows without a key came out as NaN
            p = p.masked_fill_(mask == float("-inf"), 0.0)
        return p, scores.logsumexp(-1) if with_lse else None, bend

    @staticmethod
    def forward(ctx, q, k, v, scale, shift, max_shift, window, softcap, with_lse):
        blocks = [
            range(start, min(start + QUERY_BLOCK, q.shape[2]))
            for start in range(0, q.shape[2], QUERY_BLOCK)
        ]
        ctx.args, ctx.blocks = (scale, shift, max_shift, window, softcap), blocks
        outs, lses, kept = [], [], None
        for rows in blocks:
            p, lse, bend = Attention.probs(q, k, rows, *ctx.args, with_lse)
            outs.append((p.flatten(1, 2) @ v[:, : p.shape[-1]]).view(*p.shape[:3], v.shape[-1]))
            lses.append(lse)
            kept = p if len(blocks) == 1 and bend is None else None
        out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
        ctx.save_for_backward(q, k, v, out, kept)
        ctx.set_materialize_grads(False)
        return out, torch.cat(lses, 2) if with_lse else None

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, kept = ctx.saved_tensors
        dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        dout = torch.zeros_like(out) if dout is None else dout
        for rows in ctx.blocks:
            here = slice(rows.start, rows.stop)
            p, _, bend = (
                (kept, None, None)
                if kept is not None
                else Attention.probs(q, k, rows, *ctx.args, False)
            )
            n_keys = p.shape[-1]
            row_sum = (dout[:, :, here] * out[:, :, here]).sum(-1, keepdim=True)
            if dlse is not None:
                row_sum = row_sum - dlse[:, :, here, None]
            q_rows, p_rows, do_rows = (
                x.flatten(1, 2) for x in (q[:, :, here], p, dout[:, :, here])
            )
            dv[:, :n_keys].baddbmm_(p_rows.transpose(1, 2), do_rows)
            ds = (do_rows @ v[:, :n_keys].transpose(1, 2)).sub_(row_sum.flatten(1, 2)).mul_(p_rows)
            ds = (
                ds.mul_(ctx.args[0])
                if bend is None
                else ds.mul_(bend.flatten(1, 2)).mul_(ctx.args[0])
            )
            dqs.append((ds @ k[:, :n_keys]).view(q.shape[0], q.shape[1], len(rows), -1))
            dk[:, :n_keys].baddbmm_(ds.transpose(1, 2), q_rows)
        return torch.cat(dqs, 2) if len(dqs) > 1 else dqs[0], dk, dv, *[None] * 6


def padded_places(lengths: list[int], runs: list[tuple[int, int]], device) -> torch.Tensor:
    """[T] the place of each token when every sequence is padded to the longest of its run."""
    firsts, place = [], 0
    for first, end in runs:
        longest = max(lengths[first:end])
        firsts += [place + n * longest for n in range(end - first)]
        place += longest * (end - first)
    lengths_N = torch.tensor(lengths)
    shift = torch.tensor(firsts) - (lengths_N.cumsum(0) - lengths_N)
    return (torch.arange(sum(lengths)) + shift.repeat_interleave(lengths_N)).to(device)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
):
    """Causal attention within each sequence, the last query at the last key. q: [Tq, H, D]; k, v: [Tk, G, D].

    Runs of sequences alike in length are padded to their longest. Returns out, and lse [Tq, H] if asked for.
    """
    (_, H, D), G, device = q.shape, k.shape[1], q.device
    lengths_q = cu_seqlens.diff().tolist()
    alone = cu_seqlens_k is cu_seqlens
    lengths_k = lengths_q if alone else cu_seqlens_k.diff().tolist()
    more = [b - a for a, b in zip(lengths_q, lengths_k, strict=True)]  # keys than queries
    # sequences with keys from elsewhere follow those without in a batch of shared prefixes
    runs = length_runs(
        [max(pair) for pair in zip(lengths_q, lengths_k, strict=True)],
        [i for i in range(1, len(more)) if (more[i] > 0) != (more[i - 1] > 0)],
    )

    def layout_of(
        lengths,
    ):  # (sequences, padded length) of each run, and each token's place if any is padded
        shapes = [(end - first, max(lengths[first:end])) for first, end in runs]
        padded = sum(n * longest for n, longest in shapes) > sum(lengths)
        return shapes, padded_places(lengths, runs, device) if padded else None

    def lay_out(x, shapes, places):  # [T, heads, D] -> for each run [n G, heads / G, longest, D]
        x, R, sizes = wide(x), x.shape[1] // G, [n * longest for n, longest in shapes]
        if places is not None:
            x = PutRows.apply(x, places, sum(sizes))
        return [
            part.view(n, longest, G, R, D).permute(0, 2, 3, 1, 4).reshape(n * G, R, longest, D)
            for part, (n, longest) in zip(x.split(sizes), shapes, strict=True)
        ]

    layout_q = layout_of(lengths_q)
    layout_k = layout_q if alone else layout_of(lengths_k)
    qs, ks, vs = lay_out(q, *layout_q), lay_out(k, *layout_k), lay_out(v, *layout_k)
    places = layout_q[1]
    outs, lses = [], []
    # padding lies behind every real token of its sequence, so the causal mask alone hides it
    for (first, end), q_run, k_run, v_run in zip(runs, qs, ks, vs, strict=True):
        n, longest = end - first, q_run.shape[2]
        shifts = more[first:end]
        shift = shifts[0]
        if min(shifts) != max(shifts) or shift < 0:  # not all alike, or some see no key
            shift = torch.tensor(shifts, device=device).repeat_interleave(G).view(-1, 1, 1, 1)
        if k_run.shape[2] == 0:  # one key that nobody sees
            k_run, v_run = (F.pad(x, (0, 0, 0, 1)) for x in (k_run, v_run))
        if longest:
            out, lse = Attention.apply(
                q_run,
                k_run.squeeze(1),
                v_run.squeeze(1),
                scale,
                shift,
                max(shifts),
                window,
                softcap,
                return_lse,
            )
            outs.append(out.view(n, G, -1, longest, D).permute(0, 3, 1, 2, 4).reshape(-1, H, D))
            if return_lse:
                lses.append(lse.view(n, G, -1, longest).permute(0, 3, 1, 2).reshape(-1, H))

    def collect(parts):
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        return x if places is None else TakeRows.apply(x, places)

    if not outs:  # no query at all
        return (q, wide(q[..., 0])) if return_lse else q
    out = collect(outs).to(q.dtype)
    return (out, collect(lses)) if return_lse else out


def decode_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One new token a row against that row's pages. q: [B, H, D]; pages: [P, G, page, D]; table: [B, W]."""
    (B, H, D), (_, G, page, _) = q.shape, k_pages.shape
    used = table[:, : max(1, -(-int(lengths.max()) // page)) if B else 1].long()
    k, v = (wide(x[used]).transpose(1, 2).reshape(B, G, -1, D) for x in (k_pages, v_pages))
    scores = (wide(q).view(B, G, H // G, D) * scale) @ k.transpose(-1, -2)
    unseen = (torch.arange(k.shape[2], device=q.device) >= lengths[:, None])[:, None, None]
    probs = scores.masked_fill_(unseen, float("-inf")).softmax(-1)
    out = probs @ v.masked_fill(unseen.transpose(-1, -2), 0.0)  # what nobody sees may be NaN
    return out.masked_fill((lengths == 0)[:, None, None, None], 0.0).reshape(B, H, D).to(q.dtype)


def take_in(
    logits: torch.Tensor, peak: torch.Tensor, total: torch.Tensor, weighted: torch.Tensor
) -> torch.Tensor:
    """One more slice of logits [T, slice] into a row's running maximum, sum exp(x) and sum exp(x) x, each
    [T], with x = l - maximum. Returns exp(x), in the memory of the logits or not."""
    new_peak = torch.maximum(peak, logits.amax(-1))
    moved = peak - new_peak
    rescale = moved.exp()
    exps = logits.sub_(new_peak[:, None]).exp()
    weighted.add_(total * moved).mul_(rescale).add_(logits.mul_(exps).sum(-1))
    total.mul_(rescale).add_(exps.sum(-1))
    peak.copy_(new_peak)
    return exps


def dlogits_of_exps(exps, total, dlogp, targets, start: int) -> torch.Tensor:
    """dlogp (1 at the target - p) [T, slice] with p = exp(x) / total, in the memory of exp(x), for the slice
    from column `start` on."""
    return add_at_targets(exps.mul_((-dlogp / total)[:, None]), dlogp, targets, start)


def dlogits_of_logits(logits, lse, entropy, dlogp, dentropy, targets, start: int) -> torch.Tensor:
    """dlogp (1 at the target - p) - dentropy p (log p + H), in the memory of the logits; dentropy may be
    None."""
    log_p = logits.sub_(lse[:, None])
    if dentropy is None:
        dlogits = log_p.exp_().mul_(-dlogp[:, None])
    else:
        p = log_p.exp()
        dlogits = (
            log_p.add_(entropy[:, None]).mul_(dentropy[:, None]).add_(dlogp[:, None]).mul_(p).neg_()
        )
    return add_at_targets(dlogits, dlogp, targets, start)


def add_at_targets(dlogits, dlogp, targets, start: int) -> torch.Tensor:
    here = (targets >= start) & (targets < start + dlogits.shape[1])
    dlogits[torch.arange(len(targets), device=dlogits.device)[here], targets[here] - start] += (
        dlogp[here]
    )
    return dlogits


class LinearLogprob(torch.autograd.Function):
    """kernels/linear_logprob.py has the maths; here one slice of V at a time. Backward computes each slice of
    logits anew but the last, whose exponentials are kept: at most two exist at one time, and a vocabulary of
    one slice is computed only once. `steps` has the three functions above, or the loops that do the same."""

    @staticmethod
    def logits(h, w, cap):
        logits = h @ w.to(h.dtype).T
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    @staticmethod
    def forward(ctx, h_TM, w_VM, targets_T, temperature, rows, softcap, steps):
        h = wide(h_TM if rows is None else h_TM.index_select(0, rows)) / temperature
        cap = None if softcap is None else softcap / temperature
        T = h.shape[0]
        peak = h.new_full((T,), torch.finfo(h.dtype).min)
        total, weighted = h.new_zeros(T), h.new_zeros(T)
        exps = None
        for start in range(0, w_VM.shape[0], VOCAB_SLICE):
            exps = steps.take_in(
                LinearLogprob.logits(h, w_VM[start : start + VOCAB_SLICE], cap),
                peak,
                total,
                weighted,
            )
        lse = peak + total.log()
        entropy = (
            total.log() - weighted / total
        )  # no difference of large numbers, and never below 0
        chosen = torch.linalg.vecdot(h, w_VM[targets_T].to(h.dtype))
        chosen = chosen if cap is None else cap * torch.tanh(chosen / cap)
        ctx.save_for_backward(h_TM, w_VM, targets_T, rows, lse, entropy, total)
        ctx.temperature, ctx.cap, ctx.steps = temperature, cap, steps
        ctx.exps = exps if cap is None else None  # the first backward uses their memory up
        ctx.set_materialize_grads(
            False
        )  # a gradient that nobody asked for is None, and costs nothing
        return chosen - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy):
        h_TM, w_VM, targets_T, rows, lse, entropy, total = ctx.saved_tensors
        last_exps, ctx.exps = ctx.exps, None
        dlogp = torch.zeros_like(lse) if dlogp is None else dlogp
        h = wide(h_TM if rows is None else h_TM.index_select(0, rows)) / ctx.temperature
        dh = torch.zeros_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(w_VM) if ctx.needs_input_grad[1] else None
        for start in range(0, w_VM.shape[0], VOCAB_SLICE):
            w, bend = w_VM[start : start + VOCAB_SLICE].to(h.dtype), None
            if dentropy is None and last_exps is not None and start + VOCAB_SLICE >= w_VM.shape[0]:
                dlogits = ctx.steps.dlogits_of_exps(last_exps, total, dlogp, targets_T, start)
            else:
                logits = LinearLogprob.logits(h, w, ctx.cap)
                bend = None if ctx.cap is None else 1 - (logits / ctx.cap).square()
                dlogits = ctx.steps.dlogits_of_logits(
                    logits, lse, entropy, dlogp, dentropy, targets_T, start
                )
            if bend is not None:
                dlogits.mul_(bend)
            if dh is not None:
                dh.addmm_(dlogits, w)
            if dw is not None:
                dw[start : start + VOCAB_SLICE] = (dlogits.T @ h).to(dw.dtype)
        dh = None if dh is None else (dh / ctx.temperature).to(h_TM.dtype)
        dh = dh if dh is None or rows is None else put_rows(dh, rows, len(h_TM))
        return dh, dw, None, None, None, None, None


def linear_logprob(h, weight, targets, temperature: float, rows=None, softcap: float | None = None):
    """(logp, entropy); see kernels/linear_logprob.py."""
    return LinearLogprob.apply(
        h, weight, targets, temperature, rows, softcap, sys.modules[__name__]
    )


EQUAL_REWARDS = (
    1e-6  # a group that spans less, or this share, has no signal: 0.1 * 3 and 0.3 are the same
)


MAX_LOG_RATIO = (
    20.0  # log-ratios are cut off here, gradient 0 beyond: exp() of them can not overflow
)


GRPO_OBJECTIVES = ("clip", "cispo", "gspo", "reinforce")


GRPO_KL_ESTIMATORS = ("k1", "k2", "k3")


# loss and kl_loss are weighted; the others are sums over the live tokens, how many there are is "tokens"
GRPO_METRICS = (
    "loss",
    "tokens",
    "clipped_low",
    "clipped_high",
    "k1",
    "k3",
    "ratio",
    "ratio_max",
    "cut_off",
    "kl_loss",
)


def segment_sum(x: torch.Tensor, segment: torch.Tensor, n: int) -> torch.Tensor:
    return x.new_zeros(n).index_add_(0, segment, x)


def grpo_advantages(rewards_N: torch.Tensor, offsets_G: torch.Tensor, normalise_std: bool = True):
    """(advantages [N], dead [G]); kernels/grpo.py has the maths."""
    r, sizes = wide(rewards_N), offsets_G.diff().long()
    group, n = (
        torch.arange(len(sizes), device=r.device).repeat_interleave(sizes),
        sizes.clamp(min=1),
    )
    low, high = (
        r.new_zeros(len(sizes)).scatter_reduce(0, group, r, which, include_self=False)
        for which in ("amin", "amax")
    )
    dead = high - low < EQUAL_REWARDS * torch.maximum(low.abs(), high.abs()).clamp(min=1)
    r = r - low[group]  # differences do not cancel
    centred = r - (segment_sum(r, group, len(sizes)) / n)[group]
    std = (segment_sum(centred.square(), group, len(sizes)) / n).sqrt()
    advantages = centred / std.masked_fill(dead, 1.0)[group] if normalise_std else centred
    return advantages.masked_fill(dead[group], 0.0), dead.to(r.dtype)


def grpo_loss(
    logp,
    old_logp,
    advantages,
    weights,
    offsets,
    ref_logp,
    clip_low,
    clip_high,
    kl_coef,
    objective,
    kl_estimator,
):
    """(loss, metrics); kernels/grpo.py has the maths, kernels.grpo.grpo_loss the shapes."""
    sizes = offsets.diff().long()
    sequence = torch.arange(len(sizes), device=logp.device).repeat_interleave(sizes)
    per_token = advantages.shape != weights.shape
    live = (weights != 0) & ((advantages != 0) if ref_logp is None and not per_token else True)
    tokens = live[sequence].nonzero().flatten()  # the others never reach exp()
    sequence, logp, old_logp = sequence[tokens], wide(logp[tokens]), wide(old_logp[tokens])
    a = advantages.to(logp.dtype)[tokens if per_token else sequence]
    w = weights.to(logp.dtype)[sequence]
    x = logp - old_logp
    if objective == "gspo":  # the sequence's mean; each token has the gradient of the whole
        x = (segment_sum(x, sequence, len(sizes)) / sizes.clamp(min=1))[sequence]
    cut = x.detach().abs() > MAX_LOG_RATIO
    x = torch.where(
        cut, x.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), x
    )  # a NaN keeps its gradient, NaN
    ratio = x.exp()
    clipped = ratio.detach().clamp(1 - clip_low, 1 + clip_high)
    if (
        objective == "reinforce"
    ):  # no ratio in it: nothing to clip, and no gradient to lose to the cut
        gain, low, high = a * logp, torch.zeros_like(cut), torch.zeros_like(cut)
    elif objective == "cispo":
        gain = clipped * a * torch.where(cut, logp.detach(), logp)
        low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    else:
        # the pessimist's choice for either sign of A: for A < 0 the gradient stays above 1 + clip_high
        gain = torch.where(ratio * a > clipped * a, clipped * a, ratio * a)
        low, high = (ratio < 1 - clip_low) & (a < 0), (ratio > 1 + clip_high) & (a > 0)
    loss, kl = -(gain * w).sum(), logp.new_zeros(())
    if ref_logp is not None:
        d = wide(ref_logp[tokens]) - logp
        d_cut = d.detach().abs() > MAX_LOG_RATIO
        cut, d = cut | d_cut, torch.where(d_cut, d.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), d)
        k = -d if kl_estimator == "k1" else d * d / 2 if kl_estimator == "k2" else d.exp() - d - 1
        kl = (k * w).sum()
        loss = loss + kl_coef * kl
    with torch.no_grad():
        n, largest = logp.new_tensor(len(tokens)), ratio.amax() if len(tokens) else loss
        metrics = torch.stack(
            [
                loss,
                n,
                low.sum(),
                high.sum(),
                -x.sum(),
                (ratio - 1 - x).sum(),
                ratio.sum(),
                largest,
                cut.sum(),
                kl,
            ]
        )
    return loss, metrics
