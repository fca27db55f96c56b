"""Elementwise ops and log-probs as compiled loops: SwiGLU, RMSNorm, RoPE, and slices of logits.

Each op has a loop over rows that runs on all threads, and a function for one row: Numba vectorises
the second and not the body of the first. The public ops are kernels/mlp.py, rmsnorm.py, rope.py and
linear_logprob.py. Each has here a function that runs it, with the op's own arguments, and one that
says in words why it refuses.

Shapes: R rows, M features of a row, F d_ff, T tokens, H heads, D head_dim, C = D / 2, V columns of
logits, P parts of the rows, B columns.
"""

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .. import reference
from .compile import array, exp, f32, flat, loop, numba, part, prepare
from .compile import refuses as tensors_refuse

PARTS = 64  # of the rows in a sum over all rows: each part has a sum of its own
COLUMNS = 64  # that are normed together


# ---- SwiGLU ----


@part
def swiglu_fwd_row(gate, up, y):
    for f in range(len(y)):
        y[f] = gate[f] / (f32(1) + exp(-gate[f])) * up[f]


@loop
def swiglu_fwd_loop(gate_up, stride, to_up, y_RF):
    """gate_up is flat: `stride` leads to the next row, `to_up` from a gate to its up."""
    R, F = y_RF.shape
    for i in numba.prange(R):
        up = i * stride + to_up
        swiglu_fwd_row(gate_up[i * stride : i * stride + F], gate_up[up : up + F], y_RF[i])


@part
def swiglu_bwd_row(dy, gate, up, dgate, dup):
    for f in range(len(dy)):
        s = f32(1) / (f32(1) + exp(-gate[f]))
        dgate[f] = dy[f] * up[f] * s * (f32(1) + gate[f] * (f32(1) - s))
        dup[f] = dy[f] * gate[f] * s


@loop
def swiglu_bwd_loop(dy_RF, gate_up_RF, grad_RF):
    R, F = dy_RF.shape
    for i in numba.prange(R):
        swiglu_bwd_row(dy_RF[i], gate_up_RF[i, :F], gate_up_RF[i, F:],
                       grad_RF[i, :F], grad_RF[i, F:])  # fmt: skip


def swiglu_fwd(gate_up: torch.Tensor) -> torch.Tensor:
    y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    prepare()
    F = y.shape[-1]
    swiglu_fwd_loop(array(gate_up).reshape(-1), 2 * F, F, y.numpy().reshape(-1, F))
    return y


def swiglu_bwd(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    grad = gate_up.new_empty(gate_up.shape)
    prepare()
    swiglu_bwd_loop(
        array(dy).reshape(-1, dy.shape[-1]),
        array(gate_up).reshape(-1, gate_up.shape[-1]),
        grad.numpy().reshape(-1, grad.shape[-1]),
    )
    return grad


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return swiglu_fwd(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return swiglu_bwd(dy, *ctx.saved_tensors)


def swiglu_refuses(gate_up: torch.Tensor) -> str | None:
    return tensors_refuse(gate_up)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """As kernels/mlp.py has it."""
    return SwiGLU.apply(gate_up) if torch.is_grad_enabled() else swiglu_fwd(gate_up)


# ---- RMSNorm ----


@part
def add_row(x, residual, total):
    for m in range(len(x)):
        total[m] = x[m] + residual[m]


@part
def rmsnorm_fwd_row(x, w, eps, y):
    total = f32(0)
    for m in range(len(x)):
        total += x[m] * x[m]
    r = f32(1) / np.sqrt(total / f32(len(x)) + eps)
    for m in range(len(x)):
        y[m] = x[m] * r * w[m]
    return r


@loop
def rmsnorm_fwd_loop(x_RM, residual_RM, w_M, eps, y_RM, sum_RM, r_R):
    """Without a residual, residual_RM and sum_RM have no rows."""
    add = len(residual_RM) > 0
    for i in numba.prange(len(x_RM)):
        if add:
            add_row(x_RM[i], residual_RM[i], sum_RM[i])
            r_R[i] = rmsnorm_fwd_row(sum_RM[i], w_M, eps, y_RM[i])
        else:
            r_R[i] = rmsnorm_fwd_row(x_RM[i], w_M, eps, y_RM[i])


@part
def rmsnorm_bwd_row(dy, x, w, r, dx, dw):
    total = f32(0)
    for m in range(len(x)):
        dw[m] += dy[m] * x[m] * r
        total += dy[m] * w[m] * x[m] * r
    mean = total / f32(len(x))
    for m in range(len(x)):
        dx[m] = r * (dy[m] * w[m] - x[m] * r * mean)


@loop
def rmsnorm_bwd_loop(dy_RM, dsum_RM, x_RM, w_M, r_R, dx_RM, dw_PM):
    """dsum_RM has no rows where nobody used the sum."""
    R, P, add = len(x_RM), len(dw_PM), len(dsum_RM) > 0
    for p in numba.prange(P):
        dw_PM[p] = f32(0)
        for i in range(p * R // P, (p + 1) * R // P):
            rmsnorm_bwd_row(dy_RM[i], x_RM[i], w_M, r_R[i], dx_RM[i], dw_PM[p])
            if add:
                add_row(dx_RM[i], dsum_RM[i], dx_RM[i])


def rmsnorm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, x + residual or an empty tensor, r [R])."""
    M = x.shape[-1]
    y, total = x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
    r = x.new_empty(x.numel() // M)
    x_rows = array(x).reshape(-1, M)
    rows = np.empty((0, M), f32) if residual is None else array(residual).reshape(-1, M)
    y_rows, total_rows = y.numpy().reshape(-1, M), total.numpy().reshape(-1, M)
    prepare()
    rmsnorm_fwd_loop(x_rows, rows, array(weight), f32(eps), y_rows, total_rows, r.numpy())
    return y, total, r


def rmsnorm_bwd(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    r: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dw) from the gradients of y and, if it was used, of the sum; x is what was normed."""
    M = x.shape[-1]
    dx, dw = x.new_empty(x.shape), x.new_empty(min(PARTS, len(r)), M)
    dy_rows, x_rows = array(dy).reshape(-1, M), array(x).reshape(-1, M)
    rows = np.empty((0, M), f32) if dsum is None else array(dsum).reshape(-1, M)
    dx_rows = dx.numpy().reshape(-1, M)
    prepare()
    rmsnorm_bwd_loop(dy_rows, rows, x_rows, array(weight), array(r), dx_rows, dw.numpy())
    return dx, dw.sum(0)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        y, total, r = rmsnorm_fwd(x, weight, eps, residual)
        ctx.save_for_backward(x if residual is None else total, weight, r)
        ctx.has_residual = residual is not None
        # a gradient that nobody asked for is None, and costs nothing
        ctx.set_materialize_grads(False)
        return (y, total) if ctx.has_residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum=None):
        x, weight, r = ctx.saved_tensors
        dx, dw = (dsum, None) if dy is None else rmsnorm_bwd(dy, dsum, x, weight, r)
        return dx, dw, None, dx if ctx.has_residual else None


def rmsnorm_refuses(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> str | None:
    return tensors_refuse(x, weight)  # the op itself checks that a residual is like x


def rmsnorm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
):
    """As kernels/rmsnorm.py has it."""
    if torch.is_grad_enabled():
        return RMSNorm.apply(x, weight, eps, residual)
    y, total, _ = rmsnorm_fwd(x, weight, eps, residual)
    return y if residual is None else (y, total)


@part
def add_squares(x, sums):
    for b in range(len(x)):
        sums[b] += x[b] * x[b]


@part
def scale_by(x, r, w, y):
    for b in range(len(x)):
        y[b] = x[b] * r[b] * w


@loop
def rmsnorm_columns_loop(x_HMB, w_M, eps, y_HMB):
    """Each column x[h, :, b] normed, for decoding, where features come first; y may be x."""
    H, M, B = x_HMB.shape
    blocks = (B + COLUMNS - 1) // COLUMNS
    for i in numba.prange(H * blocks):
        h, first = i // blocks, i % blocks * COLUMNS
        end = min(B, first + COLUMNS)
        sums = np.zeros(COLUMNS, f32)
        for m in range(M):
            add_squares(x_HMB[h, m, first:end], sums)
        for b in range(COLUMNS):
            sums[b] = f32(1) / np.sqrt(sums[b] / f32(M) + eps)
        for m in range(M):
            scale_by(x_HMB[h, m, first:end], sums, w_M[m], y_HMB[h, m, first:end])


# ---- RoPE ----


@loop
def rope_loop(x, stride_t, stride_h, cos_TC, sin_TC, direction, y_THD):
    """x: the memory behind [T, H, D], whose last dimension is contiguous; direction: -1 rotates
    back."""
    T, H, D = y_THD.shape
    C = D // 2
    for t in numba.prange(T):
        for h in range(H):
            at = t * stride_t + h * stride_h
            for c in range(C):
                first, second = x[at + c], x[at + C + c]
                cos, sin = cos_TC[t, c], sin_TC[t, c] * direction
                y_THD[t, h, c] = first * cos - second * sin
                y_THD[t, h, C + c] = second * cos + first * sin


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    """Every head of x [T, H, D] rotated by its token's angles, or by their opposites."""
    y = x.new_empty(x.shape)
    direction = f32(-1 if back else 1)
    prepare()
    rope_loop(flat(x), x.stride(0), x.stride(1), array(cos), array(sin), direction, y.numpy())
    return y


class RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dy = dy if dy.stride(2) == 1 else dy.contiguous()
        return rotate(dy, *ctx.saved_tensors, True), None, None


def rope_refuses(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    return tensors_refuse(x, cos, sin)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As kernels/rope.py has it."""
    return RoPE.apply(x, cos, sin) if torch.is_grad_enabled() else rotate(x, cos, sin, False)


# ---- log-probs: a slice of the logits' columns at a time ----


@part
def accumulate_row(row, before):
    """(maximum, sum exp(x), sum exp(x) x) with x = l - maximum; the row becomes exp(x)."""
    peak = before
    for v in range(len(row)):
        peak = peak if row[v] < peak else row[v]
    total, weighted = f32(0), f32(0)
    for v in range(len(row)):
        x = row[v] - peak
        e = exp(x)
        row[v] = e
        total += e
        weighted += e * x
    return peak, total, weighted


@loop
def accumulate_loop(logits_RV, peak_R, total_R, weighted_R):
    """Add a slice to the running maximum and sums of each row (online softmax); it becomes
    exp(x)."""
    for i in numba.prange(len(logits_RV)):
        before = peak_R[i]
        peak_R[i], total, weighted = accumulate_row(logits_RV[i], before)
        moved = before - peak_R[i]
        rescale = exp(moved)
        weighted_R[i] = (weighted_R[i] + total_R[i] * moved) * rescale + weighted
        total_R[i] = total_R[i] * rescale + total


@part
def scale_row(x, scale):
    for v in range(len(x)):
        x[v] *= scale


@part
def add_at(row, index, x):
    if 0 <= index < len(row):  # else the target is in another slice
        row[index] += x


@loop
def dlogits_of_exps_loop(exps_RV, total_R, dlogp_R, targets_R, start):
    """In place, from what forward kept; start: the slice's first column."""
    for i in numba.prange(len(exps_RV)):
        scale_row(exps_RV[i], -dlogp_R[i] / total_R[i])
        add_at(exps_RV[i], targets_R[i] - start, dlogp_R[i])


@part
def dlogits_row(row, lse, dlogp, dentropy, entropy):
    more = dlogp + dentropy * entropy
    for v in range(len(row)):
        log_p = row[v] - lse
        row[v] = -exp(log_p) * (more + dentropy * log_p)


@loop
def dlogits_of_logits_loop(logits_RV, lse_R, entropy_R, dlogp_R, dentropy_R, targets_R, start):
    """In place, from logits that are computed again. dentropy_R is empty if nobody used the
    entropy."""
    for i in numba.prange(len(logits_RV)):
        dentropy = dentropy_R[i] if len(dentropy_R) else f32(0)
        dlogits_row(logits_RV[i], lse_R[i], dlogp_R[i], dentropy, entropy_R[i])
        add_at(logits_RV[i], targets_R[i] - start, dlogp_R[i])


# Each step of the reference's LinearLogprob, between its products, as one loop.


def accumulate(logits, peak, total, weighted):
    prepare()
    accumulate_loop(logits.numpy(), peak.numpy(), total.numpy(), weighted.numpy())
    return logits


def dlogits_of_exps(exps, total, dlogp, targets, start):
    prepare()
    dlogits_of_exps_loop(exps.numpy(), total.numpy(), array(dlogp), array(targets), start)
    return exps


def dlogits_of_logits(logits, lse, entropy, dlogp, dentropy, targets, start):
    dentropy = np.empty(0, f32) if dentropy is None else array(dentropy)
    of_rows = lse.numpy(), entropy.numpy(), array(dlogp), dentropy, array(targets)
    prepare()
    dlogits_of_logits_loop(logits.numpy(), *of_rows, start)
    return logits


STEPS = reference.LogprobSteps(accumulate, dlogits_of_exps, dlogits_of_logits)


def linear_logprob_refuses(
    h, weight, targets, temperature: float = 1.0, rows=None, softcap: float | None = None
) -> str | None:
    return tensors_refuse(h, weight)


def linear_logprob(
    h, weight, targets, temperature: float = 1.0, rows=None, softcap: float | None = None
):
    """As kernels/linear_logprob.py has it: the reference, with these loops between its products."""
    return reference.LinearLogprob.apply(h, weight, targets, temperature, rows, softcap, STEPS)
