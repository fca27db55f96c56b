"""Elementwise ops and log-probs as compiled loops for a CPU (see compile.py).

Shapes: R rows, M features of a row, F d_ff, T tokens, H heads, D head_dim, V columns of logits.
"""

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from .. import reference
from .compile import array, exp, f32, flat, loop, numba, part, threads

PARTS = 64  # of the rows: each has a sum of its own in a sum over all rows


@part
def swiglu_fwd_row(gate, up, y):
    for f in range(len(y)):
        y[f] = gate[f] / (f32(1) + exp(-gate[f])) * up[f]


@loop
def swiglu_fwd_loop(gate_up, stride, to_up, y_RF):
    """gate_up is flat: `stride` from row to row, `to_up` from a gate to its up."""
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
        swiglu_bwd_row(
            dy_RF[i], gate_up_RF[i, :F], gate_up_RF[i, F:], grad_RF[i, :F], grad_RF[i, F:]
        )


def swiglu_fwd(gate_up: torch.Tensor) -> torch.Tensor:
    y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    threads()
    F = y.shape[-1]
    swiglu_fwd_loop(array(gate_up).reshape(-1), 2 * F, F, y.numpy().reshape(-1, F))
    return y


def swiglu_bwd(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    grad = gate_up.new_empty(gate_up.shape)
    threads()
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


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """As kernels/swiglu.py has it."""
    return SwiGLU.apply(gate_up) if torch.is_grad_enabled() else swiglu_fwd(gate_up)


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
    rows = np.empty((0, M), f32) if residual is None else array(residual).reshape(-1, M)
    threads()
    rmsnorm_fwd_loop(
        array(x).reshape(-1, M),
        rows,
        array(weight),
        f32(eps),
        y.numpy().reshape(-1, M),
        total.numpy().reshape(-1, M),
        r.numpy(),
    )
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
    rows = np.empty((0, M), f32) if dsum is None else array(dsum).reshape(-1, M)
    threads()
    rmsnorm_bwd_loop(
        array(dy).reshape(-1, M),
        rows,
        array(x).reshape(-1, M),
        array(weight),
        array(r),
        dx.numpy().reshape(-1, M),
        dw.numpy(),
    )
    return dx, dw.sum(0)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        y, total, r = rmsnorm_fwd(x, weight, eps, residual)
        ctx.save_for_backward(x if residual is None else total, weight, r)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(
            False
        )  # a gradient that nobody asked for is None, and costs nothing
        return (y, total) if ctx.has_residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum=None):
        x, weight, r = ctx.saved_tensors
        dx, dw = (dsum, None) if dy is None else rmsnorm_bwd(dy, dsum, x, weight, r)
        return dx, dw, None, dx if ctx.has_residual else None


def rmsnorm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
):
    """As kernels/rmsnorm.py has it."""
    if torch.is_grad_enabled():
        return RMSNorm.apply(x, weight, eps, residual)
    y, total, _ = rmsnorm_fwd(x, weight, eps, residual)
    return y if residual is None else (y, total)


@loop
def rope_loop(x, stride_t, stride_h, cos_TC, sin_TC, direction, y_THD):
    """x: the memory behind [T, H, D], whose last dimension is contiguous; direction: -1 turns back."""
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


def rope_turn(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool
) -> torch.Tensor:
    """Every head of x [T, H, D] turned by its token's angles, or turned back."""
    y = x.new_empty(x.shape)
    threads()
    rope_loop(
        flat(x),
        x.stride(0),
        x.stride(1),
        array(cos),
        array(sin),
        f32(-1 if backward else 1),
        y.numpy(),
    )
    return y


class RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rope_turn(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return (
            rope_turn(dy if dy.stride(2) == 1 else dy.contiguous(), *ctx.saved_tensors, True),
            None,
            None,
        )


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As kernels/rope.py has it."""
    return RoPE.apply(x, cos, sin) if torch.is_grad_enabled() else rope_turn(x, cos, sin, False)


@part
def take_in_row(row, before):
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
def take_in_loop(logits_RV, peak_R, total_R, weighted_R):
    for i in numba.prange(len(logits_RV)):
        before = peak_R[i]
        peak_R[i], total, weighted = take_in_row(logits_RV[i], before)
        moved = before - peak_R[i]
        rescale = exp(moved)
        weighted_R[i] = (weighted_R[i] + total_R[i] * moved) * rescale + weighted
        total_R[i] = total_R[i] * rescale + total


@part
def scale_row(x, scale):
    for v in range(len(x)):
        x[v] *= scale


@part
def add_at(row, place, x):
    if 0 <= place < len(row):  # else the target is in another slice
        row[place] += x


@loop
def dlogits_of_exps_loop(exps_RV, total_R, dlogp_R, targets_R, start):
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
    """In place; without a gradient of the entropy dentropy_R is empty."""
    for i in numba.prange(len(logits_RV)):
        dentropy = dentropy_R[i] if len(dentropy_R) else f32(0)
        dlogits_row(logits_RV[i], lse_R[i], dlogp_R[i], dentropy, entropy_R[i])
        add_at(logits_RV[i], targets_R[i] - start, dlogp_R[i])


def take_in(logits, peak, total, weighted):
    threads()
    take_in_loop(logits.numpy(), peak.numpy(), total.numpy(), weighted.numpy())
    return logits


def dlogits_of_exps(exps, total, dlogp, targets, start):
    threads()
    dlogits_of_exps_loop(exps.numpy(), total.numpy(), array(dlogp), array(targets), start)
    return exps


def dlogits_of_logits(logits, lse, entropy, dlogp, dentropy, targets, start):
    threads()
    dlogits_of_logits_loop(
        logits.numpy(),
        lse.numpy(),
        entropy.numpy(),
        array(dlogp),
        np.empty(0, f32) if dentropy is None else array(dentropy),
        array(targets),
        start,
    )
    return logits


STEPS = reference.LogprobSteps(take_in, dlogits_of_exps, dlogits_of_logits)


def linear_logprob(h, weight, targets, temperature: float, rows=None, softcap: float | None = None):
    """As kernels/linear_logprob.py has it: the reference, with these loops between its matrix products."""
    return reference.LinearLogprob.apply(h, weight, targets, temperature, rows, softcap, STEPS)
