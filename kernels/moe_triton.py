"""A mixture of experts as grouped Triton kernels; the maths is in moe.py.

Row r is the token of pair order[r], and the rows of one expert lie together. With z the gate and up
of a row, side by side, and s = sigmoid(gate):

    z = gate_up_e x[token]     h = gate s up     row = down_e h     y = sum over k of gates row
Gradient:
    dh    = down_e^T dy[token]                     dgates = dh . h  (= dy . row: rows are not kept)
    dgate = g dh up s (1 + gate (1 - s))           dup    = g dh gate s,   g the gate of the row
    dx    = sum over k of gate_up_e^T dz           ddown_e = sum over rows of g dy h^T
                                                   dgate_up_e = sum over rows of dz x^T

    rows    expert 0 | tile | tile | ti|      a tile is at most BLOCK_M rows of one expert: a table
            expert 1 |                        of tiles, made on the device, says which. The grid has
            expert 2 | ti|                    room for the most tiles that there can be, and the
            expert 3 | tile | t|              programs behind the last one end at once

The gather of the tokens is in the loads of the products that need it, SwiGLU at the end of the
first product. Backward computes z again, and puts dz in its place. A tile of a weight's gradient
is one program's loop over the rows of an expert, in order. No atomics, and no tile's size depends
on the number of tokens: the same bits every time, whatever else is in the batch.

FLOPs: 6 P M F forward, 16 P M F backward, where 12 are needed. Bytes in 16 bit, if the cache keeps
what several programs read at one time: forward 2 (2 T M + 3 E M F + 2 P F + 2 P M), backward
2 (5 T M + 8 E M F + 14 P F + 2 P M). Kept for backward: the inputs and the order of the pairs. As
dh has not been multiplied by the gate, fp16 might not hold it: there it is fp32, 4 P F bytes more.

Shapes: T tokens, P = T K pairs, K experts per token, E experts, M d_model, F width of an expert,
J tiles of rows.
"""

import torch

from . import chips
from .chips import Chip, stepped_down
from .dispatch import tl, triton
from .linear_logprob import tile_of

# ---- what the products share


@triton.jit
def _tile(tiles_3J, J, columns, BLOCK_N: tl.constexpr, SWIZZLE: tl.constexpr):
    """This program's (expert, first row, end of the expert's rows, tile of columns). There is no
    such tile if the first row is not before the end."""
    i, j = tile_of(J, tl.cdiv(columns, BLOCK_N), SWIZZLE)
    expert = tl.load(tiles_3J + i).to(tl.int64)
    return expert, tl.load(tiles_3J + J + i), tl.load(tiles_3J + 2 * J + i), j


@triton.jit
def _product(
    a_ptrs,
    w_ptrs,
    n_ok,
    K,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A tile of a w in fp32. The pointers are those of the first BLOCK_K columns of a, and rows of
    w; EVEN: neither K nor the columns need a mask."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            a_tile = tl.load(a_ptrs + start)
            w_tile = tl.load(w_ptrs + start * stride_wk)
        else:
            k_ok = start + k < K
            a_tile = tl.load(a_ptrs + start, k_ok[None, :], other=0.0)
            w_ok = k_ok[:, None] & n_ok[None, :]
            w_tile = tl.load(w_ptrs + start * stride_wk, w_ok, other=0.0)
        acc = tl.dot(a_tile, w_tile, acc, input_precision="ieee")
    return acc


# ---- forward kernels


@triton.jit(do_not_specialize=["J"], do_not_specialize_on_alignment=["tokens_P", "tiles_3J"])
def moe_up_fwd_kernel(
    x_TM,
    gate_up,
    h_PF,
    tokens_P,
    tiles_3J,
    J,
    M,
    F,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One tile of h = swiglu(gate_up x[token])."""
    expert, first, end, j = _tile(tiles_3J, J, 2 * F, BLOCK_N, SWIZZLE)
    if first < end:
        rows = first + tl.arange(0, BLOCK_M)
        tokens = tl.load(tokens_P + tl.minimum(rows, end - 1))
        k = tl.arange(0, BLOCK_K)
        x_ptrs = x_TM + tokens[:, None] * M + k[None, :]
        # -- z, with column f of gate and column f of up side by side: a thread holds both --
        n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = (n % 2) * F + n // 2
        w_ptrs = gate_up + expert * (2 * F * M) + columns[None, :] * M + k[:, None]
        z = _product(x_ptrs, w_ptrs, n < 2 * F, M, 1, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)
        # -- h --
        gate, up = tl.split(tl.reshape(z, (BLOCK_M, BLOCK_N // 2, 2)))
        h = gate * tl.sigmoid(gate) * up
        f = j * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        h_ptrs = h_PF + rows.to(tl.int64)[:, None] * F + f[None, :]
        tl.store(h_ptrs, h.to(h_PF.dtype.element_ty), (rows < end)[:, None] & (f < F)[None, :])


@triton.jit(do_not_specialize=["J"], do_not_specialize_on_alignment=["tokens_P", "tiles_3J"])
def moe_product_kernel(
    a,
    w_E,
    c_PN,
    tokens_P,
    tiles_3J,
    J,
    N,
    K,
    stride_wk,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
    EVEN: tl.constexpr,
    GATHER: tl.constexpr,
):
    """One tile of c[r] = a[r] w_e [K, N], or of a[token] w_e with GATHER."""
    expert, first, end, j = _tile(tiles_3J, J, N, BLOCK_N, SWIZZLE)
    if first < end:
        rows = first + tl.arange(0, BLOCK_M)
        a_rows = tl.minimum(rows, end - 1).to(tl.int64)
        if GATHER:
            a_rows = tl.load(tokens_P + a_rows)
        k = tl.arange(0, BLOCK_K)
        n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        a_ptrs = a + a_rows[:, None] * K + k[None, :]
        w = w_E + expert * N * K
        w_ptrs = w + k[:, None] * stride_wk + n[None, :] * stride_wn
        c = _product(a_ptrs, w_ptrs, n < N, K, stride_wk, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)
        c_ptrs = c_PN + rows.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(c_ptrs, c.to(c_PN.dtype.element_ty), (rows < end)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["place_TK"])
def moe_sum_kernel(
    rows_PM,
    place_TK,
    gates_TK,
    y_TM,
    T,
    M,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GATES: tl.constexpr,
):
    """Each token's K rows added up, k = 0 first; times their gates, with GATES."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(M, BLOCK_M)
    t = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (t < T)[:, None] & (m < M)[None, :]
    total = tl.zeros((ROWS, BLOCK_M), tl.float32)
    for k in tl.static_range(K):
        place = tl.load(place_TK + t * K + k, t < T, other=0)
        row = tl.load(rows_PM + place[:, None] * M + m[None, :], inside, other=0.0).to(tl.float32)
        if GATES:
            row *= tl.load(gates_TK + t * K + k, t < T, other=0.0)[:, None]
        total += row
    tl.store(y_TM + t[:, None] * M + m[None, :], total.to(y_TM.dtype.element_ty), inside)


# ---- backward kernels


@triton.jit(do_not_specialize=["P"], do_not_specialize_on_alignment=["order_P"])
def moe_hidden_bwd_kernel(
    dh_PF,
    z_PF,
    gh_PF,
    gates_P,
    dgates_P,
    order_P,
    P,
    F,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """ROWS rows of dz in place of z, of g h (gh may be dh), and their dgates."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pairs = tl.load(order_P + rows, rows < P, other=0)
    g = tl.load(gates_P + pairs)[:, None]
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        inside = (rows < P)[:, None] & (f < F)[None, :]
        h_places = rows[:, None] * F + f[None, :]
        gate_ptrs = z_PF + rows[:, None] * (2 * F) + f[None, :]
        dh = tl.load(dh_PF + h_places, inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptrs, inside, other=0.0).to(tl.float32)
        up = tl.load(gate_ptrs + F, inside, other=0.0).to(tl.float32)
        # -- dgates = dh . h --
        s = tl.sigmoid(gate)
        h = gate * s * up
        total += tl.sum(dh * h, 1)
        # -- dz and g h --
        dh *= g
        dtype = z_PF.dtype.element_ty
        tl.store(gate_ptrs, (dh * up * s * (1 + gate * (1 - s))).to(dtype), inside)
        tl.store(gate_ptrs + F, (dh * gate * s).to(dtype), inside)
        tl.store(gh_PF + h_places, (g * h).to(dtype), inside)
    tl.store(dgates_P + pairs, total, rows < P)


@triton.jit(do_not_specialize_on_alignment=["tokens_P", "ends_E"])
def moe_weights_bwd_kernel(
    a_PI,
    b_TN,
    dw_E,
    tokens_P,
    ends_E,
    I,  # noqa: E741
    N,
    stride_i,
    stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One tile of an expert's dw [I, N] = sum over its rows of a[r]^T b[token], in order."""
    tiles = tl.cdiv(I, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // tiles
    i_tile = tl.program_id(0) % tiles // tl.cdiv(N, BLOCK_N)
    n_tile = tl.program_id(0) % tl.cdiv(N, BLOCK_N)
    first = tl.load(ends_E + expert - 1, expert > 0, other=0)
    end = tl.load(ends_E + expert)
    i = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tokens = tl.load(tokens_P + first + k, first + k < end, other=0)
    for start in range(first, end, BLOCK_K):
        rows = start + k
        # one step ahead, as loads that wait for loads of the same step would go without buffers
        next_tokens = tl.load(tokens_P + rows + BLOCK_K, rows + BLOCK_K < end, other=0)
        a_ok = (rows < end)[None, :]
        b_ok = (rows < end)[:, None]
        if not EVEN:
            a_ok = a_ok & (i < I)[:, None]
            b_ok = b_ok & (n < N)[None, :]
        a_ptrs = a_PI + rows.to(tl.int64)[None, :] * I + i[:, None]
        a_tile = tl.load(a_ptrs, a_ok, other=0.0)
        b_tile = tl.load(b_TN + tokens[:, None] * N + n[None, :], b_ok, other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
        tokens = next_tokens
    dw = dw_E + expert.to(tl.int64) * I * N
    dw_ptrs = dw + i[:, None] * stride_i + n[None, :] * stride_n
    tl.store(dw_ptrs, acc.to(dw_E.dtype.element_ty), (i < I)[:, None] & (n < N)[None, :])


# ---- block sizes and launchers


def moe_config(dtype: torch.dtype, chip: Chip, M: int, F: int) -> dict[str, int]:
    """Tiles of rows x columns in steps of K, of all the products. SWIZZLE tiles of rows run side by
    side, so that they share the weights. Fewer stages and columns where shared memory is small."""
    odd = M % 16 or F % 16
    if dtype == torch.float32 or odd:  # without matrix units, or without wide loads
        tile, warps, stages = (32 if odd else 64, 64, 32), 4, 2
    elif chip.matrix_unit != "wgmma":  # too few registers for more
        tile, warps, stages = (128, 128, 64), 8, 3
    else:
        tile, warps, stages = (128, 256, 64), 8, 4
    sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True))
    config = {**sizes, "SWIZZLE": 16, "num_warps": warps, "num_stages": stages}

    def bytes_of(config):
        buffers = chip.buffers(config["num_stages"])
        return dtype.itemsize * buffers * (tile[0] + config["BLOCK_N"]) * tile[2]

    return stepped_down(config, bytes_of, chip, (("num_stages", 2), ("BLOCK_N", 64)))


def rows_config(columns: int) -> tuple[int, int]:
    """(rows, columns) of a block of the sums and of dz: 16 numbers per thread."""
    block = min(triton.next_power_of_2(columns), 1024)
    return 2048 // block, block


def row_tiles(ends: torch.Tensor, n_rows: int, block: int) -> torch.Tensor:
    """[3, J] int32: of each tile the expert, its first row, and the end of the expert's rows. J is
    the most that there can be; those behind the last tile begin at or behind that end."""
    n_experts = len(ends)
    most = (n_rows + min(n_experts, n_rows) * (block - 1)) // block
    counts = ends.diff(prepend=ends.new_zeros(1))
    tiles = (counts + block - 1) // block
    tile_ends = tiles.cumsum(0)
    tile = torch.arange(most, device=ends.device)
    expert = torch.searchsorted(tile_ends, tile, right=True).clamp(max=n_experts - 1)
    first = (ends - counts)[expert] + (tile - (tile_ends - tiles)[expert]) * block
    return torch.stack((expert, first, ends[expert])).int()


def is_even(config: dict[str, int], columns: int, inner: int) -> bool:
    return columns % config["BLOCK_N"] == 0 == inner % config["BLOCK_K"]


def grid(config: dict[str, int], tiles: torch.Tensor, columns: int) -> tuple[int]:
    return (tiles.shape[1] * triton.cdiv(columns, config["BLOCK_N"]),)


def product(a, w, tokens, tiles, config, transposed: bool, dtype=None) -> torch.Tensor:
    """[P, N] in `dtype`, or a's: a[r] w_e^T for w [E, N, K], or a[r] w_e for w [E, K, N] if
    transposed. tokens: with them the rows of a are gathered, a[tokens[r]]."""
    K, N = w.shape[1:] if transposed else w.shape[:0:-1]
    stride_wk, stride_wn = (N, 1) if transposed else (1, K)
    n_rows = len(a) if tokens is None else len(tokens)
    c = a.new_empty(n_rows, N, dtype=dtype)
    moe_product_kernel[grid(config, tiles, N)](
        a,
        w,
        c,
        tokens,
        tiles,
        tiles.shape[1],
        N,
        K,
        stride_wk,
        stride_wn,
        EVEN=is_even(config, N, K),
        GATHER=tokens is not None,
        **config,
    )
    return c


def sum_of_rows(rows: torch.Tensor, place: torch.Tensor, gates: torch.Tensor | None):
    """[T, M]: the sums of each token's rows."""
    T, K = place.shape
    M = rows.shape[1]
    y = rows.new_empty(T, M)
    n_rows, block = rows_config(M)
    moe_sum_kernel[(triton.cdiv(T, n_rows) * triton.cdiv(M, block),)](
        rows, place, gates, y, T, M, K=K, ROWS=n_rows, BLOCK_M=block, GATES=gates is not None
    )
    return y


def weight_gradient(a, b, tokens, ends, like: torch.Tensor, config, transposed: bool):
    """sum over each expert's rows of a[r]^T b[token], in like's shape [E, I, N] and dtype; its
    transpose, for like [E, N, I], if transposed."""
    I, N = a.shape[1], b.shape[1]  # noqa: E741
    dw = torch.empty_like(like, memory_format=torch.contiguous_format)
    n_tiles = triton.cdiv(I, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    moe_weights_bwd_kernel[(len(like) * n_tiles,)](
        a,
        b,
        dw,
        tokens,
        ends,
        I,
        N,
        *((1, I) if transposed else (N, 1)),
        EVEN=I % config["BLOCK_M"] == 0 == N % config["BLOCK_N"],
        **config,
    )
    return dw


def moe_fwd(
    x: torch.Tensor,
    gates: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    order: torch.Tensor,
    place: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """y [T, M]. gates fp32; the weights are cast to x's dtype; order, place, ends: moe.Groups."""
    x, gates, place = x.contiguous(), gates.contiguous(), place.contiguous()
    gate_up, down = (w.to(x.dtype).contiguous() for w in (gate_up, down))
    _, M, F = down.shape
    config = moe_config(x.dtype, chips.chip_of(x.device), M, F)
    tokens = order // place.shape[1]
    tiles = row_tiles(ends, len(order), config["BLOCK_M"])

    # 1. h of each row, from its token.
    h = x.new_empty(len(order), F)
    moe_up_fwd_kernel[grid(config, tiles, 2 * F)](
        x,
        gate_up,
        h,
        tokens,
        tiles,
        tiles.shape[1],
        M,
        F,
        EVEN=is_even(config, 2 * F, M),
        **config,
    )
    # 2. The rows, and each token's sum of them.
    rows = product(h, down, None, tiles, config, transposed=False)
    return sum_of_rows(rows, place, gates)


def moe_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    order: torch.Tensor,
    place: torch.Tensor,
    ends: torch.Tensor,
    needs_x: bool,
    needs_w: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dgates, dgate_up, ddown), the last two in the weights' dtype; an empty tensor where a
    gradient is not needed."""
    dy, x, gates, place = (a.contiguous() for a in (dy, x, gates, place))
    wide_gate_up, wide_down = gate_up, down
    gate_up, down = (w.to(x.dtype).contiguous() for w in (gate_up, down))
    _, M, F = down.shape
    P = len(order)
    config = moe_config(x.dtype, chips.chip_of(x.device), M, F)
    tokens = order // place.shape[1]
    tiles = row_tiles(ends, P, config["BLOCK_M"])

    # 1. z once more, and dh.
    z = product(x, gate_up, tokens, tiles, config, transposed=False)
    wide = torch.float32 if x.dtype == torch.float16 else None  # dh may be too large for fp16
    dh = product(dy, down, tokens, tiles, config, transposed=True, dtype=wide)
    # 2. dz, g h, and dgates.
    dgates = torch.empty_like(gates)
    gh = dh if dh.dtype == x.dtype else torch.empty_like(dh, dtype=x.dtype)
    n_rows, block = rows_config(F)
    moe_hidden_bwd_kernel[(triton.cdiv(P, n_rows),)](
        dh,
        z,
        gh,
        gates,
        dgates,
        order,
        P,
        F,
        ROWS=n_rows,
        BLOCK_F=block,
        maxnreg=255,  # or it spills on sm_80, to run more programs at once
    )
    dz = z
    # 3. The weights' gradients.
    dx, dgate_up, ddown = (x.new_empty(0) for _ in range(3))
    if needs_w:
        dgate_up = weight_gradient(dz, x, tokens, ends, wide_gate_up, config, transposed=False)
        ddown = weight_gradient(gh, dy, tokens, ends, wide_down, config, transposed=True)
    # 4. dx of each row, and each token's sum of them.
    if needs_x:
        dx = sum_of_rows(product(dz, gate_up, None, tiles, config, transposed=True), place, None)
    return dx, dgates, dgate_up, ddown


# ---- PyTorch's operators


moe_fwd_op = torch.library.custom_op("r1zero::moe_fwd", moe_fwd, mutates_args=())
moe_bwd_op = torch.library.custom_op("r1zero::moe_bwd", moe_bwd, mutates_args=())


@moe_fwd_op.register_fake
def moe_fwd_fake(x, gates, gate_up, down, order, place, ends):
    return x.new_empty(x.shape)


@moe_bwd_op.register_fake
def moe_bwd_fake(dy, x, gates, gate_up, down, order, place, ends, needs_x, needs_w):
    dw = (w.new_empty(w.shape) if needs_w else x.new_empty(0) for w in (gate_up, down))
    return x.new_empty(x.shape if needs_x else 0), gates.new_empty(gates.shape), *dw


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dy):
    needs_x, needs_w = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:4])
    dx, dgates, dgate_up, ddown = moe_bwd_op(dy, *ctx.saved_tensors, needs_x, needs_w)
    if not needs_w:
        dgate_up = ddown = None
    return dx if needs_x else None, dgates, dgate_up, ddown, None, None, None


moe_fwd_op.register_autograd(backward, setup_context=keep_for_backward)
