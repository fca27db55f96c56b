"""GRPO on an open model: the settings and their sources, the number to expect, the control beside.

    hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B
    r1zero recipe gsm8k-qwen2.5-0.5b --base Qwen2.5-0.5B --explain     what it is, what it needs
    r1zero recipe gsm8k-qwen2.5-0.5b --base Qwen2.5-0.5B               all of it

1. Measure the base on the held-out problems.
2. GRPO on the training problems, with the rule rewards; measure again.
3. The same steps with rewards that are the toss of a coin; measure again. A random reward lifts
   some bases, above all Qwen's (Spurious Rewards, arXiv 2506.10947), so a gain means little without
   it.
4. A table of the three, with 95 % intervals, beside the number that others have published.

Each stage is an ordinary run in a folder of its own, so Ctrl-C and --resume work throughout. Every
setting is a flag. The recipes themselves are in open_model_table.py.

Left out: the download. The commands for it are printed by --explain, and they need a network.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro

from ...eval.console import say, show
from ...eval.harness import evaluate
from ...eval.sampler import ModelSampler
from ...eval.tasks import hub
from ...model.checkpoint import load_model
from ...model.huggingface import is_huggingface, read_config
from ...model.lora import LoRAConfig
from ...model.memory import Setup, model_without_memory, predict, smallest_card
from ...model.optimizer import OptimConfig
from ...model.precision import DTYPES
from ...model.transformer import count_parameters
from ..adapters import default_rate
from ..checks import check_temperature
from ..compute_flags import ComputeFlags
from ..grpo import GRPOConfig, check_room, grpo, grpo_config
from ..machine import describe_machine, pick_device, reuse_memory
from ..memory_check import setup_of_run
from ..planning import LORA_RANK, SHAPES, gib, gib_needed
from ..run import at_least, check_folder_name
from ..task_flags import TaskFlags
from .parts import PartResults, check_not_begun, check_part, run_part

SMALLEST = {"lora": LoRAConfig(LORA_RANK), "recompute": True, "ref_offload": False}


@dataclass(frozen=True)
class Facts:
    """What a reader wants to know of a recipe before it is run. Nothing here was measured by us."""

    name: str
    """The recipe's name: r1zero recipe NAME."""
    model: str
    """The base, as it is called on huggingface.co."""
    model_license: str
    problems: str
    """What is trained on, and what is held out."""
    data_license: str
    fetch: tuple[str, ...]
    """The commands that fetch the data; none for problems that are generated."""
    settings: str
    """Where the settings are from."""
    expected: str
    """The published number to expect, how it was measured, and where it stands."""
    shape: str
    """The base's shape, by its name in planning.py."""
    prompt_tokens: int
    """A round number that the longest prompt stays below, to predict the memory."""

    @property
    def parameters(self) -> int:
        """How many the base has."""
        return count_parameters(SHAPES[self.shape])

    @property
    def all_commands(self) -> tuple[str, ...]:
        """The commands that fetch the model and the data."""
        folder = self.model.rpartition("/")[2]
        return (f"hf download {self.model} --local-dir {folder}", *self.fetch)


@dataclass(frozen=True, kw_only=True)
class OpenModelConfig(ComputeFlags):
    """The flags that all these recipes have; each has defaults of its own."""

    facts: ClassVar[Facts]
    task: ClassVar[str]
    """The name of its task."""
    task_options: ClassVar[tuple[str, ...]] = ()
    """The recipe's own options of the task, such as the template of the prompt."""

    base: str = ""
    """Folder of the model, as hf download leaves it, or of a run that is trained further; needed
    but for --explain."""
    run: str
    """Folder of the recipe."""
    explain: bool = False
    """Only say what the recipe is, where its settings are from, and what to expect."""
    resume: bool = False
    """Continue a recipe that was stopped."""
    data: str | None = None
    """File of the training problems, for a task that reads them from one."""
    test: str | None = None
    """File of the held-out problems. A run refuses training problems that stand in it."""
    skip_bad: bool = False
    """Go on without the lines of the files that are bad, and say how many there are."""
    options: tuple[str, ...] = ()
    """Options of the task as name=value, instead of the recipe's own of that name or besides
    them; --explain shows the recipe's."""
    chat: bool = False
    """Put each question through the model's chat template."""
    steps: int = 500
    """Number of GRPO steps."""
    control: str = "random"
    """Rewards of the control: random (the toss of a coin), permute (shuffled within each group), or
    none to leave it out."""
    prompts_per_step: int = 16
    """Number of problems per step."""
    group_size: int = 8
    """Number of answers sampled per problem."""
    max_new_tokens: int = 1024
    """Maximum number of new tokens per answer."""
    lr: float = 1e-6
    """Learning rate, after 10 steps of warm-up; it stays there. With --lora.rank its default is 10
    times as large."""
    kl_coef: float = 0.001
    """Weight of the KL to the base in the loss."""
    format_weight: float = 0.2
    """Weight of the reward for the frame of think and answer tags; 0 where the prompt does not ask
    for them."""
    micro_tokens: int = 8192
    """Maximum number of tokens per forward and backward pass."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    recompute: bool = False
    """Keep only the input of each block for the backward pass and compute the rest again, which
    takes less memory and about a third more time (activation checkpointing)."""
    ref_offload: bool = False
    """Keep the reference in the CPU's memory between its uses."""
    moments: Annotated[str, tyro.conf.arg(name="optim.moments")] = "fp32"
    """Dtype of AdamW's moments: fp32, or bf16 for half their memory."""
    save_every: int = 50
    """Number of steps between checkpoints."""
    eval_problems: int = 500
    """Number of held-out problems to measure on."""
    eval_samples: int = 4
    """Number of answers per held-out problem."""
    eval_temperature: float = 1.0
    """Sampling temperature of the measurements; 0 always takes the most likely token."""
    eval_max_new_tokens: int = 0
    """Maximum number of new tokens per answer of the measurements; 0 is --max-new-tokens."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """Device to compute on: auto (the GPU if there is one), cpu, cuda or mps."""
    wandb: bool = False
    """Also log to Weights & Biases."""

    def __post_init__(self):
        ComputeFlags.__post_init__(self)
        check_folder_name(self.run)
        at_least(self, 1, "steps", "eval_problems", "eval_samples", "save_every")
        at_least(self, 0, "seed", "eval_max_new_tokens")
        check_temperature(self.eval_temperature)
        # Making the stages' flags checks them: before the base is measured, not after.
        list(stages_of(self))

    @classmethod
    def defaults_of(cls, flags: list[str]) -> "OpenModelConfig":
        """The defaults of the command line: with --lora.rank, the learning rate times 10."""
        defaults = cls()
        return replace(defaults, lr=default_rate(flags, defaults.lr))

    def task_flags(self) -> TaskFlags:
        """The task, with its files and options."""
        # The last option of a name counts.
        chosen = {
            option.partition("=")[0]: option for option in (*self.task_options, *self.options)
        }
        if self.test is not None:
            chosen["test"] = f"test={self.test}"
        return TaskFlags(
            name=self.task,
            options=tuple(chosen.values()),
            data=self.data,
            skip_bad=self.skip_bad,
            chat=self.chat,
        )


def stage_config(config: OpenModelConfig, name: str, control: str) -> GRPOConfig:
    """GRPO as the recipe has it. name: of the stage's folder; control: none, random or permute."""
    return grpo_config(
        "grpo",
        run=str(Path(config.run) / name),
        base=config.base,
        task=config.task_flags(),
        steps=config.steps,
        control=control,
        prompts_per_step=config.prompts_per_step,
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        loss={"kl_coef": config.kl_coef},
        rewards={"format_weight": config.format_weight},
        optim=OptimConfig(
            lr=config.lr,
            warmup=10,
            final_lr=1.0,
            weight_decay=0.0,
            eps=1e-8,
            moments=config.moments,
        ),
        micro_tokens=config.micro_tokens,
        lora=config.lora,
        recompute=config.recompute,
        ref_offload=config.ref_offload,
        save_every=config.save_every,
        seed=config.seed,
        device=config.device,
        wandb=config.wandb,
        **compute_flags_of(config),
    )


def compute_flags_of(config: OpenModelConfig) -> dict:
    """The flags that say what the models compute in."""
    return {field.name: getattr(config, field.name) for field in fields(ComputeFlags)}


def stages_of(config: OpenModelConfig) -> Iterator[GRPOConfig]:
    """GRPO, and the control if there is one."""
    yield stage_config(config, "rl", "none")
    if config.control != "none":
        yield stage_config(config, "control", config.control)


# ---- what is known before it runs ----


def setup_of_recipe(config: OpenModelConfig) -> Setup:
    """What decides the memory of GRPO as the recipe has it, on a GPU."""
    facts = config.facts
    dtype = DTYPES.get(config.dtype, torch.bfloat16)  # auto, on a GPU that has bf16
    of_policy = Setup(
        model=SHAPES[facts.shape],
        dtype=dtype,
        fp32_head=config.fp32_head,
        lora=config.lora,
        recompute=config.recompute,
    )
    policy = model_without_memory(of_policy)
    longest = facts.prompt_tokens + config.max_new_tokens
    return replace(setup_of_run(stage_config(config, "rl", "none"), policy, longest), on_gpu=True)


def predicted(config: OpenModelConfig) -> str:
    """The memory that GRPO is predicted to take; nobody has measured it yet on a GPU."""
    setup = setup_of_recipe(config)
    # With a cache for all answers at one time, and on the smallest card, which has one for two.
    peak, card = predict(setup).peak, smallest_card(setup)
    words = f"{gib(peak)} GiB; the smallest card has {gib_needed(card)} GiB"
    if config.lora.rank:
        return words
    least = smallest_card(setup_of_recipe(replace(config, **SMALLEST)))
    return f"{words}, or {gib_needed(least)} GiB with --lora.rank {LORA_RANK} --recompute"


def in_words(config: OpenModelConfig) -> str:
    """The facts of a recipe and its memory with these flags, one below the other."""
    facts = config.facts
    rows = [
        ("base", f"{facts.model} ({facts.model_license})"),
        ("problems", f"{facts.problems} ({facts.data_license})"),
        ("settings", facts.settings),
        ("published", facts.expected),
        ("memory", f"predicted: {predicted(config)}"),
    ]
    lines = [f"{name:<10} {text}" for name, text in rows]
    return "\n".join([*lines, "fetch", *(f"  {command}" for command in facts.all_commands)])


# ---- what is measured ----


class Results(PartResults):
    """results.json: what was measured of the base and of each stage, and the seconds."""

    def __init__(self, config: OpenModelConfig):
        super().__init__(Path(config.run), {"measured": {}})
        self.values |= {"config": asdict(config), "machine": describe_machine()}
        self.values["published"] = config.facts.expected

    @property
    def measured(self) -> dict[str, dict]:
        return self.values["measured"]

    def is_measured(self, name: str, config: OpenModelConfig) -> bool:
        """Whether this model was measured with these flags and files."""
        return self.measured.get(name, {}).get("measured_with") == measured_with(config, name)

    def keep(self, name: str, config: OpenModelConfig, found: dict) -> None:
        """Note what was measured of a model."""
        self.measured[name] = {"measured_with": measured_with(config, name), **found}
        self.write()


def measured_with(config: OpenModelConfig, name: str) -> dict:
    """What a measurement depends on, as JSON types: flags, and the files of problems and base."""
    names = ("eval_problems", "eval_samples", "eval_temperature", "seed")
    depends: dict = {flag: getattr(config, flag) for flag in names} | compute_flags_of(config)
    depends["max_new_tokens"] = config.eval_max_new_tokens or config.max_new_tokens
    depends["task"] = json.loads(json.dumps(asdict(config.task_flags())))
    paths = [config.base, *(path for path in config.task_flags().files if not is_on_hub(path))]
    depends["files"] = {path: stamps_of(Path(path)) for path in paths}
    # How far a stage was trained; the base is the same for any number of steps.
    depends["steps"] = 0 if name == "base" else config.steps
    return depends


def stamps_of(path: Path) -> list:
    """The name, size and time of a file, or of each file directly in a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def is_on_hub(path: str) -> bool:
    """Whether a file of problems is a data set of the Hugging Face hub."""
    return path.startswith(hub.PREFIX)


def measure(config: OpenModelConfig, name: str, folder: str) -> dict:
    """Held-out accuracy of the model in a folder, as JSON types.

    The answers go to eval_<name>.jsonl.
    """
    device = pick_device(config.device)
    model, tokenizer, _ = load_model(folder, device, precision=config.precision(device))
    task = config.task_flags().make()
    size = task.size("test")  # None: as many as are asked for
    n_problems = config.eval_problems if size is None else min(size, config.eval_problems)
    sampler = ModelSampler(
        model,
        tokenizer,
        config.eval_max_new_tokens or config.max_new_tokens,
        config.eval_temperature,
        config.seed,
        cut_prompts=True,
        chat=config.chat,
    )
    problems = task.problems("test", n_problems)
    # Before the first answer is sampled: prompts that cannot be encoded, or leave no room to train.
    sampler.check([task.prompt(problem) for problem in problems])
    check_room(stage_config(config, "rl", "none"), task, model, tokenizer)
    ks = sorted({1, config.eval_samples})
    out = Path(config.run) / f"eval_{name}.jsonl"
    return evaluate(sampler, task, problems, config.eval_samples, ks, out).to_dict()


TITLES = {"base": "base", "rl": "GRPO", "control": "control"}


def table(measured: dict[str, dict]) -> str:
    """A row per model: how often it is right, its form, its length, and how often it is cut off."""
    rows = [("held-out problems", "right [95 %]", "well formed", "tokens")]
    for name, title in TITLES.items():
        if name not in measured:
            continue
        found = measured[name]
        low, high = found["accuracy_95"]
        right = f"{found['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
        rows.append((title, right, f"{found['format_rate']:.1%}", f"{found['mean_tokens']:.0f}"))
    return "\n".join(f"{a:<18}{b:>24}{c:>14}{d:>9}" for a, b, c, d in rows)


# ---- the whole ----


def open_model(config: OpenModelConfig) -> Path | None:
    """Run every stage that is not done yet; returns the path of results.json.

    Raises ValueError if the folder already holds a recipe and --resume was not given, or one that
    was made with other flags, and for files that are missing; Stopped after Ctrl-C.
    """
    show(in_words(config))
    show(f"options    {' '.join(config.task_flags().options)}")
    if config.explain:
        return None
    if not config.base:
        raise ValueError("--base must be given: the folder of the model")
    reuse_memory()
    folder = Path(config.run)
    check_not_begun(folder, config.resume)
    # 1. What can be refused is refused before anything is written.
    pick_device(config.device)
    check_data(config)
    for stage in stages_of(config):
        check_part(stage)
    results = Results(config)

    def measured(name: str, model_folder: str) -> None:
        if not results.is_measured(name, config):
            started = time.perf_counter()
            results.keep(name, config, measure(config, name, model_folder))
            results.add_seconds(f"measuring {name}", time.perf_counter() - started)
        show(table(results.measured))

    # 2. The base, as it comes.
    measured("base", config.base)
    # 3. GRPO, and the same number of steps on rewards that say nothing.
    for stage in stages_of(config):
        name = Path(stage.run).name
        results.add_seconds(name, run_part(grpo, stage))
        measured(name, stage.run)
    # 4. What others have found, beside what was measured here.
    show(f"published: {config.facts.expected}\n{results.path}")
    return results.path


def check_data(config: OpenModelConfig) -> None:
    """Raise ValueError, with the commands that fetch it, for a model or a file that is missing."""
    files = [path for path in (config.data, config.test) if path is not None]
    needed = [config.base, *(path for path in files if not is_on_hub(path))]
    missing = [path for path in needed if not Path(path).exists()]
    if missing:
        commands = "; ".join(config.facts.all_commands)
        raise ValueError(f"{', '.join(missing)} not found here; fetch what is needed: {commands}")
    config.task_flags().make()
    if is_huggingface(config.base):
        found = count_parameters(read_config(config.base))
        expected = config.facts.parameters
        if found != expected:
            say(
                f"{config.base} has {found:,} parameters, and {config.facts.model} has "
                f"{expected:,}: it is another model, so what is said to be published, and the "
                "memory, are not for it"
            )
