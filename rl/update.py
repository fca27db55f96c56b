"""One update from rollouts and their advantages: the policy's, and the critic's where there is one.

Several optimizer steps on the same rollouts share the samples out among them, each process its own; the old
policy is the one before the first. The weight of every token is fixed for the whole batch beforehand, so the
gradient depends neither on the cut into micro-batches nor on leaving out the samples that have nothing to
teach (they still count in the mean's denominator), nor on how many processes share the work.
"""

from collections.abc import Callable

import numpy as np
import torch

from ..kernels.grpo import LOSS
from ..kernels.linear_logprob import check_targets
from ..model.distributed import all_sum, sum_gradients
from ..model.optimizer import learning_rate, optimizer_step
from .family import PIECES, Pieces
from .heads import Critic
from .losses import entropy_bonus, importance_weights, mean_metrics, token_weights, value_loss
from .rollouts import MicroBatch, Rollouts, micro_batches, response_logprobs


class LogpGapError(FloatingPointError):
    """Sampler and trainer disagree about the probability of a sampled token."""


def gap_limit(policy, c) -> float:
    """--max-logp-gap, or what rounding explains."""
    return c.max_logp_gap or (1e-3 if policy.compute_dtype == torch.float32 else 1.0)


@torch.no_grad()
def each_token(
    figure: Callable[[MicroBatch], torch.Tensor],
    rollouts: Rollouts,
    batches: list[MicroBatch],
    device,
) -> torch.Tensor:
    """[R] on the device: figure(batch) of each response token of all rollouts, 0 for those of no batch."""
    whole = torch.zeros(int(rollouts.response_offsets[-1]), device=device)
    for batch in batches:
        found = figure(batch)
        whole = whole.to(found.dtype)
        whole[batch.places] = found
    return whole


def logp_of(model, temperature: float) -> Callable[[MicroBatch], torch.Tensor]:
    return lambda batch: response_logprobs(model, batch, temperature)[0]


def shares_of(samples: np.ndarray, c, step: int) -> list[np.ndarray]:
    """The samples of each optimizer step of a batch of rollouts, dealt out at random."""
    return np.array_split(
        np.random.default_rng([c.seed, step]).permutation(samples), c.updates_per_step
    )


def update_policy(
    policy,
    reference,
    rollouts: Rollouts,
    advantages: np.ndarray,
    optimizer,
    c,
    step: int,
    pieces: Pieces = PIECES,
) -> dict:
    """One or more optimizer steps on the rollouts; returns the figures to log. advantages: of each answer
    [N], or of each response token [R]. Raises LogpGapError before anything is updated with a wrong
    log-prob."""
    device, n_answers = policy.embed.device, len(rollouts.texts)
    check_targets(np.concatenate(rollouts.sequences), policy.config.vocab_size)
    lengths = rollouts.response_lengths
    if c.loss.overlong_filter:
        lengths = np.where([reason == "length" for reason in rollouts.finish_reasons], 0, lengths)
    weights_N = pieces.weights(lengths, c.loss.mean, c.max_new_tokens, all_sum) * c.updates_per_step
    per_token = len(advantages) != n_answers
    live = np.flatnonzero(
        weights_N
        if per_token or c.kl_in_loss or c.loss.entropy_coef > 0
        else weights_N * advantages
    )
    advantages, weights = (torch.from_numpy(x).float().to(device) for x in (advantages, weights_N))
    updates = [
        micro_batches(rollouts, share, c.micro_tokens, device) for share in shares_of(live, c, step)
    ]
    old_logp = None  # under the policy before the first update; with a single update that is the update's own
    if c.updates_per_step > 1:
        # in the very batches of the update: where rounding depends on a batch's shape, the ratio begins at 1
        old_logp = each_token(
            logp_of(policy, rollouts.temperature), rollouts, sum(updates, []), device
        )

    parts, norms, entropies, gap, gap_sum, n_tokens = [], [0.0], 0.0, 0.0, 0.0, 0
    largest_gap = gap_limit(policy, c)
    for batches in updates:
        found = []  # read from the device once an update
        for batch in batches:
            logp, entropy = response_logprobs(policy, batch, rollouts.temperature)
            old = logp.detach() if old_logp is None else old_logp[batch.places]
            ref_logp = None
            if c.kl_in_loss:
                with torch.no_grad():
                    ref_logp, _ = response_logprobs(reference, batch, rollouts.temperature)
            a, w, sizes = (
                advantages[batch.places if per_token else batch.samples],
                weights[batch.samples],
                batch.response_offsets.diff(),
            )
            if c.loss.max_importance > 0:
                per_answer = c.loss.objective == "gspo"
                trust = importance_weights(
                    old,
                    batch.sampler_logp,
                    c.loss.max_importance,
                    batch.response_offsets if per_answer else None,
                )
                if not (per_token or per_answer):
                    a = a.repeat_interleave(
                        sizes, output_size=len(logp)
                    )  # said, it need not be read back
                a = a * trust
            loss, metrics = pieces.loss(logp, old, ref_logp, a, w, batch.response_offsets, c.loss)
            if c.loss.entropy_coef > 0:
                w_R = w.repeat_interleave(sizes, output_size=len(logp))
                bonus = entropy_bonus(entropy, w_R, c.loss.entropy_coef)
                loss, metrics = loss + bonus, metrics.clone()
                metrics[LOSS] += bonus.detach()
            loss.backward()
            parts.append(metrics)
            gaps = (old - batch.sampler_logp).abs()
            found.append(torch.stack([entropy.detach().sum(), gaps.sum(), gaps.max()]))
            n_tokens += len(logp)
        if batches:
            entropy_sums, gap_sums, gap_maxima = torch.stack(found).double().cpu().T
            # NaN, too, is the largest
            gap = (
                max(gap, float(gap_maxima.max())) if not gap_maxima.isnan().any() else float("nan")
            )
            gap_sum, entropies = (
                gap_sum + float(gap_sums.sum()),
                entropies + float(entropy_sums.sum()),
            )
        n_batches, n_off = all_sum(np.array([len(batches), not gap <= largest_gap]))
        if n_off:  # on all processes, or the others would wait; before anything is updated with it
            where = " on another process" * (gap <= largest_gap)
            raise LogpGapError(
                f"the sampler's log-prob of a token is {gap:.3g} from the trainer's own, more "
                f"than --max-logp-gap {largest_gap:g}{where}"
            )
        if n_batches:
            sum_gradients(policy)
            norms.append(
                optimizer_step(policy, optimizer, learning_rate(step, c.steps, c.optim), c.optim)
            )
    return {
        **mean_metrics(parts, c.updates_per_step),
        "entropy": entropies / max(1, n_tokens),
        "gradient_norm": np.max(norms),
        "logp_gap": gap,
        "logp_gap_mean": gap_sum / max(1, n_tokens),
        "trained_samples": len(live),
    }


def update_critic(
    critic: Critic,
    rollouts: Rollouts,
    values_R: np.ndarray,
    returns_R: np.ndarray,
    optimizer,
    c,
    step: int,
) -> dict:
    """As many optimizer steps on the critic as on the policy; values_R: its own before the first."""
    device = critic.value.device
    values, returns = (
        torch.from_numpy(x).to(device, critic.value.dtype) for x in (values_R, returns_R)
    )
    weights_N = token_weights(rollouts.response_lengths, "token", c.max_new_tokens, all_sum)
    losses, norms = [], []
    for share in shares_of(np.arange(len(rollouts.texts)), c, step):
        for batch in micro_batches(rollouts, share, c.micro_tokens, device):
            weights = torch.full_like(batch.sampler_logp, float(weights_N[0]) * c.updates_per_step)
            loss = value_loss(
                critic(batch), values[batch.places], returns[batch.places], weights, c.value_clip
            )
            loss.backward()
            losses.append(loss.detach())
        sum_gradients(critic)
        norms.append(
            optimizer_step(
                critic, optimizer, learning_rate(step, c.steps, c.critic_optim), c.critic_optim
            )
        )
    variance = float(np.var(returns_R))
    explained = 1 - float(np.var(returns_R - values_R)) / variance if variance else 0.0
    return {
        "value_loss": float(torch.stack(losses).sum()) / c.updates_per_step,
        "value_explained": explained,
        "critic_gradient_norm": np.max(norms),
    }


def kl_to_reference(reference, rollouts: Rollouts, c, step: int) -> float:
    """Mean over tokens of the k3 estimate of KL(policy || reference), on a random few of the samples.

    The policy's log-probs are those that the samples came with, so only the reference has to be run.
    """
    n = min(c.kl_samples, len(rollouts.texts))
    some = np.sort(
        np.random.default_rng([c.seed, step, 1]).choice(len(rollouts.texts), n, replace=False)
    )
    total, count = 0.0, 0
    for batch in micro_batches(rollouts, some, c.micro_tokens, reference.embed.device):
        with torch.no_grad():
            ref_logp, _ = response_logprobs(reference, batch, rollouts.temperature)
        d = ref_logp - batch.sampler_logp
        total += float((d.exp() - d - 1).sum())
        count += len(d)
    return total / max(1, count)
