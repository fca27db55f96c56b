"""R1-Zero: GRPO straight on a base model, with two rule rewards and nothing else   (DeepSeek-R1, arXiv
2501.12948)

    r1zero grpo --run runs/rl --base runs/base --steps 80
    r1zero grpo --run runs/dapo --base runs/base --algo dapo        its family: rl/algorithms.py has the list
    r1zero grpo --run runs/x --base runs/base --algo dr_grpo --loss.clip-high 0.28 --updates-per-step 4

`grpo_step` is the algorithm: sample, grade, compare, update. Everything else here is around it.

Left out: a reward model, and a separate sampler: the engine samples with the trainer's own weights, so
rollouts are never stale. On a GPU it does so in 16 bit and with other kernels: `logp_gap_mean` and `logp_gap`
in the log are how far its log-probs are from the trainer's, and a run stops where they part.
"""

import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import torch
import tyro
from tqdm import tqdm

from ..eval.harness import evaluate
from ..eval.sampler import ModelSampler
from ..eval.tasks.base import Task
from ..model.checkpoint import build_model, load_model
from ..model.distributed import all_sum
from ..model.engine.engine import Engine
from ..model.engine.sampling import NonFiniteError
from ..model.optimizer import OptimConfig, make_optimizer
from ..model.transformer import Transformer
from ..rl.advantages import AdvantageConfig
from ..rl.family import PIECES, from_preset, in_words, missing_dials
from ..rl.heads import Critic
from ..rl.losses import LossConfig, kl_estimate
from ..rl.rewards import RewardConfig
from ..rl.rollouts import micro_batches
from ..rl.step import Learner, draw_with_signal, figures_of
from ..rl.update import (
    LogpGapError,
    each_token,
    kl_to_reference,
    logp_of,
    update_critic,
    update_policy,
)
from .lab.diagnosis import Diagnosis
from .lab.mistakes import MISTAKES, warn_of
from .machine import peak_memory, pick_device, reuse_memory
from .run import Run, RunConfig, read_metrics
from .task_flags import TaskFlags

CHECKED = (
    "loss",
    "gradient_norm",
    "value_loss",
    "critic_gradient_norm",
)  # NaN in one of them ends the run


def rl_optim(lr: float = 4e-4) -> OptimConfig:
    """AdamW for reinforcement learning: its gradients are mostly noise, so eps is large.

    With the usual 1e-8 every parameter moves by about lr a step, signal or not; on the demo's control 20 such
    steps of noise took 12 points off the arithmetic, with 1e-4 it was 4.
    """
    return OptimConfig(lr=lr, warmup=5, final_lr=0.1, weight_decay=0.0, eps=1e-4)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(RunConfig):
    """Reinforcement learning of a base model by rule rewards."""

    # to change on resume, beside what all loops have
    FREE: ClassVar[tuple[str, ...]] = ("max_logp_gap", "eval_every", "eval_problems", "ref_offload")

    base: str
    """Folder of the run (or checkpoint) to start from; also the reference of the KL."""
    algo: str = "r1_zero"
    """r1_zero, grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, reinforce or ppo; any dial that is given
    besides wins over it. What was used is in run.json."""
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
    dynamic_sampling: int | None = None
    """Replace groups of equal rewards by new problems (whose signal is nil with a group's baseline; with
    another they teach, and go all the same), until this many times --prompts-per-step were drawn; 1
    for never; if not given, as --algo has it (dapo: 3)."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    overlong_buffer: float | None = None
    """Share of --max-new-tokens, at its end, over which the reward falls by up to 1 (DAPO's soft punishment);
    0 for none; if not given, as --algo has it (dapo: 0.2)."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=lambda: rl_optim())
    critic_optim: OptimConfig = field(default_factory=lambda: rl_optim())
    """Of the critic (PPO)."""
    value_clip: float = 0.5
    """The critic's value earns nothing more beyond this distance from the old one; 0 for no clip (PPO)."""
    micro_tokens: int = 4096
    """Tokens in one forward and backward pass; changes memory and speed, not the gradient."""
    max_logp_gap: float | None = None
    """Stop when a sampled token's log-prob is further from the trainer's own; if not given, 1e-3 where the
    model computes in fp32 (about 1e-6 is usual), 1.0 in 16 bit."""
    ref_refresh: int = 0
    """Steps after which the reference becomes a copy of the policy (R1-Zero: 400); 0 for never."""
    ref_offload: bool = False
    """Keep the reference in the CPU's memory between uses."""
    kl_samples: int = 32
    """Answers a step on which the KL to the reference is measured for the log; 0 for none."""
    eval_every: int = 0
    """Steps between measurements on held-out problems; the best checkpoint is kept. 0 for none."""
    eval_problems: int = 64
    """Held-out problems of each measurement, one answer each."""
    control: bool = False
    """Deal the rewards out at random within each group: what does the machinery do without information?"""
    mistake: Annotated[str | None, tyro.conf.arg(name="break")] = None
    """Make a classic mistake on purpose, to see what it does; `r1zero compare --help` names them."""
    seed: int = 0
    """Of sampling and of the order of samples; the order of problems is the task's (--options seed=1)."""

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "prompts_per_step",
            "max_new_tokens",
            "updates_per_step",
            "micro_tokens",
            "eval_problems",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more"
                )
        if self.group_size < 2:
            raise ValueError(
                f"--group-size is {self.group_size}; an answer is compared with others of "
                "its group, so it must be 2 or more"
            )
        for name in ("kl_samples", "seed", "ref_refresh", "eval_every", "value_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 0 or more"
                )
        if not self.temperature > 0:
            raise ValueError(
                f"--temperature is {self.temperature}; exploration needs a temperature above 0"
            )
        if self.max_logp_gap is not None and not self.max_logp_gap > 0:
            raise ValueError(f"--max-logp-gap is {self.max_logp_gap}, expected a number above 0")
        if self.mistake is not None and self.mistake not in MISTAKES:
            raise ValueError(f"--break is {self.mistake!r}, expected one of {', '.join(MISTAKES)}")
        # The object that is used is the one that is logged, so dials that were not given are filled in here;
        # for another --algo make a new one: dataclasses.replace would keep the dials of the former.
        for name in ("advantage", "loss"):
            object.__setattr__(self, name, from_preset(self.algo, name, getattr(self, name)))
        for name, value in missing_dials(self.algo, "loop", self).items():
            object.__setattr__(self, name, value)
        if self.dynamic_sampling < 1 or not 0 <= self.overlong_buffer <= 1:
            raise ValueError(
                f"--dynamic-sampling is {self.dynamic_sampling} and --overlong-buffer "
                f"{self.overlong_buffer}; expected 1 or more, and a share from 0 to 1"
            )
        if self.kl_in_reward and self.advantage.scale == "std":
            raise ValueError(
                "--loss.kl-in reward with --advantage.scale std: in a group of equal rewards "
                "the KL alone would differ, and be divided by its own spread; expected the KL "
                "in the loss, or another scale"
            )
        if self.loss.objective == "gspo" and self.per_token:
            raise ValueError(
                f"--loss.objective gspo with --advantage.baseline {self.advantage.baseline}: "
                "one ratio a sequence takes one advantage a sequence; expected the objective "
                "clip, cispo or reinforce, or another baseline"
            )

    @property
    def kl_in_loss(self) -> bool:
        return self.loss.kl_coef > 0 and self.loss.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.loss.kl_coef > 0 and self.loss.kl_in == "reward"

    @property
    def per_token(self) -> bool:
        """Whether each token has an advantage of its own."""
        return (
            self.advantage.baseline == "critic"
            or self.advantage.baseline == "none"
            and self.kl_in_reward
        )


def grpo_step(s: Learner, task: Task, c: GRPOConfig, step: int) -> dict:
    """One step of GRPO; returns the figures to log."""
    started, device = time.perf_counter(), s.policy.embed.device

    # 1. and 2. Sample a group of answers to each problem, and grade each answer by rule.
    s.engine.refresh(version=step)
    rollouts, rewards_N, drawn = draw_with_signal(s, task, c, step)
    sampled = time.perf_counter()

    # 3. How much better than the rest of its group was each answer?            (DeepSeekMath, eq. 3)
    if c.ref_offload and (c.kl_samples or c.loss.kl_coef):
        s.reference.to(device)
    kl_to_ref, kl_R, values_R, batches = (
        kl_to_reference(s.reference, rollouts, c, step),
        None,
        None,
        [],
    )
    if c.per_token or c.kl_in_reward:
        batches = micro_batches(rollouts, np.arange(len(rollouts.texts)), c.micro_tokens, device)
    if c.kl_in_reward:
        ref_logp_R = each_token(logp_of(s.reference, c.temperature), rollouts, batches, device)
        kl_R = c.loss.kl_coef * kl_estimate(
            np.concatenate(rollouts.sampler_logp).astype(np.float64),
            ref_logp_R.double().cpu().numpy(),
            c.loss.kl_estimator,
        )
    if c.ref_offload and not c.kl_in_loss:
        s.reference.to("cpu")
    if s.critic is not None:
        values_R = each_token(s.critic, rollouts, batches, device).double().cpu().numpy()
    advantages, returns_R = s.pieces.advantages(
        rewards_N,
        rollouts.group_offsets,
        rollouts.response_offsets,
        c.advantage,
        kl_R,
        values_R,
        all_sum,
    )

    # 4. Make the better ones more likely, within the trust region.             (DeepSeekMath, eq. 1)
    figures = update_policy(
        s.policy, s.reference, rollouts, advantages, s.optimizer, c, step, s.pieces
    )
    if s.critic is not None:
        figures |= update_critic(
            s.critic, rollouts, values_R, returns_R, s.critic_optimizer, c, step
        )
    if c.ref_offload:
        s.reference.to("cpu")
    if kl_R is not None:
        figures["kl_in_reward"] = kl_R.mean()
    lengths = rollouts.response_lengths
    return {
        **figures_of(drawn, lengths, sampled - started),
        **figures,
        "kl_to_reference": kl_to_ref,
        "position": s.position,
        "step_s": time.perf_counter() - started,
        "update_s": time.perf_counter() - sampled,
        "update_tokens_per_s": lengths.sum() / (time.perf_counter() - sampled),
        "memory_gb": peak_memory(device) / 1e9,
    }


def held_out_accuracy(s: Learner, task: Task, c: GRPOConfig) -> float:
    """pass@1 on the first --eval-problems test problems, at the temperature of training."""
    s.engine.refresh()
    sampler = ModelSampler(
        s.policy, s.engine.tokenizer, c.max_new_tokens, c.temperature, c.seed, engine=s.engine
    )
    size = task.size("test")
    problems = task.problems(
        "test", c.eval_problems if size is None else min(size, c.eval_problems)
    )
    return evaluate(sampler, task, problems, progress=False).accuracy.mean


def make_learner(c: GRPOConfig, task: Task, device: torch.device) -> Learner:
    policy, tokenizer, base = load_model(c.base, device)
    config, weights = base.state["model_config"], base.tensors["model"]
    reference = build_model(config, weights, device)  # on the device: that sets what it computes in
    if c.ref_offload:
        reference.to("cpu")
    critic = (
        Critic(build_model(config, weights, device)) if c.advantage.baseline == "critic" else None
    )
    # The cache is for what a step samples, as far as a few prompts tell (longer ones: fewer rows),
    # and leaves room for what the first update makes: gradients and two moments, all in fp32.
    prompts = tokenizer.encode_batch(
        [task.prompt(p) for p in task.problems("train", c.prompts_per_step)]
    )
    engine = Engine(
        policy,
        tokenizer,
        max_rows=min(1024, c.prompts_per_step * c.group_size),
        longest=max(map(len, prompts)) + c.max_new_tokens,
        reserve=(12 + 12 * (critic is not None) + 4 * c.ref_offload)
        * sum(p.numel() for p in policy.parameters()),
    )
    return Learner(
        policy,
        reference.requires_grad_(False),
        engine,
        make_optimizer(policy, c.optim),
        critic,
        make_optimizer(critic, c.critic_optim) if critic else None,
        MISTAKES[c.mistake].pieces if c.mistake else PIECES,
    )


def grpo(c: GRPOConfig) -> Transformer:
    """Run the loop. Raises ValueError for bad flags, FloatingPointError or NonFiniteError for NaN, and
    LogpGapError for a sampler that is not the trainer's equal."""
    reuse_memory()
    device, task = pick_device(c.device), c.task.make()
    if c.mistake:
        warn_of(c.mistake)
    s = make_learner(c, task, device)
    more = {"reference": (s.reference, None)} if c.ref_refresh else {}
    trained = s.policy
    if s.critic is not None:
        more["critic"] = (s.critic, s.critic_optimizer)
        trained = torch.nn.ModuleDict(
            {"critic": s.critic, "policy": s.policy}
        )  # whose NaN comes first
    with Run(c, "control" if c.control else c.algo) as run:
        s.position = run.restore(s.policy, s.engine.tokenizer, s.optimizer, more).get("position", 0)
        tqdm.write(s.engine.plan(), file=sys.stderr)
        tqdm.write(in_words(c), file=sys.stderr)
        diagnosis = Diagnosis(asdict(c), read_metrics(run.folder))
        for step in run.steps():
            try:
                figures = grpo_step(s, task, c, step)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}, at step {step + 1}; {run.last_good()}") from error
            except LogpGapError as error:
                raise LogpGapError(
                    f"{error}, at step {step + 1}; {run.last_good()}. If this is "
                    "rounding alone, raise --max-logp-gap; if not, sampler and trainer "
                    "compute two different things"
                ) from error
            run.check_finite(
                step, trained, **{name: figures[name] for name in CHECKED if name in figures}
            )
            if c.ref_refresh and (step + 1) % c.ref_refresh == 0:
                s.reference.load_state_dict(s.policy.state_dict())
            score = None
            if c.eval_every and ((step + 1) % c.eval_every == 0 or step + 1 == c.steps):
                figures["eval_accuracy"] = score = held_out_accuracy(s, task, c)
            figures = {name: float(value) for name, value in figures.items()}
            run.log(step, figures, show=("accuracy", "format", "length", "kl_to_reference"))
            for advice in diagnosis.observe(figures):
                tqdm.write(advice, file=sys.stderr)
            if run.due(step, c.save_every) or score is not None:
                run.save(
                    step,
                    s.policy,
                    s.engine.tokenizer,
                    s.optimizer,
                    score,
                    more,
                    {"position": s.position},
                )
    return s.policy
