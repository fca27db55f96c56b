"""The demo: R1-Zero on a laptop, from nothing, with its control and a report.

    r1zero demo                      one seed, control included
    r1zero demo --seeds 0,1,2        three times over, and a table
    r1zero demo --model demo-moe     with a mixture of experts, as many of its parameters active

1. Write a corpus of worked Countdown attempts that contains reasoning, but not the skill of using
   it (demo_corpus.py).
2. Pretrain a base model of about a million parameters on it, from random weights. From random
   weights alone a 0/1 reward gives no signal: some answers of a group must be right.
3. R1-Zero: GRPO straight on the base, with the two rule rewards and nothing else.
4. The control: the same, with the rewards dealt out at random inside each group.
5. Measure all three models on the same held-out problems, and write the report.

Every part is a run of its own (pretrain.py, grpo.py) in a folder of its own, so Ctrl-C and --resume
work throughout. README.md says how long it takes.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ...eval.console import show
from ...eval.harness import evaluate
from ...eval.sampler import ModelSampler
from ...eval.tasks.countdown import Countdown
from ...model.checkpoint import load_model
from ...model.config import preset
from ...model.engine.engine import Engine
from ...model.engine.sampling import sample_seeds
from ...model.files import atomic_write_json
from ...model.optimizer import OptimConfig
from ...model.transformer import count_active_parameters, count_parameters
from ...rl.advantages import group_advantages
from ...rl.rewards import Grader, RewardConfig, Rewards, check_no_model
from ...rl.rollouts import Rollouts, sample_groups
from ..grpo import GRPOConfig, grpo
from ..grpo import grpo_config as complete_config
from ..log import read_metrics
from ..machine import describe_machine, pick_device, reuse_memory
from ..pretrain import PretrainConfig, pretrain
from ..report.behaviour import measure
from ..report.record import PARTS
from ..report.report import seeds_table, write_report
from ..run import at_least
from ..task_flags import TaskFlags
from .demo_corpus import CorpusConfig
from .parts import PartResults, check_part, check_room, run_part

EVAL_BATCH = 128  # held-out problems that are answered at a time
GROUP_TRIES = 50  # problems to try until a group is found that is worth showing
INTERESTING = 0.2, 0.6  # share of right answers in a group that has something to show


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """R1-Zero from nothing."""

    run: str = "runs/demo"
    """Folder of the demo."""
    resume: bool = False
    """Continue a demo that was stopped."""
    seeds: str = "0"
    """Seeds, separated by commas, as in 0,1,2. Each is a whole demo, control included."""
    numbers: int = 3
    """Number of numbers in a problem."""
    high: int = 20
    """Largest number in a problem."""
    ops: str = "+-"
    """Operations that a problem may need, of + - * and /."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    documents: int = 60_000
    """Number of documents in the corpus."""
    model: str = "demo"
    """Size of the model: a preset (demo; demo-moe, the same with experts; tiny, ...) or depth=N."""
    pretrain_steps: int = 2000
    """Number of pretraining steps, of 2,048 tokens each."""
    rl_steps: int = 50
    """Number of GRPO steps, of 16 problems x 16 answers each."""
    control_steps: int = 12
    """Number of GRPO steps of the control; 0 leaves it out."""
    max_new_tokens: int = 192
    """Maximum number of new tokens per answer."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    eval_problems: int = 512
    """Number of held-out problems to measure on."""
    eval_samples: int = 4
    """Number of answers per held-out problem, at temperature 1."""
    device: str = "auto"
    """Device to compute on: auto (the GPU if there is one), cpu, cuda or mps."""

    def __post_init__(self):
        at_least(self, 1, "documents", "pretrain_steps", "rl_steps")
        at_least(self, 1, "eval_problems", "eval_samples")
        at_least(self, 0, "control_steps")
        check_no_model(self.rewards, "demo")
        words = self.seeds.split(",")
        seeds = [int(word) for word in words if word.isdecimal()]
        if len(set(seeds)) < len(words):
            raise ValueError(
                f"--seeds is {self.seeds!r}, expected different whole numbers with "
                "commas, as in 0,1,2"
            )

        # What only a later part would refuse is refused now, not after minutes of pretraining.
        longest_prompt = 2 * self.numbers + 3
        room = preset(self.model, vocab_size=1).max_seq_len - longest_prompt
        check_room(self.max_new_tokens, room, f"--model {self.model}")
        for seed in seeds:
            base_config(self, Path(self.run), seed)
            grpo_config(self, Path(self.run), seed, control=False).task.make()

    @property
    def seed_list(self) -> list[int]:
        return [int(seed) for seed in self.seeds.split(",")]


# ---- the parts: a base model, R1-Zero, the control ----


def task_of(config: DemoConfig, seed: int) -> TaskFlags:
    """The task of all parts; the seed sets the order of its training problems."""
    options = (
        f"n_numbers={config.numbers}",
        f"high={config.high}",
        f"ops={config.ops}",
        f"seed={seed}",
    )
    return TaskFlags(name="countdown", options=options)


def base_config(config: DemoConfig, folder: Path, seed: int) -> PretrainConfig:
    """The run that pretrains the base model in `folder`."""
    return PretrainConfig(
        run=str(folder),
        resume=True,
        data=("countdown",),
        model=config.model,
        seed=seed,
        steps=config.pretrain_steps,
        save_every=200,
        corpus=config.corpus,
        documents=config.documents,
        optim=OptimConfig(lr=4e-3),
        device=config.device,
        task=Countdown(n_numbers=config.numbers, high=config.high, ops=config.ops, seed=seed),
    )


def grpo_config(config: DemoConfig, folder: Path, seed: int, control: bool) -> GRPOConfig:
    """The run of R1-Zero, or of its control, beside the base in `folder`."""
    return complete_config(
        "demo",
        run=str(folder / ("control" if control else "rl")),
        resume=True,
        base=str(folder / "base"),
        task=task_of(config, seed),
        seed=seed,
        steps=config.control_steps if control else config.rl_steps,
        save_every=20,
        max_new_tokens=config.max_new_tokens,
        rewards=config.rewards,
        control="permute" if control else "none",
        device=config.device,
    )


# ---- what is measured of each part ----


def measure_model(config: DemoConfig, folder: Path, name: str, seed: int) -> dict:
    """Held-out accuracy and behaviour of a part's last checkpoint, as JSON types.

    The responses go to eval_<name>.jsonl.
    """
    model, tokenizer, _ = load_model(str(folder / name), pick_device(config.device))
    task = task_of(config, seed).make()
    n_problems = config.eval_problems
    size = task.size("test")  # None: as many as are asked for
    if size is not None:
        n_problems = min(size, n_problems)
    problems = task.problems("test", n_problems)

    n_samples, out = config.eval_samples, folder / f"eval_{name}.jsonl"
    sampler = ModelSampler(model, tokenizer, config.max_new_tokens, temperature=1.0, seed=seed)
    result = evaluate(
        sampler, task, problems, n_samples, ks=(1, n_samples), out=out, batch=EVAL_BATCH
    )

    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    repeated = [problem for problem in problems for _ in range(n_samples)]
    behaviour = measure(repeated, [row["response"] for row in rows])
    return {"eval": result.to_dict(), "behaviour": behaviour.to_dict()}


def keep_group(config: DemoConfig, folder: Path, seed: int) -> None:
    """Sample one group from the base, as a step of GRPO does, and keep it for the report.

    group.json has it token by token, with rewards and advantages.
    """
    model, tokenizer, _ = load_model(str(folder / "base"), pick_device(config.device))
    task, rl = task_of(config, seed).make(), grpo_config(config, folder, seed, control=False)
    engine, grader = Engine(model, tokenizer), Grader(rl)

    # Take the first problem with something to show: some right answers, and some wrong ones.
    low, high = INTERESTING
    for index, problem in enumerate(task.problems("train", GROUP_TRIES)):
        seeds = sample_seeds(rl.group_size, seed, index)
        rollouts = sample_groups(
            engine,
            [task.prompt(problem)],
            rl.group_size,
            rl.max_new_tokens,
            rl.temperature,
            seeds,
            [problem],
        )
        rewards = grader(task, rollouts)
        if low <= rewards.accuracy.mean() <= high:
            break

    normalise_std = rl.advantage.scale == "std"
    advantages = group_advantages(rewards.total, rollouts.group_offsets, normalise_std)
    samples = group_samples(tokenizer, rollouts, rewards, advantages)
    group = {"step": 0, "problem": task.prompt(problem), "samples": samples}
    atomic_write_json(folder / "group.json", group)


def group_samples(tokenizer, rollouts: Rollouts, rewards: Rewards, advantages) -> list[dict]:
    """Each sample of one group: its response token by token, and what it earned."""
    samples = []
    for n, sequence in enumerate(rollouts.sequences):
        response = sequence[rollouts.prompt_lengths[n] :]
        samples.append(
            {
                "tokens": [tokenizer.token_text(int(token)) for token in response],
                "accuracy": rewards.accuracy[n],
                "format": rewards.format[n],
                "reward": rewards.total[n],
                "advantage": advantages[n],
                "why": rewards.why[n],
                "finish_reason": rollouts.finish_reasons[n],
            }
        )
    return samples


class Results(PartResults):
    """Those of one seed of the demo."""

    def __init__(self, folder: Path):
        super().__init__(folder, {"tokens": {}})

    def is_measured(self, name: str, steps: int) -> bool:
        """Whether a part was measured at this number of steps."""
        return self.values.get(name, {}).get("steps") == steps

    def in_words(self, name: str) -> str:
        """The accuracy of a part, in a sentence."""
        found = self.values[name]["eval"]
        low, high = found["accuracy_95"]
        return (
            f"{name}: {found['accuracy']:.1%} of held-out answers are right (95 % interval "
            f"{low:.1%} to {high:.1%}), {found['mean_tokens']:.1f} tokens long"
        )


# ---- the whole ----


def one_seed(config: DemoConfig, folder: Path, seed: int) -> None:
    """The whole demo for one seed; what was done before a stop is not done again."""
    results = Results(folder)

    def measure_part(name: str, steps: int) -> None:
        if results.is_measured(name, steps):
            return
        started = time.perf_counter()
        results.values[name] = {"steps": steps, **measure_model(config, folder, name, seed)}
        results.add_seconds(f"eval_{name}", time.perf_counter() - started)
        show(results.in_words(name))

    # 1. and 2. The base model, on a corpus that contains reasoning. One of its groups is kept.
    base = base_config(config, folder / "base", seed)
    results.add_seconds("pretrain", run_part(pretrain, base))
    measure_part("base", config.pretrain_steps)
    if not (folder / "group.json").exists():
        keep_group(config, folder, seed)

    # 3. R1-Zero, straight on the base.
    rl = grpo_config(config, folder, seed, control=False)
    results.add_seconds("rl", run_part(grpo, rl))
    measure_part("rl", config.rl_steps)

    # 4. The control, with rewards that carry no information.
    if config.control_steps:
        control = grpo_config(config, folder, seed, control=True)
        results.add_seconds("control", run_part(grpo, control))
        measure_part("control", config.control_steps)

    # What it cost, in tokens, and the size of the model.
    for part in PARTS:
        if (folder / part / "metrics.jsonl").exists():
            name = "pretrain" if part == "base" else part
            tokens = sum(row["tokens"] for row in read_metrics(folder / part))
            results.values["tokens"][name] = tokens
    model, _, _ = load_model(str(folder / "base"), torch.device("cpu"))
    results.values["parameters"] = count_parameters(model.config)
    if model.config.moe:
        results.values["active_parameters"] = count_active_parameters(model.config)
    results.write()


def check_seed(config: DemoConfig, folder: Path, seed: int) -> None:
    """Raise CheckpointError unless the parts of a seed that were begun have these settings."""
    check_part(base_config(config, folder / "base", seed))
    check_part(grpo_config(config, folder, seed, control=False))
    if config.control_steps:
        check_part(grpo_config(config, folder, seed, control=True))


def demo(config: DemoConfig) -> Path:
    """Run everything that is not done yet; returns the report's path.

    Raises ValueError if the folder already holds a demo and --resume was not given, or one that was
    made with other flags, and Stopped after Ctrl-C.
    """
    reuse_memory()
    folder = Path(config.run)
    record_path = folder / "demo.json"
    # As with a run, the first checkpoint makes it a demo: before, a corrected command may go on.
    is_begun = any(folder.glob("seed*/*/checkpoints/step_*"))
    if is_begun and not config.resume:
        raise ValueError(
            f"{folder} holds a demo already; add --resume to go on with it, or give another --run"
        )
    for seed in config.seed_list:
        check_seed(config, folder / f"seed{seed}", seed)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    record = {
        "config": asdict(config),
        "machine": describe_machine(),
        "seeds": config.seed_list,
        "seconds": {},
        "finished": None,
    }
    atomic_write_json(record_path, record)

    for seed in config.seed_list:
        one_seed(config, folder / f"seed{seed}", seed)

    # 5. The report, on all seeds.
    seconds = time.perf_counter() - started
    record["seconds"]["all"] = seconds
    record["finished"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    atomic_write_json(record_path, record)
    report = write_report(folder)
    show(seeds_table(folder))
    show(f"report: {report}   ({seconds / 60:.1f} minutes)")
    return report
