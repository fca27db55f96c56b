"""R1-Zero: GRPO straight on a base model, with two rule rewards and nothing else   (DeepSeek-R1, arXiv
2501.12948)

    r1zero grpo --run runs/rl --base runs/base --steps 80

`grpo_step` is the algorithm: four calls. Everything else here is around it.

Left out: a value model and a reward model (GRPO needs neither), several optimizer steps on the same rollouts
across machines, a separate sampler: the engine samples with the trainer's own weights, so rollouts are never
stale. On a GPU it does so in 16 bit and with other kernels: `logp_gap_mean` and `logp_gap` in the log are how
far its log-probs are from the trainer's, and a run stops where they part.
"""
import sys
import time
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

from ..eval.tasks import Task
from ..kernels.linear_logprob import check_targets
from ..model.engine import Engine
from ..model.generation import NonFiniteError, sample_seeds
from ..rl.advantages import group_advantages
from ..rl.losses import LossConfig, grpo_loss, mean_metrics, token_weights
from ..rl.rewards import RewardConfig, permute_within_groups, score
from ..rl.rollouts import Rollouts, micro_batches, response_logprobs, sample_groups
from .optim import OptimConfig, learning_rate, make_optimizer, optimizer_step
from .run import Run, RunConfig, build_model, load_model, pick_device, reuse_memory
from .task_flags import TaskFlags


def rl_optim(lr: float = 4e-4) -> OptimConfig:
    """AdamW for reinforcement learning: its gradients are mostly noise, so eps is large.

    With the usual 1e-8 every parameter moves by about lr a step, signal or not; on the demo's control 20 such
    steps of noise took 12 points off the arithmetic, with 1e-4 it was 4.
    """
    return OptimConfig(lr=lr, warmup=5, final_lr=0.1, weight_decay=0.0, eps=1e-4)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(RunConfig):
    """Reinforcement learning of a base model by rule rewards."""

    FREE: ClassVar[tuple[str, ...]] = ("max_logp_gap",)  # to change on resume, beside what all loops have

    base: str
    """Folder of the run (or checkpoint) to start from; also the reference of the KL."""
    task: TaskFlags = field(default_factory=TaskFlags)
    prompts_per_step: int = 16
    """Problems in a step."""
    group_size: int = 16
    """Answers sampled to each problem."""
    max_new_tokens: int = 128
    """Longest answer; one that is cut off gets no format reward."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs in the loss."""
    updates_per_step: int = 1
    """Optimizer steps on each batch of rollouts; with more than 1 the samples are shared out among them."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    normalise_std: bool = True
    """Divide advantages by the group's standard deviation (GRPO) or not (Dr. GRPO)."""
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=lambda: rl_optim())
    micro_tokens: int = 4096
    """Tokens in one forward and backward pass; changes memory and speed, not the gradient."""
    max_logp_gap: float | None = None
    """Stop when a sampled token's log-prob is further from the trainer's own; if not given, 1e-3 where the
    model computes in fp32 (about 1e-6 is usual), 1.0 in 16 bit."""
    kl_samples: int = 32
    """Answers a step on which the KL to the base is measured for the log; 0 for none."""
    control: bool = False
    """Deal the rewards out at random within each group: what does the machinery do without information?"""
    seed: int = 0
    """Of sampling and of the order of samples; the order of problems is the task's (--dials seed=1)."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("prompts_per_step", "max_new_tokens", "updates_per_step", "micro_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more")
        if self.group_size < 2:
            raise ValueError(f"--group-size is {self.group_size}; an answer is compared with others of "
                             "its group, so it must be 2 or more")
        for name in ("kl_samples", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 0 or more")
        if not self.temperature > 0:
            raise ValueError(f"--temperature is {self.temperature}; exploration needs a temperature above 0")
        if self.max_logp_gap is not None and not self.max_logp_gap > 0:
            raise ValueError(f"--max-logp-gap is {self.max_logp_gap}, expected a number above 0")


def grpo_step(policy, reference, engine: Engine, task: Task, optimizer, c: GRPOConfig, step: int) -> dict:
    """One step of GRPO; returns the figures to log."""
    problems = task.problems("train", c.prompts_per_step, start=step * c.prompts_per_step)
    prompts = [task.prompt(p) for p in problems]
    started = time.perf_counter()

    # 1. Sample a group of answers to each problem.
    seeds = sample_seeds(c.prompts_per_step * c.group_size, c.seed, step)
    engine.refresh(version=step)
    rollouts = sample_groups(engine, prompts, c.group_size, c.max_new_tokens, c.temperature, seeds)
    sampled = time.perf_counter()

    # 2. Grade each answer by rule: is it right, is it well formed?
    rewards = score(task, [p for p in problems for _ in range(c.group_size)], rollouts.texts, c.rewards)
    rewards_N = rewards.total
    if c.control:
        rewards_N = permute_within_groups(rewards_N, rollouts.group_offsets, seed=(c.seed, step))

    # 3. How much better than the rest of its group was each answer?            (DeepSeekMath, eq. 3)
    advantages_N, dead = group_advantages(rewards_N, rollouts.group_offsets, c.normalise_std)

    # 4. Make the better ones more likely, within the trust region.             (DeepSeekMath, eq. 1)
    figures = update_policy(policy, reference, rollouts, advantages_N, optimizer, c, step)

    lengths = rollouts.response_lengths
    return {"reward": rewards.total.mean(), "accuracy": rewards.accuracy.mean(),
            "format": rewards.format.mean(), "length": lengths.mean(),
            "truncated": np.mean([r == "length" for r in rollouts.finish_reasons]),
            "dead_groups": dead.mean(), **figures,
            "kl_to_base": kl_to_reference(reference, rollouts, c, step),
            "tokens": int(lengths.sum()), "rollout_s": sampled - started,
            "step_s": time.perf_counter() - started,
            "rollout_tokens_per_s": lengths.sum() / (sampled - started)}


def update_policy(policy, reference, rollouts: Rollouts, advantages_N: np.ndarray, optimizer, c: GRPOConfig,
                  step: int) -> dict:
    """One or more optimizer steps on the rollouts; samples that have nothing to teach are not computed at
    all.

    The weight of every token is fixed for the whole batch beforehand, so the gradient depends neither on the
    cut into micro-batches nor on leaving out the samples whose advantage is 0 (they still count in the mean's
    denominator).
    """
    device = policy.embed.device
    check_targets(np.concatenate(rollouts.sequences), policy.config.vocab_size)
    weights_N = token_weights(rollouts.response_lengths, c.loss.mean, c.max_new_tokens) * c.updates_per_step
    advantages, weights = (torch.from_numpy(x).float().to(device) for x in (advantages_N, weights_N))
    live = np.flatnonzero(advantages_N) if c.loss.kl_coef == 0 else np.arange(len(advantages_N))
    shares = np.array_split(np.random.default_rng([c.seed, step]).permutation(live), c.updates_per_step)
    updates = [micro_batches(rollouts, share, c.micro_tokens, device) for share in shares]
    old_logp = {}  # under the policy before the first update; with a single update that is the update's own
    if c.updates_per_step > 1:
        with torch.no_grad():
            old_logp = {id(b): response_logprobs(policy, b, rollouts.temperature)[0]
                        for batches in updates for b in batches}

    parts, norms, entropies, gap, gap_sum, n_tokens = [], [0.0], 0.0, 0.0, 0.0, 0
    largest_gap = gap_limit(policy, c)
    for batches in updates:
        found = []  # read from the device once an update
        for batch in batches:
            logp, entropy = response_logprobs(policy, batch, rollouts.temperature)
            old = old_logp.get(id(batch), logp.detach())
            ref_logp = None
            if c.loss.kl_coef > 0:
                with torch.no_grad():
                    ref_logp, _ = response_logprobs(reference, batch, rollouts.temperature)
            loss, metrics = grpo_loss(logp, old, ref_logp, advantages[batch.samples], weights[batch.samples],
                                      batch.response_offsets, c.loss)
            loss.backward()
            parts.append(metrics)
            gaps = (old - batch.sampler_logp).abs()
            found.append(torch.stack([entropy.detach().sum(), gaps.sum(), gaps.max()]))
            n_tokens += len(logp)
        if batches:
            entropy_sums, gap_sums, gap_maxima = torch.stack(found).double().cpu().T
            largest = float(gap_maxima.max())
            if not largest <= largest_gap:  # NaN, too; before anything is updated with it
                raise LogpGapError(f"the sampler's log-prob of a token is {largest:.3g} from the trainer's "
                                   f"own, more than --max-logp-gap {largest_gap:g}")
            gap, gap_sum = max(gap, largest), gap_sum + float(gap_sums.sum())
            entropies += float(entropy_sums.sum())
            norms.append(optimizer_step(policy, optimizer, learning_rate(step, c.steps, c.optim), c.optim))
    return {**mean_metrics(parts, c.updates_per_step), "entropy": entropies / max(1, n_tokens),
            "gradient_norm": np.max(norms), "logp_gap": gap, "logp_gap_mean": gap_sum / max(1, n_tokens),
            "trained_samples": len(live)}


class LogpGapError(FloatingPointError):
    """Sampler and trainer disagree about the probability of a sampled token."""


def gap_limit(policy, c: GRPOConfig) -> float:
    """--max-logp-gap, or what rounding explains."""
    return c.max_logp_gap or (1e-3 if policy.compute_dtype == torch.float32 else 1.0)


@torch.no_grad()
def kl_to_reference(reference, rollouts: Rollouts, c: GRPOConfig, step: int) -> float:
    """Mean over tokens of the k3 estimate of KL(policy || reference), on a random few of the samples.

    The policy's log-probs are those that the samples came with, so only the reference has to be run.
    """
    n = min(c.kl_samples, len(rollouts.texts))
    some = np.sort(np.random.default_rng([c.seed, step, 1]).choice(len(rollouts.texts), n, replace=False))
    total, count = 0.0, 0
    for batch in micro_batches(rollouts, some, c.micro_tokens, reference.embed.device):
        ref_logp, _ = response_logprobs(reference, batch, rollouts.temperature)
        d = ref_logp - batch.sampler_logp
        total += float((d.exp() - d - 1).sum())
        count += len(d)
    return total / max(1, count)


def grpo(c: GRPOConfig):
    """Run the loop. Raises ValueError for bad flags, FloatingPointError or NonFiniteError for NaN, and
    LogpGapError for a sampler that is not the trainer's equal."""
    reuse_memory()
    device, task = pick_device(c.device), c.task.make()
    policy, tokenizer, base = load_model(c.base, device)
    reference = build_model(base.state["model_config"], base.tensors["model"], device).requires_grad_(False)
    with Run(c, "control" if c.control else "grpo") as run:
        optimizer = make_optimizer(policy, c.optim)
        run.restore(policy, tokenizer, optimizer)
        # The cache is for what a step samples, as far as a few prompts tell (longer ones: fewer rows),
        # and leaves room for what the first update makes: gradients and two moments, all in fp32.
        prompts = tokenizer.encode_batch([task.prompt(p) for p in task.problems("train", c.prompts_per_step)])
        engine = Engine(policy, tokenizer, max_rows=min(1024, c.prompts_per_step * c.group_size),
                        longest=max(map(len, prompts)) + c.max_new_tokens,
                        reserve=12 * sum(p.numel() for p in policy.parameters()))
        tqdm.write(engine.plan(), file=sys.stderr)
        for step in run.steps():
            try:
                figures = grpo_step(policy, reference, engine, task, optimizer, c, step)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}, at step {step + 1}; {run.last_good()}") from error
            except LogpGapError as error:
                raise LogpGapError(f"{error}, at step {step + 1}; {run.last_good()}. If this is "
                                   "rounding alone, raise --max-logp-gap; if not, sampler and trainer "
                                   "compute two different things") from error
            run.check_finite(step, policy, loss=figures["loss"], gradient_norm=figures["gradient_norm"])
            figures = {name: float(value) for name, value in figures.items()}
            run.log(step, figures, show=("accuracy", "format", "length", "kl_to_base"))
            if run.due(step, c.save_every):
                run.save(step, policy, tokenizer, optimizer)
    return policy


if __name__ == "__main__":
    from .cli import run_command
    run_command("grpo")
