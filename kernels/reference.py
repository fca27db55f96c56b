"""Every op in plain PyTorch: the oracle of the tests, the text to learn from, and what runs where
neither Triton nor a compiled loop does.

Maths is done in `promote_types(dtype, float32)`: 16-bit inputs accumulate in fp32, and fp64 stays
fp64. The op files have the formulas and the sources; rmsnorm, rope, swiglu and decode_attention are
those formulas. Attention and linear_logprob are a little longer than the formula, for a CPU trains
on them: they never hold all scores of a long sequence, or all logits.

Shapes: N sequences, T flat tokens, S padded length, H query heads, G kv heads, R query heads per kv
head, D head_dim, E width of a value, M d_model, F d_ff, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

VOCAB_SLICE = 4096  # columns of logits that exist at one time in linear_logprob
QUERY_BLOCK = 128  # rows of attention scores that exist at one time
POSITIONS = 32768  # of a cache of latents that are read at one time


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp32 or fp64, the dtype of the maths."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


# ---- elementwise ops


def rmsnorm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; rounded before the weight, too.

    With a residual: the pair (rmsnorm of x + residual, x + residual).
    """
    if residual is not None:
        total = x + residual
        return rmsnorm(total, weight, eps), total
    x_wide = wide(x)
    mean_square = x_wide.square().mean(-1, keepdim=True)
    normed = (x_wide * (mean_square + eps).rsqrt()).to(x.dtype)
    return (wide(normed) * weight).to(x.dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x [T, H, D] by the angles of cos and sin [T, D/2]."""
    first, second = wide(x).chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.to(x.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, for [..., 2F] that holds gate, then up."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def moe_mlp(x_TM, gates_TK, experts_TK, gate_up, down) -> torch.Tensor:
    """A mixture of experts, token by token: y[t] = sum over k of gates[t, k] * MLP_e(x[t]), where e
    is experts[t, k]. gate_up [E, 2F, M], down [E, M, F]."""
    result = [wide(x_TM[:0])]
    for t, x in enumerate(wide(x_TM)):
        y = torch.zeros_like(x)
        for k, e in enumerate(experts_TK[t].tolist()):
            hidden = swiglu(wide(gate_up[e]) @ x)
            y = y + gates_TK[t, k] * (wide(down[e]) @ hidden)
        result.append(y[None])
    return torch.cat(result).to(x_TM.dtype)


# ---- rows


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
    """x[rows] for distinct rows: its gradient is a plain copy, where autograd's adds up."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.n = len(x)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return put_rows(dy, ctx.saved_tensors[0], ctx.n), None


# ---- attention


def length_runs(lengths: list[int], ends: Iterable[int] = ()) -> list[tuple[int, int]]:
    """Cut the sequences into runs (first, end) that waste little when each is padded to its own
    longest.

    A run ends where padding would pass a quarter of it, so a batch that is sorted by length pads
    least; and before the sequences `ends`.
    """
    ends = set(ends)
    runs = []
    first, longest, total = 0, 0, 0
    for i, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        wasteful = i - first >= 8 and (i + 1 - first) * longest > 1.25 * total
        if i in ends or wasteful:
            runs.append((first, i))
            first, longest, total = i, length, length
    return [*runs, (first, len(lengths))]


def causal_mask(
    rows: range, n_keys: int, shift, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """0 where query i sees key j, -inf elsewhere: 0 <= i + shift - j, and < window where there is
    one.

    shift: how many more keys than queries a sequence has, a number or a tensor [n, 1, 1, 1].
    """
    i = torch.arange(rows.start, rows.stop, device=like.device)[:, None] + shift
    j = torch.arange(n_keys, device=like.device)
    hidden = j > i
    if window is not None:
        hidden = hidden | (j <= i - window)
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, float("-inf"))


def attention_scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """scale q k^T, softcapped where asked: [n, R, B, D], [n, S, D] -> [n, R, B, S]."""
    # the R heads of a kv head are rows of one product
    scores = (q.flatten(1, 2) @ k.transpose(1, 2)).mul_(scale)
    scores = scores.view(*q.shape[:3], k.shape[1])
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


class Attention(torch.autograd.Function):
    """One block of queries at a time against the keys up to its end: never all S x S scores of a
    long run.

    With P = softmax(s + mask), O = P v, L = log sum exp and upstream gradients dO and dL:
        dv = P^T dO      ds = P (dO v^T - delta), delta = rowsum(dO O) - dL
        dq = scale ds k  dk = scale ds^T q
    and ds times 1 - (s / softcap)^2 where there is a softcap. Backward computes P again, unless a
    run is one block only: then it is small and kept.

    q: [n, R, Sq, D], n sequences x kv heads, R query heads for each; k: [n, Sk, D]; v: [n, Sk, E];
    shift: see causal_mask, max_shift its largest value. Returns O [n, R, Sq, E] and L [n, R, Sq],
    None unless asked for. A row that sees no key gives 0 and -inf.
    """

    @staticmethod
    def probs(q, k, rows, scale, shift, max_shift, window, softcap, with_lse):
        """(P, L, slope of the softcap) of a block of rows; the last two None if not needed."""
        n_keys = min(max(rows.stop + max_shift, 1), k.shape[1])
        scores = attention_scores(q[:, :, rows.start : rows.stop], k[:, :n_keys], scale, softcap)
        slope = None if softcap is None else 1 - (scores / softcap).square()
        mask = causal_mask(rows, n_keys, shift, window, q)
        p = scores.add_(mask).softmax(-1)
        if not isinstance(shift, int):  # rows without a key came out as NaN
            p = p.masked_fill_(mask == float("-inf"), 0.0)
        lse = scores.logsumexp(-1) if with_lse else None
        return p, lse, slope

    @staticmethod
    def forward(ctx, q, k, v, scale, shift, max_shift, window, softcap, with_lse):
        Sq = q.shape[2]
        starts = range(0, Sq, QUERY_BLOCK)
        blocks = [range(start, min(start + QUERY_BLOCK, Sq)) for start in starts]
        ctx.args, ctx.blocks = (scale, shift, max_shift, window, softcap), blocks
        outs, lses, kept = [], [], None
        for rows in blocks:
            p, lse, slope = Attention.probs(q, k, rows, *ctx.args, with_lse)
            out = p.flatten(1, 2) @ v[:, : p.shape[-1]]
            outs.append(out.view(*p.shape[:3], v.shape[-1]))
            lses.append(lse)
            kept = p if len(blocks) == 1 and slope is None else None
        out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
        ctx.save_for_backward(q, k, v, out, kept)
        ctx.set_materialize_grads(False)
        return out, torch.cat(lses, 2) if with_lse else None

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, kept = ctx.saved_tensors
        scale = ctx.args[0]
        dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        dout = torch.zeros_like(out) if dout is None else dout
        for rows in ctx.blocks:
            here = slice(rows.start, rows.stop)
            # P of this block, kept or computed again
            if kept is None:
                p, _, slope = Attention.probs(q, k, rows, *ctx.args, False)
            else:
                p, slope = kept, None
            n_keys = p.shape[-1]
            delta = (dout[:, :, here] * out[:, :, here]).sum(-1, keepdim=True)
            if dlse is not None:
                delta = delta - dlse[:, :, here, None]
            q_rows = q[:, :, here].flatten(1, 2)
            p_rows = p.flatten(1, 2)
            do_rows = dout[:, :, here].flatten(1, 2)

            # dv += P^T dO, ds = P (dO v^T - delta), dq = scale ds k, dk += scale ds^T q
            dv[:, :n_keys].baddbmm_(p_rows.transpose(1, 2), do_rows)
            dp = do_rows @ v[:, :n_keys].transpose(1, 2)
            ds = dp.sub_(delta.flatten(1, 2)).mul_(p_rows)
            if slope is not None:
                ds.mul_(slope.flatten(1, 2))
            ds.mul_(scale)
            dq = ds @ k[:, :n_keys]
            dqs.append(dq.view(q.shape[0], q.shape[1], len(rows), -1))
            dk[:, :n_keys].baddbmm_(ds.transpose(1, 2), q_rows)
        return torch.cat(dqs, 2) if len(dqs) > 1 else dqs[0], dk, dv, *[None] * 6


class PaddedRuns:
    """Flat tokens to and from one padded tensor per run of sequences."""

    def __init__(self, lengths: list[int], runs: list[tuple[int, int]], device):
        self.shapes = [(end - first, max(lengths[first:end])) for first, end in runs]
        self.sizes = [n * longest for n, longest in self.shapes]
        self.slots = None  # each token's index in the padded runs, where there is any padding
        if sum(self.sizes) > sum(lengths):
            self.slots = self.slots_of(lengths, runs).to(device)

    def slots_of(self, lengths: list[int], runs: list[tuple[int, int]]) -> torch.Tensor:
        """[T] the index of each token when every sequence is padded to the longest of its run."""
        firsts, start = [], 0
        for (first, end), (_, longest), size in zip(runs, self.shapes, self.sizes, strict=True):
            firsts += [start + i * longest for i in range(end - first)]
            start += size
        lengths_N = torch.tensor(lengths)
        shift = torch.tensor(firsts) - (lengths_N.cumsum(0) - lengths_N)
        return torch.arange(sum(lengths)) + shift.repeat_interleave(lengths_N)

    def pad(self, x: torch.Tensor, n_kv_heads: int) -> list[torch.Tensor]:
        """[T, heads, D] -> for each run [n G, heads / G, longest, D]."""
        x = wide(x)
        heads, D = x.shape[1:]
        G, R = n_kv_heads, heads // n_kv_heads
        if self.slots is not None:
            x = PutRows.apply(x, self.slots, sum(self.sizes))
        padded = []
        for part, (n, longest) in zip(x.split(self.sizes), self.shapes, strict=True):
            by_head = part.view(n, longest, G, R, D).permute(0, 2, 3, 1, 4)
            padded.append(by_head.reshape(n * G, R, longest, D))
        return padded

    def flatten(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Runs of padded tokens, each [n longest, ...] -> [T, ...]."""
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        return x if self.slots is None else TakeRows.apply(x, self.slots)


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
    """Causal attention within each sequence, the last query at the last key. q: [Tq, H, D]; k:
    [Tk, G, D]; v: [Tk, G, E].

    Runs of sequences alike in length are padded to their longest. Returns out, and lse [Tq, H] if
    asked for.
    """
    H, G, E = q.shape[1], k.shape[1], v.shape[2]
    same_keys = cu_seqlens_k is cu_seqlens
    lengths_q = cu_seqlens.diff().tolist()
    lengths_k = lengths_q if same_keys else cu_seqlens_k.diff().tolist()
    shifts = [n_k - n_q for n_q, n_k in zip(lengths_q, lengths_k, strict=True)]

    # 1. Runs of sequences alike in length. In a batch of shared prefixes, the sequences with keys
    # from elsewhere follow those without: a new run begins there.
    longer = [max(pair) for pair in zip(lengths_q, lengths_k, strict=True)]
    ends = [i for i in range(1, len(shifts)) if (shifts[i] > 0) != (shifts[i - 1] > 0)]
    runs = length_runs(longer, ends)
    queries = PaddedRuns(lengths_q, runs, q.device)
    keys = queries if same_keys else PaddedRuns(lengths_k, runs, q.device)

    # 2. Attention of each run. Padding lies behind every token of its sequence: the causal mask
    # hides it.
    outs, lses = [], []
    padded = zip(runs, queries.pad(q, G), keys.pad(k, G), keys.pad(v, G), strict=True)
    for (first, end), q_run, k_run, v_run in padded:
        n, longest = end - first, q_run.shape[2]
        if longest == 0:
            continue
        own = shifts[first:end]
        shift = own[0]
        if min(own) != max(own) or shift < 0:  # not all alike, or some see no key
            shift = torch.tensor(own, device=q.device).repeat_interleave(G).view(-1, 1, 1, 1)
        if k_run.shape[2] == 0:  # one key that nobody sees
            k_run, v_run = F.pad(k_run, (0, 0, 0, 1)), F.pad(v_run, (0, 0, 0, 1))
        options = (scale, shift, max(own), window, softcap, return_lse)
        out, lse = Attention.apply(q_run, k_run.squeeze(1), v_run.squeeze(1), *options)
        by_token = out.view(n, G, -1, longest, E).permute(0, 3, 1, 2, 4)
        outs.append(by_token.reshape(-1, H, E))
        if return_lse:
            lses.append(lse.view(n, G, -1, longest).permute(0, 3, 1, 2).reshape(-1, H))

    # 3. Back to flat tokens.
    if not outs:  # no query at all
        nothing = q[..., :1].expand(-1, -1, E)
        return (nothing, wide(q[..., 0])) if return_lse else nothing
    out = queries.flatten(outs).to(q.dtype)
    return (out, queries.flatten(lses)) if return_lse else out


def decode_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """One new token per row. q: [B, H, D]; pages: [P, G, page, D]; table: [B, W]; lengths: [B]."""
    B, H, D = q.shape
    _, G, page, _ = k_pages.shape

    # 1. Read each row's pages, as many as the longest row has: [B, G, S, D].
    longest = int(lengths.max()) if B else 0
    n_pages = max(1, -(-longest // page))
    used = table[:, :n_pages].long()
    k = wide(k_pages[used]).transpose(1, 2).reshape(B, G, -1, D)
    v = wide(v_pages[used]).transpose(1, 2).reshape(B, G, -1, D)

    # 2. Softmax of the scores [B, G, R, S] over the positions that the row has, or the last ones of
    # them where there is a window.
    q_by_group = wide(q).view(B, G, H // G, D)
    scores = (q_by_group * scale) @ k.transpose(-1, -2)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    position = torch.arange(k.shape[2], device=q.device)
    unseen = position >= lengths[:, None]
    if window is not None:
        unseen = unseen | (position < lengths[:, None] - window)
    unseen = unseen[:, None, None]
    probs = scores.masked_fill_(unseen, float("-inf")).softmax(-1)

    # 3. The weighted sum of the values; what nobody sees may be NaN, and so is a row of length 0.
    out = probs @ v.masked_fill(unseen.transpose(-1, -2), 0.0)
    out = out.masked_fill((lengths == 0)[:, None, None, None], 0.0)
    return out.reshape(B, H, D).to(q.dtype)


def latent_decode_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One new token per row against the latents of its row. q_latent: [B, H, L]; q_rope: [B, H, R];
    pages: [P, 1, page, L] and [P, 1, page, R]; table: [B, W]; lengths: [B]."""
    # 1. How many pages are read: as many as the longest row has. A GPU reads all columns of the
    # table, since to ask it for the lengths is to wait for it, and a CUDA graph could not.
    page, n_pages = latent_pages.shape[2], table.shape[1]
    if lengths.is_cpu and len(lengths):
        n_pages = max(1, -(-int(lengths.max()) // page))
    table = table[:, :n_pages].long()

    # 2. Some rows at a time, so that the copies of their pages stay small.
    outs = [q_latent[:0]]
    n_rows = max(1, POSITIONS // max(1, n_pages * page))
    for first in range(0, len(table), n_rows):
        rows = slice(first, first + n_rows)
        latent_BSL = wide(latent_pages[table[rows]]).flatten(1, 3)
        rope_BSR = wide(rope_pages[table[rows]]).flatten(1, 3)

        # 3. Scores [B, H, S]: all heads read the same latents. What a row does not have may be NaN.
        position = torch.arange(latent_BSL.shape[1], device=table.device)
        unseen = (position >= lengths[rows, None])[:, None]
        latent_BSL.masked_fill_(unseen.transpose(1, 2), 0.0)
        scores = wide(q_latent[rows]) @ latent_BSL.transpose(1, 2)
        scores = scores + wide(q_rope[rows]) @ rope_BSR.transpose(1, 2)
        probs = scores.mul_(scale).masked_fill_(unseen, float("-inf")).softmax(-1)

        # 4. The weighted sum of the latents; 0 for a row of length 0.
        out = (probs @ latent_BSL).masked_fill((lengths[rows] == 0)[:, None, None], 0.0)
        outs.append(out.to(q_latent.dtype))
    return torch.cat(outs)


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

    These are, all [T], the maximum so far, and with x = l - maximum the sum of e^x and of e^x x.
    Returns e^x [T, slice], in the memory of the logits or not.
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
    """dlogp (1[target] - p) of a slice [T, slice] from column `start`, in the memory of exps."""
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

    Backward computes each slice of logits again, but not the last, whose exponentials are kept. So
    at most two slices exist at one time, and a vocabulary of one slice is computed only once.
    `steps`: the three functions above, or compiled loops that do the same.
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


# a group whose rewards span less than this, or this share of the largest, has no signal: 0.1 * 3 is
# not 0.3
EQUAL_REWARDS = 1e-6
# log-ratios are cut off here, with gradient 0 beyond, so that exp() of them cannot overflow
MAX_LOG_RATIO = 20.0
OBJECTIVES = ("clip", "cispo", "dppo", "gspo", "reinforce")
KL_ESTIMATORS = ("k1", "k2", "k3")
# loss and kl_loss are weighted sums; the others are plain sums over the live tokens, counted by
# "tokens"
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
    """(advantages [N], dead [G]): A = (r - mean) / std of the group (DeepSeek-R1, eq. 3)."""
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
    """(x within +-MAX_LOG_RATIO, with gradient 0 beyond; which were outside). NaN stays NaN."""
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
    """(loss, metrics); kernels/grpo.py has the maths. All [R], but offsets [N + 1]."""
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
    elif objective == "dppo":  # the bounds are of the probability itself
        change = logp.detach().exp() - old_logp.exp()
        too_low, too_high = (change < -clip_low) & (a < 0), (change > clip_high) & (a > 0)
        gain = (ratio * a).masked_fill(too_low | too_high, 0.0)
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
