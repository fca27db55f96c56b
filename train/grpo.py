"""R1-Zero: GRPO straight on a base model, with two rule rewards and nothing else.

    r1zero grpo --run runs/rl --base runs/base --steps 80
    r1zero grpo --run runs/dapo --base runs/base --algo dapo        # its family: rl/family.py
    r1zero grpo --run runs/x --base runs/base --algo dr_grpo --loss.clip-high 0.28
    r1zero grpo --run runs/d --base runs/small --algo distill --teacher runs/rl

The algorithm is rl/step.py. This file is the loop around it: flags, run folder, checkpoints, time
and memory.

Left out: a separate sampler. The engine samples with the trainer's own weights, so rollouts are
never stale. On a GPU it does so in 16 bit and with other kernels: `logp_gap_mean` and `logp_gap` in
the log show how far its log-probs are from the trainer's, and the run stops if they differ too much
(--max-logp-gap). Source: DeepSeek-R1, arXiv 2501.12948.
"""

import time
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Annotated, ClassVar

import torch
import tyro

from ..eval.console import say
from ..eval.harness import evaluate
from ..eval.sampler import ModelSampler
from ..eval.tasks.base import Task
from ..model.chat_template import encode_problems
from ..model.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from ..model.engine.engine import Engine
from ..model.engine.sampling import NonFiniteError
from ..model.lora import (
    LEARNING_RATE_FACTOR,
    LoRAConfig,
    cast_frozen,
)
from ..model.memory import predict
from ..model.tokenizer import Tokenizer
from ..model.transformer import Transformer
from ..rl import family
from ..rl.family import Algorithm, in_words
from ..rl.heads import ValueHead
from ..rl.plugin import PluginError
from ..rl.rewards import check_parts
from ..rl.step import Learner, grpo_step
from ..rl.update import LogpGapError, Reference, gap_limit
from .adapters import default_optim, loading_device, value_in
from .compute_flags import ComputeFlags
from .inputs import base_parts, plugin_parts, task_parts
from .lab.diagnosis import Diagnosis
from .lab.mistakes import MISTAKES, warn_of
from .log import read_metrics
from .machine import peak_memory, pick_device, reuse_memory
from .memory_check import predicted_for, setup_of_run, steps_measured, try_longest_batch
from .other_models import (
    Base,
    check_judges,
    check_reader,
    check_teacher,
    make_critic_trunk,
    make_reference,
    open_judges,
    open_teacher,
)
from .rollout_log import RolloutLog
from .run import START, Run, RunConfig, at_least
from .task_flags import TaskFlags

TABLE_EVERY = 10  # steps between tables of samples in Weights & Biases, without --eval-every
MEASURED = 10_000  # prompts per split whose length is looked at before a run
# Templates of prompts that ask for another form than the format reward is for.
WITHOUT_FRAME = ("zero_shot", "eight_shot", "chat", "boxed")
# From so many parameters on, a larger learning rate than this is told to be one.
LARGE, LARGE_RATE = 50_000_000, 5e-5
# A NaN or an infinity in any of these metrics ends the run.
CHECKED = ("loss", "gradient_norm", "value_loss", "critic_gradient_norm")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Algorithm, ComputeFlags, RunConfig):
    """Reinforcement learning of a base model by rule rewards."""

    # Options that may change on resume, besides those of all loops; and those that name a file or
    # folder, whose content is compared instead.
    FREE: ClassVar[tuple[str, ...]] = (
        "max_logp_gap",
        "eval_every",
        "eval_problems",
        "keep_rollouts",
        "ref_offload",
    )
    PATHS: ClassVar[tuple[str, ...]] = (
        "base",
        "task.data",
        "task.skip_bad",
        "rewards.model",
        "rewards.process",
        "teacher",
    )
    # What older runs have for a flag that was a switch then.
    RENAMED: ClassVar[dict[str, dict]] = {"control": {False: "none", True: "permute"}}

    base: str
    """Folder of the run, checkpoint, Hugging Face model or adapters in PEFT's layout to start from;
    it is also the KL's reference, until a refresh."""
    teacher: str | None = None
    """Folder of a model to measure the KL to, instead of the base: with --algo distill, the one to
    learn from. It must have the base's tokenizer."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    task: TaskFlags = field(default_factory=TaskFlags)
    eval_every: int = 0
    """Number of steps between measurements on held-out problems; the best checkpoint is kept. 0
    turns them off."""
    eval_problems: int = 64
    """Number of held-out problems per measurement, with one answer each."""
    keep_rollouts: float = 1.0
    """Share of the groups whose completions are kept in rollouts.jsonl.gz, for `r1zero show` and
    the table of --wandb; 0 keeps none."""
    mistake: Annotated[str | None, tyro.conf.arg(name="break")] = None
    """Make a classic mistake on purpose, to see what it does; `r1zero compare --help` names
    them."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        ComputeFlags.__post_init__(self)
        Algorithm.__post_init__(self)
        at_least(self, 1, "eval_problems")
        at_least(self, 0, "eval_every")
        if not 0 <= self.keep_rollouts <= 1:
            raise ValueError(
                f"--keep-rollouts is {self.keep_rollouts}, expected a share from 0 to 1"
            )
        if self.lora.rank and self.ref_offload:
            raise ValueError(
                "--ref-offload with --lora.rank: the reference is the policy's own weights without "
                "the adapters, so nothing is moved; leave --ref-offload out"
            )
        if self.teacher is not None and self.ref_refresh > 0:
            raise ValueError(
                f"--ref-refresh {self.ref_refresh} would replace the teacher; leave out --teacher, "
                "or give --ref-refresh 0"
            )
        if isinstance(self.mistake, str) and self.mistake not in MISTAKES:
            raise ValueError(f"--break is {self.mistake!r}, expected one of {', '.join(MISTAKES)}")

    @classmethod
    def defaults_of(cls, flags: list[str]) -> "GRPOConfig":
        """The defaults of the command line: the values of --algo's preset, and with --lora.rank
        its learning rates times 10.

        Raises ValueError for an unknown preset.
        """
        algo = value_in(flags, "--algo", "r1_zero")
        required = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
        defaults = family.resolve(algo, dict.fromkeys(required, tyro.MISSING), cls)
        return replace(
            defaults,
            optim=default_optim(flags, defaults.optim),
            critic_optim=default_optim(flags, defaults.critic_optim),
        )


def grpo_config(algo: str = "r1_zero", **overrides) -> GRPOConfig:
    """The complete configuration of a run: the preset's, with the overrides; see family.resolve."""
    return family.resolve(algo, overrides, GRPOConfig)


# ---- the learner ----


def make_learner(
    config: GRPOConfig,
    task: Task,
    base: Base,
    reference: Reference | None = None,
    judges: dict[str, ValueHead] | None = None,
) -> Learner:
    """Make everything that a step uses. base: as `load_model` gives it; its model is trained.

    reference: what the KL is measured to; None is the base. judges: the models of --rewards.model
    and --rewards.process, as "model" and "process".
    """
    policy, tokenizer, _ = base
    judges = judges or {}
    # The reference is at home before the engine measures how much memory is free.
    critic_trunk = None
    if reference is None and config.needs_reference:
        reference = make_reference(config, base)
    if config.advantage.baseline == "critic":
        critic_trunk = make_critic_trunk(base, judges.get("model"))
    for judge in judges.values():
        cast_frozen(judge.trunk)  # nobody trains it: no fp32 masters
    engine = make_engine(config, task, base, reference)
    chat = is_chat(config)
    learner = family.make_learner(config, policy, reference, engine, critic_trunk, chat, judges)
    if config.mistake:
        MISTAKES[config.mistake].make(learner)
    return learner


def inputs_of(
    config: GRPOConfig,
    base: Base,
    judges: dict[str, Checkpoint] | None = None,
    teacher: Checkpoint | None = None,
) -> dict:
    """What the run depends on: the base, the files of problems, the code of a task and of a reward
    of the user's own, the models of --rewards.model and --rewards.process, and a teacher, if there
    are any."""
    _, tokenizer, checkpoint = base
    inputs = {"base": base_parts(checkpoint, tokenizer)}
    inputs |= task_parts(config.task) | plugin_parts(config.rewards.plugin)
    for name, judge in (judges or {}).items():
        what = "reward model" if name == "model" else "process reward"
        inputs[what] = base_parts(judge, tokenizer)
    if teacher is not None:
        inputs["teacher"] = base_parts(teacher, tokenizer)
    return inputs


def start_weights(run: Run) -> dict[str, torch.Tensor] | None:
    """The weights that a resumed run began with, and its KL is measured to; None are the base's.

    With adapters they always are. Else the run keeps a copy of them, in case that the base changes
    or goes. Raises CheckpointError if the copy is gone, and the base is another one.
    """
    start = run.folder / START
    if not (run.resumed and keeps_start(run.config)):
        return None
    if start.exists():
        return load_checkpoint(start, groups=("model",)).tensors["model"]
    if not run.began_with("base"):
        raise CheckpointError(
            f"{start} is gone, and --base is not the model that the run began with, which its KL "
            "is measured to; give that one, or take another run folder"
        )
    return None


def keeps_start(config: GRPOConfig) -> bool:
    """Whether a run keeps the model that it begins with: not without a KL, nor with a teacher, nor
    with adapters, which need their base anyway."""
    return config.needs_reference and config.teacher is None and config.lora.rank == 0


def keep_start(run: Run, base: Base) -> None:
    """Keep the weights that the run begins with, for `start_weights`."""
    policy, tokenizer, checkpoint = base
    state = {
        "settings": run.settings,
        "model_config": policy.config.to_dict(),
        "tokenizer": tokenizer.to_dict(),
    }
    tensors = {"model": checkpoint.tensors["model"]}
    save_checkpoint(run.folder / START, 0, tensors, state)


def form_notice(task: Task, config: Algorithm) -> str | None:
    """What to say of a prompt that asks for another form than the format reward is for, or None."""
    template = getattr(task, "template", None)
    if template not in WITHOUT_FRAME or config.rewards.format_weight == 0:
        return None
    return (
        f"the template {template} does not ask for <think> and <answer>, which the format reward "
        "is for; --options template=r1_zero asks for those, and --rewards.format-weight 0 leaves "
        "that reward out"
    )


def rate_notice(config: Algorithm, policy: Transformer) -> str | None:
    """What to say of a learning rate that is for a much smaller model, or None."""
    size = sum(parameter.numel() for parameter in policy.parameters())
    factor = LEARNING_RATE_FACTOR if config.lora.rank else 1
    if size < LARGE or config.optim.lr <= LARGE_RATE * factor:
        return None
    return (
        f"--optim.lr is {config.optim.lr:g}, which suits models of a million parameters; this one "
        f"has {size / 1e6:,.0f} million, and is likely to fall apart. {factor * 1e-6:g} to "
        f"{factor * 1e-5:g} are usual, with --optim.eps 1e-8"
    )


def is_chat(config: GRPOConfig) -> bool:
    """Whether prompts go through the model's chat template."""
    return getattr(config.task, "chat", False)


def longest_prompt(config: GRPOConfig, task: Task, tokenizer: Tokenizer, problems: list) -> int:
    """The number of tokens of the longest prompt. ValueError for one that cannot be encoded."""
    prompts = [task.prompt(problem) for problem in problems]
    return max(map(len, encode_problems(tokenizer, prompts, is_chat(config))))


def check_room(config: GRPOConfig, task: Task, policy: Transformer, tokenizer: Tokenizer) -> int:
    """The number of tokens that the longest prompt and its answer may have together.

    Raises ValueError unless the model has room for them. All prompts are measured where they can be
    counted, else the first MEASURED.
    """
    splits = ("train", "test") if config.eval_every else ("train",)
    if config.eval_every and not getattr(task, "held_out", True):
        raise ValueError(
            f"--eval-every measures on held-out problems, and --task {task.name} holds none out "
            "of --data; add --options test=FILE or test_share=0.1"
        )
    sizes = {split: task.size(split) for split in splits}
    for split, size in sizes.items():
        if size == 0:
            raise ValueError(
                f"--task {task.name} has no {split} problems; give it some, or choose another task"
            )
    longest = max(
        longest_prompt(
            config, task, tokenizer, task.problems(split, min(size or MEASURED, MEASURED))
        )
        for split, size in sizes.items()
    )
    limit = policy.config.max_seq_len
    if longest >= limit:
        raise ValueError(
            f"a prompt of --task {task.name} has up to {longest} tokens, and the base has room for "
            f"{limit} in all, the answer among them; give shorter prompts, or a longer base "
            "(r1zero pretrain --model depth=2 has 512 tokens)"
        )
    if longest + config.max_new_tokens > limit:
        raise ValueError(
            f"--max-new-tokens is {config.max_new_tokens}, and a prompt has up to {longest} "
            f"tokens; the base has room for {limit} in all. Give at most {limit - longest}"
        )
    return longest + config.max_new_tokens


def make_engine(
    config: GRPOConfig,
    task: Task,
    base: Base,
    reference: Reference | None,
) -> Engine:
    """An engine whose cache is for what a step samples, and leaves room for the first update."""
    policy, tokenizer, _ = base
    # Measure a few prompts. If later ones are longer, fewer rows run at a time.
    few = task.problems("train", config.prompts_per_step)
    longest = longest_prompt(config, task, tokenizer, few) + config.max_new_tokens
    # And leave room for what the first update makes (model/memory.py).
    setup = setup_of_run(config, policy, longest, reference)
    return Engine(
        policy,
        tokenizer,
        max_rows=setup.rows,
        longest=longest,
        reserve=predict(setup).reserve,
        keep_routes=config.routing_replay,
    )


def held_out_accuracy(learner: Learner, task: Task, config: GRPOConfig) -> float:
    """pass@1 on the first --eval-problems test problems, at the temperature of training."""
    engine = learner.sampler.engine
    engine.refresh()
    sampler = ModelSampler(
        learner.policy,
        engine.tokenizer,
        config.max_new_tokens,
        config.temperature,
        config.seed,
        engine=engine,
        chat=is_chat(config),
    )
    size = task.size("test")
    n_problems = config.eval_problems if size is None else min(size, config.eval_problems)
    problems = task.problems("test", n_problems)
    return evaluate(sampler, task, problems, progress=False).accuracy.mean


# ---- time and memory ----


class TimedSampler:
    """A sampler that notes how long its last call took."""

    def __init__(self, sampler):
        self.sampler = sampler
        self.engine = sampler.engine
        self.seconds = 0.0

    @property
    def position(self) -> int:
        return self.sampler.position

    @position.setter
    def position(self, value: int) -> None:
        self.sampler.position = value

    def sample(self, task, config, step: int):
        started = time.perf_counter()
        rollouts = self.sampler.sample(task, config, step)
        self.seconds = time.perf_counter() - started
        return rollouts


def timed_step(learner: Learner, task: Task, config: Algorithm, step: int) -> dict:
    """A step's metrics, with seconds, tokens per second and peak memory beside them."""
    if not isinstance(learner.sampler, TimedSampler):
        learner.sampler = TimedSampler(learner.sampler)
    started = time.perf_counter()
    metrics = grpo_step(learner, task, config, step)
    step_s = time.perf_counter() - started
    rollout_s = learner.sampler.seconds
    update_s = step_s - rollout_s
    tokens, replaced = metrics["tokens"], metrics["replaced_tokens"]
    memory = peak_memory(learner.policy.device)
    if memory is not None:
        metrics = metrics | {"memory_gb": memory / 1e9}
    return metrics | {
        "step_s": step_s,
        "rollout_s": rollout_s,
        "rollout_tokens_per_s": tokens / rollout_s,
        "replaced_s": rollout_s * replaced / tokens,
        "update_s": update_s,
        "update_tokens_per_s": (tokens - replaced) / update_s,
    }


def timed_write(kept: RolloutLog, step: int) -> tuple[list[dict], float]:
    """(the samples that were kept of a step, the seconds that it took)."""
    started = time.perf_counter()
    samples = kept.write(step)
    return samples, time.perf_counter() - started


# ---- the loop ----


def grpo(config: GRPOConfig, step_of=timed_step, score_of=held_out_accuracy) -> Transformer:
    """Run the loop; returns the trained model.

    step_of runs one step; score_of measures on held-out problems. Raises ValueError for bad flags,
    FloatingPointError or NonFiniteError for NaN, LogpGapError if sampler and trainer disagree about
    log-probs, and Stopped after Ctrl-C.
    """
    reuse_memory()
    device, task = pick_device(config.device), config.task.make()
    precision = config.precision(device)
    # A reward of the user's own is tried before there is a run folder.
    if config.rewards.plugin:
        config.rewards.try_plugin(task.problems("train", 1)[0], config.group_size)
    if config.mistake:
        warn_of(config.mistake)
    check_parts(task, config.rewards)
    check_teacher(config)
    check_judges(config)
    run = Run(config, config.algo if config.control == "none" else "control")
    # A resumed run keeps the learning rate's schedule that it began with.
    algorithm = replace(config, steps=run.schedule_steps)
    at_first = loading_device(config.lora, device)
    policy, tokenizer, _ = base = load_model(config.base, at_first, precision=precision)
    policy.recomputes = config.recompute
    opened = open_judges(config, base)
    judges = {name: judge for name, (judge, _) in opened.items()}
    files = {name: checkpoint for name, (_, checkpoint) in opened.items()}
    teacher, origin = open_teacher(config, base, device)
    run.check_inputs(inputs_of(config, base, files, origin))
    run.check_model(policy, tokenizer)
    longest = check_room(config, task, policy, tokenizer)
    for name, judge in judges.items():
        flag = f"--rewards.{name} {getattr(config.rewards, name)}"
        check_reader(flag, judge.trunk, longest)
    check_reader(f"--teacher {config.teacher}", teacher and teacher.model, longest)
    for notice in (form_notice(task, config), rate_notice(config, policy)):
        if notice:
            say(notice)
    run.adapt(policy, base[2])
    policy.to(device)
    for judge in judges.values():
        judge.to(device)
    reference = teacher
    if reference is None and config.needs_reference:
        reference = make_reference(config, base, start_weights(run))
    learner = make_learner(algorithm, task, base, reference, judges)
    engine = learner.sampler.engine
    trained, more = trained_modules(learner, config)
    with run:
        counters = run.restore(policy, engine.tokenizer, learner.optimizer, more)
        learner.sampler.position = counters.get("position", 0)
        learner.scaler.load(counters)
        if keeps_start(config) and not run.resumed:
            keep_start(run, base)
        del base  # of a run's folder, it holds all weights once more
        say(engine.plan())
        shapes = [judge.config for judge in judges.values()]
        predicted = predicted_for(config, learner, longest, shapes)
        if run.first_step < config.steps:
            run.note(memory={"predicted": predicted.parts | {"peak": predicted.peak}})
        if device.type == "cuda":
            try_longest_batch(learner, config, longest, predicted)
        say(f"{in_words(config)}, max_logp_gap {gap_limit(policy, config):g}")
        rollout_log = RolloutLog(
            run.folder, run.first_step, engine.tokenizer, config.keep_rollouts, config.seed
        )
        learner.observe = rollout_log.observe
        diagnosis = Diagnosis(asdict(config), read_metrics(run.folder))
        for step in steps_measured(run, predicted, device):
            with explained(run, step):
                metrics = step_of(learner, task, algorithm, step)
            checked = {name: metrics[name] for name in CHECKED if name in metrics}
            run.check_finite(step, trained, **checked)
            if learner.reference and config.ref_refresh and (step + 1) % config.ref_refresh == 0:
                learner.reference.refresh(policy)
            metrics = {name: float(value) for name, value in metrics.items()}
            samples, metrics["keep_s"] = timed_write(rollout_log, step)
            counters = {"position": learner.sampler.position, **learner.scaler.counters()}
            run.done(step, metrics, counters)

            # Every eval_every steps, measure on held-out problems, to know the best checkpoint.
            score = None
            is_last = step + 1 == config.steps
            if config.eval_every and ((step + 1) % config.eval_every == 0 or is_last):
                score = metrics["eval_accuracy"] = score_of(learner, task, config)

            shown = ("accuracy", "format", "length", "kl_to_reference")
            has_table = (step + 1) % (config.eval_every or TABLE_EVERY) == 0
            run.log(step, metrics, shown, samples if has_table else ())
            for advice in diagnosis.observe(metrics):
                say(advice)
            if run.due(step, config.save_every) or score is not None:
                rollout_log.sync()
                run.save(step, score)
    return policy


def trained_modules(learner: Learner, config: GRPOConfig) -> tuple[torch.nn.Module, dict]:
    """(the modules checked for NaN, what a checkpoint holds besides the policy)."""
    trained, more = learner.policy, {}
    if learner.reference and config.ref_refresh:
        more["reference"] = (learner.reference.model, None)
    if config.advantage.baseline == "critic":
        critic = learner.credit.critic
        more["critic"] = (critic.critic, critic.optimizer)
        # In this order: a critic's NaN comes before the policy's.
        trained = torch.nn.ModuleDict({"critic": critic.critic, "policy": learner.policy})
    return trained, more


@contextmanager
def explained(run: Run, step: int):
    """Add to an error the step that it stopped, and the checkpoint that remains."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}, at step {step + 1}; {run.last_good()}") from error
    except PluginError as error:
        raise PluginError(f"{error}, at step {step + 1}; {run.last_good()}") from error
    except LogpGapError as error:
        raise LogpGapError(
            f"{error}, at step {step + 1}; {run.last_good()}. If this is rounding alone, raise "
            "--max-logp-gap; if not, sampler and trainer compute two different things"
        ) from error
