"""RMSNorm   (Zhang & Sennrich 2019, arXiv 1910.07467)

    y = x / rms(x) * w,  rms(x) = sqrt(mean(x^2) + eps)

In 16 bit, n = x / rms(x) is rounded before it is multiplied by w, and the product once more: so do
the models that are trained with it (transformers' LlamaRMSNorm and Qwen2RMSNorm; Gemma does not).

With a residual, the add before the norm is done in the same pass: s = x + residual, y = s / rms(s)
* w. Both y and s are returned, so that a transformer block never reads the residual stream just to
add to it.

Gradient, with r = 1 / rms(x), n = x r and g = dy * w:
    dx = r (g - n * mean(g * n)) + ds        dw = sum over rows of dy * n
where ds is the upstream gradient of s; dx is the gradient of the residual too.

    forward    a program owns ROWS whole rows, in registers
    backward   program p owns every P-th block of ROWS rows, or a part of their features where M is
               above 8,192. It keeps its own sum of dw in registers, and writes it once.

Memory-bound. Least bytes in 16 bit: forward 4 R M, with a residual 8 R M; backward 6 R M, with one
8 R M. r is kept for backward, 4 bytes per row. dw is summed in two fixed steps, first over the rows
of a program and then over the few hundred programs: no atomics, and the same bits every time.

Shapes: T tokens, H heads (1 without), R = T H rows, M features of a row, P programs of backward.
"""

import torch

from . import chips, reference
from .chips import Chip, stepped_down
from .cpu import elementwise as cpu
from .dispatch import Backend, check_tensors, choose, serves_all, tl, triton, triton_refuses

LARGEST_M = 16384  # a row lies in the registers of one program of forward


@triton.jit(do_not_specialize=["R"])
def rmsnorm_fwd_kernel(
    x_THM,
    residual_RM,
    w_M,
    y_RM,
    sum_RM,
    r_R,
    R,
    H,
    x_stride_t,
    x_stride_h,
    eps,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, BLOCK_M)[None, :]
    mask = (row < R)[:, None] & (m < M)
    w = tl.load(w_M + m, m < M, other=0.0)

    # -- load x, plus the residual; row numbers fit 32 bits, but offsets of elements may not --
    x_row = (row // H).to(tl.int64) * x_stride_t + (row % H).to(tl.int64) * x_stride_h
    offsets = row.to(tl.int64)[:, None] * M + m
    x = tl.load(x_THM + x_row[:, None] + m, mask, other=0.0)
    if residual_RM is not None:
        residual = tl.load(residual_RM + offsets, mask, other=0.0).to(tl.float32)
        # the norm is of the sum as it is stored
        x = (x.to(tl.float32) + residual).to(y_RM.dtype.element_ty)
        tl.store(sum_RM + offsets, x, mask)

    # -- normalise --
    x = x.to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / M + eps)
    tl.store(r_R + row, r, row < R)
    n = (x * r[:, None]).to(y_RM.dtype.element_ty)
    y = n.to(tl.float32) * w.to(tl.float32)
    tl.store(y_RM + offsets, y.to(y_RM.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["R"])
def rmsnorm_bwd_kernel(
    dy_THM,
    dsum_RM,
    x_THM,
    w_M,
    r_R,
    dx_RM,
    dw_PM,
    R,
    H,
    dy_stride_t,
    dy_stride_h,
    x_stride_t,
    x_stride_h,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    # a row and its dw fit the registers of one program, or are worked on in parts, by one program
    # each
    parts: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    part = tl.program_id(0) % parts
    p = tl.program_id(0) // parts
    programs = tl.num_programs(0) // parts
    block = tl.arange(0, BLOCK_M)[None, :]
    m = part * BLOCK_M + block
    w = tl.load(w_M + m, m < M, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK_M), tl.float32)  # summed over its rows once, after the loop
    # STAGES 2: the next rows are fetched while these are worked on
    for start in tl.range(p * ROWS, R, programs * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        here = (row < R)[:, None]
        t = (row // H).to(tl.int64)
        h = (row % H).to(tl.int64)
        x_rows = x_THM + (t * x_stride_t + h * x_stride_h)[:, None]
        dy_rows = dy_THM + (t * dy_stride_t + h * dy_stride_h)[:, None]
        r = tl.load(r_R + row, row < R, other=0.0)[:, None]

        # -- mean(g * n): the other parts of the row count, too --
        total = tl.zeros((ROWS,), tl.float32)
        for other in tl.static_range(1, parts):
            o = (part + other) % parts * BLOCK_M + block
            w_o = tl.load(w_M + o, o < M, other=0.0).to(tl.float32)
            x_o = tl.load(x_rows + o, here & (o < M), other=0.0).to(tl.float32)
            dy_o = tl.load(dy_rows + o, here & (o < M), other=0.0).to(tl.float32)
            total += tl.sum(dy_o * w_o * (x_o * r), 1)
        x = tl.load(x_rows + m, here & (m < M), other=0.0).to(tl.float32)
        dy = tl.load(dy_rows + m, here & (m < M), other=0.0).to(tl.float32)
        n = x * r
        g = dy * w
        mean = (total + tl.sum(g * n, 1))[:, None] / M

        # -- dw and dx --
        dw += dy * n
        dx = r * (g - n * mean)
        offsets = row.to(tl.int64)[:, None] * M + m
        if dsum_RM is not None:
            dx += tl.load(dsum_RM + offsets, here & (m < M), other=0.0).to(tl.float32)
        tl.store(dx_RM + offsets, dx.to(dx_RM.dtype.element_ty), here & (m < M))
    tl.store(dw_PM + p.to(tl.int64) * M + m, tl.sum(dw, 0)[None, :], m < M)


# ---- block sizes and launchers


def rmsnorm_config(M: int) -> dict[str, int]:
    """Block sizes of forward: 16 elements per thread (two loads of 16 bytes in 16 bit), 32 at the
    largest M; short rows share a program."""
    block = triton.next_power_of_2(M)
    warps = min(max(block // 512, 4), 16)
    return {"BLOCK_M": block, "ROWS": max(512 * warps // block, 1), "num_warps": warps}


def rmsnorm_bwd_config(M: int, R: int, chip: Chip) -> tuple[int, dict[str, int]]:
    """(P, block sizes) of backward: as many programs as run at one time, but at least eight rows
    for each, so that the partial sums stay small beside dy. A row of more than 8,192 takes two
    programs."""
    block = min(triton.next_power_of_2(M), 8192)
    warps = max(block // 512, 4)
    rows = max(1024 // block, 1)
    stages = 2 if M <= 8192 else 1
    warps_at_one_time = 32 if block <= 1024 else 16  # of one multiprocessor
    at_one_time = chip.processors * (warps_at_one_time // warps)
    P = min(triton.cdiv(R, max(rows, 8)), at_one_time // triton.cdiv(M, block))
    config = {"BLOCK_M": block, "ROWS": rows, "STAGES": stages, "num_warps": warps}
    if block == 1024:  # else the assembler spills a few registers at this size
        config["maxnreg"] = 64

    def bytes_of(config):  # rows of x, dy and dsum that are fetched ahead, in fp32 at most
        return 12 * block * rows * (config["STAGES"] - 1) + 1024

    return P, stepped_down(config, bytes_of, chip, (("STAGES", 1),))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[T, H, M] with M contiguous: a view where two strides count the rows of `x`, else a copy."""
    x = x if x.ndim == 3 else x.reshape(-1, 1, x.shape[-1])
    return x if x.stride(2) == 1 else x.contiguous()


def rmsnorm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, x + residual or an empty tensor, r). r: [R] fp32."""
    x_THM = as_rows(x)
    T, H, M = x_THM.shape
    R = T * H
    y = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    r = x.new_empty(R, dtype=torch.float32)
    config = rmsnorm_config(M)
    rmsnorm_fwd_kernel[(triton.cdiv(R, config["ROWS"]),)](
        x_THM,
        None if residual is None else residual.contiguous(),
        weight,
        y,
        None if residual is None else total,
        r,
        R,
        H,
        x_THM.stride(0),
        x_THM.stride(1),
        eps,
        M=M,
        **config,
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
    dy_THM, x_THM = as_rows(dy), as_rows(x)
    T, H, M = x_THM.shape
    R = T * H
    P, config = rmsnorm_bwd_config(M, R, chips.chip_of(x.device))
    dx = x.new_empty(x.shape)
    dw_PM = x.new_empty(P, M, dtype=torch.float32)
    rmsnorm_bwd_kernel[(P * triton.cdiv(M, config["BLOCK_M"]),)](
        dy_THM,
        None if dsum is None else dsum.contiguous(),
        x_THM,
        weight,
        r,
        dx,
        dw_PM,
        R,
        H,
        dy_THM.stride(0),
        dy_THM.stride(1),
        x_THM.stride(0),
        x_THM.stride(1),
        M=M,
        **config,
    )
    return dx, dw_PM.sum(0).to(weight.dtype)


# ---- PyTorch's operators


rmsnorm_fwd_op = torch.library.custom_op("r1zero::rmsnorm_fwd", rmsnorm_fwd, mutates_args=())
rmsnorm_bwd_op = torch.library.custom_op("r1zero::rmsnorm_bwd", rmsnorm_bwd, mutates_args=())


@rmsnorm_fwd_op.register_fake
def rmsnorm_fwd_fake(x, weight, eps, residual):
    R = x.numel() // x.shape[-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(R, dtype=torch.float32),
    )


@rmsnorm_bwd_op.register_fake
def rmsnorm_bwd_fake(dy, dsum, x, weight, r):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def keep_for_backward(ctx, inputs, output):
    x, weight, _, residual = inputs
    _, total, r = output
    ctx.save_for_backward(x if residual is None else total, weight, r)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)  # a gradient that nobody asked for is None, and costs nothing


def backward(ctx, dy, dsum, _):
    x, weight, r = ctx.saved_tensors
    if not ctx.has_residual:  # what stands in for the sum has no gradient
        dsum = None
    dx, dw = dsum, None
    if dy is not None:
        dx, dw = rmsnorm_bwd_op(dy, dsum, x, weight, r)
    return dx, dw, None, dx if ctx.has_residual else None


rmsnorm_fwd_op.register_autograd(backward, setup_context=keep_for_backward)


# ---- the public function


def triton_rmsnorm(x, weight, eps, residual):
    y, total, _ = rmsnorm_fwd_op(x, weight, eps, residual)
    return y if residual is None else (y, total)


def kernel_refuses(x, weight, eps, residual) -> str | None:
    reason = triton_refuses(x)
    if reason is None and x.shape[-1] > LARGEST_M:
        reason = f"the last dimension of x is {x.shape[-1]}, the Triton kernel takes {LARGEST_M}"
    return reason


RMSNORM = (
    Backend("triton", triton_rmsnorm, kernel_refuses),
    Backend("cpu", cpu.rmsnorm, cpu.rmsnorm_refuses),
    Backend("reference", reference.rmsnorm, serves_all),
)


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise the last dimension of `x` or `x + residual` by its root mean square; scale it by
    `weight`.

    x: [..., M], any float dtype; weight: [M], any float dtype; residual: as x. Returns y [..., M]
    in x's dtype; with a residual the pair (y, x + residual). Sums are in fp32 at least. impl:
    "triton", "cpu", "reference", or None to choose by device. Raises ValueError if weight or
    residual does not match x. Triton takes M up to 16,384.
    """
    check_tensors("rmsnorm", x=x, weight=weight, residual=residual)
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rmsnorm: weight has shape {tuple(weight.shape)}, but the last dimension of x is "
            f"{x.shape[-1] if x.ndim else 'missing'}; give one weight per feature"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rmsnorm: residual is {tuple(residual.shape)} in {residual.dtype}, but x is "
            f"{tuple(x.shape)} in {x.dtype}; expected the same"
        )
    args = (x, weight, eps, residual)
    return choose("rmsnorm", RMSNORM, impl, *args)(*args)
