"""SwiGLU and the MLP around it   (Shazeer 2020, arXiv 2002.05202)

    y = silu(gate) * up,   silu(g) = g * sigmoid(g)
Gradient, with s = sigmoid(gate):
    dgate = dy * up * s * (1 + gate * (1 - s))
    dup   = dy * silu(gate)

SwiGLU is memory-bound. Bytes that must be moved in 16 bit: 6 R F forward, 10 R F backward. Backward
reads gate, up and dy, and computes the sigmoid again, so nothing but the input is kept.

    program -> a tile of ROWS x BLOCK_F features; the row holds gate, then up

    gate_up  | gate [F]          | up [F]            |
             |   [tile]          |   [tile]          |   one program reads both tiles
    y        |   [tile]          |                       and writes one

The MLP is down(swiglu(gate_up(x))): 6 R M F FLOPs forward. On a GPU its two products are PyTorch's.
On a CPU with AVX2 one compiled loop takes a few tokens at a time through the whole MLP, so that
they stay in the cache; kernels/cpu/mlp.py says when that is faster.

Shapes: R rows (tokens), M d_model, F d_ff.
"""

import torch
from torch.nn.functional import linear

from . import reference
from .cpu import elementwise as cpu
from .cpu import mlp as cpu_mlp
from .dispatch import Backend, check_tensors, choose, serves_all, tl, triton, triton_refuses

# ---- kernels


@triton.jit
def _load_gate_and_up(
    gate_up, R, row_stride, F: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr
):
    """This program's rows and features, a mask of those that exist, and its tiles in fp32."""
    blocks_per_row: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)  # all programs are on axis 0, the one without a limit
    row = (pid // blocks_per_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    f = (pid % blocks_per_row) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (row < R) & (f < F)
    gate_ptrs = gate_up + row * row_stride + f
    gate = tl.load(gate_ptrs, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + F, mask, other=0.0).to(tl.float32)
    return row, f, mask, gate, up


@triton.jit(do_not_specialize=["R"])
def swiglu_fwd_kernel(
    gate_up,
    y_RF,
    R,
    row_stride,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row, f, mask, gate, up = _load_gate_and_up(gate_up, R, row_stride, F, ROWS, BLOCK_F)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_RF + row * F + f, y.to(y_RF.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["R"])
def swiglu_bwd_kernel(
    dy_RF,
    gate_up,
    dgate_up,
    R,
    row_stride,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row, f, mask, gate, up = _load_gate_and_up(gate_up, R, row_stride, F, ROWS, BLOCK_F)
    dy = tl.load(dy_RF + row * F + f, mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dy * up * s * (1 + gate * (1 - s))
    dup = dy * gate * s
    dgate_ptrs = dgate_up + row * (2 * F) + f
    tl.store(dgate_ptrs, dgate.to(dgate_up.dtype.element_ty), mask)
    tl.store(dgate_ptrs + F, dup.to(dgate_up.dtype.element_ty), mask)


# ---- block sizes and launchers


def swiglu_config(F: int) -> dict[str, int]:
    """Block sizes of both passes: 16 elements of gate per thread; short rows share a program."""
    # a larger block would leave many threads without work at F = 4864, say
    block = min(triton.next_power_of_2(F), 1024)
    # the masks of many rows take registers: so few features get 8 elements per thread
    return {"BLOCK_F": block, "ROWS": 2048 // block, "num_warps": 4 if block > 32 else 8}


def swiglu_grid(R: int, F: int, config: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(R, config["ROWS"]) * triton.cdiv(F, config["BLOCK_F"]),)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[R, features], contiguous features: a view where rows have one stride, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def swiglu_fwd(gate_up: torch.Tensor) -> torch.Tensor:
    rows = as_rows(gate_up)
    R, F = len(rows), gate_up.shape[-1] // 2
    config = swiglu_config(F)
    y = gate_up.new_empty(*gate_up.shape[:-1], F)
    swiglu_fwd_kernel[swiglu_grid(R, F, config)](rows, y, R, rows.stride(0), F=F, **config)
    return y


def swiglu_bwd(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    rows = as_rows(gate_up)
    R, F = len(rows), dy.shape[-1]
    config = swiglu_config(F)
    dgate_up = gate_up.new_empty(gate_up.shape)
    swiglu_bwd_kernel[swiglu_grid(R, F, config)](
        dy.contiguous(), rows, dgate_up, R, rows.stride(0), F=F, **config
    )
    return dgate_up


# ---- PyTorch's operators


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


# ---- the public functions


SWIGLU = (
    Backend("triton", swiglu_fwd_op, triton_refuses),
    Backend("cpu", cpu.swiglu, cpu.swiglu_refuses),
    Backend("reference", reference.swiglu, serves_all),
)


def swiglu(gate_up: torch.Tensor, impl: str | None = None) -> torch.Tensor:
    """silu(gate) * up, for gate_up [..., 2F] that holds gate's F features, then up's.

    Returns [..., F] in the same dtype; the maths is in fp32 at least. impl: "triton", "cpu",
    "reference", or None to choose by device. Raises ValueError if the last dimension is odd.
    """
    check_tensors("swiglu", gate_up=gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"swiglu: gate_up is {tuple(gate_up.shape)}; its last dimension holds gate and up "
            "side by side, so it must be even"
        )
    return choose("swiglu", SWIGLU, impl, gate_up)(gate_up)


def mlp_of_products(x, gate_up, down, impl: str | None) -> torch.Tensor:
    """PyTorch's two matrix products with SwiGLU between them; `impl` chooses SwiGLU's back end."""
    hidden = swiglu(linear(x, gate_up.to(x.dtype)), impl)
    return linear(hidden, down.to(x.dtype))


def mlp_in_one_loop(x, gate_up, down, impl: str | None) -> torch.Tensor:
    return cpu_mlp.swiglu_mlp(x, gate_up, down)


SWIGLU_MLP = (
    Backend("triton", mlp_of_products, triton_refuses),
    Backend("cpu", mlp_in_one_loop, cpu_mlp.refuses),
    Backend("reference", mlp_of_products, serves_all),
)


def swiglu_mlp(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, impl: str | None = None
) -> torch.Tensor:
    """The whole MLP, down(swiglu(gate_up(x))): x [..., M] -> [..., M] in x's dtype, differentiable
    in all three arguments.

    gate_up: [2F, M], gate's rows before up's; down: [M, F]; both of any float dtype, cast to x's.
    impl: "triton" or "reference" for SwiGLU between two products of PyTorch's, "cpu" for one
    compiled loop, None to choose. Raises ValueError for shapes that do not fit, or an impl that
    cannot serve them.
    """
    if gate_up.shape != (2 * down.shape[1], x.shape[-1]) or down.shape[0] != x.shape[-1]:
        raise ValueError(
            f"swiglu_mlp: x is {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down "
            f"{tuple(down.shape)}; expected [..., M], [2F, M] and [M, F]"
        )
    return choose("swiglu_mlp", SWIGLU_MLP, impl, x, gate_up, down)(x, gate_up, down, impl)
