"""GRPO in two launches: rewards to advantages, and log-probs to loss, gradient and metrics. No host sync.

Advantages (DeepSeekMath, eq. 3, arXiv 2402.03300): A = (r - mean) / std of the group, the population's std;
Dr. GRPO (arXiv 2503.20783) leaves the std out. In two passes over differences to one reward of the group, so
that nothing cancels. A group whose rewards span less than EQUAL_REWARDS, or that share of the largest if it
is above 1, gets exactly 0: in floating point 0.1 * 3 and 0.3 differ.

Loss, a sum over tokens t of sequence n with weight w_n, which carries the mean (rl/losses.py):
    x = logp - old_logp, r = e^x      loss = sum w (-J + kl_coef k)
    clip   J = min(r A, clip(r, 1 - low, 1 + high) A)                 GRPO, Dr. GRPO, DAPO (arXiv 2503.14476)
           dJ/dlogp = r A where r A is the smaller one, else 0
    gspo   the same with x the mean of the sequence's tokens, so that it has one ratio    (arXiv 2507.18071)
    cispo  J = c A logp with c = clip(r, 1 - low, 1 + high) a constant (arXiv 2506.13585); dJ/dlogp = c A
    reinforce  J = A logp, dJ/dlogp = A (Williams 1992): no ratio, so no clip; r is only for the metrics
A is one number a sequence, or one a token (not with gspo, which has one ratio a sequence).

The KL to the reference, with d = ref_logp - logp (Schulman 2020, "Approximating KL"). On-policy k1 and k3
have the reverse KL(policy || reference) as their mean, and k2 nearly so; but the mean of a gradient is not
the gradient of the mean. For each token's distribution, the states taken as given, the mean gradient is
on-policy (Tang and Munos 2025, arXiv 2506.09477):
    k1 = -d             dk/dlogp = 1          0: as a loss it does nothing, but for noise
    k2 = d^2 / 2        dk/dlogp = -d         that of the reverse KL(policy || reference)
    k3 = e^d - d - 1    dk/dlogp = 1 - e^d    that of the forward KL(reference || policy), which to first
                                              order in d equals the reverse one's

x and d are cut off at +-MAX_LOG_RATIO, with gradient 0 beyond (but reinforce, which has no x, keeps its own),
so that no exp() overflows; such tokens are counted. Sequences that teach nothing (weight 0, or the advantage
of the whole sequence 0 without a reference) are not even read.

About 20 bytes (24 with an advantage a token) and 30 FLOPs a token: the launch is what costs, so one program
walks one sequence, and one more adds up the sums of all. No atomics: the same bits every time.

Shapes: N samples (sequences), G groups, R response tokens of all sequences.
"""

import torch

from . import reference as reference_grpo
from .dispatch import check_tensors, tl, triton, use_triton
from .reference import (
    EQUAL_REWARDS,
    GRPO_KL_ESTIMATORS,
    GRPO_METRICS,
    GRPO_OBJECTIVES,
    MAX_LOG_RATIO,
)

LOSS, RATIO_MAX = GRPO_METRICS.index("loss"), GRPO_METRICS.index("ratio_max")
COLUMNS = 16  # of the table of sums: a power of 2 that holds GRPO_METRICS


@triton.jit
def grpo_advantages_fwd_kernel(
    rewards_N,
    offsets_G,
    advantages_N,
    dead_G,
    tolerance,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    g, i = tl.program_id(0), tl.arange(0, BLOCK)
    first, end = tl.load(offsets_G + g).to(tl.int64), tl.load(offsets_G + g + 1).to(tl.int64)
    base = tl.load(rewards_N + first, first < end, other=0.0).to(
        tl.float32
    )  # differences to it are exact
    total = tl.zeros((BLOCK,), tl.float32)
    low, high = (
        tl.full((BLOCK,), float("inf"), tl.float32),
        tl.full((BLOCK,), -float("inf"), tl.float32),
    )
    for start in range(first, end, BLOCK):
        inside = start + i < end
        r = tl.load(rewards_N + start + i, inside, other=0.0).to(tl.float32) - base
        total += tl.where(inside, r, 0.0)
        low, high = (
            tl.minimum(low, tl.where(inside, r, low)),
            tl.maximum(high, tl.where(inside, r, high)),
        )
    n = tl.maximum(end - first, 1).to(tl.float32)
    mean, lowest, highest = tl.sum(total, 0) / n, tl.min(low, 0), tl.max(high, 0)
    largest = tl.maximum(tl.abs(lowest + base), tl.abs(highest + base))
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        inside = start + i < end
        r = tl.load(rewards_N + start + i, inside, other=0.0).to(tl.float32) - base
        squares += tl.where(inside, (r - mean) * (r - mean), 0.0)
    # a NaN is not hidden; a group of none is dead
    dead = (first == end) | (
        (highest - lowest < tolerance * tl.maximum(largest, 1.0)) & (mean == mean)
    )
    per_std = 1.0
    if NORMALISE:
        per_std = 1 / tl.sqrt_rn(tl.where(dead, 1.0, tl.sum(squares, 0) / n))
    for start in range(first, end, BLOCK):
        inside = start + i < end
        r = tl.load(rewards_N + start + i, inside, other=0.0).to(tl.float32) - base
        tl.store(advantages_N + start + i, tl.where(dead, 0.0, (r - mean) * per_std), inside)
    tl.store(dead_G + g, dead.to(tl.float32))


@triton.jit
def _cut(x, bound):
    """(x cut off at +-bound, whether it was outside); NaN stays NaN."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x)), tl.abs(x) > bound


@triton.jit(do_not_specialize=["R"])
def grpo_loss_fwd_kernel(
    logp_R,
    old_R,
    ref_R,
    advantages,
    weights_N,
    offsets_N,
    dlogp_R,
    sums_NC,
    R,
    clip_low,
    clip_high,
    kl_coef,
    bound,
    OBJECTIVE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sequence n: the gradient of its tokens, and a row of sums, in the order of GRPO_METRICS.

    advantages: [R] where PER_TOKEN, else [N]. ESTIMATOR: of the KL; None without a reference.
    """
    n, i, column = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    first, end = tl.load(offsets_N + n).to(tl.int64), tl.load(offsets_N + n + 1).to(tl.int64)
    w = tl.load(weights_N + n)
    live = (w != 0) & (first < end)
    if not PER_TOKEN:
        a = tl.load(advantages + n)
        live = live & ((a != 0) | (ref_R is not None))
    end_live = tl.where(live, end, first)
    x_sequence = 0.0
    if OBJECTIVE == "gspo":
        x_sum = tl.zeros((BLOCK,), tl.float32)
        for start in range(first, end_live, BLOCK):
            r = start + i
            x_sum += tl.load(logp_R + r, r < end, other=0.0).to(tl.float32)
            x_sum -= tl.load(old_R + r, r < end, other=0.0).to(tl.float32)
        x_sequence = tl.sum(x_sum, 0) / tl.maximum(end - first, 1).to(tl.float32)
    loss, kl, k1, k3 = (
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
    )
    low, high, cut = (
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
    )
    ratios, largest = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end_live, BLOCK):
        r = start + i
        here = r < end
        logp = tl.load(logp_R + r, here, other=0.0).to(tl.float32)
        if OBJECTIVE == "gspo":
            x, is_cut = _cut(tl.where(here, x_sequence, 0.0), bound)
        else:
            x, is_cut = _cut(logp - tl.load(old_R + r, here, other=0.0).to(tl.float32), bound)
        ratio = tl.exp(x)
        if PER_TOKEN:
            a = tl.load(advantages + r, here, other=0.0)
        clipped = tl.where(
            ratio > 1 + clip_high,
            1 + clip_high,
            tl.where(ratio < 1 - clip_low, 1 - clip_low, ratio),
        )
        if (
            OBJECTIVE == "reinforce"
        ):  # no ratio in it: nothing to clip, and no gradient to lose to the cut
            gain, slope = a * logp, tl.where(here, a, 0.0)
        elif OBJECTIVE == "cispo":
            gain, slope = clipped * a * logp, clipped * a
            is_low, is_high = ratio < 1 - clip_low, ratio > 1 + clip_high
        else:
            bound_wins = (
                ratio * a > clipped * a
            )  # the minimum is the pessimist's choice for either sign of A
            gain, slope = (
                tl.where(bound_wins, clipped * a, ratio * a),
                tl.where(bound_wins, 0.0, ratio * a),
            )
            is_low = (ratio < 1 - clip_low) & (ratio * a < 0)
            is_high = (ratio > 1 + clip_high) & (ratio * a > 0)
        grad = -slope if OBJECTIVE == "reinforce" else tl.where(is_cut, 0.0, -slope)
        loss += tl.where(here, -gain, 0.0)
        if ref_R is not None:
            d, d_is_cut = _cut(tl.load(ref_R + r, here, other=0.0).to(tl.float32) - logp, bound)
            if ESTIMATOR == "k1":
                k, k_slope = -d, 1.0
            elif ESTIMATOR == "k2":
                k, k_slope = d * d / 2, -d
            else:
                k, k_slope = tl.exp(d) - d - 1, 1 - tl.exp(d)
            kl += tl.where(here, k, 0.0)
            grad += kl_coef * tl.where(d_is_cut, 0.0, k_slope)
            is_cut = is_cut | d_is_cut
        tl.store(dlogp_R + r, w * grad, here)
        if OBJECTIVE != "reinforce":
            low += (is_low & here).to(tl.float32)
            high += (is_high & here).to(tl.float32)
        cut += (is_cut & here).to(tl.float32)
        k1 -= x  # places that there are not have x = 0
        k3 += ratio - 1 - x
        ratios += tl.where(here, ratio, 0.0)
        largest = tl.maximum(largest, tl.where(here, ratio, 0.0))
    for start in range(end_live, end, BLOCK):
        tl.store(dlogp_R + start + i, tl.zeros((BLOCK,), tl.float32), start + i < end)
    if n == tl.num_programs(0) - 1:  # tokens behind the last sequence are nobody's
        for start in range(end, R, BLOCK):
            tl.store(dlogp_R + start + i, tl.zeros((BLOCK,), tl.float32), start + i < R)
    w = tl.where(live, w, 0.0)
    kl_total, ratio_total = w * tl.sum(kl, 0), tl.sum(ratios, 0)
    row = tl.where(column == 0, w * tl.sum(loss, 0) + kl_coef * kl_total, 0.0)
    row = tl.where(column == 1, (end_live - first).to(tl.float32), row)
    row = tl.where(column == 2, tl.sum(low, 0), row)
    row = tl.where(column == 3, tl.sum(high, 0), row)
    row = tl.where(column == 4, tl.sum(k1, 0), row)
    row = tl.where(column == 5, tl.sum(k3, 0), row)
    row = tl.where(column == 6, ratio_total, row)
    row = tl.where(
        column == 7, tl.where(ratio_total == ratio_total, tl.max(largest, 0), ratio_total), row
    )
    row = tl.where(column == 8, tl.sum(cut, 0), row)
    row = tl.where(column == 9, kl_total, row)
    tl.store(sums_NC + n.to(tl.int64) * COLUMNS + column, row)


@triton.jit(do_not_specialize=["N"])
def grpo_sum_fwd_kernel(
    sums_NC,
    out_C,
    N,
    USED: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up the rows, in fixed order; of column MAX the largest."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, COLUMNS)[None, :]
    total, largest = tl.zeros((BLOCK, COLUMNS), tl.float32), tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, N, BLOCK):
        rows = tl.load(
            sums_NC + (start + row).to(tl.int64) * COLUMNS + column, start + row < N, other=0.0
        )
        total += rows
        largest = tl.maximum(largest, rows)
    sums, most = tl.sum(total, 0)[None, :], tl.max(largest, 0)[None, :]
    result = tl.where(
        (column == MAX) & (sums == sums), most, sums
    )  # a maximum would pass over a NaN
    tl.store(out_C + column, result, column < USED)


def grpo_advantages_fwd(
    rewards: torch.Tensor, offsets: torch.Tensor, normalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages [N], dead [G] 0 or 1), fp32."""
    advantages = rewards.new_empty(rewards.shape, dtype=torch.float32)
    dead = rewards.new_empty(len(offsets) - 1, dtype=torch.float32)
    if len(dead):
        grpo_advantages_fwd_kernel[(len(dead),)](
            rewards,
            offsets,
            advantages,
            dead,
            EQUAL_REWARDS,
            NORMALISE=normalise,
            BLOCK=128,
            num_warps=4,
        )
    return advantages, dead


def grpo_loss_fwd(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    ref_logp: torch.Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    objective: str,
    kl_estimator: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums [len(GRPO_METRICS)], d loss / d logp [R]), fp32."""
    N, dlogp = len(weights), logp.new_empty(logp.shape, dtype=torch.float32)
    sums, out = (
        logp.new_empty(shape, dtype=torch.float32) for shape in ((N, COLUMNS), len(GRPO_METRICS))
    )
    if N:
        grpo_loss_fwd_kernel[(N,)](
            logp,
            old_logp,
            ref_logp,
            advantages,
            weights,
            offsets,
            dlogp,
            sums,
            len(logp),
            clip_low,
            clip_high,
            kl_coef,
            MAX_LOG_RATIO,
            OBJECTIVE=objective,
            ESTIMATOR=None if ref_logp is None else kl_estimator,
            PER_TOKEN=len(advantages) != N,
            BLOCK=1024,
            COLUMNS=COLUMNS,
            num_warps=8,
        )
    grpo_sum_fwd_kernel[(1,)](
        sums, out, N, USED=len(GRPO_METRICS), MAX=RATIO_MAX, BLOCK=128, COLUMNS=COLUMNS, num_warps=4
    )
    return out, dlogp


grpo_advantages_op = torch.library.custom_op(
    "r1zero::grpo_advantages", grpo_advantages_fwd, mutates_args=()
)
grpo_loss_op = torch.library.custom_op("r1zero::grpo_loss", grpo_loss_fwd, mutates_args=())


@grpo_advantages_op.register_fake
def grpo_advantages_fake(rewards, offsets, normalise):
    return (
        rewards.new_empty(rewards.shape, dtype=torch.float32),
        rewards.new_empty(len(offsets) - 1, dtype=torch.float32),
    )


@grpo_loss_op.register_fake
def grpo_loss_fake(
    logp,
    old_logp,
    advantages,
    weights,
    offsets,
    ref_logp,
    clip_low,
    clip_high,
    kl_coef,
    objective,
    kl_estimator,
):
    return (
        logp.new_empty(len(GRPO_METRICS), dtype=torch.float32),
        logp.new_empty(logp.shape, dtype=torch.float32),
    )


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def grpo_loss_bwd(dsums: torch.Tensor, dlogp: torch.Tensor) -> torch.Tensor:
    """An op of its own, so that a second derivative is an error and not 0."""
    return dsums[LOSS] * dlogp


grpo_loss_bwd_op = torch.library.custom_op("r1zero::grpo_loss_bwd", grpo_loss_bwd, mutates_args=())


@grpo_loss_bwd_op.register_fake
def grpo_loss_bwd_fake(dsums, dlogp):
    return dlogp.new_empty(dlogp.shape)


def backward(ctx, dsums, _):
    return grpo_loss_bwd_op(dsums, *ctx.saved_tensors).to(ctx.dtype), *[None] * 10


grpo_loss_op.register_autograd(backward, setup_context=keep_for_backward)


def grpo_advantages(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    normalise_std: bool = True,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much better than the rest of its group was each sample?

    rewards: [N], samples sorted by group, finite; group_offsets: [G + 1] int32 or int64, contiguous, from 0
    to N, groups of any sizes, 0 too. Returns advantages [N], fp32 at least, and dead [G], 1.0 for a group
    without signal.
    Values are checked where rewards are made (rl/advantages.py), for an op never reads the device back.
    impl: "triton", "reference", or None to choose by device. Raises ValueError for shapes or dtypes that do
    not fit.
    """
    check_tensors("grpo_advantages", rewards=rewards)
    check_offsets("grpo_advantages", "group_offsets", group_offsets, rewards)
    if rewards.ndim != 1:
        raise ValueError(
            f"grpo_advantages: rewards are {tuple(rewards.shape)}; expected one dimension, [N]"
        )
    op = grpo_advantages_op if use_triton(impl, rewards) else reference_grpo.grpo_advantages
    return op(rewards, group_offsets, normalise_std)


def grpo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    ref_logp: torch.Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    objective: str = "clip",
    kl_estimator: str = "k3",
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (loss [], differentiable in logp; metrics [len(GRPO_METRICS)], detached).

    logp, old_logp, ref_logp: [R], one a response token, at the temperature that they were sampled at;
    advantages: [N], one a sequence, or [R], one a response token (where R = N, one a sequence is meant);
    weights: [N], of each token of a sequence; offsets: [N + 1] int32 or int64, where each sequence's tokens
    begin, from 0 to R. ref_logp: None for no KL. objective: "clip", "cispo", "gspo" or "reinforce".
    kl_estimator: "k1", "k2" or "k3"; what each one's gradient is stands at the top of this file.
    metrics are sums over the tokens that teach something, so that those of micro-batches add up:
    reference_grpo.GRPO_METRICS names them; ratio_max is their largest. With advantages [R] those are all
    tokens of the sequences whose weight is not 0, also the tokens whose advantage is.
    impl: "triton", "reference", or None to choose by device.
    Raises ValueError for shapes, dtypes or devices that do not fit together, an unknown objective or
    estimator, or advantages [R] with "gspo".
    """
    check_tensors(
        "grpo_loss",
        logp=logp,
        old_logp=old_logp,
        advantages=advantages,
        weights=weights,
        ref_logp=ref_logp,
    )
    check_offsets("grpo_loss", "offsets", offsets, logp)
    N = len(offsets) - 1
    if (
        logp.ndim != 1
        or any(x is not None and x.shape != logp.shape for x in (old_logp, ref_logp))
        or advantages.shape not in ((N,), logp.shape)
        or weights.shape != (N,)
    ):
        raise ValueError(
            f"grpo_loss: logp {tuple(logp.shape)}, old_logp {tuple(old_logp.shape)}, ref_logp "
            f"{None if ref_logp is None else tuple(ref_logp.shape)}, advantages "
            f"{tuple(advantages.shape)}, weights {tuple(weights.shape)}, offsets "
            f"{tuple(offsets.shape)}; expected [R], [R], [R] or None, [N] or [R], [N], [N + 1]"
        )
    if objective not in GRPO_OBJECTIVES:
        raise ValueError(
            f"grpo_loss: objective is {objective!r}; expected one of {GRPO_OBJECTIVES}"
        )
    if kl_estimator not in GRPO_KL_ESTIMATORS:
        raise ValueError(
            f"grpo_loss: kl_estimator is {kl_estimator!r}; expected one of {GRPO_KL_ESTIMATORS}"
        )
    if objective == "gspo" and advantages.shape != (N,):
        raise ValueError(
            "grpo_loss: gspo has one ratio a sequence, so it takes one advantage a sequence; "
            f"advantages are {tuple(advantages.shape)}, expected ({N},)"
        )
    if not use_triton(impl, logp):
        return reference_grpo.grpo_loss(
            logp,
            old_logp,
            advantages,
            weights,
            offsets,
            ref_logp,
            clip_low,
            clip_high,
            kl_coef,
            objective,
            kl_estimator,
        )
    advantages, weights = advantages.float().contiguous(), weights.float().contiguous()
    sums, _ = grpo_loss_op(
        logp,
        old_logp,
        advantages,
        weights,
        offsets,
        ref_logp,
        clip_low,
        clip_high,
        kl_coef,
        objective,
        kl_estimator,
    )
    return sums[LOSS], sums.detach()


def check_offsets(op: str, name: str, offsets: torch.Tensor, like: torch.Tensor) -> None:
    if (
        offsets.ndim != 1
        or len(offsets) < 1
        or offsets.dtype not in (torch.int32, torch.int64)
        or offsets.device != like.device
        or not offsets.is_contiguous()
    ):
        raise ValueError(
            f"{op}: {name} is {tuple(offsets.shape)} in {offsets.dtype} on {offsets.device}, "
            f"stride {offsets.stride()}; expected one dimension, contiguous, int32 or int64, on "
            f"{like.device} like the rest"
        )


OBJECTIVES, KL_ESTIMATORS, POLICY_METRICS = GRPO_OBJECTIVES, GRPO_KL_ESTIMATORS, GRPO_METRICS


def policy_loss(logp, old_logp, ref_logp, advantages, weights, offsets, **options):
    """Stand-in until the kernel itself takes one number per token."""
    if options.get("objective") == "gspo":
        first = offsets[:-1].long().clamp(max=max(0, len(logp) - 1))
        empty = offsets.diff() == 0
        a, w = advantages[first].masked_fill(empty, 0), weights[first].masked_fill(empty, 0)
        return grpo_loss(logp, old_logp, a, w, offsets, ref_logp, **options)
    each = torch.arange(len(logp) + 1, dtype=torch.int32, device=logp.device)
    return grpo_loss(logp, old_logp, advantages, weights, each, ref_logp, **options)
