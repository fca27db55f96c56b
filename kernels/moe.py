"""A mixture of experts: each token goes through K of E MLPs   (Shazeer 2017, arXiv 1701.06538)

    y[t]     = sum over k of gates[t, k] * MLP_e(x[t]),   e = experts[t, k]
    MLP_e(x) = down_e swiglu(gate_up_e x)

The mixture is dropless (MegaBlocks, arXiv 2211.15841): an expert takes all tokens that chose it,
be it none or all of them. A pair is one choice of a token; pair p = t K + k.

    1. group     sort the P = T K pairs by expert; equal ones stay in order    order, place [P]
    2. gather    row r is the token of pair order[r]                           rows [P, M]
    3. products  rows of one expert lie together: a product for each expert    rows [P, M]
    4. combine   each token adds its K rows, weighted, k = 0 first             y [T, M]

          tokens      rows, by expert     tokens
          t0: 2 0  ->  | 0: t0 t2    |  -> t0 = gate * row 3 + gate * row 0
          t1: 3 2  ->  | 1:          |
          t2: 0 3  ->  | 2: t0 t1    |
                       | 3: t1 t2    |

Gradient, with row r of pair (t, k):
    drow[r]     = gates[t, k] dy[t]       (through the MLP of the expert)
    dgates[t,k] = dy[t] . row[r]
    dx[t]       = sum over k of dgathered, k = 0 first
No step adds two rows by an atomic, so the bits are the same in every run. No step waits for the
host, but for step 3 in the back end "loop", which reads how many rows each expert has.

It must compute 6 P M F FLOPs forward, and read the weights of the experts in use, 3 E M F numbers.
On a GPU moe_triton.py does steps 2 to 4 in kernels of its own; the back ends here are in plain
PyTorch. `top_experts` is the choice itself.

Shapes: T tokens, P pairs, E experts, K experts per token, M d_model, F width of an expert.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import reference
from .dispatch import (
    OLDEST_ARCH,
    Backend,
    arch_of,
    check_tensors,
    choose,
    serves_all,
    triton_refuses,
    why_not_triton,
)
from .mlp import swiglu, swiglu_mlp
from .moe_triton import moe_fwd_op

INDEX_BITS = 16  # of a packed key; so there are at most 65,536 experts


# ---- the choice of experts


def top_experts(scores_TE: torch.Tensor, n: int) -> torch.Tensor:
    """[T, n] int64: the experts with the highest scores, the highest first.

    Of equal scores the lower index wins, on every device. (That of torch.topk varies.) Scores are
    compared in fp32. A row with NaN gets experts that exist, and the NaN shows in its gates.
    """
    # 1. fp32 numbers as integers of the same order; adding 0 makes 0 of -0.
    bits = (scores_TE.detach().float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)

    # 2. Behind them the index, counted from the end: no two keys of a row are equal.
    n_experts = scores_TE.shape[-1]
    from_end = torch.arange(n_experts - 1, -1, -1, device=scores_TE.device)
    keys = (ordered.long() << INDEX_BITS) | from_end
    best = keys.topk(n, dim=-1).values
    return n_experts - 1 - (best & ((1 << INDEX_BITS) - 1))


# ---- pairs to rows, and back


class Groups(NamedTuple):
    """The pairs, sorted by expert."""

    order: torch.Tensor
    """[P] int64, the pair of each row."""
    place: torch.Tensor
    """[T, K] int64, the row of each pair."""
    ends: torch.Tensor
    """[E] int32, where the rows of each expert end."""


def group_by_expert(experts_TK: torch.Tensor, n_experts: int) -> Groups:
    """Sort the pairs by expert, without waiting for the host."""
    by_expert, order = experts_TK.flatten().sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    every_expert = torch.arange(n_experts, device=order.device)
    ends = torch.searchsorted(by_expert, every_expert, right=True, out_int32=True)
    return Groups(order, place.view_as(experts_TK), ends)


def expert_counts(experts_TK: torch.Tensor, n_experts: int) -> torch.Tensor:
    """[E] int64: how many pairs each expert has."""
    ends = group_by_expert(experts_TK, n_experts).ends.long()
    return ends.diff(prepend=ends.new_zeros(1))


def add_in_order(rows: torch.Tensor, place: torch.Tensor, gates=None) -> torch.Tensor:
    """[T, M] fp32 or wider: each token's rows, times their gates if given; k = 0 first."""
    total = 0.0
    for k in range(place.shape[1]):
        row = reference.wide(rows.index_select(0, place[:, k]))
        total = total + (row if gates is None else gates[:, k, None] * row)
    return total


class Gather(torch.autograd.Function):
    """Tokens [T, M] to rows [P, M]."""

    @staticmethod
    def forward(ctx, x_TM, order, place):
        ctx.save_for_backward(place)
        return x_TM.index_select(0, order // place.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        return add_in_order(drows, ctx.saved_tensors[0]).to(drows.dtype), None, None


class Combine(torch.autograd.Function):
    """Rows [P, M] and gates [T, K] to tokens [T, M]."""

    @staticmethod
    def forward(ctx, rows, gates, order, place):
        ctx.save_for_backward(rows, gates, order, place)
        return add_in_order(rows, place, gates).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, gates, order, place = ctx.saved_tensors
        dy = reference.wide(dy)
        gate_of_row = gates.flatten()[order]
        drows = gate_of_row[:, None] * dy.index_select(0, order // place.shape[1])
        dgates = [
            (dy * reference.wide(rows.index_select(0, place[:, k]))).sum(-1)
            for k in range(place.shape[1])
        ]
        return drows.to(rows.dtype), torch.stack(dgates, 1).to(gates.dtype), None, None


# ---- the products


def products_one_by_one(rows, gate_up, down, ends) -> torch.Tensor:
    """[P, M]: each expert's MLP on its rows, one after the other. The host waits for the ends."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    # unbind, not an index: the gradient of an index is as large as all experts together
    experts = zip(rows.split(counts), gate_up.unbind(), down.unbind(), strict=True)
    # An expert without rows is left out, but not all of them: weights get a gradient, if of zeros.
    none = len(rows) == 0
    results = [swiglu_mlp(part, up, back) for part, up, back in experts if len(part) or none]
    return torch.cat([rows[:0], *results])


def products_grouped(rows, gate_up, down, ends) -> torch.Tensor:
    """[P, M]: the same by two of PyTorch's grouped products."""
    hidden = swiglu(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    return F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)


def dropless(x, gates, experts, gate_up, down, products: Callable) -> torch.Tensor:
    """The four steps. products: (rows [P, M], gate_up, down, ends [E]) -> [P, M]."""
    groups = group_by_expert(experts, len(gate_up))
    rows = Gather.apply(x, groups.order, groups.place)
    rows = products(rows, gate_up.to(x.dtype), down.to(x.dtype), groups.ends)
    return Combine.apply(rows, gates, groups.order, groups.place)


def moe_in_triton(x, gates, experts, gate_up, down) -> torch.Tensor:
    groups = group_by_expert(experts, len(gate_up))
    return moe_fwd_op(x, gates.float(), gate_up, down, *groups)


def moe_in_groups(x, gates, experts, gate_up, down) -> torch.Tensor:
    return dropless(x, gates, experts, gate_up, down, products_grouped)


def moe_in_a_loop(x, gates, experts, gate_up, down) -> torch.Tensor:
    return dropless(x, gates, experts, gate_up, down, products_one_by_one)


def grouped_refuses(x, gates, experts, gate_up, down) -> str | None:
    """Why PyTorch's grouped products do not serve these arguments, or None."""
    _, d_model, width = down.shape
    return why_not_grouped(x.dtype, x.device, d_model, width)


def why_not_grouped(
    dtype: torch.dtype, device: torch.device, d_model: int, width: int
) -> str | None:
    """Why they do not serve experts [d_model -> width -> d_model] in `dtype` on `device`, or None.

    On a CPU they are 1.6 to 2.1 times as fast as the loop where experts have few rows, as in
    decoding, and still 1.03 times with 256 rows each (python -m benchmarks.moe). They refuse fp64,
    and rows that are no multiple of 16 bytes.
    """
    served = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,)
    if device.type not in ("cpu", "cuda"):
        return f"grouped products run on a CPU or a CUDA GPU, not on {device.type}"
    if dtype not in served:
        return f"grouped products on {device.type} take {served}, not {dtype}"
    if device.type == "cuda" and arch_of(device) < OLDEST_ARCH:
        return f"grouped products need sm_{OLDEST_ARCH} or later"
    for size in (d_model, width):
        if size * dtype.itemsize % 16:
            return f"rows of {size} numbers in {dtype} are no multiple of 16 bytes"
    return None


def waits_for_host(dtype: torch.dtype, device: torch.device, d_model: int, width: int) -> bool:
    """Whether `moe_mlp` waits for the host with such experts: where only the loop serves them."""
    if why_not_triton(dtype, device.type, arch_of(device)) is None:
        return False
    return why_not_grouped(dtype, device, d_model, width) is not None


# ---- the public function


def check_range(experts: torch.Tensor, n_experts: int) -> None:
    """Raise ValueError for an expert that is not there."""
    least, most = (int(end) for end in experts.aminmax())
    if least < 0 or most >= n_experts:
        given = least if least < 0 else most
        raise ValueError(f"moe_mlp: there is an expert {given}, expected 0 to {n_experts - 1}")


MOE_MLP = (
    Backend("triton", moe_in_triton, triton_refuses),
    Backend("grouped", moe_in_groups, grouped_refuses),
    Backend("loop", moe_in_a_loop, serves_all),
    Backend("reference", reference.moe_mlp, serves_all),
)


def moe_mlp(
    x: torch.Tensor,
    gates: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    impl: str | None = None,
) -> torch.Tensor:
    """Each token's K experts, weighted by their gates and added up: [T, M] in x's dtype,
    differentiable in all but `experts`.

    x: [T, M]. gates: [T, K], fp32 or wider. experts: [T, K] int64, each from 0 to E - 1, and no
    expert twice for a token. gate_up: [E, 2F, M], gate's rows first; down: [E, M, F]; both of any
    float dtype, cast to x's. impl: "triton", "grouped" (PyTorch's grouped products), "loop" (expert
    by expert), "reference" (token by token: the oracle), or None to choose. Raises ValueError for
    shapes that do not fit, or an impl that cannot serve them; on a CPU for experts that are not
    there, too. (On a GPU that would wait for the host: their rows are undefined, and -1 is 0.)
    """
    check_tensors("moe_mlp", x=x, gates=gates, gate_up=gate_up, down=down)
    n_experts, d_model, width = down.shape
    fits = (
        x.ndim == 2 and x.shape[1] == d_model and gate_up.shape == (n_experts, 2 * width, d_model)
    )
    if not fits or gates.shape != experts.shape or gates.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"moe_mlp: x is {tuple(x.shape)}, gates {tuple(gates.shape)}, experts "
            f"{tuple(experts.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}; "
            "expected [T, M], [T, K], [T, K], [E, 2F, M] and [E, M, F]"
        )
    if experts.is_floating_point() or not 1 <= gates.shape[1] <= n_experts:
        raise ValueError(
            f"moe_mlp: {gates.shape[1]} experts per token of {n_experts}, as {experts.dtype}; "
            f"expected 1 to {n_experts} whole numbers"
        )
    if experts.device.type == "cpu" and experts.numel():
        check_range(experts, n_experts)
    return choose("moe_mlp", MOE_MLP, impl, x, gates, experts, gate_up, down)(
        x, gates, experts, gate_up, down
    )
