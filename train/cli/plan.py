"""Does it fit my card? Predicts memory by part, time and cost of a GRPO run, and chooses settings.

    r1zero plan                                     the models of the recipes, by card
    r1zero plan --base models/Qwen2.5-0.5B --memory 24
    r1zero plan --model qwen2.5-1.5b --gpu rtx-4090 --price 0.4 --steps 500
    r1zero plan --run runs/rl                       what was predicted, beside what was measured

Nothing is loaded: config.json says the shape. What is predicted of memory is held against what
PyTorch allocates (benchmarks/memory_predicted.py); what is predicted of time comes from published
numbers.

A plan is for GPUs: in 16 bit a CPU keeps copies in fp32, which take more.

Left out: SFT and pretraining, whose batches are smaller; PPO's critic.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ...eval.console import show
from ...model.checkpoint import load_checkpoint
from ...model.config import ModelConfig, preset
from ...model.huggingface import is_huggingface, read_config
from ...model.lora import LoRAConfig
from ...model.memory import Setup
from ...model.peft_folder import folder_of_base, is_peft
from ...model.precision import DTYPES
from ...model.transformer import count_active_parameters, count_parameters
from ..memory_check import rows_of
from ..planning import (
    CARDS,
    GIB,
    MEMORIES,
    SHAPES,
    Card,
    Choice,
    Work,
    choose,
    gib,
    gib_needed,
    parts_in_words,
    seconds_per_step,
    setting_in_words,
    smallest,
    smallest_full,
)
from ..run import at_least, read_record

VOCABULARY = 151_936  # of a preset: Qwen's
BY_NAME = {name.lower(): shape for name, shape in SHAPES.items()}
LEAST_MEMORY = 1.0  # GiB; the driver alone takes most of it


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Predict memory, time and cost of a GRPO run, and choose settings that fit a card."""

    base: str = ""
    """Folder of the model to train: an open model, or a run."""
    model: str = ""
    """Name of a preset to plan for instead, with Qwen's vocabulary, such as depth=12, or of a
    recipe's model, such as qwen2.5-3b."""
    run: str = ""
    """Folder of a run, to see what was predicted of it and what was measured."""
    gpu: str = ""
    """Name of a card, for its memory and for the time: rtx-4090, a100, h200, ..."""
    memory: float | None = None
    """Memory of the card in GiB; without it, that of --gpu, or a table of several."""
    price: float = 0.0
    """Price of the card per hour, for the cost."""
    steps: int = 500
    """Number of steps, for the cost."""
    prompts_per_step: int = 16
    """Number of problems per step."""
    group_size: int = 16
    """Number of answers sampled per problem."""
    prompt_tokens: int = 256
    """Number of tokens of a prompt."""
    max_new_tokens: int = 1024
    """Maximum number of new tokens per answer."""
    dtype: str = "bf16"
    """Dtype to compute in: fp32, bf16 or fp16."""
    lora_rank: Annotated[int, tyro.conf.arg(name="lora.rank")] = 0
    """Rank of LoRA; 0 takes it only where all weights do not fit."""
    kl: bool = True
    """Plan for a reference, which the KL is measured to."""
    judges: int = 0
    """Number of models as large as the policy that judge its answers: a reward model, a process
    reward."""

    def __post_init__(self):
        at_least(self, 1, "steps", "prompts_per_step", "group_size", "prompt_tokens")
        at_least(self, 1, "max_new_tokens")
        at_least(self, 0, "price", "judges")
        LoRAConfig(self.lora_rank)  # checks the rank
        if self.memory is not None:
            at_least(self, 0, "memory")
        given = [f"--{name}" for name in ("base", "model", "run") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} were given; give one: the folder of a model, the name of a "
                "preset, or the folder of a run to look back at"
            )
        if self.run and (self.memory is not None or self.gpu):
            raise ValueError(
                "--run shows what was predicted of that run and measured, on no other card; leave "
                "out --memory and --gpu, or give --base instead of --run"
            )
        if not given and (self.memory is not None or self.gpu):
            raise ValueError(
                "--memory and --gpu need a model; give --base DIR or --model NAME. Without a flag "
                "the plan is a table of the recipes' models"
            )
        if self.gpu and self.gpu not in CARDS:
            raise ValueError(f"--gpu is {self.gpu!r}, expected one of {', '.join(CARDS)}")
        if self.price and not self.gpu:
            raise ValueError("--price needs --gpu, whose speed says how many hours a run takes")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")


def shape_of(config: PlanConfig) -> ModelConfig:
    """The shape of the model to plan for. Raises ValueError for a folder that holds none."""
    if config.model.lower() in BY_NAME:
        return BY_NAME[config.model.lower()]
    if config.model:
        try:
            return preset(config.model, VOCABULARY)
        except ValueError as error:
            raise ValueError(f"{error}; of the recipes' models {', '.join(BY_NAME)}") from None
    base = folder_of_base(config.base) if is_peft(config.base) else config.base
    if is_huggingface(base):
        return read_config(base)
    state = load_checkpoint(base, groups=()).state
    if "model_config" not in state:
        raise ValueError(f"{config.base} holds no model; give the folder of one")
    return ModelConfig(**state["model_config"])


def setup_of(config: PlanConfig, shape: ModelConfig, name: str = "the model") -> Setup:
    """What decides the memory, as the flags say it. Raises ValueError for what has no room."""
    longest = config.prompt_tokens + config.max_new_tokens
    if longest > shape.max_seq_len:
        raise ValueError(
            f"--prompt-tokens {config.prompt_tokens} and --max-new-tokens {config.max_new_tokens} "
            f"are {longest} tokens, and {name} has room for {shape.max_seq_len}; give fewer"
        )
    return Setup(
        model=shape,
        rows=rows_of(config.prompts_per_step, config.group_size),
        longest=longest,
        dtype=DTYPES[config.dtype],
        lora=LoRAConfig(config.lora_rank),
        reference="device" if config.kl else "none",
        judges=config.judges * (shape,),
    )


def plan(config: PlanConfig) -> None:
    """Print the plan. Raises ValueError where nothing would fit."""
    if config.run:
        show("\n".join(look_back(Path(config.run))))
        return
    if not (config.base or config.model):
        show("\n".join(table_of_recipes(config)))
        return
    shape = shape_of(config)
    setup = setup_of(config, shape)
    active = ""
    if shape.moe:
        active = f", {count_active_parameters(shape):,} of them active per token"
    card = CARDS.get(config.gpu)
    memory = config.memory
    if memory is None and card:
        memory = card.memory
    lines = table_of(setup) if memory is None else plan_for(config, setup, memory, card)
    show(f"{count_parameters(shape):,} parameters{active}; all that follows is predicted")
    show("\n".join(lines))


def plan_for(config: PlanConfig, setup: Setup, memory: float, card: Card | None) -> list[str]:
    """The plan for one card, in lines. Raises ValueError where nothing fits."""
    choice = choose(setup, memory * GIB) if memory >= LEAST_MEMORY else None
    if choice is None:
        least, needed = smallest(setup)
        more = gib_needed(needed - memory * GIB)
        raise ValueError(
            f"it does not fit {memory:g} GiB at any setting; the least is {setting_in_words(least)}"
            f", which needs a card of {gib_needed(needed)} GiB, {more} more. Fewer "
            "--max-new-tokens or a smaller model need less"
        )
    sizes = (
        f"--prompts-per-step {config.prompts_per_step} --group-size {config.group_size} "
        f"--max-new-tokens {config.max_new_tokens} --dtype {config.dtype}"
    )
    lines = [f"{memory:g} GiB: {setting_in_words(choice.setup)}", f"  {sizes} {choice.flags}"]
    lines += parts_in_words(choice.predicted)
    lines.append(f"  {choice.rows} of {setup.rows} answers are sampled at one time")
    if choice.setup.lora.rank and not config.lora_rank:
        full = gib_needed(smallest_full(setup))
        lines.append(f"  all weights fit from {full} GiB on, with two answers at one time")
    if card:
        lines += time_in_words(config, choice, card)
    return lines


def time_in_words(config: PlanConfig, choice: Choice, card: Card) -> list[str]:
    """What a step and the run take, if all answers are as long as they may be."""
    answers = config.prompts_per_step * config.group_size
    work = Work(answers, config.prompt_tokens, config.max_new_tokens, config.kl)
    sampling, update = seconds_per_step(choice, work, card)
    hours = (sampling + update) * config.steps / 3600
    cost = f", {hours * config.price:.2f} at {config.price:g} per hour" if config.price else ""
    return [
        f"  a step: about {sampling + update:.0f} s ({sampling:.0f} sampling, {update:.0f} update),"
        f" if all answers are {config.max_new_tokens} tokens long",
        f"  {config.steps} steps: about {hours:.1f} hours{cost}",
    ]


def table_of(setup: Setup) -> list[str]:
    """What fits which card: a row for each memory, as Markdown."""
    lines = [
        "| card | settings | micro-batch | answers at one time | peak |",
        "|---|---|---|---|---|",
    ]
    for memory in MEMORIES:
        choice = choose(setup, memory * GIB)
        if choice is None:
            _, needed = smallest(setup)
            lines.append(f"| {memory} GiB | does not fit: needs {gib_needed(needed)} GiB | | | |")
            continue
        predicted = choice.predicted
        lines.append(
            f"| {memory} GiB | {setting_in_words(choice.setup)} | {choice.setup.micro_tokens:,} "
            f"tokens | {choice.rows} | {gib(predicted.peak)} GiB |"
        )
    return lines


def table_of_recipes(config: PlanConfig) -> list[str]:
    """What of each recipe's model fits which card: a row per model, as Markdown."""
    head = ["model", "parameters", *(f"{memory} GiB" for memory in MEMORIES)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, shape in SHAPES.items():
        setup = setup_of(config, shape, name)
        choices = [choose(setup, memory * GIB) for memory in MEMORIES]
        cells = ["–" if choice is None else setting_in_words(choice.setup) for choice in choices]
        lines.append(f"| {name} | {count_parameters(shape) / 1e9:.2f} B | {' | '.join(cells)} |")
    return lines


def look_back(folder: Path) -> list[str]:
    """What a run's record says was predicted and measured."""
    if not folder.is_dir():
        raise ValueError(f"--run {folder} does not exist; give the folder of a run")
    record = read_record(folder / "run.json")
    memory = record.get("memory")
    if not isinstance(memory, dict) or not isinstance(memory.get("predicted"), dict):
        raise ValueError(
            f"{folder} keeps no plan; runs of r1zero grpo do, since they predict their memory"
        )
    parts = {name: size for name, size in memory["predicted"].items() if size}
    lines = [f"  {name:<28} {size / GIB:8.3f} GiB" for name, size in parts.items()]
    measured = memory.get("measured")
    if measured is None:
        return ["predicted, of tensors:", *lines, "measured: not yet, the run has not ended"]
    what = "the process, with Python and its libraries"
    if memory.get("device") == "cuda":
        what = "PyTorch's tensors"
    return ["predicted, of tensors:", *lines, f"measured peak of {what}: {measured / GIB:.3f} GiB"]
