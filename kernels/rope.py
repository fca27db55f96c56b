"""Rotary position embedding, half-split layout of Llama and Qwen   (Su et al., arXiv 2104.09864)

The pair (x[i], x[i + D/2]) of a token at position p is rotated by the angle p * theta^(-2i / D):
    y[i]       = x[i] cos - x[i + D/2] sin
    y[i + D/2] = x[i + D/2] cos + x[i] sin
The gradient is a rotation by the opposite angle, so one kernel serves both passes.

Memory-bound. Least bytes in 16 bit: 4 T H D for H query and key heads together, and 4 T D for an
fp32 table.

    program -> ROWS heads, one after the other in memory, with both halves of each

    x[t, h]  | first half  [C] | second half [C] |      cos[t], sin[t]  [C]
             '------ rotated together ----------'       shared by the heads of token t

Shapes: T tokens, H heads, R = T H rows, D head_dim, C = D / 2 pairs.
"""

from collections.abc import Callable

import torch

from . import reference
from .cpu import elementwise as cpu
from .dispatch import (
    Backend,
    check_tensors,
    choose,
    serves_all,
    tl,
    triton,
    triton_refuses,
    widest_dtype,
)


@triton.jit(do_not_specialize=["R"])
def rope_fwd_kernel(
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
    """direction: 1.0 rotates forward, -1.0 rotates back, which is the backward pass."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (row < R)[:, None] & (c < C)

    # row and token numbers fit 32 bits, but the offset of an element may not
    t = (row // H).to(tl.int64)[:, None]
    h = (row % H).to(tl.int64)[:, None]
    x_ptrs = x_THD + t * x_stride_t + h * x_stride_h + c
    first = tl.load(x_ptrs, mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + C, mask, other=0.0).to(tl.float32)

    # the heads of a token are neighbours in a program, so all but one find the angles in the cache
    cos = tl.load(cos_TC + t * C + c, mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_TC + t * C + c, mask, other=0.0).to(tl.float32) * direction

    y_ptrs = y_THD + row.to(tl.int64)[:, None] * (2 * C) + c
    y_first = first * cos - second * sin
    y_second = second * cos + first * sin
    tl.store(y_ptrs, y_first.to(y_THD.dtype.element_ty), mask)
    tl.store(y_ptrs + C, y_second.to(y_THD.dtype.element_ty), mask)


def rope_config(D: int) -> dict[str, int]:
    """Block sizes: 8 pairs per thread, which is two loads of 16 bytes of x in 16 bit."""
    block = triton.next_power_of_2(D // 2)
    return {"BLOCK_C": block, "ROWS": max(1024 // block, 1), "num_warps": 4}


def rope_rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool
) -> torch.Tensor:
    """Every head of x [T, H, D] rotated by its token's angles, or rotated back."""
    x = x if x.stride(2) == 1 else x.contiguous()
    T, H, D = x.shape
    y = x.new_empty(x.shape)
    config = rope_config(D)
    rope_fwd_kernel[(triton.cdiv(T * H, config["ROWS"]),)](
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


rope_op = torch.library.custom_op("r1zero::rope", rope_rotate, mutates_args=())


@rope_op.register_fake
def rope_fake(x, cos, sin, backward):
    return x.new_empty(x.shape)


def keep_for_backward(ctx, inputs, output):
    _, cos, sin, ctx.was_backward = inputs
    ctx.save_for_backward(cos, sin)


def backward(ctx, dy):
    cos, sin = ctx.saved_tensors
    return rope_op(dy, cos, sin, not ctx.was_backward), None, None, None


rope_op.register_autograd(backward, setup_context=keep_for_backward)


def rope_table(
    positions: torch.Tensor,
    head_dim: int,
    theta: float,
    rescale: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of each token's angles: two of [T, head_dim / 2], fp32.

    positions: [T] integers; theta: the base of the angles. rescale: what becomes of the frequencies
    [head_dim / 2], in radians per position, where a model has stretched them to a longer context.
    """
    # in fp64 where the device has it, so that position 100,000 keeps its angle
    dtype = widest_dtype(positions.device)
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype)
    exponents = pairs / head_dim
    frequencies = theta**-exponents
    if rescale is not None:
        frequencies = rescale(frequencies)
    angles = positions.to(dtype)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def triton_rope(x, cos, sin) -> torch.Tensor:
    return rope_op(x, cos, sin, False)


ROPE = (
    Backend("triton", triton_rope, triton_refuses),
    Backend("cpu", cpu.rope, cpu.rope_refuses),
    Backend("reference", reference.rope, serves_all),
)


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, impl: str | None = None
) -> torch.Tensor:
    """Rotate every head of `x`. Give q and k side by side in one tensor, so that one launch serves
    both.

    x: [T, H, D], any float dtype, a view of wider rows too; cos, sin: [T, D / 2], which get no
    gradient. Returns [T, H, D] in x's dtype. impl: "triton", "cpu", "reference", or None to choose
    by device. Raises ValueError if the table does not fit x.
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
    return choose("rope", ROPE, impl, x, cos, sin)(x, cos, sin)
