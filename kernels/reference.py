"""Every op in plain torch: the CPU's path, the oracle of the tests, and the text to learn from.

Maths is done in `promote_types(dtype, float32)`, so 16-bit inputs accumulate in fp32 and fp64 stays fp64.
Shapes: N sequences, T flat tokens, S padded length, H query heads, G kv heads, D head_dim, M d_model, F d_ff,
V vocabulary.
"""
import torch
import torch.nn.functional as F

VOCAB_SLICE = 4096  # columns of logits that exist at one time in linear_logprob


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    x_wide = wide(x)
    rms = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * rms * weight).to(x.dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + D/2]) by the angle of (token, i). x: [T, H, D]; cos, sin: [T, D/2]."""
    first, second = wide(x).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class SwiGLU(torch.autograd.Function):
    """Keeps only its input, and writes both halves of the gradient in place: a third less memory traffic."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = wide(gate_up).chunk(2, dim=-1)
        return F.silu(gate).mul_(up).to(gate_up.dtype)

    @staticmethod
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
    return SwiGLU.apply(gate_up)


class TakeRows(torch.autograd.Function):
    """x[rows] for distinct rows: the gradient is a plain copy back, where autograd's own has to add up."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, dy):
        rows, = ctx.saved_tensors
        return dy.new_zeros(ctx.shape).index_copy_(0, rows, dy), None


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

    def lay_out(x):  # [T, heads, D] -> for each run [n, heads, longest, D]
        x = wide(x)
        if padded:
            x = x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, places, x)
        return [part.view(*shape, *x.shape[1:]).transpose(1, 2)
                for part, shape in zip(x.split(sizes), shapes, strict=True)]

    # padding lies behind every real token of its sequence, so the causal mask alone hides it
    outs = [F.scaled_dot_product_attention(*qkv, is_causal=True, scale=scale, enable_gqa=H != G)
            for qkv in zip(lay_out(q), lay_out(k), lay_out(v), strict=True) if qkv[0].numel()]
    out = torch.cat([out.transpose(1, 2).reshape(-1, H, D) for out in outs])
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
    Backward computes each slice of l anew, so that only [T, VOCAB_SLICE] logits exist at one time.
    """

    @staticmethod
    def forward(ctx, h_TM, w_VM, targets_T, temperature):
        h = wide(h_TM) / temperature
        T = h.shape[0]
        peak = h.new_full((T,), torch.finfo(h.dtype).min)  # running maximum of the logits
        total, weighted = h.new_zeros(T), h.new_zeros(T)  # sums of exp(x) and of exp(x) x, with x = l - peak
        for start in range(0, w_VM.shape[0], VOCAB_SLICE):
            logits = h @ w_VM[start : start + VOCAB_SLICE].to(h.dtype).T
            new_peak = torch.maximum(peak, logits.amax(-1))
            rescale = (peak - new_peak).exp()
            exps = logits.sub_(new_peak[:, None]).exp()
            weighted = (weighted + total * (peak - new_peak)) * rescale + torch.linalg.vecdot(exps, logits)
            total = total * rescale + exps.sum(-1)
            peak = new_peak
        lse = peak + total.log()
        entropy = total.log() - weighted / total  # no difference of large numbers, and never below 0
        chosen = torch.linalg.vecdot(h, w_VM[targets_T].to(h.dtype))
        ctx.save_for_backward(h_TM, w_VM, targets_T, lse, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # a gradient that nobody asked for is None, and costs nothing
        return chosen - lse, entropy

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        h_TM, w_VM, targets_T, lse, entropy = ctx.saved_tensors
        if dlogp is None:
            dlogp = torch.zeros_like(lse)
        h = wide(h_TM) / ctx.temperature
        dh = torch.zeros_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(w_VM) if ctx.needs_input_grad[1] else None
        rows = torch.arange(len(targets_T), device=h.device)
        for start in range(0, w_VM.shape[0], VOCAB_SLICE):
            w = w_VM[start : start + VOCAB_SLICE].to(h.dtype)
            log_p = (h @ w.T).sub_(lse[:, None])
            if dentropy is None:
                dlogits = log_p.exp_().mul_(-dlogp[:, None])
            else:  # -p (a + b (log p + H))
                p = log_p.exp()
                dlogits = log_p.add_(entropy[:, None]).mul_(dentropy[:, None]).add_(dlogp[:, None])
                dlogits.mul_(p).neg_()
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
