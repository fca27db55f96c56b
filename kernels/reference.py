"""Every op in plain torch: the oracle of the tests, the text to learn from, and what runs where neither
Triton nor a compiled loop (kernels/cpu.py) does. Those of GRPO are in kernels/reference_grpo.py.

Maths is done in `promote_types(dtype, float32)`, so 16-bit inputs accumulate in fp32 and fp64 stays fp64.
Shapes: N sequences, T flat tokens, S padded length, H query heads, G kv heads, D head_dim, M d_model, F d_ff,
V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

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


# ---- log-probs, one slice of the vocabulary at a time


class LogprobSteps(NamedTuple):
    """What LinearLogprob does with a slice of logits, between its matrix products."""

    accumulate: Callable
    dlogits_of_exps: Callable
    dlogits_of_logits: Callable


def accumulate(
    logits: torch.Tensor, peak: torch.Tensor, total: torch.Tensor, weighted: torch.Tensor
) -> torch.Tensor:
    """Accumulate one more slice of logits l [T, slice] into each row's statistics, in place.

    These are, all [T], the maximum so far, and with x = l - maximum the sum of e^x and of e^x x. Returns
    e^x [T, slice], in the memory of the logits or not.
    """
    new_peak = torch.maximum(peak, logits.amax(-1))
    moved = peak - new_peak
    rescale = moved.exp()
    exps = logits.sub_(new_peak[:, None]).exp()
    weighted.add_(total * moved).mul_(rescale).add_(logits.mul_(exps).sum(-1))
    total.mul_(rescale).add_(exps.sum(-1))
    peak.copy_(new_peak)
    return exps


def dlogits_of_exps(
    exps: torch.Tensor,
    total: torch.Tensor,
    dlogp: torch.Tensor,
    targets: torch.Tensor,
    start: int,
) -> torch.Tensor:
    """dlogp (1[target] - p) of the slice [T, slice] from column `start`, in the memory of exps = total p."""
    dlogits = exps.mul_((-dlogp / total)[:, None])
    return add_at_targets(dlogits, dlogp, targets, start)


def dlogits_of_logits(
    logits: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    dlogp: torch.Tensor,
    dentropy: torch.Tensor | None,
    targets: torch.Tensor,
    start: int,
) -> torch.Tensor:
    """dlogp (1[target] - p) - dentropy p (log p + H) of a slice, in the memory of its logits."""
    log_p = logits.sub_(lse[:, None])
    if dentropy is None:
        dlogits = log_p.exp_().mul_(-dlogp[:, None])
    else:
        p = log_p.exp()
        dlogits = log_p.add_(entropy[:, None]).mul_(dentropy[:, None])
        dlogits = dlogits.add_(dlogp[:, None]).mul_(p).neg_()
    return add_at_targets(dlogits, dlogp, targets, start)


def add_at_targets(
    dlogits: torch.Tensor, dlogp: torch.Tensor, targets: torch.Tensor, start: int
) -> torch.Tensor:
    """Add dlogp [T] at each row's target, where that is in the slice from column `start`."""
    here = (targets >= start) & (targets < start + dlogits.shape[1])
    rows = torch.arange(len(targets), device=dlogits.device)[here]
    dlogits[rows, targets[here] - start] += dlogp[here]
    return dlogits


PLAIN_STEPS = LogprobSteps(accumulate, dlogits_of_exps, dlogits_of_logits)


class LinearLogprob(torch.autograd.Function):
    """One slice of the vocabulary at a time; kernels/linear_logprob.py has the maths.

    Backward computes each slice of logits again, but not the last, whose exponentials are kept. So at most
    two slices exist at one time, and a vocabulary of one slice is computed only once. `steps`: the three
    functions above, or compiled loops that do the same.
    """

    @staticmethod
    def logits(h, w, cap):
        logits = h @ w.to(h.dtype).T
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    @staticmethod
    def forward(ctx, h_TM, w_VM, targets_T, temperature, rows, softcap, steps):
        h = wide(h_TM if rows is None else h_TM.index_select(0, rows)) / temperature
        cap = None if softcap is None else softcap / temperature
        T, V = len(h), len(w_VM)

        # statistics of each row, over all slices
        peak = h.new_full((T,), torch.finfo(h.dtype).min)
        total, weighted = h.new_zeros(T), h.new_zeros(T)
        exps = None
        for start in range(0, V, VOCAB_SLICE):
            logits = LinearLogprob.logits(h, w_VM[start : start + VOCAB_SLICE], cap)
            exps = steps.accumulate(logits, peak, total, weighted)
        lse = peak + total.log()
        entropy = total.log() - weighted / total  # no difference of large numbers, never below 0

        chosen = torch.linalg.vecdot(h, w_VM[targets_T].to(h.dtype))
        if cap is not None:
            chosen = cap * torch.tanh(chosen / cap)
        ctx.save_for_backward(h_TM, w_VM, targets_T, rows, lse, entropy, total)
        ctx.temperature, ctx.cap, ctx.steps = temperature, cap, steps
        ctx.exps = exps if cap is None else None  # the first backward uses their memory up
        ctx.set_materialize_grads(False)  # a gradient that nobody asked for is None
        return chosen - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy):
        h_TM, w_VM, targets_T, rows, lse, entropy, total = ctx.saved_tensors
        last_exps, ctx.exps = ctx.exps, None
        dlogp = torch.zeros_like(lse) if dlogp is None else dlogp
        h = wide(h_TM if rows is None else h_TM.index_select(0, rows)) / ctx.temperature
        V = len(w_VM)
        dh = torch.zeros_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(w_VM) if ctx.needs_input_grad[1] else None
        for start in range(0, V, VOCAB_SLICE):
            w = w_VM[start : start + VOCAB_SLICE].to(h.dtype)
            # dl, the gradient of this slice's logits
            is_last = start + VOCAB_SLICE >= V
            if is_last and last_exps is not None and dentropy is None:
                dlogits = ctx.steps.dlogits_of_exps(last_exps, total, dlogp, targets_T, start)
            else:
                logits = LinearLogprob.logits(h, w, ctx.cap)
                slope = None if ctx.cap is None else 1 - (logits / ctx.cap).square()
                dlogits = ctx.steps.dlogits_of_logits(
                    logits, lse, entropy, dlogp, dentropy, targets_T, start
                )
                if slope is not None:
                    dlogits.mul_(slope)
            # dh += dl w, and this slice of dw = dl^T h
            if dh is not None:
                dh.addmm_(dlogits, w)
            if dw is not None:
                dw[start : start + VOCAB_SLICE] = (dlogits.T @ h).to(dw.dtype)
        if dh is not None:
            dh = (dh / ctx.temperature).to(h_TM.dtype)
            dh = dh if rows is None else put_rows(dh, rows, len(h_TM))
        return dh, dw, None, None, None, None, None


def linear_logprob(h, weight, targets, temperature: float, rows=None, softcap: float | None = None):
    """(logp [T], entropy [T]) of the targets; see kernels/linear_logprob.py."""
    return LinearLogprob.apply(h, weight, targets, temperature, rows, softcap, PLAIN_STEPS)


# ---- GRPO and its family; kernels/grpo.py has the maths


# a group whose rewards span less than this, or this share of the largest, has no signal: 0.1 * 3 is not 0.3
EQUAL_REWARDS = 1e-6
# log-ratios are cut off here, with gradient 0 beyond, so that exp() of them cannot overflow
MAX_LOG_RATIO = 20.0
OBJECTIVES = ("clip", "cispo", "gspo", "reinforce")
KL_ESTIMATORS = ("k1", "k2", "k3")
# loss and kl_loss are weighted sums; the others are plain sums over the live tokens, counted by "tokens"
POLICY_METRICS = (
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
    """[n] the sum of the x of each segment; segment: [len(x)], which one each x belongs to."""
    return x.new_zeros(n).index_add_(0, segment, x)


def grpo_advantages(rewards_N: torch.Tensor, offsets_G: torch.Tensor, normalise_std: bool = True):
    """(advantages [N], dead [G]): A = (r - mean) / std of the group (DeepSeekMath, eq. 3)."""
    r = wide(rewards_N)
    sizes = offsets_G.diff().long()
    G, n = len(sizes), sizes.clamp(min=1)
    group = torch.arange(G, device=r.device).repeat_interleave(sizes)

    # a group whose rewards are all the same, but for rounding, teaches nothing
    low = r.new_zeros(G).scatter_reduce(0, group, r, "amin", include_self=False)
    high = r.new_zeros(G).scatter_reduce(0, group, r, "amax", include_self=False)
    largest = torch.maximum(low.abs(), high.abs())
    dead = high - low < EQUAL_REWARDS * largest.clamp(min=1)

    # r - mean, in differences to the lowest reward, so that nothing cancels
    r = r - low[group]
    mean = segment_sum(r, group, G) / n
    advantages = r - mean[group]
    if normalise_std:
        std = (segment_sum(advantages.square(), group, G) / n).sqrt()
        advantages = advantages / std.masked_fill(dead, 1.0)[group]
    return advantages.masked_fill(dead[group], 0.0), dead.to(r.dtype)


def cut_off(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x within +-MAX_LOG_RATIO, with gradient 0 beyond; which were outside). A NaN keeps its gradient."""
    outside = x.detach().abs() > MAX_LOG_RATIO
    clamped = x.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(outside, clamped, x), outside


def kl_of_tokens(d: torch.Tensor, estimator: str) -> torch.Tensor:
    """k1, k2 or k3 of each token, from d = ref_logp - logp (Schulman 2020, "Approximating KL")."""
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d * d / 2
    return d.exp() - d - 1


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    objective: str,
    kl_estimator: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, metrics); kernels/grpo.py has the maths and the shapes, all [R] but offsets [N + 1]."""
    # 1. Only live tokens count: the others may hold anything, NaN too, and never reach exp().
    sizes = offsets.diff().long()
    N = len(sizes)
    sequence = torch.arange(N, device=logp.device).repeat_interleave(sizes)
    live = weights[: len(sequence)] != 0
    if ref_logp is None:
        live = live & (advantages[: len(sequence)] != 0)
    tokens = live.nonzero().flatten()
    logp, old_logp = wide(logp[tokens]), wide(old_logp[tokens])
    a, w = advantages[tokens].to(logp.dtype), weights[tokens].to(logp.dtype)

    # 2. How much likelier each token has become since it was sampled: r = e^x.
    x = logp - old_logp
    if objective == "gspo":  # the mean over the sequence; each token has the gradient of the whole
        sequence = sequence[tokens]
        n_live = torch.bincount(sequence, minlength=N)
        x = (segment_sum(x, sequence, N) / n_live.clamp(min=1))[sequence]
    x, outside = cut_off(x)
    ratio = x.exp()
    clipped = ratio.detach().clamp(1 - clip_low, 1 + clip_high)

    # 3. The objective J of each token, and which tokens the clip holds back.
    too_low, too_high = ratio < 1 - clip_low, ratio > 1 + clip_high
    if (
        objective == "reinforce"
    ):  # no ratio in it: nothing to clip, and no gradient to lose to the cut
        gain = a * logp
        too_low, too_high = torch.zeros_like(outside), torch.zeros_like(outside)
    elif objective == "cispo":
        gain = clipped * a * torch.where(outside, logp.detach(), logp)
    else:  # the smaller one for either sign of A: for A < 0 the gradient stays above 1 + clip_high
        gain = torch.where(ratio * a > clipped * a, clipped * a, ratio * a)
        too_low, too_high = too_low & (a < 0), too_high & (a > 0)
    loss = -(gain * w).sum()

    # 4. The KL to the reference.
    kl = logp.new_zeros(())
    if ref_logp is not None:
        d, d_outside = cut_off(wide(ref_logp[tokens]) - logp)
        outside = outside | d_outside
        kl = (kl_of_tokens(d, kl_estimator) * w).sum()
        loss = loss + kl_coef * kl

    # 5. What a log shows, in the order of POLICY_METRICS.
    with torch.no_grad():
        metrics = [
            loss,
            logp.new_tensor(len(tokens)),
            too_low.sum(),
            too_high.sum(),
            -x.sum(),
            (ratio - 1 - x).sum(),
            ratio.sum(),
            ratio.amax() if len(tokens) else loss,
            outside.sum(),
            kl,
        ]
        return loss, torch.stack(metrics)
