"""Log-prob and entropy of chosen tokens, from hidden states and the head's weight, without the
logits.

    l = h w^T / t     logp = l[target] - log sum exp l     H = -sum p log p,  p = softmax(l)
Where asked, l is softcapped before the division: softcap tanh(. / softcap). With targets = next
tokens, -logp is the cross-entropy of pretraining. Gradient, with a and b upstream of logp and H:
    dl_j = (a (1[j = target] - p_j) - b p_j (log p_j + H)) / t      dh = dl w      dw = dl^T h
and dl times 1 - (l t / softcap)^2 where there is a softcap.

                 V ->                          forward: a program owns a tile of logits. It leaves
    T     | tile | tile | tile | tile |          three numbers per row: the maximum m, the sum of
    |     | tile | tile | tile | tile |          e^(l - m), and of e^(l - m) (l - m). A second
    v     | tile | tile | tile | tile |          kernel joins the tiles of a row, left to right.
           '-- slice 0 -'-- slice 1 -'         backward: one slice at a time. The tiles of dl are
                                                 computed again, into a workspace of one slice.

Two plain products take a slice of dl to dh (summed in fp32 over the slices) and to that slice of
dw, which has the weight's dtype. A weight of another dtype than h (the fp32 master) is rounded to
h's, slice by slice.

FLOPs: 2 T M V forward, 6 T M V backward. Least bytes in 16 bit: 2 (T M + V M). Memory beyond the
results: forward 12 T V / BLOCK_V, backward 4 T M + 2 T SLICE; with chosen rows 2 T M, for an fp32
weight 2 SLICE M more. The logits would be 2 T V.

No atomics: the same bits every time. A token's logp and entropy do not depend on its neighbours
either: the tiles, the order of the sum over M in a tile and the order of the tiles are fixed. T
only says how many tiles there are.

Shapes: T rows of h that count (tokens), M d_model, V vocabulary, C tiles of the vocabulary.
"""

import math

import numpy as np
import torch

from . import chips, reference
from .chips import Chip, stepped_down
from .cpu import elementwise as cpu
from .dispatch import Backend, check_tensors, choose, serves_all, tl, triton, triton_refuses

SLICE = 4096  # columns of dlogits that exist at one time; all of BLOCK_V divide it
LOG2_E = 1.4426950408889634


@triton.jit
def tile_of(tiles_0, tiles_1, SWIZZLE: tl.constexpr):
    """This program's tile (i, j). Programs that run at one time share rows of both factors."""
    pid = tl.program_id(0)
    first = pid // (SWIZZLE * tiles_1) * SWIZZLE
    size = tl.minimum(tiles_0 - first, SWIZZLE)
    in_group = pid % (SWIZZLE * tiles_1)
    return first + in_group % size, in_group // size


@triton.jit
def _logits(
    h_TM,
    w_VM,
    t,
    v,
    T,
    V,
    M,
    scale,
    cap,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The tile of logits of rows t and columns v, divided by the temperature, in base 2.

    Rows and columns behind the end repeat the last one.
    """
    k = tl.arange(0, BLOCK_K)
    h_ptrs = h_TM + tl.minimum(t, T - 1).to(tl.int64)[:, None] * M + k[None, :]
    w_ptrs = w_VM + tl.minimum(v, V - 1).to(tl.int64)[None, :] * M + k[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for start in range(0, M, BLOCK_K):
        if EVEN:
            h_tile = tl.load(h_ptrs + start)
            w_tile = tl.load(w_ptrs + start)
        else:
            h_tile = tl.load(h_ptrs + start, (start + k < M)[None, :], other=0.0)
            w_tile = tl.load(w_ptrs + start, (start + k < M)[:, None], other=0.0)
        acc = tl.dot(h_tile, w_tile, acc, input_precision="ieee")
    x = acc * scale
    if SOFTCAP:
        # tanh: the formula is right where e^2y overflows, the series where the difference cancels
        y = x / cap
        series = y * (1 - y * y * (1 / 3 - y * y * (2 / 15 - y * y * (17 / 315))))
        exact = 1 - 2 / (tl.exp2(y * 2.8853900817779268) + 1)
        x = cap * tl.where(tl.abs(y) < 0.2, series, exact)
    return x


@triton.jit(
    do_not_specialize=["T", "V", "first_v", "first_tile", "C"],
    do_not_specialize_on_alignment=["targets_T"],
)
def logprob_tiles_fwd_kernel(
    h_TM,
    w_VM,
    targets_T,
    stats_3CT,
    chosen_T,
    T,
    V,
    M,
    first_v,
    first_tile,
    C,
    scale,
    cap,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
    EVEN: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One tile: m, sum e^(l - m), sum e^(l - m) (l - m) of each row, and the target's logit."""
    tile_t, tile_v = tile_of(tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), SWIZZLE)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _logits(h_TM, w_VM, t, v, T, V, M, scale, cap, BLOCK_T, BLOCK_V, BLOCK_K, EVEN, SOFTCAP)

    # -- the target's logit, if its column of this slice lies in this tile --
    target = (tl.load(targets_T + t, t < T, other=-1) - first_v).to(tl.int32)
    chosen = tl.sum(tl.where(v[None, :] == target[:, None], x, 0.0), 1)
    here = (target >= tile_v * BLOCK_V) & (target < tl.minimum(V, (tile_v + 1) * BLOCK_V))
    tl.store(chosen_T + t, chosen, here & (t < T))

    # -- the statistics of each row --
    x = tl.where((v < V)[None, :], x, -1e30)  # finite, so that 0 times it is 0
    peak = tl.max(x, 1)
    x -= peak[:, None]
    e = tl.exp2(x)
    stats_ptrs = stats_3CT + (first_tile + tile_v).to(tl.int64) * T + t
    tl.store(stats_ptrs, peak, t < T)
    tl.store(stats_ptrs + C.to(tl.int64) * T, tl.sum(e, 1), t < T)
    tl.store(stats_ptrs + 2 * C.to(tl.int64) * T, tl.sum(e * x, 1), t < T)


@triton.jit(do_not_specialize=["T", "C"])
def logprob_rows_fwd_kernel(
    stats_3CT,
    chosen_T,
    logp_T,
    entropy_T,
    lse_T,
    T,
    C,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Put the tiles of each row together: a running maximum, and sums relative to it."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    peak = tl.full((BLOCK_T,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (t < T)[None, :]
        stats_ptrs = stats_3CT + c.to(tl.int64)[:, None] * T + t[None, :]
        tile_peak = tl.load(stats_ptrs, inside, other=-1e30)
        tile_total = tl.load(stats_ptrs + C.to(tl.int64) * T, inside, other=0.0)
        tile_weighted = tl.load(stats_ptrs + 2 * C.to(tl.int64) * T, inside, other=0.0)
        new_peak = tl.maximum(peak, tl.max(tile_peak, 0))
        # the old sums and the tiles' own, both relative to the new maximum
        fall = peak - new_peak
        tile_fall = tile_peak - new_peak[None, :]
        tile_scale = tl.exp2(tile_fall)
        tiles_weighted = tl.sum((tile_weighted + tile_total * tile_fall) * tile_scale, 0)
        weighted = (weighted + total * fall) * tl.exp2(fall) + tiles_weighted
        total = total * tl.exp2(fall) + tl.sum(tile_total * tile_scale, 0)
        peak = new_peak
    total = tl.where(t < T, total, 1.0)
    lse = peak + tl.log2(total)
    chosen = tl.load(chosen_T + t, t < T, other=0.0)
    tl.store(logp_T + t, (chosen - lse) * 0.6931471805599453, t < T)
    # no difference of large numbers
    tl.store(entropy_T + t, (tl.log2(total) - weighted / total) * 0.6931471805599453, t < T)
    tl.store(lse_T + t, lse, t < T)


@triton.jit(do_not_specialize=["T", "V", "first_v"], do_not_specialize_on_alignment=["targets_T"])
def logprob_dlogits_bwd_kernel(
    h_TM,
    w_VM,
    targets_T,
    lse_T,
    entropy_T,
    dlogp_T,
    dentropy_T,
    dl_TV,
    T,
    V,
    M,
    first_v,
    scale,
    cap,
    per_t,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
    EVEN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """One tile of dl, the gradient of a slice's logits, before temperature and softcap."""
    tile_t, tile_v = tile_of(tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), SWIZZLE)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _logits(h_TM, w_VM, t, v, T, V, M, scale, cap, BLOCK_T, BLOCK_V, BLOCK_K, EVEN, SOFTCAP)
    target = (tl.load(targets_T + t, t < T, other=-1) - first_v).to(tl.int32)
    a = tl.load(dlogp_T + t, t < T, other=0.0)
    log2_p = x - tl.load(lse_T + t, t < T, other=0.0)[:, None]
    if ENTROPY:  # -p (a + b (log p + H))
        b = tl.load(dentropy_T + t, t < T, other=0.0)
        rest = a + b * tl.load(entropy_T + t, t < T, other=0.0)
        dl = -tl.exp2(log2_p) * (rest[:, None] + (b * 0.6931471805599453)[:, None] * log2_p)
    else:  # -p a
        dl = -tl.exp2(log2_p) * a[:, None]
    dl = tl.where(v[None, :] == target[:, None], dl + a[:, None], dl)
    if SOFTCAP:
        tanh = x / cap
        dl *= 1 - tanh * tanh
    # zeros to the end of the tile: the workspace has room
    dl = tl.where((v < V)[None, :], dl * per_t, 0.0)
    dl_ptrs = dl_TV + t.to(tl.int64)[:, None] * STRIDE + v[None, :]
    tl.store(dl_ptrs, dl.to(dl_TV.dtype.element_ty), (t < T)[:, None])


@triton.jit(do_not_specialize=["rows", "K"])
def logprob_product_bwd_kernel(
    dl_TV,
    b_KJ,
    c_IJ,
    rows,
    J,
    K,
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
):
    """One tile of c = dl b, or of dl^T b where TRANSPOSED; with ADD c += that."""
    tile_i, tile_j = tile_of(tl.cdiv(rows, BLOCK_T), tl.cdiv(J, BLOCK_V), SWIZZLE)
    i = tile_i * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tile_j * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_K)
    b_ptrs = b_KJ + k[:, None] * J + j[None, :]
    c_ptrs = c_IJ + i.to(tl.int64)[:, None] * J + j[None, :]
    inside = (i < rows)[:, None] & (j < J)[None, :]
    if ADD:
        acc = tl.load(c_ptrs, inside, other=0.0)
    else:
        acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    # A mask along a contiguous dimension would cost the wide loads. None is needed: columns of dl
    # behind the slice's end are zeros, or make rows that are not stored.
    if TRANSPOSED:
        a_ptrs = dl_TV + k[None, :] * STRIDE + i[:, None]
    else:
        a_ptrs = dl_TV + tl.minimum(i, rows - 1).to(tl.int64)[:, None] * STRIDE + k[None, :]
    for start in range(0, K, BLOCK_K):
        if TRANSPOSED:
            a_tile = tl.load(a_ptrs, (k < K - start)[None, :], other=0.0)
            a_ptrs += BLOCK_K * STRIDE
        else:
            a_tile = tl.load(a_ptrs)
            a_ptrs += BLOCK_K
        b_tile = tl.load(b_ptrs, (k < K - start)[:, None] & (j < J)[None, :], other=0.0)
        b_ptrs += BLOCK_K * J
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
    tl.store(c_ptrs, acc.to(c_IJ.dtype.element_ty), inside)


# ---- block sizes and launchers


def logprob_config(
    kernel: str, dtype: torch.dtype, chip: Chip, M: int, softcap: float = 0.0
) -> dict[str, int]:
    """Tiles of T x V in steps of K for "tiles", "dlogits" or "product", so far alike. SWIZZLE tiles
    of rows run side by side, so that they share the weight. Fewer stages and smaller tiles where
    shared memory is small."""
    if dtype == torch.float32 or M % 16:  # without matrix units, or without wide loads
        tile, warps, stages = (32 if M % 16 else 64, 64, 32), 4, 2
    elif chip.matrix_unit != "wgmma" or softcap:  # too few registers for more
        tile, warps, stages = (128, 128, 64), 8, 3
    else:
        tile, warps, stages = (128, 256, 64), 8, 4
    sizes = dict(zip(("BLOCK_T", "BLOCK_V", "BLOCK_K"), tile, strict=True))
    config = {**sizes, "SWIZZLE": 16, "num_warps": warps, "num_stages": stages}

    def bytes_of(config):
        buffers = chip.buffers(config["num_stages"])
        return dtype.itemsize * buffers * (config["BLOCK_T"] + config["BLOCK_V"]) * tile[2]

    # BLOCK_V stays a multiple of BLOCK_K
    return stepped_down(
        config, bytes_of, chip, (("num_stages", 2), ("BLOCK_V", 64), ("BLOCK_T", 32))
    )


def tiles(config: dict[str, int], rows: int, columns: int) -> tuple[int]:
    """The grid: one program per tile."""
    return (triton.cdiv(rows, config["BLOCK_T"]) * triton.cdiv(columns, config["BLOCK_V"]),)


def slices(weight: torch.Tensor, dtype: torch.dtype, size: int):
    """(first column, that slice of the weight in `dtype`) one after the other."""
    for first in range(0, len(weight), size):
        yield first, weight[first : first + size].to(dtype).contiguous()


def base_2(temperature: float, softcap: float) -> tuple[float, float]:
    """(factor of the products of h and w, softcap), so that logits come out in base 2."""
    return LOG2_E / temperature, LOG2_E * softcap / temperature


def live_rows(h: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return h.contiguous() if rows is None else h.index_select(0, rows)


def logprob_fwd(
    h: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logp [T], entropy [T], log-sum-exp [T] in base 2), fp32. softcap 0: none."""
    h = live_rows(h, rows)
    T, M = h.shape
    V = len(weight)
    config = logprob_config("tiles", h.dtype, chips.chip_of(h.device), M, softcap)
    C = triton.cdiv(V, config["BLOCK_V"])
    stats = h.new_empty((3, C, T), dtype=torch.float32)
    chosen, logp, entropy, lse = (h.new_empty(T, dtype=torch.float32) for _ in range(4))
    if T == 0:
        return logp, entropy, lse

    # 1. The statistics of each tile, in one launch unless the weight has to be cast.
    slice_size = V if weight.dtype == h.dtype else SLICE
    for first, w in slices(weight, h.dtype, slice_size):
        logprob_tiles_fwd_kernel[tiles(config, T, len(w))](
            h,
            w,
            targets,
            stats,
            chosen,
            T,
            len(w),
            M,
            first,
            first // config["BLOCK_V"],
            C,
            *base_2(temperature, softcap),
            EVEN=M % config["BLOCK_K"] == 0,
            SOFTCAP=softcap > 0,
            **config,
        )
    # 2. The tiles of each row together.
    logprob_rows_fwd_kernel[(triton.cdiv(T, 32),)](
        stats, chosen, logp, entropy, lse, T, C, BLOCK_T=32, BLOCK_C=32, num_warps=4
    )
    return logp, entropy, lse


def logprob_bwd(
    dlogp: torch.Tensor,
    dentropy: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    temperature: float,
    softcap: float,
    needs_h: bool,
    needs_w: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dh, dw); an empty tensor where it is not needed."""
    h_live = live_rows(h, rows)
    T, M = h_live.shape
    chip = chips.chip_of(h.device)
    config = logprob_config("dlogits", h.dtype, chip, M, softcap)
    product = logprob_config("product", h.dtype, chip, M, softcap)
    dw = weight.new_empty(weight.shape if needs_w else 0)
    if T == 0:
        dw.zero_()
    dh = h.new_empty((T, M) if needs_h else 0, dtype=torch.float32)
    dl = h.new_empty(T, SLICE)
    for first, w in slices(weight, h.dtype, SLICE) if T else ():
        width = len(w)
        # 1. dl of this slice, into the workspace.
        logprob_dlogits_bwd_kernel[tiles(config, T, width)](
            h_live,
            w,
            targets,
            lse,
            entropy,
            dlogp,
            dentropy,
            dl,
            T,
            width,
            M,
            first,
            *base_2(temperature, softcap),
            1 / temperature,
            STRIDE=SLICE,
            EVEN=M % config["BLOCK_K"] == 0,
            SOFTCAP=softcap > 0,
            ENTROPY=dentropy is not None,
            **config,
        )
        # 2. dh += dl w
        if needs_h:
            logprob_product_bwd_kernel[tiles(product, T, M)](
                dl, w, dh, T, M, width, STRIDE=SLICE, TRANSPOSED=False, ADD=first > 0, **product
            )
        # 3. This slice of dw = dl^T h
        if needs_w:
            logprob_product_bwd_kernel[tiles(product, width, M)](
                dl,
                h_live,
                dw[first : first + width],
                width,
                M,
                T,
                STRIDE=SLICE,
                TRANSPOSED=True,
                ADD=False,
                **product,
            )
    del dl, h_live  # before dh is cast: both are large
    if needs_h:
        dh = dh.to(h.dtype)
        dh = dh if rows is None else reference.put_rows(dh, rows, len(h))
    return dh, dw


# ---- PyTorch's operators


logprob_fwd_op = torch.library.custom_op("r1zero::logprob_fwd", logprob_fwd, mutates_args=())
logprob_bwd_op = torch.library.custom_op("r1zero::logprob_bwd", logprob_bwd, mutates_args=())


@logprob_fwd_op.register_fake
def logprob_fwd_fake(h, weight, targets, rows, temperature, softcap):
    return tuple(h.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))


@logprob_bwd_op.register_fake
def logprob_bwd_fake(
    dlogp, dentropy, h, weight, targets, rows, lse, entropy, temperature, softcap, needs_h, needs_w
):
    return (
        h.new_empty(h.shape if needs_h else 0, dtype=h.dtype if needs_h else torch.float32),
        weight.new_empty(weight.shape if needs_w else 0),
    )


def keep_for_backward(ctx, inputs, output):
    h, weight, targets, rows, ctx.temperature, ctx.softcap = inputs
    _, entropy, lse = output
    ctx.save_for_backward(h, weight, targets, rows, lse, entropy)
    ctx.set_materialize_grads(False)  # a gradient that nobody asked for is None, and costs nothing


def backward(ctx, dlogp, dentropy, _):
    h, weight, targets, rows, lse, entropy = ctx.saved_tensors
    if dlogp is None and dentropy is None:
        return (None,) * 6
    dlogp = torch.zeros_like(lse) if dlogp is None else dlogp.contiguous()
    needs_h, needs_w = ctx.needs_input_grad[:2]
    dh, dw = logprob_bwd_op(
        dlogp,
        None if dentropy is None else dentropy.contiguous(),
        h,
        weight,
        targets,
        rows,
        lse,
        entropy,
        ctx.temperature,
        ctx.softcap,
        needs_h,
        needs_w,
    )
    return dh if needs_h else None, dw if needs_w else None, None, None, None, None


logprob_fwd_op.register_autograd(backward, setup_context=keep_for_backward)


def triton_linear_logprob(h, weight, targets, temperature, rows, softcap):
    targets = targets.contiguous()
    logp, entropy, _ = logprob_fwd_op(h, weight, targets, rows, temperature, softcap or 0.0)
    return logp, entropy


LINEAR_LOGPROB = (
    Backend("triton", triton_linear_logprob, triton_refuses),
    Backend("cpu", cpu.linear_logprob, cpu.linear_logprob_refuses),
    Backend("reference", reference.linear_logprob, serves_all),
)


def check_targets(targets: torch.Tensor | np.ndarray, vocab_size: int) -> None:
    """Raise ValueError, with the place, for a target outside [0, vocab_size). For the host, before
    a batch is sent to the device, where a wrong one would read another's memory."""
    targets = np.asarray(targets)
    wrong = np.flatnonzero((targets < 0) | (targets >= vocab_size))
    if len(wrong):
        raise ValueError(
            f"target {wrong[0]} is token id {targets[wrong[0]]} ({len(wrong)} such in all), but "
            f"the model's vocabulary has ids from 0 to {vocab_size - 1}; is this the tokenizer "
            "that it was made with?"
        )


def linear_logprob(
    h: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    rows: torch.Tensor | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (logp, entropy in nats), fp32 at least, one of each a target; differentiable in h and
    weight.

    h: [T, M]; weight: [V, M], of any float dtype, cast to h's slice by slice, its gradient in its
    own dtype; targets: int64 in [0, V), checked on the host where the batch is built; temperature:
    above 0, the one that the tokens were sampled at; rows: int64, the distinct rows of h that
    predict the targets, in their order, when not all do: the others cost nothing and have gradient
    0; softcap: the logits' own cap. impl: "triton", "cpu", "reference", or None to choose by
    device. In fp16 the upstream gradients must be scaled, as usual. Raises ValueError for shapes
    that do not fit together, for targets or rows that are no int64 on h's device, or for a
    temperature or softcap of 0 or below.
    """
    check_tensors("linear_logprob", h=h, weight=weight)
    for name, x in (("targets", targets), ("rows", rows)):
        if x is not None and (x.dtype != torch.int64 or x.device != h.device or x.ndim != 1):
            raise ValueError(
                f"linear_logprob: {name} is {tuple(x.shape)} in {x.dtype} on {x.device}; "
                f"expected one dimension, int64, on {h.device} like h"
            )
    if (
        h.ndim != 2
        or weight.ndim != 2
        or h.shape[1] != weight.shape[1]
        or not len(weight)
        or len(targets) != (len(h) if rows is None else len(rows))
    ):
        raise ValueError(
            f"linear_logprob: h {tuple(h.shape)}, weight {tuple(weight.shape)}, targets "
            f"{tuple(targets.shape)}, rows {None if rows is None else tuple(rows.shape)}; "
            "expected [T, M], [V, M] and one target for each row of h, or for each of `rows`"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"linear_logprob: temperature is {temperature}, expected a number above 0 (a greedy "
            "choice has no log-prob)"
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(
            f"linear_logprob: softcap is {softcap}, expected a number above 0, or None"
        )
    args = (h, weight, targets, float(temperature), rows, softcap)
    return choose("linear_logprob", LINEAR_LOGPROB, impl, *args)(*args)
