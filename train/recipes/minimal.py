"""The smallest whole loop, for a class: text -> pretraining -> fine-tuning -> GRPO, with probes.

    r1zero recipe minimal                    all of it; minimal.md is the page to read beside it
    r1zero recipe minimal --sft-steps 0      GRPO straight on the base
    r1zero recipe minimal --control random   and once more, with rewards that say nothing

1. Make two texts (minimal_text.py): facts and sums to pretrain on, questions and answers to
   fine-tune on.
2. Pretrain a model of 0.4 million parameters from random weights: it learns to continue a text.
3. Fine-tune it on the questions: it learns to answer between tags.
4. GRPO on the sums, with the two rule rewards: it learns which way to an answer pays.

Before the first stage and after each, the same three prompts are put to the model, and the same
held-out sums are measured. Every stage is a run of its own (pretrain.py, sft.py, grpo.py) in a
folder of its own, so Ctrl-C and --resume work throughout.

Left out: a report, which the demo has.
"""

import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...eval.console import show
from ...eval.harness import evaluate
from ...eval.sampler import ModelSampler
from ...model.checkpoint import checkpoint_steps, load_model
from ...model.config import preset
from ...model.files import atomic_write_text
from ...model.optimizer import OptimConfig
from ...model.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ...rl.family import rl_optim
from ...rl.rewards import RewardConfig, check_no_model, check_parts
from ..grpo import GRPOConfig, grpo, grpo_config
from ..machine import describe_machine, pick_device, reuse_memory
from ..pretrain import PretrainConfig, pretrain
from ..run import at_least
from ..sft import SFTConfig, sft
from ..task_flags import TaskFlags
from .minimal_text import FACTS, HELD_OUT, N_NUMBERS, make_task, pairs_file, question, words
from .parts import PartResults, Stage, check_not_begun, check_part, run_stage

N_PAIRS = 6000  # examples of fine-tuning
MAX_NEW_TOKENS = 48
PROBES = ("The capital of France is", "What is the capital of France?", "7+5+8+3=")


@dataclass(frozen=True, kw_only=True)
class MinimalConfig:
    """The smallest whole loop: text, pretraining, fine-tuning, GRPO."""

    run: str = "runs/minimal"
    """Folder of the recipe."""
    resume: bool = False
    """Continue a recipe that was stopped."""
    seed: int = 0
    """Seed of the texts, the weights and the sampling."""
    model: str = "depth=3"
    """Size of the model: a preset or depth=N."""
    documents: int = 60_000
    """Number of documents in the pretraining text."""
    pretrain_steps: int = 600
    """Number of pretraining steps, of 2,048 tokens each."""
    sft_steps: int = 300
    """Number of fine-tuning steps, of 1,024 tokens each; 0 leaves the stage out."""
    rl_steps: int = 30
    """Number of GRPO steps, of 16 sums x 16 answers each."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    control: str = "none"
    """Run GRPO once more, with rewards that say nothing: permute or random, as r1zero grpo --help
    explains; none leaves it out."""
    eval_problems: int = 256
    """Number of held-out sums to measure on, with one answer each."""
    device: str = "auto"
    """Device to compute on: auto (the GPU if there is one), cpu, cuda or mps."""

    def __post_init__(self):
        at_least(self, 1, "documents", "pretrain_steps", "rl_steps", "eval_problems")
        at_least(self, 0, "sft_steps", "seed")
        # What only a later stage would refuse is refused now, not after the text is made.
        preset(self.model, vocab_size=1)
        check_parts(make_task(self.seed), self.rewards)
        check_no_model(self.rewards, "recipe minimal")
        rl_config(self, Path(self.run), self.control)


# ---- the stages: each is an ordinary run ----


def base_config(config: MinimalConfig, folder: Path) -> PretrainConfig:
    """Pretraining from random weights, on facts and sums."""
    return PretrainConfig(
        run=str(folder / "base"),
        data=("minimal",),
        documents=config.documents,
        model=config.model,
        steps=config.pretrain_steps,
        save_every=100,
        optim=OptimConfig(lr=6e-3),
        seed=config.seed,
        device=config.device,
    )


def sft_config(config: MinimalConfig, folder: Path) -> SFTConfig:
    """Fine-tuning of the base on questions and answers."""
    return SFTConfig(
        run=str(folder / "sft"),
        base=str(folder / "base"),
        data=str(folder / "pairs.jsonl"),
        steps=config.sft_steps,
        optim=OptimConfig(lr=2e-3, warmup=10, weight_decay=0.0),
        seed=config.seed,
        device=config.device,
    )


def rl_config(config: MinimalConfig, folder: Path, control: str = "none") -> GRPOConfig:
    """GRPO on the sums, on the fine-tuned model, or on the base if that stage is left out."""
    options = ("ops=+", "digits=1", f"n_operands={N_NUMBERS}", f"seed={config.seed}")
    return grpo_config(
        "grpo",
        run=str(folder / ("rl" if control == "none" else "control")),
        base=str(folder / ("sft" if config.sft_steps else "base")),
        task=TaskFlags(name="arithmetic", options=options),
        steps=config.rl_steps,
        save_every=10,
        max_new_tokens=MAX_NEW_TOKENS,
        micro_tokens=8192,
        rewards=config.rewards,
        control=control,
        optim=rl_optim(4e-4),
        seed=config.seed,
        device=config.device,
    )


def stages_of(config: MinimalConfig, folder: Path) -> list[Stage]:
    """The stages in order."""
    stages = [Stage("base", pretrain, base_config(config, folder))]
    if config.sft_steps:
        stages.append(Stage("sft", sft, sft_config(config, folder)))
    stages.append(Stage("rl", grpo, rl_config(config, folder)))
    if config.control != "none":
        stages.append(Stage("control", grpo, rl_config(config, folder, config.control)))
    return stages


# ---- what a model says, and how often it is right ----


TITLES = {
    "random": "random weights",
    "base": "after pretraining",
    "sft": "after fine-tuning",
    "rl": "after GRPO",
    "control": "after the control",
}


def random_model(config: MinimalConfig) -> tuple[Transformer, Tokenizer]:
    """The model that pretraining begins with."""
    tokenizer = Tokenizer.from_words(words())
    model = Transformer(preset(config.model, tokenizer.vocab_size)).init_weights(config.seed)
    return model.to(pick_device(config.device)), tokenizer


def ask(model: Transformer, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """The model's own answer to each prompt, always with the most likely token."""
    sampler = ModelSampler(model, tokenizer, MAX_NEW_TOKENS, temperature=0.0)
    return [sampled.text for [sampled] in sampler(prompts, 1)]


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def measure(
    config: MinimalConfig, folder: Path, name: str, model: Transformer, tokenizer: Tokenizer
) -> dict:
    """What the model of a stage says to the probes, and how often it is right, as JSON types.

    Its answers to the held-out sums, at temperature 1, go to eval_<name>.jsonl.
    """
    # The probes, and the capitals that fine-tuning never asks about.
    probes = dict(zip(PROBES, ask(model, tokenizer, list(PROBES)), strict=True))
    said = ask(model, tokenizer, [question("capital", country) for country in HELD_OUT])
    capitals = [FACTS["capital"][country] for country in HELD_OUT]
    knows = [f"<answer>{city}</answer>" in text for city, text in zip(capitals, said, strict=True)]

    # The held-out sums, by the grader, which reads nothing but the answer block.
    task = make_task(config.seed)
    problems = task.problems("test", config.eval_problems)
    sampler = ModelSampler(model, tokenizer, MAX_NEW_TOKENS, seed=config.seed)
    out = folder / f"eval_{name}.jsonl"
    result = evaluate(sampler, task, problems, out=out, progress=False)

    # And by the last number, wherever it stands; and whether there is a step before it.
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    responses = [row["response"] for row in rows]
    numbers = [(re.findall(r"\d+", response) or [""])[-1] for response in responses]
    last_right = [
        number == str(problem.answer) for number, problem in zip(numbers, problems, strict=True)
    ]
    return {
        "probes": probes,
        "eval": result.to_dict(),
        "last_number": share(last_right),
        "worked_out": share(["+" in response for response in responses]),
        "capitals": share(knows),
    }


# ---- what is shown ----


def probes_in_words(title: str, probes: dict[str, str]) -> str:
    """The prompts and the model's own answers, one per line."""
    lines = [f"  {prompt}  ->  {answer!r}" for prompt, answer in probes.items()]
    return "\n".join([f"--- {title} ---", *lines])


COLUMNS = ("right [95 %]", "last number", "well formed", "worked out", "tokens", "capitals")


def table(measured: dict[str, dict]) -> str:
    """A row per stage: what was measured of it."""
    rows = [("held-out sums", *COLUMNS)]
    for name, title in TITLES.items():
        if name not in measured:
            continue
        found, result = measured[name], measured[name]["eval"]
        low, high = result["accuracy_95"]
        rows.append(
            (
                title,
                f"{result['accuracy']:.0%} [{low:.0%}, {high:.0%}]",
                f"{found['last_number']:.0%}",
                f"{result['format_rate']:.0%}",
                f"{found['worked_out']:.0%}",
                f"{result['mean_tokens']:.1f}",
                f"{found['capitals']:.0%}",
            )
        )
    return "\n".join(f"{row[0]:<18}" + "".join(f"{cell:>16}" for cell in row[1:]) for row in rows)


# ---- the whole ----


def check_stages(config: MinimalConfig, folder: Path) -> None:
    """Raise ValueError or CheckpointError unless the stages that were begun have these flags."""
    for stage in stages_of(config, folder):
        check_part(stage.config)

    # More steps are no fault of a stage's own, but the stages behind it began from what it was.
    path = folder / "results.json"
    if not path.exists():
        return
    then = json.loads(path.read_text(encoding="utf-8"))["config"]
    behind = {"pretrain_steps": ("sft", "rl"), "sft_steps": ("rl",)}
    for name, later in behind.items():
        now, was = getattr(config, name), then.get(name, getattr(config, name))
        if now != was and any(checkpoint_steps(folder / stage) for stage in later):
            raise ValueError(
                f"--{name.replace('_', '-')} is {now}, but later stages in {folder} began after "
                f"{was}; give {was}, or another --run"
            )


class Results(PartResults):
    """Those of each stage, with the configuration and the machine."""

    def __init__(self, folder: Path, config: MinimalConfig):
        super().__init__(folder, {"stages": {}})
        self.values |= {"config": asdict(config), "machine": describe_machine()}

    @property
    def stages(self) -> dict[str, dict]:
        return self.values["stages"]

    def is_measured(self, name: str, steps: int) -> bool:
        """Whether a stage was measured at this number of steps, on as many sums as now."""
        found = self.stages.get(name)
        if not found or found["steps"] != steps:
            return False
        return found["eval"]["n_problems"] == self.values["config"]["eval_problems"]

    def keep(self, name: str, steps: int, found: dict) -> None:
        """Note what was measured of a stage."""
        self.stages[name] = {"steps": steps, **found}
        self.write()


def minimal(config: MinimalConfig) -> Path:
    """Run every stage that is not done yet; returns the path of results.json.

    Raises ValueError if the folder already holds a recipe and --resume was not given, or one that
    was made with other flags, and Stopped after Ctrl-C.
    """
    reuse_memory()
    folder = Path(config.run)
    check_not_begun(folder, config.resume)
    # Nothing is written before it is known that this device and these flags will do.
    pick_device(config.device)
    check_stages(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder, config)
    started = time.perf_counter()

    def probe(name: str, steps: int, model: Transformer, tokenizer: Tokenizer) -> None:
        if not results.is_measured(name, steps):
            results.keep(name, steps, measure(config, folder, name, model, tokenizer))
        show(probes_in_words(TITLES[name], results.stages[name]["probes"]))

    # 1. The texts, and the model before anything is learned.
    atomic_write_text(folder / "pairs.jsonl", pairs_file(N_PAIRS, config.seed))
    probe("random", 0, *random_model(config))

    # 2. to 4. Each stage goes on from the one before; the control begins where GRPO began.
    for stage in stages_of(config, folder):
        results.add_seconds(stage.name, run_stage(stage))
        model, tokenizer, _ = load_model(stage.config.run, pick_device(config.device))
        probe(stage.name, stage.config.steps, model, tokenizer)

    # What each stage has added. It stands in results.json already.
    seconds = time.perf_counter() - started
    show(f"\n{table(results.stages)}\n\n{results.path}   ({seconds:.0f} seconds)")
    return results.path
