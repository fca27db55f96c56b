"""What GRPO adds to a Transformer: rewards to advantages, log-probs to loss, gradient and metrics.

Advantages (DeepSeek-R1, eq. 3, arXiv 2501.12948): A = (r - mean) / std of the group, the
population's std; Dr. GRPO (arXiv 2503.20783) leaves the std out. They are computed from differences
to one reward of the group, so that nothing cancels. A group whose rewards span less than
EQUAL_REWARDS, or that share of the largest if it is above 1, gets exactly 0, since in floating
point 0.1 * 3 and 0.3 differ.

Loss, a sum over tokens with weights w, which carry the mean (rl/losses.py):
    x = logp - old_logp, r = e^x      loss = sum w (-J + kl_coef k)
    clip       J = min(r A, clip(r, 1 - low, 1 + high) A); dJ/dlogp = r A where that is the smaller,
               else 0: GRPO, Dr. GRPO, DAPO (arXiv 2503.14476)
    gspo       the same with x the mean of the sequence's live tokens: one ratio (arXiv 2507.18071)
    cispo      J = c A logp with c = clip(r, 1 - low, 1 + high) a constant, dJ/dlogp = c A
               (arXiv 2506.13585)
    dppo       J = r A, but 0 where p - p_old > high with A > 0, or p_old - p > low with A < 0, p
               being e^logp; dJ/dlogp = J. |p - p_old| is the total variation between old and new
               policy when all other tokens are seen as one. So rare tokens, whose ratio is noise,
               move freely, and frequent ones do not (arXiv 2602.04879, the binary form)
    reinforce  J = A logp, dJ/dlogp = A: no ratio, so no clip; r is for the metrics (Williams 1992)

The KL to the reference, with d = ref_logp - logp (Schulman 2020, "Approximating KL"):
    k1 = -d             dk/dlogp = 1          its mean on-policy is 0: as a loss it is noise only
    k2 = d^2 / 2        dk/dlogp = -d         on-policy that of the reverse KL(policy || reference)
    k3 = e^d - d - 1    dk/dlogp = 1 - e^d    on-policy that of the forward KL(reference || policy)
On-policy k1 and k3 have the reverse KL as their mean, but the mean of a gradient is not the
gradient of the mean. The right column says whose gradient it is for each token's distribution, with
the states as given (Tang and Munos 2025, arXiv 2506.09477). To first order in d the two KLs are the
same.

A token is live if its weight is not 0 and it has something to teach: an advantage that is not 0, or
a reference. Of the others nothing else is read. x and d are cut off at +-MAX_LOG_RATIO, with
gradient 0 beyond, so that no exp() overflows; such tokens are counted. (reinforce has no x, and
keeps its gradient.)

    program n    | . . . . . . . |   one sequence, BLOCK tokens at a time; writes their gradients,
    program n+1  | . . . |           and a row of sums. One more program adds up the rows, in order

About 28 bytes and 30 FLOPs per token: the launch is what costs. No atomics, so the same bits every
time, and no synchronisation with the host.

Shapes: N samples (sequences), G groups, R response tokens of all sequences.
"""

import torch

from . import reference
from .dispatch import Backend, check_tensors, choose, serves_all, tl, triton, triton_refuses
from .reference import (
    EQUAL_REWARDS,
    KL_ESTIMATORS,
    MAX_LOG_RATIO,
    OBJECTIVES,
    POLICY_METRICS,
)

LOSS = POLICY_METRICS.index("loss")
RATIO_MAX = POLICY_METRICS.index("ratio_max")
COLUMNS = 16  # of the table of sums: a power of 2 that holds POLICY_METRICS


# ---- advantages


@triton.jit(do_not_specialize_on_alignment=["offsets_G"])
def grpo_advantages_fwd_kernel(
    rewards_N,
    offsets_G,
    advantages_N,
    dead_G,
    tolerance,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program g: the samples of one group, BLOCK at a time, in three passes."""
    g = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    first = tl.load(offsets_G + g).to(tl.int64)
    end = tl.load(offsets_G + g + 1).to(tl.int64)
    # differences to one reward are exact
    base = tl.load(rewards_N + first, first < end, other=0.0).to(tl.float32)

    # 1. mean, lowest and highest
    total = tl.zeros((BLOCK,), tl.float32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(first, end, BLOCK):
        inside = start + i < end
        r = tl.load(rewards_N + start + i, inside, other=0.0).to(tl.float32) - base
        total += tl.where(inside, r, 0.0)
        low = tl.minimum(low, tl.where(inside, r, low))
        high = tl.maximum(high, tl.where(inside, r, high))
    n = tl.maximum(end - first, 1).to(tl.float32)
    mean = tl.sum(total, 0) / n
    lowest = tl.min(low, 0)
    highest = tl.max(high, 0)
    largest = tl.maximum(tl.abs(lowest + base), tl.abs(highest + base))

    # 2. std
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        inside = start + i < end
        r = tl.load(rewards_N + start + i, inside, other=0.0).to(tl.float32) - base
        squares += tl.where(inside, (r - mean) * (r - mean), 0.0)
    # a group that holds a NaN is not dead, so that it shows; an empty one is
    equal = highest - lowest < tolerance * tl.maximum(largest, 1.0)
    dead = (first == end) | (equal & (mean == mean))
    per_std = 1.0
    if NORMALISE:
        per_std = 1 / tl.sqrt_rn(tl.where(dead, 1.0, tl.sum(squares, 0) / n))

    # 3. advantages
    for start in range(first, end, BLOCK):
        inside = start + i < end
        r = tl.load(rewards_N + start + i, inside, other=0.0).to(tl.float32) - base
        advantage = tl.where(dead, 0.0, (r - mean) * per_std)
        tl.store(advantages_N + start + i, advantage, inside)
    tl.store(dead_G + g, dead.to(tl.float32))


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


grpo_advantages_op = torch.library.custom_op(
    "r1zero::grpo_advantages", grpo_advantages_fwd, mutates_args=()
)


@grpo_advantages_op.register_fake
def grpo_advantages_fake(rewards, offsets, normalise):
    advantages = rewards.new_empty(rewards.shape, dtype=torch.float32)
    return advantages, rewards.new_empty(len(offsets) - 1, dtype=torch.float32)


GRPO_ADVANTAGES = (
    Backend("triton", grpo_advantages_op, triton_refuses),
    Backend("reference", reference.grpo_advantages, serves_all),
)


def grpo_advantages(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    normalise_std: bool = True,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much better than the rest of its group was each sample?

    rewards: [N], finite, samples sorted by group; group_offsets: [G + 1] int32 or int64,
    contiguous, from 0 to N, groups of any size, 0 too. Returns advantages [N], fp32 at least, and
    dead [G], 1.0 for a group without signal. Values are checked where rewards are made
    (rl/advantages.py): an op never reads the device back. impl: "triton", "reference", or None to
    choose by device. Raises ValueError for shapes or dtypes that do not fit.
    """
    check_tensors("grpo_advantages", rewards=rewards)
    check_offsets("grpo_advantages", "group_offsets", group_offsets, rewards)
    if rewards.ndim != 1:
        raise ValueError(
            f"grpo_advantages: rewards are {tuple(rewards.shape)}; expected one dimension, [N]"
        )
    args = (rewards, group_offsets, normalise_std)
    return choose("grpo_advantages", GRPO_ADVANTAGES, impl, *args)(*args)


# ---- loss


@triton.jit
def _cut(x, bound):
    """(x cut off at +-bound, whether it was outside); NaN stays NaN."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x)), tl.abs(x) > bound


@triton.jit
def _live(weights_R, advantages_R, r, here, ref_R):
    """(weight and advantage of tokens r, which of them are live)"""
    w = tl.load(weights_R + r, here, other=0.0)
    live = here & (w != 0)
    a = tl.load(advantages_R + r, live, other=0.0)
    if ref_R is None:
        live = live & (a != 0)
    return w, a, live


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["offsets_N"])
def policy_loss_fwd_kernel(
    logp_R,
    old_R,
    ref_R,
    advantages_R,
    weights_R,
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
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program n: the gradient of one sequence's tokens, and a row of sums, as POLICY_METRICS names
    them.

    ESTIMATOR: of the KL; None without a reference.
    """
    n = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    first = tl.load(offsets_N + n).to(tl.int64)
    end = tl.load(offsets_N + n + 1).to(tl.int64)

    # -- gspo: x is the mean over the sequence --
    x_sequence = 0.0
    if OBJECTIVE == "gspo":
        x_sum = tl.zeros((BLOCK,), tl.float32)
        n_live = tl.zeros((BLOCK,), tl.float32)
        for start in range(first, end, BLOCK):
            r = start + i
            _, _, live = _live(weights_R, advantages_R, r, r < end, ref_R)
            x_sum += tl.load(logp_R + r, live, other=0.0).to(tl.float32)
            x_sum -= tl.load(old_R + r, live, other=0.0).to(tl.float32)
            n_live += live.to(tl.float32)
        x_sequence = tl.sum(x_sum, 0) / tl.maximum(tl.sum(n_live, 0), 1.0)

    loss = tl.zeros((BLOCK,), tl.float32)
    tokens = tl.zeros((BLOCK,), tl.float32)
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    k1 = tl.zeros((BLOCK,), tl.float32)
    k3 = tl.zeros((BLOCK,), tl.float32)
    ratios = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    cut = tl.zeros((BLOCK,), tl.float32)
    kl = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        r = start + i
        here = r < end
        # -- the ratio r = e^x --
        w, a, live = _live(weights_R, advantages_R, r, here, ref_R)
        logp = tl.load(logp_R + r, live, other=0.0).to(tl.float32)
        if OBJECTIVE == "gspo":
            x = tl.where(live, x_sequence, 0.0)
        else:
            old = tl.load(old_R + r, live, other=0.0).to(tl.float32)
            x = logp - old
        x, is_cut = _cut(x, bound)
        ratio = tl.exp(x)
        too_low = ratio < 1 - clip_low
        too_high = ratio > 1 + clip_high
        clipped = tl.where(too_high, 1 + clip_high, tl.where(too_low, 1 - clip_low, ratio))

        # -- J and its slope dJ/dlogp --
        # reinforce has no ratio: nothing to clip, and no gradient to lose to the cut
        if OBJECTIVE == "reinforce":
            gain = a * logp
            grad = -a
        elif OBJECTIVE == "cispo":
            gain = clipped * a * logp
            grad = tl.where(is_cut, 0.0, -clipped * a)
        elif OBJECTIVE == "dppo":  # the bounds are of the probability itself
            change = tl.exp(logp) - tl.exp(old)
            too_low = (change < -clip_low) & (a < 0)
            too_high = (change > clip_high) & (a > 0)
            gain = tl.where(too_low | too_high, 0.0, ratio * a)
            grad = tl.where(is_cut, 0.0, -gain)
        else:  # the smaller one for either sign of A
            bound_wins = ratio * a > clipped * a
            gain = tl.where(bound_wins, clipped * a, ratio * a)
            grad = tl.where(bound_wins | is_cut, 0.0, -ratio * a)
            too_low = too_low & (ratio * a < 0)
            too_high = too_high & (ratio * a > 0)
        loss += tl.where(live, -w * gain, 0.0)

        # -- the KL to the reference --
        if ref_R is not None:
            d = tl.load(ref_R + r, live, other=0.0).to(tl.float32) - logp
            d, d_is_cut = _cut(d, bound)
            if ESTIMATOR == "k1":
                k = -d
                k_slope = 1.0
            elif ESTIMATOR == "k2":
                k = d * d / 2
                k_slope = -d
            else:
                k = tl.exp(d) - d - 1
                k_slope = 1 - tl.exp(d)
            kl += tl.where(live, w * k, 0.0)
            grad += kl_coef * tl.where(d_is_cut, 0.0, k_slope)
            is_cut = is_cut | d_is_cut
        tl.store(dlogp_R + r, tl.where(live, w * grad, 0.0), here)

        # -- metrics; a token that is not live has x = 0 and ratio = 1 --
        tokens += live.to(tl.float32)
        if OBJECTIVE != "reinforce":
            low += (too_low & live).to(tl.float32)
            high += (too_high & live).to(tl.float32)
        k1 -= x
        k3 += ratio - 1 - x
        ratios += tl.where(live, ratio, 0.0)
        largest = tl.maximum(largest, tl.where(live, ratio, 0.0))
        cut += (is_cut & live).to(tl.float32)
    if n == tl.num_programs(0) - 1:  # tokens behind the last sequence belong to none
        for start in range(end, R, BLOCK):
            tl.store(dlogp_R + start + i, tl.zeros((BLOCK,), tl.float32), start + i < R)

    # -- one row of the table --
    kl_total = tl.sum(kl, 0)
    ratio_total = tl.sum(ratios, 0)
    ratio_max = tl.where(ratio_total == ratio_total, tl.max(largest, 0), ratio_total)  # NaN shows
    row = tl.where(column == 0, tl.sum(loss, 0) + kl_coef * kl_total, 0.0)
    row = tl.where(column == 1, tl.sum(tokens, 0), row)
    row = tl.where(column == 2, tl.sum(low, 0), row)
    row = tl.where(column == 3, tl.sum(high, 0), row)
    row = tl.where(column == 4, tl.sum(k1, 0), row)
    row = tl.where(column == 5, tl.sum(k3, 0), row)
    row = tl.where(column == 6, ratio_total, row)
    row = tl.where(column == 7, ratio_max, row)
    row = tl.where(column == 8, tl.sum(cut, 0), row)
    row = tl.where(column == 9, kl_total, row)
    tl.store(sums_NC + n.to(tl.int64) * COLUMNS + column, row)


@triton.jit(do_not_specialize=["N"])
def policy_sums_fwd_kernel(
    sums_NC,
    out_C,
    N,
    USED: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The only program: adds up the rows, in fixed order; of column MAX it takes the largest."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    largest = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, N, BLOCK):
        row_ptrs = sums_NC + (start + row).to(tl.int64) * COLUMNS + column
        rows = tl.load(row_ptrs, start + row < N, other=0.0)
        total += rows
        largest = tl.maximum(largest, rows)
    sums = tl.sum(total, 0)[None, :]
    most = tl.max(largest, 0)[None, :]
    # a maximum would pass over a NaN, a sum does not
    result = tl.where((column == MAX) & (sums == sums), most, sums)
    tl.store(out_C + column, result, column < USED)


def policy_loss_fwd(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    objective: str,
    kl_estimator: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums [len(POLICY_METRICS)], d loss / d logp [R]), fp32."""
    N = len(offsets) - 1
    dlogp = logp.new_empty(logp.shape, dtype=torch.float32)
    rows = logp.new_empty((N, COLUMNS), dtype=torch.float32)
    sums = logp.new_empty(len(POLICY_METRICS), dtype=torch.float32)
    if N:
        policy_loss_fwd_kernel[(N,)](
            logp,
            old_logp,
            ref_logp,
            advantages,
            weights,
            offsets,
            dlogp,
            rows,
            len(logp),
            clip_low,
            clip_high,
            kl_coef,
            MAX_LOG_RATIO,
            OBJECTIVE=objective,
            ESTIMATOR=None if ref_logp is None else kl_estimator,
            BLOCK=1024,
            COLUMNS=COLUMNS,
            num_warps=8,
            maxnreg=255,  # or it spills on sm_120, to run more programs at once
        )
    policy_sums_fwd_kernel[(1,)](
        rows,
        sums,
        N,
        USED=len(POLICY_METRICS),
        MAX=RATIO_MAX,
        BLOCK=128,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return sums, dlogp


def policy_loss_bwd(dsums: torch.Tensor, dlogp: torch.Tensor) -> torch.Tensor:
    """An op of its own, so that a second derivative is an error and not 0."""
    return dsums[LOSS] * dlogp


policy_loss_op = torch.library.custom_op("r1zero::policy_loss", policy_loss_fwd, mutates_args=())
policy_loss_bwd_op = torch.library.custom_op(
    "r1zero::policy_loss_bwd", policy_loss_bwd, mutates_args=()
)


@policy_loss_op.register_fake
def policy_loss_fake(logp, *_):
    sums = logp.new_empty(len(POLICY_METRICS), dtype=torch.float32)
    return sums, logp.new_empty(logp.shape, dtype=torch.float32)


@policy_loss_bwd_op.register_fake
def policy_loss_bwd_fake(dsums, dlogp):
    return dlogp.new_empty(dlogp.shape)


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def backward(ctx, dsums, _):
    (dlogp,) = ctx.saved_tensors
    return policy_loss_bwd_op(dsums, dlogp).to(ctx.dtype), *[None] * 10


policy_loss_op.register_autograd(backward, setup_context=keep_for_backward)


def triton_policy_loss(
    logp, old_logp, ref_logp, advantages, weights, offsets, *settings
) -> tuple[torch.Tensor, torch.Tensor]:
    advantages, weights = advantages.float().contiguous(), weights.float().contiguous()
    sums, _ = policy_loss_op(logp, old_logp, ref_logp, advantages, weights, offsets, *settings)
    return sums[LOSS], sums.detach()


POLICY_LOSS = (
    Backend("triton", triton_policy_loss, triton_refuses),
    Backend("reference", reference.policy_loss, serves_all),
)


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    objective: str = "clip",
    kl_estimator: str = "k3",
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (loss [], differentiable in logp; metrics [len(POLICY_METRICS)], detached).

    logp, old_logp, ref_logp: [R], one per response token, at the temperature of the sampler;
    ref_logp is None for no KL. advantages, weights: [R] too. offsets: [N + 1] int32 or int64, where
    each sequence's tokens begin, from 0 to R. A token with weight 0 is left out, and without a
    reference one with advantage 0. objective: "clip", "cispo", "dppo", "gspo" or "reinforce". gspo
    has one ratio per sequence, so advantages and weights must be the same for all its live tokens;
    that is not checked here. kl_estimator: "k1", "k2" or "k3"; the top of this file says what each
    one's gradient is.

    metrics are sums over the live tokens, so that those of micro-batches add up, but for ratio_max,
    the largest; POLICY_METRICS names them. impl: "triton", "reference", or None to choose by
    device. Raises ValueError for shapes, dtypes or devices that do not fit together, and for an
    unknown objective or estimator.
    """
    per_token = {
        "logp": logp,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "advantages": advantages,
        "weights": weights,
    }
    check_tensors("policy_loss", **per_token)
    check_offsets("policy_loss", "offsets", offsets, logp)
    if logp.ndim != 1 or any(x is not None and x.shape != logp.shape for x in per_token.values()):
        shapes = ", ".join(
            f"{name} {None if x is None else tuple(x.shape)}" for name, x in per_token.items()
        )
        raise ValueError(
            f"policy_loss: {shapes}; expected [R] of each, one number per response token, or None "
            "for ref_logp"
        )
    for name, value, known in (
        ("objective", objective, OBJECTIVES),
        ("kl_estimator", kl_estimator, KL_ESTIMATORS),
    ):
        if value not in known:
            raise ValueError(f"policy_loss: {name} is {value!r}; expected one of {known}")
    args = (logp, old_logp, ref_logp, advantages, weights, offsets)
    args += (clip_low, clip_high, kl_coef, objective, kl_estimator)
    return choose("policy_loss", POLICY_LOSS, impl, *args)(*args)


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
