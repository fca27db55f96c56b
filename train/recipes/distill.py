"""Distillation or reinforcement learning for a small model? Six arms from one student, and a curve.

    r1zero demo                              the teacher, in runs/demo/seed0/rl
    r1zero distill                           every arm, with a table and a picture
    r1zero distill --teacher DIR --student DIR --teacher-base DIR --task gsm8k ...

    student     the small base that the arms begin with
    rl          RL alone
    sft         SFT on right answers of the teacher                     R1-Distill
    sft_rl      the same, and then RL                                   R1 leaves this one out,
    large       the teacher's own base by SFT on the same answers       and this one
    own         SFT on right answers of the student itself              STaR, RAFT: one round
    on_policy   the student's samples, the teacher's log-probs          on-policy distillation
    teacher     what there is to reach

The curve is SFT on 64 to 2,048 of the teacher's answers, right ones alone or unfiltered, always
with the same number of steps. Each stage is an ordinary run in a folder of its own (`r1zero
collect`, `sft`, `grpo`), so Ctrl-C and --resume work throughout.

Sky-T1 is two of these calls, with the shares of its data (NovaSky, January 2025):

    r1zero collect --run TEACHER --out maths.jsonl --task math --data math.jsonl --samples 4 \\
        --per-problem 1
    r1zero sft --run runs/sky --base STUDENT --data code.jsonl:5 maths.jsonl:10 science.jsonl:1

Sources: DeepSeek-R1, arXiv 2501.12948, sections 2.4 and 4.1; on-policy distillation,
thinkingmachines.ai/blog/on-policy-distillation. Left out: rewriting the teacher's answers (Sky-T1
asks another model for it), and what the teacher itself has cost.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...eval.console import say, show
from ...eval.harness import evaluate
from ...eval.result_file import partial_path
from ...eval.sampler import ModelSampler
from ...eval.tasks.base import Task
from ...eval.tasks.countdown import Countdown
from ...model.chat_template import encode_problems
from ...model.checkpoint import checkpoint_steps, load_model
from ...model.config import preset
from ...model.files import atomic_write_text
from ...model.optimizer import OptimConfig
from ...model.tokenizer import Tokenizer
from ...rl.family import PRESETS
from ..collect import CollectConfig, collect
from ..grpo import grpo, grpo_config
from ..machine import pick_device, reuse_memory
from ..pretrain import PretrainConfig, pretrain
from ..report.record import read_lines
from ..run import at_least
from ..settings import as_json
from ..sft import SFTConfig, sft
from ..task_flags import TaskFlags
from .demo_corpus import words
from .distill_results import Results, plot_results, verdicts
from .parts import (
    PartResults,
    Stage,
    answers_path,
    check_not_begun,
    check_part,
    check_room,
    check_size,
    has_answers,
    run_stage,
)

DEMO = "runs/demo/seed0"
TOY = TaskFlags(name="countdown", options=("n_numbers=3", "high=20", "ops=+-"))
FREE = ("run", "resume", "device")  # flags that may be others on resume at any time
MEASURING = ("eval_problems", "eval_samples")  # flags of no stage, but of what is measured of each


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation against reinforcement learning for a small model, in six arms."""

    run: str = "runs/distill"
    """Folder of the recipe."""
    resume: bool = False
    """Continue a recipe that was stopped."""
    seed: int = 0
    """Seed of the student's weights and of the sampling."""
    teacher: str = f"{DEMO}/rl"
    """Folder of the model to learn from."""
    teacher_base: str | None = f"{DEMO}/base"
    """Folder of the base that the teacher was made of, for the arm `large`; None leaves it out."""
    student: str | None = None
    """Folder of the small base. None pretrains one on the demo's text, for the task countdown."""
    task: TaskFlags = TOY
    model: str = "depth=3"
    """Size of a student that is pretrained: a preset or depth=N."""
    documents: int = 60_000
    """Number of documents in the text of its pretraining."""
    pretrain_steps: int = 800
    """Number of steps of its pretraining, of 2,048 tokens each."""
    traces: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    """Numbers of the teacher's answers for the curve; the arms have the most."""
    problems: int = 3072
    """Number of problems that teacher and student are asked, for answers to train on."""
    own_samples: int = 4
    """Number of answers of the student per problem; the teacher gives one."""
    sft_steps: int = 80
    """Number of steps of each fine-tuning, of --batch-tokens each."""
    batch_tokens: int = 2048
    """Maximum number of tokens in one step of fine-tuning."""
    sft_lr: float = 1e-3
    """Learning rate of fine-tuning."""
    rl_steps: int = 50
    """Number of steps of reinforcement learning, and of on-policy distillation."""
    rl_lr: float = PRESETS["demo"]["optim"]["lr"]
    """Learning rate of reinforcement learning, and of on-policy distillation."""
    prompts_per_step: int = 16
    """Number of problems per step of reinforcement learning."""
    group_size: int = 16
    """Number of answers per problem of reinforcement learning."""
    max_new_tokens: int = 192
    """Maximum number of new tokens per answer."""
    on_policy: bool = True
    """Run the arm on_policy. It needs a teacher with the student's tokenizer."""
    eval_problems: int = 512
    """Number of held-out problems to measure on."""
    eval_samples: int = 4
    """Number of answers per held-out problem, at temperature 1."""
    device: str = "auto"
    """Device to compute on: auto (the GPU if there is one), cpu, cuda or mps."""

    def __post_init__(self):
        at_least(
            self,
            1,
            "documents",
            "pretrain_steps",
            "problems",
            "own_samples",
            "sft_steps",
            "rl_steps",
        )
        at_least(self, 1, "batch_tokens", "prompts_per_step", "max_new_tokens")
        at_least(self, 1, "eval_problems", "eval_samples")
        at_least(self, 0, "seed")
        if not self.traces or min(self.traces) < 1 or len(set(self.traces)) < len(self.traces):
            raise ValueError(f"--traces is {self.traces}, expected different numbers of 1 or more")
        # What only a later stage would refuse is refused now, not after minutes of work.
        preset(self.model, vocab_size=1)
        task = self.task.make()
        if self.student is None and not isinstance(task, Countdown):
            raise ValueError(
                f"--task {task.name} without --student; a student that is pretrained here learns "
                "countdown alone, so give the folder of a base"
            )
        stages_of(self, Path(self.run))

    @property
    def most(self) -> int:
        """The number of traces of the arms."""
        return max(self.traces)


# ---- what is refused before anything is made ----


def check_folders(config: DistillConfig) -> None:
    """Raise ValueError for a model that is not there."""
    flags = {
        "--teacher": (config.teacher, "r1zero demo makes one in runs/demo"),
        "--teacher-base": (config.teacher_base, "--teacher-base None leaves its arm out"),
        "--student": (config.student, "leave it out to pretrain one"),
    }
    for flag, (folder, help_) in flags.items():
        if folder is not None and not Path(folder).exists():
            raise ValueError(
                f"{flag} {folder} does not exist; give the folder of a model, or {help_}"
            )


class Known(NamedTuple):
    """What is to be known of a model before anything is made."""

    tokenizer: Tokenizer
    max_seq_len: int


def known_of(flag: str, folder: str, device: torch.device) -> Known:
    """The model in a folder. Raises ValueError, which names the flag, if it holds none that
    writes."""
    try:
        model, tokenizer, _ = load_model(folder, device)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    return Known(tokenizer, model.config.max_seq_len)


def known_of_student(config: DistillConfig, device: torch.device) -> Known:
    """The student, which may be one that is still to be pretrained."""
    if config.student:
        return known_of("--student", config.student, device)
    tokenizer = Tokenizer.from_words(words(config.task.make()))
    return Known(tokenizer, preset(config.model, vocab_size=1).max_seq_len)


def check_models(config: DistillConfig) -> None:
    """Raise ValueError for models that do not fit, and for more problems than there are.

    Each stage would find its own fault, but the last of them when all others have run.
    """
    # 1. Are there as many problems to train on?
    task = config.task.make()
    check_size(f"--problems {config.problems}", config.problems, task, "train")

    # 2. Do the models write? Are the teacher's log-probs of the student's tokens?
    device = pick_device(config.device)
    models = {
        f"--teacher {config.teacher}": known_of("--teacher", config.teacher, device),
        f"the student {config.student or config.model}": known_of_student(config, device),
    }
    teacher, student = models.values()
    if config.on_policy and teacher.tokenizer.fingerprint() != student.tokenizer.fingerprint():
        raise ValueError(
            f"--teacher {config.teacher} has another tokenizer than the student "
            f"{config.student or 'that is pretrained here'}, so it can be distilled by its texts "
            "alone; add --no-on-policy"
        )
    if config.teacher_base:
        flag = f"--teacher-base {config.teacher_base}"
        models[flag] = known_of("--teacher-base", config.teacher_base, device)

    # 3. Have they room for an answer beside the longest problem?
    asked = [("train", config.problems), ("test", n_held_out(config, task))]
    prompts = [task.prompt(each) for split, n in asked for each in task.problems(split, n)]
    for whose, (tokenizer, max_seq_len) in models.items():
        longest = max(map(len, encode_problems(tokenizer, prompts, config.task.chat)))
        check_room(config.max_new_tokens, max_seq_len - longest, whose)


def check_flags(config: DistillConfig, folder: Path) -> dict:
    """The flags as JSON types. Raises ValueError if something in the folder was made with others.

    Flags of stages that have not begun may be others than those that the recipe began with.
    """
    now = {name: value for name, value in as_json(asdict(config)).items() if name not in FREE}
    values = PartResults(folder, {}).values
    then = values.get("config", {})
    changed = [name for name in now if then.get(name, now[name]) != now[name]]
    fixed = [name for name in changed if is_fixed(config, folder, name, then[name], values)]
    if fixed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in fixed)
        raise ValueError(
            f"{folder} was begun with another {flags}; give what {folder / 'results.json'} says, "
            "or another --run"
        )
    return now


def is_fixed(config: DistillConfig, folder: Path, name: str, then: Any, values: dict) -> bool:
    """Whether something was made or measured with a flag that had the value `then`.

    values: those of results.json.
    """
    if name in MEASURING and values.get("stages"):
        return True
    if isinstance(then, list):
        then = tuple(then)
    if name == "task":
        then = TaskFlags(**then | {"options": tuple(then["options"])})
    # The stages as they are now, and as they were with that value.
    pair = [stages_of(each, folder) for each in (config, replace(config, **{name: then}))]
    now, earlier = ({stage.name: stage for stage in stages} for stages in pair)
    changed = [each for each, stage in earlier.items() if stage != now.get(each)]
    return any(is_begun(earlier[each]) for each in changed)


def is_begun(stage: Stage) -> bool:
    """Whether a stage has made something that is kept."""
    if stage.loop is not collect:
        return bool(checkpoint_steps(Path(stage.config.run)))
    out = Path(stage.config.out)
    return out.exists() or partial_path(out).exists()


# ---- the stages: each is an ordinary run ----


def student_of(config: DistillConfig, folder: Path) -> str:
    """The folder of the small base."""
    return config.student or str(folder / "student")


def student_stage(config: DistillConfig, folder: Path) -> Stage:
    """Pretraining of the small base, on the text of the demo."""
    run = PretrainConfig(
        run=str(folder / "student"),
        data=("countdown",),
        model=config.model,
        task=config.task.make(),
        documents=config.documents,
        steps=config.pretrain_steps,
        save_every=200,
        optim=OptimConfig(lr=4e-3),
        seed=config.seed,
        device=config.device,
    )
    return Stage("student", pretrain, run)


def collect_stage(config: DistillConfig, folder: Path, name: str, run: str, **options) -> Stage:
    """Answers of a model to training problems, in <name>.jsonl."""
    flags = CollectConfig(
        run=run,
        out=str(folder / f"{name}.jsonl"),
        task=config.task,
        problems=config.problems,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        device=config.device,
        **options,
    )
    return Stage(name, collect, flags)


def sft_stage(config: DistillConfig, folder: Path, name: str, base: str, data: str) -> Stage:
    """Fine-tuning on a file of answers. All have the same number of steps."""
    run = SFTConfig(
        run=str(folder / name),
        base=base,
        data=(str(folder / data),),
        steps=config.sft_steps,
        batch_tokens=config.batch_tokens,
        save_every=100,
        optim=OptimConfig(lr=config.sft_lr, warmup=5, weight_decay=0.0),
        seed=config.seed,
        device=config.device,
    )
    return Stage(name, sft, run)


def rl_stage(config: DistillConfig, folder: Path, name: str, base: str, **options) -> Stage:
    """Reinforcement learning by the rules, as in the demo, unless the options say otherwise."""
    algo = options.pop("algo", "demo")
    demo = PRESETS["demo"]
    run = grpo_config(
        algo,
        run=str(folder / name),
        base=base,
        task=config.task,
        steps=config.rl_steps,
        save_every=10,
        max_new_tokens=config.max_new_tokens,
        prompts_per_step=config.prompts_per_step,
        group_size=config.group_size,
        updates_per_step=demo["updates_per_step"],
        micro_tokens=demo["micro_tokens"],
        optim=demo["optim"] | {"lr": config.rl_lr},
        seed=config.seed,
        device=config.device,
        **options,
    )
    return Stage(name, grpo, run)


def data_stages(config: DistillConfig, folder: Path) -> list[Stage]:
    """The student, and the answers that it is trained on."""
    stages = [] if config.student else [student_stage(config, folder)]
    # Whatever was not cut off; which of them are right, the lines say.
    asked = {
        "traces": (config.teacher, 1),
        "own_traces": (student_of(config, folder), config.own_samples),
    }
    for name, (model, samples) in asked.items():
        options = {"samples": samples, "keep": ("finished",)}
        stages.append(collect_stage(config, folder, name, model, **options))
    return stages


def arm_stages(config: DistillConfig, folder: Path) -> list[Stage]:
    """What the student becomes, each arm behind what it goes on from."""
    student, best = student_of(config, folder), right_name(config.most)
    stages = [
        rl_stage(config, folder, "rl", student),
        sft_stage(config, folder, "sft", student, f"{best}.jsonl"),
        rl_stage(config, folder, "sft_rl", str(folder / "sft")),
        sft_stage(config, folder, "own", student, "own_right.jsonl"),
    ]
    if config.on_policy:
        # The teacher's log-probs are the only reward. (Whitening takes off their mean, for the
        # variance, and divides by their deviation, as the other arms divide by one.)
        taught = {"algo": "distill", "teacher": config.teacher, "advantage": {"scale": "batch"}}
        stages.append(rl_stage(config, folder, "on_policy", student, **taught))
    if config.teacher_base:
        stages.append(sft_stage(config, folder, "large", config.teacher_base, f"{best}.jsonl"))
    return stages


def curve_stages(config: DistillConfig, folder: Path) -> list[Stage]:
    """Fine-tuning on more and more traces. The last with right ones alone is the arm sft."""
    student, stages = student_of(config, folder), []
    for n in sorted(config.traces):
        names = [any_name(n)] if n == config.most else [right_name(n), any_name(n)]
        stages += [sft_stage(config, folder, name, student, f"{name}.jsonl") for name in names]
    return stages


def stages_of(config: DistillConfig, folder: Path) -> list[Stage]:
    """Every stage in order."""
    parts = (data_stages, arm_stages, curve_stages)
    return [stage for part in parts for stage in part(config, folder)]


# ---- the traces ----


def right_name(n: int) -> str:
    return f"right_{n}"


def any_name(n: int) -> str:
    return f"any_{n}"


def is_right(line: str) -> bool:
    """Whether a line of `r1zero collect` has a right, well-formed answer."""
    parts = json.loads(line)["parts"]
    return parts["accuracy"] == parts["format"] == 1.0


def one_per_problem(lines: list[str]) -> list[str]:
    """The first line of each problem."""
    return list({json.loads(line)["index"]: line for line in reversed(lines)}.values())[::-1]


def write_traces(folder: Path, numbers: tuple[int, ...], chosen: Callable) -> dict[str, int]:
    """Write the first n of the teacher's answers for each n, right ones and any; and the first
    right one of the student to each problem.

    chosen: from a line to whether it is right. Returns {name of the file: number of its lines},
    which is less than n where there are no more. Raises ValueError if the teacher is never right.
    """
    files = [folder / f"{name}.jsonl" for name in ("traces", "own_traces")]
    lines, own = (path.read_text(encoding="utf-8").splitlines(keepends=True) for path in files)
    right, own_right = (list(filter(chosen, each)) for each in (lines, own))
    if not right:
        raise ValueError(
            f"none of the {len(lines):,} answers in {folder / 'traces.jsonl'} is right, so there "
            "is nothing to distil; give another --teacher, in another --run"
        )
    files = {"own_right": one_per_problem(own_right)[: max(numbers)]}
    for n in numbers:
        files |= {right_name(n): right[:n], any_name(n): lines[:n]}
    for name, kept in files.items():
        atomic_write_text(folder / f"{name}.jsonl", "".join(kept))
    if len(right) < max(numbers):
        say(
            f"there are {len(right):,} right answers, not {max(numbers):,}; more --problems, in "
            "another --run, would give them"
        )
    return {name: len(kept) for name, kept in files.items()}


# ---- the whole ----


def n_held_out(config: DistillConfig, task: Task) -> int:
    """The number of held-out problems: as many as are asked for, or as there are."""
    size = task.size("test")
    return config.eval_problems if size is None else min(size, config.eval_problems)


def measure(config: DistillConfig, folder: Path, name: str, model_folder: str) -> dict:
    """Accuracy on held-out problems, as JSON types; the answers go to eval_<name>.jsonl."""
    model, tokenizer, _ = load_model(model_folder, pick_device(config.device))
    task = config.task.make()
    sampler = ModelSampler(
        model, tokenizer, config.max_new_tokens, seed=config.seed, chat=config.task.chat
    )
    out = answers_path(folder, name)
    problems = task.problems("test", n_held_out(config, task))
    result = evaluate(sampler, task, problems, config.eval_samples, out=out, progress=False)
    return {
        "accuracy": list(result.accuracy),
        "format": list(result.format_rate),
        "mean_tokens": result.mean_tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def distill(config: DistillConfig, chosen=is_right) -> Path:
    """Run every stage that is not done yet; returns the path of results.json.

    chosen: from a line of `r1zero collect` to whether its answer is right.
    Raises ValueError for a model that is not there or does not fit, for a torn file, or if the
    folder already holds a recipe and --resume was not given; CheckpointError or ValueError for
    stages that were begun with other flags; and Stopped after Ctrl-C.
    """
    reuse_memory()
    folder = Path(config.run)
    # Nothing is written before it is known that these models and flags will do.
    check_not_begun(folder, config.resume)
    check_folders(config)
    flags = check_flags(config, folder)
    check_models(config)
    for stage in stages_of(config, folder):
        if stage.loop is not collect:
            check_part(stage.config)
    folder.mkdir(parents=True, exist_ok=True)
    results, started = Results(folder, flags), time.perf_counter()

    def done(stage: Stage) -> None:
        show(f"--- {stage.name}")
        began = time.perf_counter()
        try:
            run_stage(stage)
        finally:  # what is broken off has cost something, too
            results.add_seconds(stage.name, time.perf_counter() - began)

    def measured(name: str, model: str) -> None:
        path = answers_path(folder, name)
        if name in results.stages and has_answers(path):
            return
        began = time.perf_counter()
        results.keep(name, measure(config, folder, name, model))
        lengths = [row["n_tokens"] for row in read_lines(path)]
        results.add_sampled(f"eval_{name}", model, sum(lengths), len(lengths))
        results.add_seconds(f"eval_{name}", time.perf_counter() - began)

    # 1. The student, and what teacher and student answer to training problems.
    for stage in data_stages(config, folder):
        done(stage)
    measured("student", student_of(config, folder))
    measured("teacher", config.teacher)
    results.values["traces"] = write_traces(folder, config.traces, chosen)

    # 2. The arms, and the curve.
    for stage in arm_stages(config, folder) + curve_stages(config, folder):
        if stage.name == "own" and not results.values["traces"]["own_right"]:
            say("the student was never right, so it cannot learn from itself: no arm `own`")
            continue
        done(stage)
        measured(stage.name, stage.config.run)

    # 3. What they have cost, and which is better.
    results.sum_up(folder)
    plot_results(results.values, folder / "distill.png")
    minutes = (time.perf_counter() - started) / 60
    show(f"\n{results.table()}\n\n{verdicts(results.values)}\n")
    show(f"{results.path}   {folder / 'distill.png'}   ({minutes:.1f} minutes)")
    return results.path
