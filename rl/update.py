"""One update of the policy from rollouts and their advantages.

With several optimizer steps on the same rollouts, the samples are split among the steps, and each
process has samples of its own. The old policy is the one before the first step. The weight of every
token is fixed for the whole batch beforehand. So the gradient depends neither on the cut into
micro-batches, nor on leaving out the samples that teach nothing (they still count in the mean's
denominator), nor on how many processes share the work.

Shapes: N answers, R response tokens of a batch or of all rollouts.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..kernels.grpo import POLICY_METRICS
from ..kernels.linear_logprob import check_targets
from ..model.distributed import all_sum, sum_gradients
from ..model.lora import AdapterCopy
from ..model.optimizer import learning_rate, optimizer_step
from ..model.routes import check_routes
from .advantages import Advantages, sum_per_answer
from .losses import entropy_bonus, importance_weights, kl_estimate, mean_metrics
from .rollouts import (
    MicroBatch,
    Rollouts,
    micro_batches,
    over_all_tokens,
    response_logprobs,
)

LOSS = POLICY_METRICS.index("loss")


class LogpGapError(FloatingPointError):
    """Sampler and trainer disagree about the probability of a sampled token."""


def update_policy(learner, rollouts: Rollouts, advantages: Advantages, config, step: int) -> dict:
    """One or more optimizer steps on the rollouts; returns the metrics to log.

    learner: a Learner (rl/step.py); config: an Algorithm (rl/family.py). Raises LogpGapError before
    anything is updated with a wrong log-prob, and ValueError for routes that are not the policy's.
    """
    policy = learner.policy
    check_targets(np.concatenate(rollouts.sequences), policy.config.head_rows)
    if rollouts.routes is not None:
        check_routes(rollouts.routes, [len(s) for s in rollouts.sequences], policy.config)
    updates = lay_out_updates(learner, rollouts, advantages, config, step)
    rate = learning_rate(step, config.steps, config.optim)
    corrects = config.loss.max_importance > 0
    log = UpdateLog(gap_limit(policy, config), gap_advice(policy, rollouts), corrects)
    for batches in updates:
        # Add up the gradient over micro-batches...
        for batch in batches:
            loss, *measured = batch_loss(learner, batch, rollouts.temperature, config)
            learner.scaler.scale(loss).backward()
            log.add(batch, *measured)
        # ... and over processes, after all of them have found their log-probs to be right.
        if log.check_gaps_and_count(batches) > 0:
            sum_gradients(policy)
            norm = optimizer_step(policy, learner.optimizer, rate, config.optim, learner.scaler)
            log.gradient_norms.append(norm)
    # PPO alone: its critic learns from the same rollouts. (Without one this does nothing.)
    critic_metrics = learner.credit.critic.update(rollouts, advantages, step)
    metrics = log.summary(config.updates_per_step) | advantages.metrics | critic_metrics
    return metrics | learner.scaler.metrics() | {"lr": rate}


def lay_out_updates(
    learner, rollouts: Rollouts, advantages: Advantages, config, step: int
) -> list[list[MicroBatch]]:
    """The micro-batches of each optimizer step, with everything that their loss needs."""
    device, lengths = learner.policy.device, rollouts.response_lengths
    counted = lengths
    if config.loss.overlong_filter:
        was_cut = [reason == "length" for reason in rollouts.finish_reasons]
        counted = np.where(was_cut, 0, lengths)
    weights_N = learner.loss_weights(counted, config.loss.mean, config.max_new_tokens)
    weights_N = weights_N * config.updates_per_step  # each update has a share of the samples

    # Samples that teach nothing are left out: those whose advantages are all 0, if nothing else
    # (the KL, the entropy bonus) has a gradient.
    has_signal_N = sum_per_answer(advantages.per_token != 0, rollouts.response_offsets) > 0
    others_teach = config.kl_in_loss or config.loss.entropy_coef > 0
    live = np.flatnonzero(weights_N * (has_signal_N | others_teach))

    def on_device(values_R: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values_R).float().to(device)

    advantages_R = on_device(advantages.per_token)
    weights_R = on_device(np.repeat(weights_N, lengths))
    updates = [
        micro_batches(rollouts, share, config.micro_tokens, device)
        for share in deal_samples(live, config, step)
    ]

    # The old policy is the one before the first update. Its log-probs are computed in the same
    # micro-batches as the update's, so that rounding cannot push the first ratio off 1.
    every_batch = [batch for batches in updates for batch in batches]
    old_logp = ref_logp = [None] * len(every_batch)
    if config.updates_per_step > 1:
        old_logp = logprobs_of(learner.policy, every_batch, rollouts.temperature)
    if config.kl_in_loss:
        ref_logp = learner.reference.logprobs(every_batch, rollouts.temperature)

    complete = iter(
        replace(
            batch,
            advantages=advantages_R[batch.token_index],
            weights=weights_R[batch.token_index],
            old_logp=old,
            ref_logp=ref,
        )
        for batch, old, ref in zip(every_batch, old_logp, ref_logp, strict=True)
    )
    return [[next(complete) for _ in batches] for batches in updates]


def deal_samples(samples: np.ndarray, config, step: int) -> list[np.ndarray]:
    """The samples of each optimizer step of a batch of rollouts, dealt out at random."""
    shuffled = np.random.default_rng([config.seed, step]).permutation(samples)
    return np.array_split(shuffled, config.updates_per_step)


def batch_loss(learner, batch: MicroBatch, temperature: float, config) -> tuple:
    """(loss, metrics, entropy [R], gap [R], is_cut [R], flipped [T, L]) of one micro-batch.

    is_cut: which importance weights were lowered to the cap, or dropped; None without weights.
    flipped: which routers would have chosen other experts; None if none were replayed.
    """
    options = config.loss
    routing = batch.replay()
    logp, entropy = response_logprobs(learner.policy, batch, temperature, routing)
    old_logp = logp.detach() if batch.old_logp is None else batch.old_logp
    advantages, is_cut = batch.advantages, None
    if options.max_importance > 0:
        offsets = batch.response_offsets
        trust = importance_weights(old_logp, batch.sampler_logp, offsets, options)
        advantages = advantages * trust
        is_cut = (trust == 0) | (trust >= options.max_importance)
    loss, metrics = learner.policy_loss(
        logp, old_logp, batch.ref_logp, advantages, batch.weights, batch.response_offsets, options
    )
    if options.entropy_coef > 0:
        bonus = entropy_bonus(entropy, batch.weights, options.entropy_coef)
        loss, metrics = loss + bonus, metrics.clone()
        metrics[LOSS] += bonus.detach()
    gap = (old_logp - batch.sampler_logp).abs()
    flipped = None if routing is None else routing.flipped()
    return loss, metrics, entropy.detach(), gap, is_cut, flipped


def gap_limit(policy, config) -> float:
    """The largest distance between the sampler's and the trainer's log-prob of a token:
    --max-logp-gap, or what rounding explains."""
    by_rounding = 1e-3 if policy.compute_dtype == torch.float32 else 1.0
    return config.max_logp_gap or by_rounding


def gap_advice(policy, rollouts: Rollouts) -> str:
    """What the error of a large gap says besides: of a mixture whose routes are not replayed."""
    if policy.config.moe is None or rollouts.routes is not None:
        return ""
    return (
        "; this mixture's routers may choose other experts than in sampling: leave out "
        "--no-routing-replay"
    )


@dataclass
class UpdateLog:
    """Collects what a log shows of an update, and stops it where the log-probs are wrong.

    Numbers stay on the device until the micro-batches of an optimizer step are all done: one read
    per optimizer step.
    """

    largest_gap: float
    advice: str = ""
    """What the error of a larger gap ends with."""
    corrects: bool = False
    """Whether there are importance weights."""
    metrics: list = field(default_factory=list)
    gradient_norms: list = field(default_factory=lambda: [0.0])
    samples: int = 0
    tokens: int = 0
    entropy_sum: float = 0.0
    gap_sum: float = 0.0
    gap_max: float = 0.0
    cut_sum: float = 0.0
    n_routed: np.ndarray = field(default_factory=lambda: np.zeros(2))
    """Routers of all tokens, and tokens, whose routes were replayed."""
    n_flipped: np.ndarray = field(default_factory=lambda: np.zeros(2))
    """Those of them that would have chosen other experts, one at least. In later updates that is
    also because the weights have moved."""
    unread: list = field(default_factory=list)

    def add(self, batch: MicroBatch, metrics: torch.Tensor, entropy, gap, is_cut, flipped) -> None:
        self.metrics.append(metrics)
        self.samples += len(batch.samples)
        self.tokens += len(gap)
        n_cut = torch.zeros_like(gap) if is_cut is None else is_cut
        n_flipped = [gap.new_zeros(())] * 2
        if flipped is not None:
            n_flipped = [flipped.sum(), flipped.any(1).sum()]
            self.n_routed += flipped.numel(), len(flipped)
        sums = [entropy.sum(), gap.sum(), gap.max(), n_cut.sum(), *n_flipped]
        self.unread.append(torch.stack(sums))

    def check_gaps_and_count(self, batches: list[MicroBatch]) -> int:
        """How many micro-batches all processes have together: 0 leaves nothing to step with.

        Every process must call it. Raises LogpGapError in all processes if one has a gap that is
        too large: a process that stopped alone would leave the others waiting.
        """
        if self.unread:
            entropies, gaps, maxima, cuts, *flips = torch.stack(self.unread).cpu().double().T
            self.unread.clear()
            self.entropy_sum += float(entropies.sum())
            self.gap_sum += float(gaps.sum())
            self.cut_sum += float(cuts.sum())
            self.n_flipped += [float(counts.sum()) for counts in flips]
            # A maximum would pass over NaN, which is the largest gap of all.
            worst = float("nan") if maxima.isnan().any() else float(maxima.max())
            self.gap_max = worst if math.isnan(worst) else max(self.gap_max, worst)
        too_large = not self.gap_max <= self.largest_gap  # NaN is too large, too
        n_batches, n_too_large = all_sum(np.array([len(batches), too_large]))
        if n_too_large:
            where = "" if too_large else " on another process"
            raise LogpGapError(
                f"the sampler's log-prob of a token is {self.gap_max:.3g} from the trainer's own, "
                f"more than --max-logp-gap {self.largest_gap:g}{where}{self.advice}"
            )
        return int(n_batches)

    def summary(self, n_updates: int) -> dict:
        """The metrics of a step. Where no answer taught anything, no token was looked at, and what
        is measured on tokens is left out."""
        metrics = {
            "loss": 0.0,
            "gradient_norm": np.max(self.gradient_norms),
            "trained_samples": self.samples,
        }
        if self.tokens == 0:
            return metrics
        if self.corrects:
            metrics["importance_cut"] = self.cut_sum / self.tokens
        if self.n_routed.any():
            shares = self.n_flipped / self.n_routed
            metrics["flipped_routers"], metrics["flipped_tokens"] = shares.tolist()
        return metrics | {
            **mean_metrics(self.metrics, n_updates),
            "entropy": self.entropy_sum / self.tokens,
            "logp_gap": self.gap_max,
            "logp_gap_mean": self.gap_sum / self.tokens,
        }


# ---- log-probs under a model that is not trained here ----


@torch.no_grad()
def logprobs_of(
    model, batches: Iterable[MicroBatch], temperature: float, replays: bool = True
) -> list[torch.Tensor]:
    """[R] for each batch: the log-probs of its response tokens under the model.

    replays: whether its routers take the experts of sampling, as in the update.
    """
    return [
        response_logprobs(model, batch, temperature, batch.replay() if replays else None)[0]
        for batch in batches
    ]


class Reference:
    """The model that the KL is measured to: where it lives, and when it is refreshed.

    Of a mixture of experts, it replays the policy's routes. If it chose its own, the KL to equal
    weights would not be 0.
    """

    replays = True
    shape = None
    """Its ModelConfig, where that is not the policy's."""

    def __init__(self, model, device, offload: bool = False):
        """offload: keep the model in the CPU's memory between uses."""
        self.model = model.requires_grad_(False)
        self.device, self.home = device, torch.device("cpu") if offload else device
        self.model.to(self.home)

    @contextmanager
    def in_use(self):
        """The model, on the device while the block runs."""
        self.model.to(self.device)
        try:
            yield self.model
        finally:
            self.model.to(self.home)

    def logprobs(self, batches: list[MicroBatch], temperature: float) -> list[torch.Tensor]:
        """[R] for each batch: the log-probs of its response tokens."""
        if not batches:
            return []
        with self.in_use() as model:
            return logprobs_of(model, batches, temperature, self.replays)

    def refresh(self, policy) -> None:
        """Become a copy of the policy (R1-Zero: every 400 steps)."""
        self.model.load_state_dict(policy.state_dict())


class Teacher(Reference):
    """A reference that is another model, of any shape. It never becomes a copy of the policy, and
    its routers, if it has some, choose for themselves."""

    replays = False

    def __init__(self, model, device, offload: bool = False):
        super().__init__(model, device, offload)
        self.shape = model.config


class AdapterReference(Reference):
    """The reference of a policy with adapters: the policy itself, with the adapters that it began
    with. Their B is 0, so it is the base, and there is no second model."""

    def __init__(self, policy):
        self.policy, self.device = policy, policy.device
        self.model = AdapterCopy(policy)

    @contextmanager
    def in_use(self):
        """The policy, with the reference's adapters while the block runs."""
        self.model.swap(self.policy)
        try:
            yield self.policy
        finally:
            self.model.swap(self.policy)

    def refresh(self, policy) -> None:
        self.model.copy_from(policy)


def kl_to_reference(reference: Reference | None, rollouts: Rollouts, config, step: int) -> dict:
    """{"kl_to_reference": k3 estimate of KL(policy || reference), in nats per token}.

    It is measured on a random few samples; without samples the dict is empty. The policy's
    log-probs are those that the samples came with, so only the reference has to run.
    """
    n_samples = min(config.kl_samples, len(rollouts.texts))
    if n_samples == 0:
        return {}
    rng = np.random.default_rng([config.seed, step, 1])
    some = np.sort(rng.choice(len(rollouts.texts), n_samples, replace=False))
    batches = micro_batches(rollouts, some, config.micro_tokens, reference.device)
    total, count = 0.0, 0
    ref_logp = reference.logprobs(batches, rollouts.temperature)
    for batch, ref in zip(batches, ref_logp, strict=True):
        d = ref - batch.sampler_logp
        total += float((d.exp() - d - 1).sum())
        count += len(d)
    return {"kl_to_reference": total / count}


def kl_cost_to(reference: Reference, config) -> Callable[[Rollouts], np.ndarray]:
    """For the KL in the reward: a function of rollouts that gives what each token costs, [R]."""

    def kl_cost(rollouts: Rollouts) -> np.ndarray:
        with reference.in_use() as model:

            def logp_of(batch: MicroBatch) -> torch.Tensor:
                [logp_R] = logprobs_of(model, [batch], rollouts.temperature, reference.replays)
                return logp_R

            ref_logp_R = over_all_tokens(logp_of, rollouts, config.micro_tokens, reference.device)
        logp_R = np.concatenate(rollouts.sampler_logp).astype(np.float64)
        kl_R = kl_estimate(logp_R, ref_logp_R.cpu().double().numpy(), config.loss.kl_estimator)
        return config.loss.kl_coef * kl_R

    return kl_cost
