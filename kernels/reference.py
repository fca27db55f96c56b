"""Every op in plain torch: the CPU's path, the oracle of the tests, and the text to learn from.

Maths is done in `promote_types(dtype, float32)`, so 16-bit inputs accumulate in fp32 and fp64 stays fp64.
Shapes: N sequences, T flat tokens, S padded length, H query heads, G kv heads, D head_dim, M d_model, F d_ff,
V vocabulary.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

VOCAB_SLICE = 4096  # columns of logits that exist at one time in linear_logprob
QUERY_BLOCK = 128  # rows of attention scores that exist at one time


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class RMSNorm(torch.autograd.Function):
    """Keeps n = x / rms(x) and 1 / rms(x); kernels/rmsnorm.py has the maths of the gradient."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x_wide = wide(x)
        r = x_wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        n = x_wide * r
        ctx.save_for_backward(n, r, weight)
        return (n * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        n, r, weight = ctx.saved_tensors
        dy_wide = wide(dy)
        dy_n = (dy_wide * n).flatten(0, -2)
        mean_g_n = (dy_n @ weight.to(dy_n.dtype) / len(weight)).view(r.shape)  # of g * n, with g = dy * w
        dx = (dy_wide * weight).addcmul_(n, mean_g_n, value=-1).mul_(r)
        return dx.to(dy.dtype), dy_n.sum(0).to(weight.dtype), None


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. With a residual: the pair (that of
    x + residual, x + residual)."""
    if residual is not None:
        total = x + residual
        return rmsnorm(total, weight, eps), total
    if torch.is_grad_enabled():
        return RMSNorm.apply(x, weight, eps)
    return F.rms_norm(wide(x), x.shape[-1:], wide(weight), eps).to(x.dtype)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair (x[i], x[i + D/2]) turned by its angle, as complex numbers are multiplied."""
    out = torch.empty_like(x)
    (first, second), (out_first, out_second) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


class RoPE(torch.autograd.Function):
    """The gradient of a turn is the turn back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(wide(x), cos, sin).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return turn(wide(dy), cos, -sin).to(dy.dtype), None, None


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + D/2]) by the angle of (token, i). x: [T, H, D]; cos, sin: [T, D/2]."""
    cos, sin = cos[:, None], sin[:, None]
    return RoPE.apply(x, cos, sin) if torch.is_grad_enabled() else turn(wide(x), cos, sin).to(x.dtype)


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(gate_up.dtype)


class SwiGLU(torch.autograd.Function):
    """Keeps only its input, and writes both halves of the gradient in place: a third less memory traffic."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate_up, = ctx.saved_tensors
        x, dy = wide(gate_up), wide(dy)
        gate, up = x.chunk(2, dim=-1)
        grad = torch.empty_like(x)
        dgate, dup = grad.chunk(2, dim=-1)
        s = torch.sigmoid(gate)
        torch.mul(gate, s, out=dup)  # silu(gate)
        # s (1 + gate (1 - s)) = s + silu (1 - s)
        torch.addcmul(s, dup, 1 - s, out=dgate).mul_(up).mul_(dy)
        dup.mul_(dy)
        return grad.to(gate_up.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, for [..., 2F] that holds gate, then up."""
    return SwiGLU.apply(gate_up) if torch.is_grad_enabled() else gated(gate_up)


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


def length_runs(lengths: list[int]) -> list[tuple[int, int]]:
    """Cut the sequences into runs (first, end) that waste little when each is padded to its own longest.

    A run ends where padding would pass a quarter of it, so a batch that is sorted by length pads least.
    """
    runs, first, longest, total = [], 0, 0, 0
    for i, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        if i - first >= 8 and (i + 1 - first) * longest > 1.25 * total:
            runs.append((first, i))
            first, longest, total = i, length, length
    return [*runs, (first, len(lengths))]


def attention_probs(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal softmax(q k^T scale), the last query at the last key. q: [n, R, B, D]; k: [n, S, D].

    Returns [n, R, B, S].
    """
    (n, R, B, _), S = q.shape, k.shape[1]
    scores = (q.flatten(1, 2) @ k.transpose(1, 2)).mul_(scale).view(n, R, B, S)
    later = torch.full((B, S), float("-inf"), dtype=q.dtype, device=q.device).triu_(1 + S - B)
    return scores.add_(later).softmax(-1)


class Attention(torch.autograd.Function):
    """One block of queries at a time against the keys up to its end: never all S x S scores of a long run.

    With P = softmax(scale q k^T + mask), O = P v and upstream gradient dO:
        dv = P^T dO     dS = P (dO v^T - rowsum(dO O))     dq = scale dS k     dk = scale dS^T q
    Backward computes P anew, unless a run is one block only: then it is small and kept.

    q: [n, R, S, D], n sequences x kv heads, R query heads for each; k, v: [n, S, D]. Returns [n, R, S, D].
    """

    @staticmethod
    def forward(ctx, q, k, v, scale):
        outs, S, p = [], q.shape[2], None
        for start in range(0, S, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, S)
            p = attention_probs(q[:, :, start:end], k[:, :end], scale)
            outs.append((p.flatten(1, 2) @ v[:, :end]).view(*p.shape[:3], -1))
        out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
        ctx.save_for_backward(q, k, v, out, p if len(outs) == 1 else None)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, kept = ctx.saved_tensors
        S, dqs, dk, dv = q.shape[2], [], torch.zeros_like(k), torch.zeros_like(v)
        for start in range(0, S, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, S)
            q_block, k_seen, v_seen = q[:, :, start:end], k[:, :end], v[:, :end]
            p = attention_probs(q_block, k_seen, ctx.scale) if kept is None else kept
            do = dout[:, :, start:end]
            row_sum = (do * out[:, :, start:end]).sum(-1, keepdim=True)
            q_rows, p_rows, do_rows = (x.flatten(1, 2) for x in (q_block, p, do))
            dv[:, :end].baddbmm_(p_rows.transpose(1, 2), do_rows)
            ds = (do_rows @ v_seen.transpose(1, 2)).sub_(row_sum.flatten(1, 2)).mul_(p_rows).mul_(ctx.scale)
            dqs.append((ds @ k_seen).view(q_block.shape))
            dk[:, :end].baddbmm_(ds.transpose(1, 2), q_rows)
        return torch.cat(dqs, 2) if len(dqs) > 1 else dqs[0], dk, dv, None


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
              scale: float) -> torch.Tensor:
    """Causal attention within each sequence. q: [T, H, D]; k, v: [T, G, D].

    Pads inside: runs of sequences of similar length are laid out one after the other, each run padded to its
    longest.
    """
    (T, H, D), G, device = q.shape, k.shape[1], q.device
    if T == 0:
        return q
    lengths = cu_seqlens.diff().tolist()
    # (sequences, padded length) of each run
    shapes = [(end - first, max(lengths[first:end])) for first, end in length_runs(lengths)]
    sizes = [n * longest for n, longest in shapes]
    padded = sum(sizes) > T
    if padded:  # the place of token t in the padded layout: its sequence's first place, then on by position
        firsts = torch.tensor([longest for n, longest in shapes for _ in range(n)], device=device).cumsum(0)
        firsts = firsts.roll(1).index_fill_(0, torch.zeros(1, dtype=torch.int64, device=device), 0)
        shift = (firsts - cu_seqlens[:-1]).repeat_interleave(cu_seqlens.diff().long(), output_size=T)
        places = torch.arange(T, device=device) + shift

    def lay_out(x):  # [T, heads, D] -> for each run [n G, heads / G, longest, D]
        x, R = wide(x), x.shape[1] // G
        if padded:
            x = PutRows.apply(x, places, sum(sizes))
        return [part.view(n, longest, G, R, D).permute(0, 2, 3, 1, 4).reshape(n * G, R, longest, D)
                for part, (n, longest) in zip(x.split(sizes), shapes, strict=True)]

    # padding lies behind every real token of its sequence, so the causal mask alone hides it
    outs = [Attention.apply(q, k.squeeze(1), v.squeeze(1), scale)
            .view(n, G, -1, longest, D).permute(0, 3, 1, 2, 4).reshape(-1, H, D)
            for q, k, v, (n, longest) in zip(lay_out(q), lay_out(k), lay_out(v), shapes, strict=True)
            if longest]
    out = torch.cat(outs) if len(outs) > 1 else outs[0]
    return (TakeRows.apply(out, places) if padded else out).to(q.dtype)


def decode_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
                     scale: float) -> torch.Tensor:
    """One new token a row against that row's cache. q: [B, H, D]; caches: [B, G, S, D]; lengths: [B]."""
    (B, H, D), (_, G, S, _) = q.shape, k_cache.shape
    q_BGRD = wide(q).view(B, G, H // G, D) * scale
    scores = q_BGRD @ wide(k_cache).transpose(-1, -2)
    unseen = torch.arange(S, device=q.device) >= lengths[:, None]
    probs = scores.masked_fill_(unseen[:, None, None], float("-inf")).softmax(-1)
    return (probs @ wide(v_cache)).reshape(B, H, D).to(q.dtype)


class LinearLogprob(torch.autograd.Function):
    """log softmax(h @ w.T / temperature) at the targets, and its entropy, one slice of V at a time.

    With l = logits, p = softmax(l), H = -sum p log p and upstream gradients a (of logp) and b (of H):
        d l_j = a (1[j = target] - p_j) - b p_j (log p_j + H)
    Backward computes each slice of l anew but the last, whose exponentials are kept: at most two slices of
    logits exist at one time, and a vocabulary of one slice is computed only once.
    """

    @staticmethod
    def forward(ctx, h_TM, w_VM, targets_T, temperature):
        h = wide(h_TM) / temperature
        T = h.shape[0]
        peak = h.new_full((T,), torch.finfo(h.dtype).min)  # running maximum of the logits
        total, weighted = h.new_zeros(T), h.new_zeros(T)  # sums of exp(x) and of exp(x) x, with x = l - peak
        exps = None
        for start in range(0, w_VM.shape[0], VOCAB_SLICE):
            logits = h @ w_VM[start : start + VOCAB_SLICE].to(h.dtype).T
            new_peak = torch.maximum(peak, logits.amax(-1))
            rescale = (peak - new_peak).exp()
            exps = logits.sub_(new_peak[:, None]).exp()
            weighted = (weighted + total * (peak - new_peak)) * rescale + logits.mul_(exps).sum(-1)
            total = total * rescale + exps.sum(-1)
            peak = new_peak
        lse = peak + total.log()
        entropy = total.log() - weighted / total  # no difference of large numbers, and never below 0
        chosen = torch.linalg.vecdot(h, w_VM[targets_T].to(h.dtype))
        ctx.save_for_backward(h_TM, w_VM, targets_T, lse, entropy, exps, total)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # a gradient that nobody asked for is None, and costs nothing
        return chosen - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy):
        h_TM, w_VM, targets_T, lse, entropy, last_exps, total = ctx.saved_tensors
        if dlogp is None:
            dlogp = torch.zeros_like(lse)
        h = wide(h_TM) / ctx.temperature
        dh = torch.zeros_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(w_VM) if ctx.needs_input_grad[1] else None
        rows = torch.arange(len(targets_T), device=h.device)
        for start in range(0, w_VM.shape[0], VOCAB_SLICE):
            w = w_VM[start : start + VOCAB_SLICE].to(h.dtype)
            if dentropy is not None:  # -p (a + b (log p + H))
                log_p = (h @ w.T).sub_(lse[:, None])
                p = log_p.exp()
                dlogits = log_p.add_(entropy[:, None]).mul_(dentropy[:, None]).add_(dlogp[:, None])
                dlogits.mul_(p).neg_()
            elif start + VOCAB_SLICE < w_VM.shape[0]:
                dlogits = (h @ w.T).sub_(lse[:, None]).exp_().mul_(-dlogp[:, None])
            else:
                dlogits = last_exps * (-dlogp / total)[:, None]
            here = (targets_T >= start) & (targets_T < start + len(w))
            dlogits[rows[here], targets_T[here] - start] += dlogp[here]
            if dh is not None:
                dh.addmm_(dlogits, w)
            if dw is not None:
                dw[start : start + VOCAB_SLICE] = (dlogits.T @ h).to(dw.dtype)
        return None if dh is None else (dh / ctx.temperature).to(h_TM.dtype), dw, None, None


def linear_logprob(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float):
    """h: [T, M]; weight: [V, M]; targets: [T]. Returns logp [T] and entropy [T]."""
    return LinearLogprob.apply(h, weight, targets, temperature)
