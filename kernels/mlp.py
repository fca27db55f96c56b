"""SwiGLU: y = silu(gate) * up,  silu(g) = g * sigmoid(g)   (Shazeer 2020, arXiv 2002.05202)

Gradient, with s = sigmoid(gate):
    dgate = dy * up * s * (1 + gate * (1 - s))        dup = dy * silu(gate)

Memory-bound. Least bytes in 16 bit: 6 R F forward, 10 R F backward: backward reads gate, up and dy and
computes the sigmoid anew, so nothing but the input is kept.

Shapes: R rows (tokens), F features.
"""

import torch

from . import reference
from .cpu import elementwise as cpu
from .cpu.compile import serves
from .dispatch import check_tensors, tl, triton, use_triton


@triton.jit
def _read(gate_up, R, stride, F: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr):
    """This program's rows and features, which of them there are, and its tiles of gate and up in fp32."""
    blocks: tl.constexpr = (
        F + BLOCK_F - 1
    ) // BLOCK_F  # of a row; all on axis 0, the one without a limit
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    f = pid % blocks * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    inside = (row < R) & (f < F)
    gate = tl.load(gate_up + row * stride + f, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + f + F, inside, other=0.0).to(tl.float32)
    return row, f, inside, gate, up


@triton.jit(do_not_specialize=["R"])
def swiglu_fwd_kernel(
    gate_up, y_RF, R, stride, F: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr
):
    row, f, inside, gate, up = _read(gate_up, R, stride, F, ROWS, BLOCK_F)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_RF + row * F + f, y.to(y_RF.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["R"])
def swiglu_bwd_kernel(
    dy_RF, gate_up, grad, R, stride, F: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr
):
    row, f, inside, gate, up = _read(gate_up, R, stride, F, ROWS, BLOCK_F)
    dy = tl.load(dy_RF + row * F + f, inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate, dup = dy * up * s * (1 + gate * (1 - s)), dy * gate * s
    tl.store(grad + row * (2 * F) + f, dgate.to(grad.dtype.element_ty), inside)
    tl.store(grad + row * (2 * F) + f + F, dup.to(grad.dtype.element_ty), inside)


def swiglu_config(F: int) -> dict[str, int]:
    """Block sizes, forward and backward: 16 elements of gate a thread; short rows share a program."""
    block = min(
        triton.next_power_of_2(F), 1024
    )  # more would leave many threads idle at F = 4864, say
    return {"BLOCK_F": block, "ROWS": 2048 // block, "num_warps": 4}


def swiglu_grid(R: int, F: int, config: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(R, config["ROWS"]) * triton.cdiv(F, config["BLOCK_F"]),)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[R, features], the features contiguous: a view where one stride counts the rows of `x`, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def swiglu_fwd(gate_up: torch.Tensor) -> torch.Tensor:
    rows, F = as_rows(gate_up), gate_up.shape[-1] // 2
    y, config = gate_up.new_empty(*gate_up.shape[:-1], F), swiglu_config(F)
    swiglu_fwd_kernel[swiglu_grid(len(rows), F, config)](
        rows, y, len(rows), rows.stride(0), F=F, **config
    )
    return y


def swiglu_bwd(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    rows, F = as_rows(gate_up), dy.shape[-1]
    grad, config = gate_up.new_empty(gate_up.shape), swiglu_config(F)
    swiglu_bwd_kernel[swiglu_grid(len(rows), F, config)](
        dy.contiguous(), rows, grad, len(rows), rows.stride(0), F=F, **config
    )
    return grad


swiglu_fwd_op = torch.library.custom_op("r1zero::swiglu_fwd", swiglu_fwd, mutates_args=())
swiglu_bwd_op = torch.library.custom_op("r1zero::swiglu_bwd", swiglu_bwd, mutates_args=())


@swiglu_fwd_op.register_fake
def swiglu_fwd_fake(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@swiglu_bwd_op.register_fake
def swiglu_bwd_fake(dy, gate_up):
    return gate_up.new_empty(gate_up.shape)


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dy):
    return swiglu_bwd_op(dy, *ctx.saved_tensors)


swiglu_fwd_op.register_autograd(backward, setup_context=keep_for_backward)


def swiglu(gate_up: torch.Tensor, impl: str | None = None) -> torch.Tensor:
    """silu(gate) * up for [..., 2F] that holds the gate's F features, then up's. Returns [..., F] in the same
    dtype; the maths is in fp32 at least.

    impl: "triton", "cpu", "reference", or None to choose by device.
    Raises ValueError if the last dimension is odd.
    """
    check_tensors("swiglu", gate_up=gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"swiglu: gate_up is {tuple(gate_up.shape)}; its last dimension holds gate and up "
            "side by side, so it must be even"
        )
    if use_triton(impl, gate_up, loops=True):
        return swiglu_fwd_op(gate_up)
    return (cpu if serves(impl, gate_up) else reference).swiglu(gate_up)
