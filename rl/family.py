"""The family: each member is a complete set of options for the same four steps.

A preset is what its paper has. `resolve("dapo", {"loss": {"clip_high": 0.3}})` gives the complete
configuration, with the options that are given explicitly overriding the preset's. `make_learner`
turns a configuration into the objects that `grpo_step` uses.

    name           source             baseline        scale   ratio, clip      mean       KL
    r1_zero        arXiv 2501.12948   group           std     token, 0.2       sequence   k3, loss
    grpo           arXiv 2402.03300   group           std     token, 0.2       sequence   k3, loss
    dr_grpo        arXiv 2503.20783   group           -       token, 0.2       constant   -
    dapo           arXiv 2503.14476   group           std     token, 0.2|0.28  token      -
    gspo           arXiv 2507.18071   group           std     sequence, 3-4e-4 sequence   -
    cispo          arXiv 2506.13585   group           std     constant, to 6   token      -
    rloo           arXiv 2402.14740   leave_one_out   -       none             constant   k1, reward
    reinforce_pp   arXiv 2501.03262   none            batch   token, 0.2       token      k1, reward
    reinforce      Williams 1992      batch           -       none             constant   -
    ppo            arXiv 1707.06347   critic          batch   token, 0.2       token      k1, reward
    gdpo           arXiv 2601.05242   group           parts   token, 0.2       sequence   -
    maxrl          arXiv 2602.02710   group           mean    token, 0.2       constant   -
    dppo           arXiv 2602.04879   group           -       probability 0.15 constant   -
    distill        Thinking Machines  teacher         -       token, 0.2       token      k1, reward
    demo           r1zero demo        group           std     token, 0.2       sequence   k3, loss
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

from ..model.engine.engine import Engine
from ..model.engine.requests import LEAST_TEMPERATURE
from ..model.loss_scale import LossScaler
from ..model.optimizer import OptimConfig, make_optimizer
from ..model.transformer import Transformer
from .advantages import AdvantageConfig, Credit, no_kl, no_steps
from .control import CONTROLS
from .heads import CriticLearner, ValueHead
from .losses import LossConfig
from .process import weighted_steps
from .rewards import Grader, RewardConfig
from .rollouts import DynamicSampler, GroupSampler
from .step import Learner
from .update import Reference, kl_cost_to

# What each member has besides, or instead of, the defaults below: GRPO with the mean over tokens,
# and no KL.
#
# r1_zero is grpo with a reference that becomes a copy of the policy every 400 steps. demo is grpo
# with what suits a model of a million parameters: four updates on each batch of rollouts, a larger
# KL that protects its arithmetic, and DAPO's soft penalty for long answers.
#
# Where a preset is not its paper's: the weight of the KL is R1-Zero's 0.001 in all that have one
# (DeepSeekMath: 0.04). dapo replaces groups of equal reward, form and length included; its paper
# looks at right and wrong alone. ppo has InstructGPT's KL in the reward, whitening, and TinyZero's
# lam of 1 (the paper of GAE: 0.95). cispo's bound is ours, since its paper leaves it open. A sum
# over an answer's tokens (rloo, reinforce, maxrl, dppo) is divided by max_new_tokens here. maxrl
# has no reward for the form, since its theorem is about answers that are right or wrong. distill is
# on-policy distillation (thinkingmachines.ai/blog/on-policy-distillation): its "reference" is a
# teacher, the reverse KL of each token is all that it learns from, and rewards are for the log.
KL_IN_REWARD = {"kl_coef": 0.001, "kl_in": "reward", "kl_estimator": "k1"}
PRESETS: dict[str, dict[str, Any]] = {
    "r1_zero": {"loss": {"mean": "sequence", "kl_coef": 0.001}, "ref_refresh": 400},
    "grpo": {"loss": {"mean": "sequence", "kl_coef": 0.001}},
    "dr_grpo": {"advantage": {"scale": "none"}, "loss": {"mean": "constant"}},
    "dapo": {"loss": {"clip_high": 0.28}, "dynamic_sampling": 3, "overlong_buffer": 0.2},
    "gspo": {
        "loss": {"objective": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "mean": "sequence"}
    },
    "cispo": {"loss": {"objective": "cispo", "clip_low": 1.0, "clip_high": 5.0}},
    "rloo": {
        "advantage": {"baseline": "leave_one_out", "scale": "none"},
        "loss": {"objective": "reinforce", "mean": "constant", **KL_IN_REWARD},
    },
    "reinforce_pp": {"advantage": {"baseline": "none", "scale": "batch"}, "loss": KL_IN_REWARD},
    "reinforce": {
        "advantage": {"baseline": "batch", "scale": "none"},
        "loss": {"objective": "reinforce", "mean": "constant"},
    },
    "ppo": {"advantage": {"baseline": "critic", "scale": "batch"}, "loss": KL_IN_REWARD},
    "gdpo": {"advantage": {"scale": "parts"}, "loss": {"mean": "sequence"}},
    "maxrl": {
        "advantage": {"scale": "mean"},
        "loss": {"mean": "constant"},
        "rewards": {"format_weight": 0.0},
    },
    "dppo": {
        "advantage": {"scale": "none"},
        "loss": {"objective": "dppo", "clip_low": 0.15, "clip_high": 0.15, "mean": "constant"},
    },
    "distill": {
        "advantage": {"baseline": "teacher", "scale": "none", "gamma": 0.0},
        "loss": KL_IN_REWARD | {"kl_coef": 1.0},
    },
    "demo": {
        "steps": 50,
        "max_new_tokens": 192,
        "updates_per_step": 4,
        "overlong_buffer": 0.3,
        "loss": {"mean": "sequence", "kl_coef": 0.05},
        "optim": {"lr": 4e-4, "eps": 1e-8},
        "micro_tokens": 8192,
    },
}


DEAD_GROUPS = ("rules", "reward", "accuracy")


def rl_optim(lr: float = 4e-4) -> OptimConfig:
    """AdamW for reinforcement learning: its gradients are mostly noise, so eps is large.

    With the usual 1e-8 every parameter moves by about lr per step, signal or not. On the demo's
    control 20 such steps of noise took 12 points off the arithmetic; with 1e-4 it was 4.

    The gradients of the presets are not of one size: without the std, and over max_new_tokens,
    those of dr_grpo, rloo and reinforce are several times smaller, which this eps does not hide. To
    compare presets, take eps 1e-8 and a lower rate, as benchmarks/ablation.py does.
    """
    return OptimConfig(lr=lr, warmup=5, final_lr=0.1, weight_decay=0.0, eps=1e-4)


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Every option of a member of the family, complete: nothing is filled in later.

    Make one with `resolve`. Raises ValueError for options that are out of range or do not go
    together.
    """

    algo: str = "r1_zero"
    """The preset: r1_zero, grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, reinforce, ppo,
    gdpo, maxrl, dppo, distill or demo. Options that are given explicitly override it; run.json
    records what was used."""
    steps: int = 100
    """Number of steps in all; the learning rate's schedule ends with the last."""
    prompts_per_step: int = 16
    """Number of problems per step."""
    group_size: int = 16
    """Number of answers sampled per problem."""
    max_new_tokens: int = 128
    """Maximum number of new tokens per answer; an answer that is cut off gets no format reward."""
    temperature: float = 1.0
    """Temperature of sampling, and of the log-probs in the loss."""
    updates_per_step: int = 1
    """Number of optimizer steps on each batch of rollouts; the samples are split among them."""
    dynamic_sampling: int = 1
    """Dynamic sampling (DAPO): replace problems whose answers all got the same reward, until this
    many times --prompts-per-step were sampled. 1 turns it off."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    overlong_buffer: float = 0.0
    """Soft overlong penalty (DAPO): the share of --max-new-tokens, at its end, over which the
    reward falls by up to 1. 0 turns it off."""
    dead_groups: str = "rules"
    """Which groups teach nothing. "rules": those equal in accuracy, format, language, plug-in and
    the reward model's score together, in which efficiency and coherence then do not count, but the
    overlong penalty does. "reward": those equal in the whole reward. "accuracy": those that are all
    right or all wrong, and equal in the reward model's score if there is one."""
    control: str = "none"
    """Train on rewards that carry no information, to see what training does by itself. "permute":
    shuffle the rewards within each group. "random": toss a coin for each answer."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=rl_optim)
    critic_optim: OptimConfig = field(default_factory=rl_optim)
    """The critic's optimizer (PPO)."""
    value_clip: float = 0.5
    """PPO's value clip: moving the critic's value further than this from its old value earns
    nothing. 0 turns the clip off."""
    micro_tokens: int = 4096
    """Maximum number of tokens per forward and backward pass; it changes memory and speed, not the
    gradient."""
    routing_replay: bool = True
    """Of a mixture of experts: send each token through the experts that it went through as it was
    sampled, in the update and in the reference (arXiv 2510.11370). No effect on dense models."""
    max_logp_gap: float = 0.0
    """Stop when a sampled token's log-prob is further than this from the trainer's own. 0: 1e-3
    where the model computes in fp32 (about 1e-6 is usual), 1.0 in 16 bit."""
    ref_refresh: int = 0
    """Number of steps after which the reference becomes a copy of the policy (R1-Zero: 400). 0:
    never."""
    ref_offload: bool = False
    """Keep the reference in the CPU's memory between uses."""
    kl_samples: int = 32
    """Number of answers per step on which the KL to the reference is measured for the log. 0 turns
    the measurement off; without a KL in loss or reward there is then no reference in memory."""
    seed: int = 0
    """Seed of sampling and of the order of samples. (The order of problems is the task's: --options
    seed=1.)"""

    def __post_init__(self):
        check_ranges(self)
        check_combinations(self)

    @property
    def kl_in_loss(self) -> bool:
        return self.loss.kl_coef > 0 and self.loss.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.loss.kl_coef > 0 and self.loss.kl_in == "reward"

    @property
    def needs_reference(self) -> bool:
        """Whether anything is compared with a reference: the loss, the reward or the log."""
        return self.loss.kl_coef > 0 or self.kl_samples > 0

    @property
    def per_token(self) -> bool:
        """Whether the tokens of an answer have advantages that differ."""
        return self.rewards.process is not None or self.discounts

    @property
    def discounts(self) -> bool:
        """Whether a token's advantage is made of the rewards to come, so that gamma counts."""
        baseline = self.advantage.baseline
        return baseline in ("critic", "teacher") or (baseline == "none" and self.kl_in_reward)


def flag(name: str) -> str:
    """The command line's name of an option."""
    return f"--{name.replace('_', '-')}"


def check_ranges(config: Algorithm) -> None:
    if config.algo not in PRESETS:
        raise ValueError(f"--algo is {config.algo!r}, expected one of {', '.join(PRESETS)}")
    for name in ("steps", "prompts_per_step", "max_new_tokens", "updates_per_step", "micro_tokens"):
        if getattr(config, name) < 1:
            raise ValueError(f"{flag(name)} is {getattr(config, name)}, expected 1 or more")
    for name in ("kl_samples", "ref_refresh", "value_clip", "max_logp_gap"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{flag(name)} is {getattr(config, name)}, expected 0 or more")
    for name, words in (("dead_groups", DEAD_GROUPS), ("control", ("none", *CONTROLS))):
        if getattr(config, name) not in words:
            raise ValueError(
                f"{flag(name)} is {getattr(config, name)!r}, expected {' or '.join(words)}"
            )
    if config.group_size < 2:
        raise ValueError(
            f"--group-size is {config.group_size}; an answer is compared with others of its group, "
            "so it must be 2 or more"
        )
    if not 0 <= config.seed < 2**64:
        raise ValueError(f"--seed is {config.seed}, expected 0 or more, and less than 2^64")
    if not LEAST_TEMPERATURE <= config.temperature < math.inf:
        raise ValueError(
            f"--temperature is {config.temperature}; exploration needs a temperature above 0, "
            f"and the engine one of {LEAST_TEMPERATURE:g} or more"
        )
    if config.dynamic_sampling < 1 or not 0 <= config.overlong_buffer <= 1:
        raise ValueError(
            f"--dynamic-sampling is {config.dynamic_sampling} and --overlong-buffer "
            f"{config.overlong_buffer}; expected 1 or more, and a share from 0 to 1"
        )


def check_combinations(config: Algorithm) -> None:
    check_scale(config)
    if (
        config.rewards.model is not None
        and config.rewards.model_first(config.steps) >= config.steps
    ):
        raise ValueError(
            f"--rewards.model-from {config.rewards.model_from:g} of {config.steps} --steps leaves "
            "none to the reward model; give more steps or a smaller share"
        )
    if config.loss.objective == "gspo" and config.per_token:
        raise ValueError(
            f"--loss.objective gspo with {cause_of_tokens(config)}: one ratio per sequence takes "
            "one advantage per sequence; expected the objective clip, cispo or reinforce, or "
            "another baseline and no process reward"
        )
    token_by_token = ("critic", "none", "teacher")
    if config.rewards.process is not None and config.advantage.baseline in token_by_token:
        raise ValueError(
            f"--rewards.process with --advantage.baseline {config.advantage.baseline}: steps are "
            "compared with those of their group, so expected the baseline group, leave_one_out or "
            "batch"
        )
    if config.advantage.baseline == "teacher" and not config.kl_in_reward:
        raise ValueError(
            "--advantage.baseline teacher learns from the KL alone; expected --loss.kl-coef above "
            "0 and --loss.kl-in reward"
        )
    if config.advantage.baseline == "teacher" and config.dynamic_sampling > 1:
        raise ValueError(
            f"--dynamic-sampling {config.dynamic_sampling} with --advantage.baseline teacher: no "
            "reward counts there, so no group is without signal; leave it out"
        )
    if config.advantage.baseline == "teacher" and config.control != "none":
        raise ValueError(
            f"--control {config.control} with --advantage.baseline teacher: no reward counts "
            "there, so dealing rewards out at random changes nothing; leave it out"
        )


def cause_of_tokens(config: Algorithm) -> str:
    """The flag that makes the advantages of an answer's tokens differ."""
    if config.rewards.process is not None:
        return "--rewards.process"
    return f"--advantage.baseline {config.advantage.baseline}"


def check_scale(config: Algorithm) -> None:
    """Raise ValueError for rewards that --advantage.scale cannot divide."""
    scale = config.advantage.scale
    why_not_kl = {
        "std": "in a group of equal rewards the KL alone would differ, and be divided by its own "
        "spread",
        "mean": "the KL can make a reward negative",
        "parts": "the KL is not one of the parts",
    }
    if config.kl_in_reward and scale in why_not_kl:
        raise ValueError(
            f"--loss.kl-in reward with --advantage.scale {scale}: {why_not_kl[scale]}; expected "
            "the KL in the loss, or another scale"
        )
    negative = {
        "--overlong-buffer": config.overlong_buffer,
        "--rewards.efficiency-weight": config.rewards.efficiency_weight,
    }
    if config.rewards.model is not None:
        negative["--rewards.model-weight"] = config.rewards.model_weight
    for name, value in negative.items():
        if scale == "mean" and value > 0:
            raise ValueError(
                f"{name} {value} with --advantage.scale mean: rewards would be negative; expected "
                "0, or another scale"
            )


PARTS = ("advantage", "loss", "rewards", "optim", "critic_optim")  # configs in the config


def resolve(algo: str, overrides: dict[str, Any] | None = None, config_class: type = Algorithm):
    """The complete configuration of a preset, with `overrides` winning over it.

    overrides: option -> value; a part is a dict of its own options, {"loss": {"clip_high": 0.3}},
    or a whole new part. config_class: Algorithm, or a class that adds fields to it. Raises
    ValueError for an unknown preset or option, and as Algorithm does.
    """
    if algo not in PRESETS:
        raise ValueError(f"--algo is {algo!r}, expected one of {', '.join(PRESETS)}")
    overrides = overrides or {}
    if overrides.get("algo", algo) != algo:
        raise ValueError(
            f"resolve: the overrides of {algo} have algo {overrides['algo']!r}; resolve that preset"
        )
    options: dict[str, Any] = {"algo": algo}
    for given in (PRESETS[algo], overrides):
        for name, value in given.items():
            extends = name in PARTS and isinstance(value, dict)
            options[name] = options.get(name, {}) | value if extends else value

    defaults = {field.name: field for field in fields(config_class)}
    check_names(options, defaults, config_class.__name__)
    for name in PARTS:
        if isinstance(options.get(name), dict):
            default = defaults[name].default_factory()
            check_names(options[name], asdict(default), name)
            options[name] = replace(default, **options[name])
    return config_class(**options)


def check_names(given: dict, known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first name that is no option."""
    for name in given:
        if name not in known:
            raise ValueError(f"{where} has no option {name!r}; expected {', '.join(known)}")


def in_words(config: Algorithm) -> str:
    """A configuration on one line; options that have no effect are left out."""
    advantage, loss = asdict(config.advantage), asdict(config.loss)
    if not config.discounts:
        advantage = {name: advantage[name] for name in ("baseline", "scale")}
    without_effect = {name for name, value in loss.items() if value in (0.0, False)}
    if config.loss.kl_coef == 0:
        without_effect |= {"kl_in", "kl_estimator"}
    if config.loss.max_importance == 0:
        without_effect.add("importance")
    if config.loss.objective == "reinforce":
        without_effect |= {"clip_low", "clip_high"}
    options = advantage
    options |= {name: value for name, value in loss.items() if name not in without_effect}
    usual = RewardConfig()
    for name in ("accuracy_weight", "format_weight"):
        if getattr(config.rewards, name) != getattr(usual, name):
            options[name] = getattr(config.rewards, name)
    if config.dynamic_sampling > 1:
        options["dynamic_sampling"] = config.dynamic_sampling
    if config.overlong_buffer:
        options["overlong_buffer"] = config.overlong_buffer
    for name, weight in config.rewards.weights.items():
        if name not in ("accuracy", "format"):
            options[name] = weight
    if config.rewards.process is not None:
        options["process"] = config.rewards.process_weight
    return f"{config.algo}: " + ", ".join(f"{name} {value}" for name, value in options.items())


def make_learner(
    config: Algorithm,
    policy: Transformer,
    reference: Reference | None,
    engine: Engine,
    critic_trunk: Transformer | None = None,
    chat: bool = False,
    judges: dict[str, ValueHead] | None = None,
) -> Learner:
    """The objects that `grpo_step` uses, each chosen once, here.

    reference: None where nothing is compared with it (config.needs_reference).
    critic_trunk: a transformer for the critic to begin from; needed by baseline "critic" alone.
    chat: put each prompt through the model's chat template. judges: "model" is the reward model
    that rewards.model names, "process" the process reward of rewards.process.
    """
    device, score, score_steps, step_credit = policy.device, None, None, no_steps
    judges, per_batch = judges or {}, config.micro_tokens
    if "model" in judges:
        score = partial(judges["model"].score_rollouts, tokens_per_batch=per_batch)
    if "process" in judges:
        score_steps = partial(
            judges["process"].score_steps, tokenizer=engine.tokenizer, tokens_per_batch=per_batch
        )
        step_credit = partial(weighted_steps, weight=config.rewards.process_weight)
    grader = Grader(config, score, score_steps)

    if config.dynamic_sampling > 1:
        sampler = DynamicSampler(engine, grader, chat)
    else:
        sampler = GroupSampler(engine, chat)

    scaler = LossScaler.of(policy)
    kl_cost, critic = no_kl, None
    if config.kl_in_reward:
        kl_cost = kl_cost_to(reference, config)
    if config.advantage.baseline == "critic":
        network = ValueHead(critic_trunk)
        optimizer = make_optimizer(network, config.critic_optim)
        critic = CriticLearner(network, optimizer, config, scaler)
    return Learner(
        policy=policy,
        optimizer=make_optimizer(policy, config.optim),
        reference=reference,
        sampler=sampler,
        grader=grader,
        credit=Credit(config.advantage, device, kl_cost, critic, step_credit),
        scaler=scaler,
    )
