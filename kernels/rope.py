"""Rotary position embedding, half-split layout of Llama and Qwen   (Su et al. 2021, arXiv 2104.09864)

The pair (x[i], x[i + D/2]) of a token at position p is turned by the angle p * theta^(-2i / D):
    y[i] = x[i] cos - x[i + D/2] sin        y[i + D/2] = x[i + D/2] cos + x[i] sin
The gradient is the turn by the opposite angle: one kernel serves both.

Memory-bound. Least bytes in 16 bit: 4 T H D for H query and key heads together, and 4 T D for an fp32 table.

Shapes: T tokens, H heads, R = T H rows, D head_dim, C = D / 2 pairs.
"""

import torch

from . import reference
from .cpu import elementwise as cpu
from .cpu.compile import serves
from .dispatch import check_tensors, tl, triton, use_triton


@triton.jit(do_not_specialize=["R"])
def rope_kernel(
    x_THD,
    cos_TC,
    sin_TC,
    y_THD,
    R,
    H,
    x_stride_t,
    x_stride_h,
    direction,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """direction: 1.0 for a turn, -1.0 for the turn back."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (row < R)[:, None] & (c < C)
    # the numbers of a row and of its token fit 32 bits, the place of its elements need not
    t, h = (row // H).to(tl.int64)[:, None], (row % H).to(tl.int64)[:, None]
    x = x_THD + t * x_stride_t + h * x_stride_h + c
    first = tl.load(x, inside, other=0.0).to(tl.float32)
    second = tl.load(x + C, inside, other=0.0).to(tl.float32)
    # the heads of a token lie side by side in a program, so all but one of them find these in the cache
    cos = tl.load(cos_TC + t * C + c, inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_TC + t * C + c, inside, other=0.0).to(tl.float32) * direction
    y = y_THD + row.to(tl.int64)[:, None] * (2 * C) + c
    tl.store(y, (first * cos - second * sin).to(y_THD.dtype.element_ty), inside)
    tl.store(y + C, (second * cos + first * sin).to(y_THD.dtype.element_ty), inside)


def rope_config(D: int) -> dict[str, int]:
    """Block sizes: 8 pairs a thread, that is two loads of 16 bytes of x in 16 bit."""
    block = triton.next_power_of_2(D // 2)
    return {"BLOCK_C": block, "ROWS": max(1024 // block, 1), "num_warps": 4}


def rope_turn(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool
) -> torch.Tensor:
    """Every head of x [T, H, D] turned by its token's angles, or turned back."""
    x = x if x.stride(2) == 1 else x.contiguous()
    T, H, D = x.shape
    y, config = x.new_empty(x.shape), rope_config(D)
    rope_kernel[(triton.cdiv(T * H, config["ROWS"]),)](
        x,
        cos.contiguous(),
        sin.contiguous(),
        y,
        T * H,
        H,
        x.stride(0),
        x.stride(1),
        -1.0 if backward else 1.0,
        C=D // 2,
        **config,
    )
    return y


rope_turn_op = torch.library.custom_op("r1zero::rope_turn", rope_turn, mutates_args=())


@rope_turn_op.register_fake
def rope_turn_fake(x, cos, sin, backward):
    return x.new_empty(x.shape)


def keep_for_backward(ctx, inputs, output):
    _, cos, sin, ctx.was_backward = inputs
    ctx.save_for_backward(cos, sin)


def backward(ctx, dy):
    return rope_turn_op(dy, *ctx.saved_tensors, not ctx.was_backward), None, None, None


rope_turn_op.register_autograd(backward, setup_context=keep_for_backward)


def rope_table(
    positions: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of each token's angles: two tensors [T, head_dim / 2], fp32. positions: [T] ints."""
    exponents = (
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    )
    # in fp64, so that position 100,000 keeps its angle
    angles = positions.to(torch.float64)[:, None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, impl: str | None = None
) -> torch.Tensor:
    """Turn every head of `x`; give q and k side by side in one tensor, so that one launch serves both.

    x: [T, H, D], any float dtype, a view of wider rows too; cos, sin: [T, D / 2], which get no gradient.
    Returns [T, H, D] in x's dtype. impl: "triton", "cpu", "reference", or None to choose by device.
    Raises ValueError if the table does not fit x.
    """
    check_tensors("rope", x=x, cos=cos, sin=sin)
    if (
        x.ndim != 3
        or x.shape[2] % 2
        or cos.shape != (x.shape[0], x.shape[2] // 2)
        or sin.shape != cos.shape
    ):
        raise ValueError(
            f"rope: x is {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; "
            "expected [T, H, D] and twice [T, D / 2] (see rope_table)"
        )
    if use_triton(impl, x, loops=True):
        return rope_turn_op(x, cos, sin, False)
    return (cpu if serves(impl, x, cos, sin) else reference).rope(x, cos, sin)
