"""The two ops of GRPO in plain torch: the CPU's path, the oracle of the tests, and the text to learn from.

Shapes: N samples (sequences), G groups, R response tokens of all sequences.
"""
import torch

from .reference import wide

EQUAL_REWARDS = 1e-6  # a group that spans less, or this share, has no signal: 0.1 * 3 and 0.3 are the same
MAX_LOG_RATIO = 20.0  # log-ratios are cut off here, gradient 0 beyond: exp() of them can not overflow
GRPO_OBJECTIVES = ("clip", "cispo", "gspo", "reinforce")
GRPO_KL_ESTIMATORS = ("k1", "k2", "k3")
# loss and kl_loss are weighted; the others are sums over the live tokens, how many there are is "tokens"
GRPO_METRICS = ("loss", "tokens", "clipped_low", "clipped_high", "k1", "k3", "ratio", "ratio_max", "cut_off",
                "kl_loss")


def segment_sum(x: torch.Tensor, segment: torch.Tensor, n: int) -> torch.Tensor:
    return x.new_zeros(n).index_add_(0, segment, x)


def grpo_advantages(rewards_N: torch.Tensor, offsets_G: torch.Tensor, normalise_std: bool = True):
    """(advantages [N], dead [G]); kernels/grpo.py has the maths."""
    r, sizes = wide(rewards_N), offsets_G.diff().long()
    group, n = torch.arange(len(sizes), device=r.device).repeat_interleave(sizes), sizes.clamp(min=1)
    low, high = (r.new_zeros(len(sizes)).scatter_reduce(0, group, r, which, include_self=False)
                 for which in ("amin", "amax"))
    dead = high - low < EQUAL_REWARDS * torch.maximum(low.abs(), high.abs()).clamp(min=1)
    r = r - low[group]  # differences do not cancel
    centred = r - (segment_sum(r, group, len(sizes)) / n)[group]
    std = (segment_sum(centred.square(), group, len(sizes)) / n).sqrt()
    advantages = centred / std.masked_fill(dead, 1.0)[group] if normalise_std else centred
    return advantages.masked_fill(dead[group], 0.0), dead.to(r.dtype)


def grpo_loss(logp, old_logp, advantages, weights, offsets, ref_logp, clip_low, clip_high, kl_coef,
              objective, kl_estimator):
    """(loss, metrics); kernels/grpo.py has the maths, kernels.grpo.grpo_loss the shapes."""
    sizes = offsets.diff().long()
    sequence = torch.arange(len(sizes), device=logp.device).repeat_interleave(sizes)
    per_token = advantages.shape != weights.shape
    live = (weights != 0) & ((advantages != 0) if ref_logp is None and not per_token else True)
    tokens = live[sequence].nonzero().flatten()  # the others never reach exp()
    sequence, logp, old_logp = sequence[tokens], wide(logp[tokens]), wide(old_logp[tokens])
    a = advantages.to(logp.dtype)[tokens if per_token else sequence]
    w = weights.to(logp.dtype)[sequence]
    x = logp - old_logp
    if objective == "gspo":  # the sequence's mean; each token has the gradient of the whole
        x = (segment_sum(x, sequence, len(sizes)) / sizes.clamp(min=1))[sequence]
    cut = x.detach().abs() > MAX_LOG_RATIO
    x = torch.where(cut, x.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), x)  # a NaN keeps its gradient, NaN
    ratio = x.exp()
    clipped = ratio.detach().clamp(1 - clip_low, 1 + clip_high)
    if objective == "reinforce":  # no ratio in it: nothing to clip, and no gradient to lose to the cut
        gain, low, high = a * logp, torch.zeros_like(cut), torch.zeros_like(cut)
    elif objective == "cispo":
        gain = clipped * a * torch.where(cut, logp.detach(), logp)
        low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    else:
        # the pessimist's choice for either sign of A: for A < 0 the gradient stays above 1 + clip_high
        gain = torch.where(ratio * a > clipped * a, clipped * a, ratio * a)
        low, high = (ratio < 1 - clip_low) & (a < 0), (ratio > 1 + clip_high) & (a > 0)
    loss, kl = -(gain * w).sum(), logp.new_zeros(())
    if ref_logp is not None:
        d = wide(ref_logp[tokens]) - logp
        d_cut = d.detach().abs() > MAX_LOG_RATIO
        cut, d = cut | d_cut, torch.where(d_cut, d.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), d)
        k = -d if kl_estimator == "k1" else d * d / 2 if kl_estimator == "k2" else d.exp() - d - 1
        kl = (k * w).sum()
        loss = loss + kl_coef * kl
    with torch.no_grad():
        n, largest = logp.new_tensor(len(tokens)), ratio.amax() if len(tokens) else loss
        metrics = torch.stack([loss, n, low.sum(), high.sum(), -x.sum(), (ratio - 1 - x).sum(), ratio.sum(),
                               largest, cut.sum(), kl])
    return loss, metrics
