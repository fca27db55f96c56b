"""From R1-Zero to R1, at toy scale: the whole road of DeepSeek-R1, with a control for each claim.

    r1zero r1                        every stage and every control, with a report
    r1zero r1 --no-controls          the road alone
    r1zero r1 --break                also ask too much of the reward model, to see it hacked

The model thinks about Countdown puzzles in one of two languages, and answers plain requests
(eval/tasks/assistant.py). Its pretraining text mixes the languages (r1_corpus.py).

    base        pretraining                                             DeepSeek-V3-Base
    zero        RL on the base: is it right, is it well formed?         R1-Zero
    cold        SFT on long, right, consistent answers of zero          Dev1: the cold start
    reasoning   RL with a third reward, for a consistent language       Dev2
    tuned       SFT *from the base* on right answers of `reasoning`,    Dev3: rejection sampling
                3 : 1 with general data
    reward      reward model, by rankings of answers of `tuned`
    r1          RL for all scenarios: rules for puzzles, the reward     R1
                model for requests, and that in the last quarter alone

Each stage is an ordinary run (`r1zero pretrain`, `grpo`, `collect`, `sft`, `reward-model`) in a
folder of its own, so Ctrl-C and --resume work throughout. r1_measure.py measures each.

Source: DeepSeek-R1, arXiv 2501.12948 v2, sections 2 and 3, appendices B.3 and B.4. Left out:
DeepSeek-V3 as a second writer of the cold start's thoughts, and a reward for harmlessness.
"""

import math
import time
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Annotated

import tyro

from ...eval.console import show
from ...eval.result_file import partial_path, summary_path
from ...eval.tasks.countdown import Countdown
from ...model.chat_template import encode_prompts
from ...model.checkpoint import load_model
from ...model.config import preset
from ...model.files import atomic_write_text
from ...model.optimizer import OptimConfig
from ...model.tokenizer import Tokenizer
from ...rl.rewards import RewardConfig
from ..collect import CollectConfig, collect
from ..grpo import grpo, grpo_config
from ..machine import describe_machine, pick_device, reuse_memory
from ..pretrain import PretrainConfig, pretrain
from ..report.metrics import share_with_interval
from ..report.r1_page import write_report
from ..report.record import dig, read_dict
from ..reward_model import RewardModelConfig, reward_model
from ..run import at_least
from ..sft import SFTConfig, sft
from ..task_flags import TaskFlags
from .parts import (
    PartResults,
    Stage,
    answers_path,
    check_not_begun,
    check_part,
    check_room,
    check_size,
    enough_to_split,
    has_answers,
    run_stage,
)
from .r1_corpus import AuthorsConfig, general_pairs, words
from .r1_measure import held_out_tasks, measure, reached, sample_held_out, win_rate, write_samples

REWARD_MODEL_FROM = 0.75  # share of the last RL's steps before requests and their reward model
# Of the last RL, a quarter of that of the others: there is little left to learn for puzzles. Chosen
# on test problems that the recipe does not measure on: puzzles lost a point at 4e-4 and at 2e-4,
# and gained one at 1e-4; of the answers to requests 62 % are preferred at 2e-4, and 57 % at 1e-4.
LAST_LEARNING_RATE = 1e-4
LEAST_ALL_STEPS = 4  # of the last RL: with fewer, no step has the reward model
GENERAL_PAIRS = 2000  # lines of general data for SFT
HIDDEN_PREFERENCE = "r1zero.train.recipes.r1_corpus:preferences"
MEASURED = ("base", "zero", "cold", "reasoning", "tuned", "r1")
REINFORCED = ("zero", "reasoning", "no_language", "no_cold", "r1", "hacked")
CONTROLS = ("no_language", "no_cold", "alone", "hacked")


@dataclass(frozen=True, kw_only=True)
class R1Config:
    """From R1-Zero to R1: cold start, reasoning, rejection sampling, all scenarios."""

    run: str = "runs/r1"
    """Folder of the recipe."""
    resume: bool = False
    """Continue a recipe that was stopped."""
    seed: int = 0
    """Seed of the texts, the weights and the sampling."""
    numbers: int = 3
    """Number of numbers in a puzzle."""
    high: int = 20
    """Largest number in a problem."""
    ops: str = "+-"
    """Operations that a puzzle may need, of + - * and /."""
    authors: AuthorsConfig = field(default_factory=AuthorsConfig)
    documents: int = 60_000
    """Number of documents in the pretraining text."""
    model: str = "demo"
    """Size of the model: a preset or depth=N."""
    pretrain_steps: int = 2000
    """Number of pretraining steps, of 2,048 tokens each."""
    zero_steps: int = 30
    """Number of steps of R1-Zero."""
    cold_steps: int = 80
    """Number of steps of the cold start, of 1,024 tokens each."""
    reasoning_steps: int = 30
    """Number of steps of the first reinforcement learning, with the reward for the language."""
    tuned_steps: int = 120
    """Number of steps of SFT on chosen answers and general data, of 2,048 tokens each."""
    reward_steps: int = 60
    """Number of steps of the reward model, of 16 rankings each."""
    all_steps: int = 40
    """Number of steps of the last reinforcement learning, on all kinds of problems."""
    max_new_tokens: int = 192
    """Maximum number of new tokens per answer."""
    language_weight: float = 0.5
    """Weight of the reward for a consistent language."""
    model_weight: float = 0.5
    """Weight of the reward model's score."""
    collect_problems: int = 512
    """Number of problems whose answers are sampled for the rankings; twice as many are for the cold
    start and for rejection sampling."""
    keep: tuple[str, ...] = ("right", "formed")
    """What an answer must be to be kept as data for SFT; r1zero collect --help lists the words."""
    eval_problems: int = 200
    """Number of held-out problems of each kind to measure on."""
    eval_samples: int = 4
    """Number of answers per held-out problem, at temperature 1."""
    controls: bool = True
    """Run what each claim is compared with: no reward for the language, no cold start, and SFT
    without general data."""
    hack: Annotated[bool, tyro.conf.arg(name="break")] = False
    """Also ask the reward model in every step, and four times as long, to see it hacked."""
    price: float = 0.0
    """Price of the machine per hour, for the table of costs."""
    device: str = "auto"
    """Device to compute on: auto (the GPU if there is one), cpu, cuda or mps."""

    def __post_init__(self):
        at_least(self, 1, "documents", "pretrain_steps", "zero_steps", "cold_steps")
        at_least(self, 1, "reasoning_steps", "tuned_steps", "reward_steps")
        at_least(self, LEAST_ALL_STEPS, "all_steps")
        at_least(self, 1, "collect_problems", "eval_problems", "eval_samples")
        at_least(self, 0, "seed", "price")
        # What only a later stage would refuse is refused now, not after the text is made.
        preset(self.model, vocab_size=1)
        check_problems(self)
        stages_of(self, Path(self.run))


# ---- what is refused before anything is made ----


def check_problems(config: R1Config) -> None:
    """Raise ValueError if there are fewer problems than are asked for, or no room for answers."""
    # 1. Held-out problems: enough of each kind, and room for an answer beside the longest.
    tasks = held_out_tasks(config.numbers, config.high, config.ops)
    prompts = []
    for task in tasks.values():
        check_size(f"--eval-problems {config.eval_problems}", config.eval_problems, task, "test")
        problems = task.problems("test", config.eval_problems)
        prompts += [task.prompt(problem) for problem in problems]
    tokenizer = Tokenizer.from_words(words(tasks["requests"]))
    longest = max(map(len, encode_prompts(tokenizer, prompts, chat=False)))
    room = preset(config.model, vocab_size=1).max_seq_len - longest
    check_room(config.max_new_tokens, room, f"--model {config.model}")

    # 2. Problems to collect answers to.
    n = config.collect_problems
    puzzles = task_of(config, "puzzles").make()
    check_size(f"--collect-problems {n}, twice for puzzles,", 2 * n, puzzles, "train")

    # 3. Requests to rank: the reward model holds some of them out.
    task = task_of(config, "requests").make()
    asked = (task.prompt(task.problem("train", index)) for index in count())
    enough = enough_to_split(asked, reward_config(config, Path()).held_out)
    if n < enough:
        raise ValueError(
            f"--collect-problems is {n}, and so few requests do not give a reward model something "
            f"to train on and something to measure on; expected {enough} or more"
        )


def check_collection(config: R1Config, flags: CollectConfig) -> None:
    """Raise ValueError for answers that were collected with another --keep or --collect-problems.

    Answers that are not complete yet may be collected with others. flags: of the collection.
    """
    out = Path(flags.out)
    then = dig(read_dict(summary_path(out)), "flags")
    if not then or not out.exists() or partial_path(out).exists():
        return
    kept, problems = then.get("keep", list(flags.keep)), then.get("problems", flags.problems)
    changed = []
    if kept != list(flags.keep):
        changed.append(f"--keep was {' '.join(kept)}")
    if problems != flags.problems:
        times = flags.problems // config.collect_problems
        changed.append(f"--collect-problems was {problems // times}")
    if changed:
        raise ValueError(
            f"{' and '.join(changed)} when {out} was made; give that, or another --run"
        )


# ---- the stages: each is an ordinary run ----


def task_of(config: R1Config, kinds: str, *others: str) -> TaskFlags:
    """Puzzles, requests or both. others: further options of the task."""
    options = (
        f"kinds={kinds}",
        *others,
        f"n_numbers={config.numbers}",
        f"high={config.high}",
        f"ops={config.ops}",
        f"seed={config.seed}",
    )
    return TaskFlags(name="assistant", options=options)


def base_stage(config: R1Config, folder: Path) -> Stage:
    """Pretraining on the text that mixes its languages."""
    puzzles = Countdown(
        n_numbers=config.numbers, high=config.high, ops=config.ops, seed=config.seed
    )
    return Stage(
        "base",
        pretrain,
        PretrainConfig(
            run=str(folder / "base"),
            data=("assistant",),
            model=config.model,
            task=puzzles,
            authors=config.authors,
            documents=config.documents,
            steps=config.pretrain_steps,
            save_every=200,
            optim=OptimConfig(lr=4e-3),
            seed=config.seed,
            device=config.device,
        ),
    )


def rl_stage(config: R1Config, folder: Path, name: str, base: str, steps: int, **options) -> Stage:
    """Reinforcement learning of another stage's model, on puzzles."""
    run = grpo_config(
        "demo",
        run=str(folder / name),
        base=str(folder / base),
        task=task_of(config, "puzzles"),
        steps=steps,
        save_every=10,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        device=config.device,
        **options,
    )
    return Stage(name, grpo, run)


def sft_stage(
    config: R1Config, folder: Path, name: str, data: tuple[str, ...], steps: int, tokens: int
) -> Stage:
    """Supervised fine-tuning, always of the base. data: names of files, with weights."""
    run = SFTConfig(
        run=str(folder / name),
        base=str(folder / "base"),
        data=tuple(str(folder / each) for each in data),
        steps=steps,
        batch_tokens=tokens,
        save_every=50,
        optim=OptimConfig(lr=1e-3, warmup=5, weight_decay=0.0),
        seed=config.seed,
        device=config.device,
    )
    return Stage(name, sft, run)


def collect_stage(
    config: R1Config, folder: Path, name: str, run: str, problems: int, **options
) -> Stage:
    """Samples of the model of another stage, the good ones kept; on puzzles, unless `kinds` says
    more."""
    kinds = options.pop("kinds", "puzzles")
    flags = CollectConfig(
        run=str(folder / run),
        out=str(folder / f"{name}.jsonl"),
        task=task_of(config, kinds),
        problems=problems,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        device=config.device,
        **options,
    )
    return Stage(name, collect, flags)


def rewards_of(config: R1Config, folder: Path, model_from: float | None = None) -> RewardConfig:
    """The rules and the language; and the reward model from a share of the steps on, if given."""
    if model_from is None:
        return RewardConfig(language_weight=config.language_weight)
    return RewardConfig(
        language_weight=config.language_weight,
        model=str(folder / "reward"),
        model_weight=config.model_weight,
        model_from=model_from,
    )


def stages_of(config: R1Config, folder: Path) -> list[Stage]:
    """Every stage in order, the controls each behind what they are compared with."""
    stages = [base_stage(config, folder)]
    problems = config.collect_problems

    # 1. R1-Zero, whose answers are right, and mix their languages.
    stages.append(rl_stage(config, folder, "zero", "base", config.zero_steps))

    # 2. The cold start: answers of R1-Zero that people would like to read.           (B.3.2)
    stages.append(
        collect_stage(
            config,
            folder,
            "cold_data",
            "zero",
            2 * problems,
            keep=config.keep,
            min_language=1.0,
            min_tokens=25,
            max_repetition=0.5,
            per_problem=1,
        )
    )
    stages.append(sft_stage(config, folder, "cold", ("cold_data.jsonl",), config.cold_steps, 1024))

    # 3. Reasoning, with a reward for a consistent language.                          (3.2.1, eq. 7)
    rules = rewards_of(config, folder)
    steps = config.reasoning_steps
    stages.append(rl_stage(config, folder, "reasoning", "cold", steps, rewards=rules))
    if config.controls:
        stages.append(rl_stage(config, folder, "no_language", "cold", steps))
        stages.append(rl_stage(config, folder, "no_cold", "base", steps, rewards=rules))

    # 4. Rejection sampling, and SFT of the base on what was kept and on general data. (B.3.3)
    stages.append(
        collect_stage(
            config,
            folder,
            "chosen",
            "reasoning",
            2 * problems,
            keep=config.keep,
            min_language=1.0,
            max_repetition=0.5,
            per_problem=2,
        )
    )
    chosen, general, steps = "chosen.jsonl", "general.jsonl", config.tuned_steps
    stages.append(sft_stage(config, folder, "tuned", (f"{chosen}:3", f"{general}:1"), steps, 2048))
    if config.controls:
        stages.append(sft_stage(config, folder, "alone", (chosen,), steps, 2048))

    # 5. A reward model for what no rule can judge.                                   (3.2.2)
    hidden = RewardConfig(accuracy_weight=0, format_weight=0, plugin=HIDDEN_PREFERENCE)
    ranking = {"kinds": "requests", "rank": True, "samples": 6, "rewards": hidden}
    stages.append(collect_stage(config, folder, "rankings", "tuned", problems, **ranking))
    stages.append(Stage("reward", reward_model, reward_config(config, folder)))

    # 6. All scenarios. Requests and the reward model come in at the end alone.       (3.2.2)
    stages.append(all_scenarios(config, folder, "r1", config.all_steps, REWARD_MODEL_FROM))
    if config.hack:
        stages.append(all_scenarios(config, folder, "hacked", 4 * config.all_steps, 0.0))
    return stages


def all_scenarios(
    config: R1Config, folder: Path, name: str, steps: int, model_from: float
) -> Stage:
    """The last reinforcement learning; requests and reward model from a share of the steps on."""
    run = rl_stage(config, folder, name, "tuned", steps).config
    first = math.ceil(model_from * steps) * run.prompts_per_step
    run = replace(
        run,
        task=task_of(config, "both", f"requests_from={first}"),
        rewards=rewards_of(config, folder, model_from),
        optim=replace(run.optim, lr=LAST_LEARNING_RATE),
        temperature=0.7,
    )
    return Stage(name, grpo, run)


def reward_config(config: R1Config, folder: Path) -> RewardModelConfig:
    """The reward model, from the fine-tuned model on."""
    return RewardModelConfig(
        run=str(folder / "reward"),
        base=str(folder / "tuned"),
        data=(str(folder / "rankings.jsonl"),),
        steps=config.reward_steps,
        seed=config.seed,
        device=config.device,
    )


# ---- what came out ----


class Results(PartResults):
    """Those of each stage, with the configuration and the machine."""

    def __init__(self, folder: Path, config: R1Config):
        super().__init__(folder, {"stages": {}})
        self.values |= {"machine": describe_machine(), "price": config.price}

    @property
    def stages(self) -> dict[str, dict]:
        return self.values["stages"]

    def is_measured(self, name: str, settings: dict) -> bool:
        """Whether a stage was measured with these settings, and its samples are there."""
        found = self.stages.get(name, {})
        is_same = settings == {key: found.get(key) for key in settings}
        return is_same and has_answers(answers_path(self.path.parent, name))


def measure_stage(config: R1Config, folder: Path, name: str, results: Results) -> dict:
    """What is measured of the model of a stage; its samples go to eval_<name>.jsonl, and their
    number to the results."""
    tasks = held_out_tasks(config.numbers, config.high, config.ops)
    groups = sample_held_out(
        load_model(str(folder / name), pick_device(config.device)),
        tasks,
        config.eval_problems,
        config.eval_samples,
        config.max_new_tokens,
        config.seed,
    )
    write_samples(answers_path(folder, name), groups)
    lengths = [len(sample.tokens) for group in groups for sample in group]
    results.add_sampled(f"eval_{name}", str(folder / name), sum(lengths), len(lengths))
    found = measure(groups)
    if name in REINFORCED:
        found["steps_to_70"] = reached(folder / name, 0.7)
    if name in ("r1", "hacked"):
        found["win_rate"] = list(
            win_rate(answers_path(folder, name), answers_path(folder, "tuned"))
        )
    return found


COLUMNS = {
    "accuracy": "right",
    "format": "well formed",
    "consistency": "consistent",
    "general": "requests",
    "win_rate": "preferred",
}


def table(stages: dict[str, dict]) -> str:
    """A row per stage: what was measured of it."""
    heads = [f"{title:>20}" for title in COLUMNS.values()]
    lines = ["".join([f"{'stage':<14}", *heads, f"{'tokens':>10}"])]
    for name, found in stages.items():
        cells = [f"{share_with_interval(found.get(column)):>20}" for column in COLUMNS]
        lines.append("".join([f"{name:<14}", *cells, f"{found['tokens']:>10.1f}"]))
    return "\n".join(lines)


# ---- the whole ----


def r1(config: R1Config) -> Path:
    """Run every stage that is not done yet; returns the report's path.

    Raises ValueError if the folder already holds a recipe and --resume was not given, or holds a
    file that is torn; CheckpointError or ValueError for stages that were begun with other flags;
    and Stopped after Ctrl-C.
    """
    reuse_memory()
    folder = Path(config.run)
    check_not_begun(folder, config.resume)
    # Nothing is written before it is known that this device and these flags will do.
    pick_device(config.device)
    stages = stages_of(config, folder)
    for stage in stages:
        if stage.loop is collect:
            check_collection(config, stage.config)
        else:
            check_part(stage.config)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder, config)
    started = time.perf_counter()

    # The general data of SFT, which no model made.
    task = task_of(config, "both").make()
    atomic_write_text(folder / "general.jsonl", general_pairs(task, GENERAL_PAIRS, config.seed))

    for stage in stages:
        show(f"--- {stage.name}")
        results.add_seconds(stage.name, run_stage(stage))
        if stage.name not in (*MEASURED, *CONTROLS):
            continue
        settings = {
            "steps": stage.config.steps,
            "eval_problems": config.eval_problems,
            "eval_samples": config.eval_samples,
        }
        if not results.is_measured(stage.name, settings):
            began = time.perf_counter()
            found = measure_stage(config, folder, stage.name, results)
            results.stages[stage.name] = settings | found
            results.add_seconds(f"eval_{stage.name}", time.perf_counter() - began)

    seconds = time.perf_counter() - started
    report = write_report(folder)
    show(f"\n{table(results.stages)}\n\nreport: {report}   ({seconds / 60:.1f} minutes)")
    return report
