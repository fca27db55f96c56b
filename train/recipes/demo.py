"""The demo: R1-Zero on a laptop, from nothing, with its control and a report.

    r1zero demo                      about 12 minutes on 2 slow cores, control included
    r1zero demo --seeds 0,1,2        three times over, and a table

1. Write a corpus of worked Countdown attempts that contains reasoning, but not the skill of using it
   (corpus.py).
2. Pretrain a base model of about a million parameters on it, from random weights. From random weights alone
   a 0/1 reward gives no signal: some answers of a group must be right.
3. R1-Zero: GRPO straight on the base, with the two rule rewards and nothing else.
4. The control: the same, with the rewards dealt out at random inside each group.
5. Measure all three on the same held-out problems, and write the report.

Every part is a run of its own (pretrain.py, grpo.py) in a folder of its own, so Ctrl-C and --resume work
throughout.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ...eval.harness import evaluate
from ...eval.sampler import ModelSampler
from ...eval.tasks.countdown import Countdown
from ...model.checkpoint import atomic_write_json, checkpoint_steps, load_model
from ...model.config import preset
from ...model.engine.engine import Engine
from ...model.engine.sampling import sample_seeds
from ...model.optimizer import OptimConfig
from ...model.transformer import count_parameters
from ...rl.advantages import group_advantages
from ...rl.family import rl_optim
from ...rl.rewards import Grader, RewardConfig
from ...rl.rollouts import sample_groups
from ..grpo import GRPOConfig, grpo
from ..pretrain import PretrainConfig, pretrain
from ..report.behaviour import measure
from ..report.report import seeds_table, write_report
from ..run import machine, pick_device, read_metrics, reuse_memory
from ..task_flags import TaskFlags
from .demo_corpus import CorpusConfig


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """R1-Zero from nothing."""

    run: str = "runs/demo"
    """Folder of the demo."""
    resume: bool = False
    """Go on with a demo that was stopped."""
    seeds: str = "0"
    """One whole demo each, control included; several with commas, as in 0,1,2."""
    numbers: int = 3
    """How many numbers a problem has."""
    high: int = 20
    """The largest number."""
    ops: str = "+-"
    """The operations."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    documents: int = 60_000
    """Documents in the corpus."""
    model: str = "demo"
    """Size of the model: a preset or depth=N."""
    pretrain_steps: int = 1400
    """Optimizer steps of 2,048 tokens."""
    rl_steps: int = 80
    """GRPO steps of 16 problems x 16 answers."""
    control_steps: int = 24
    """GRPO steps of the control; 0 for none."""
    max_new_tokens: int = 144
    """Longest answer."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    rl_lr: float = 4e-4
    """Learning rate of GRPO."""
    eval_problems: int = 512
    """Held-out problems."""
    eval_samples: int = 4
    """Answers to each of them, at temperature 1."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda."""

    def __post_init__(self):
        for name in ("documents", "pretrain_steps", "rl_steps", "eval_problems", "eval_samples"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more"
                )
        if self.control_steps < 0:
            raise ValueError(
                f"--control-steps is {self.control_steps}, expected 0 (no control) or more"
            )
        seeds = self.seeds.split(",")
        if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ValueError(
                f"--seeds is {self.seeds!r}, expected different whole numbers with "
                "commas, as in 0,1,2"
            )
        # What only a later part would refuse is told now, not after minutes of pretraining.
        # beside the longest prompt
        room = preset(self.model, vocab_size=1).max_seq_len - 2 * self.numbers - 3
        if self.max_new_tokens > room:
            raise ValueError(
                f"--max-new-tokens is {self.max_new_tokens}, but --model {self.model} has "
                f"room for {room} beside a problem; expected no more"
            )
        grpo_config(self, Path(self.run), 0, control=False).task.make()

    @property
    def seed_list(self) -> list[int]:
        return [int(seed) for seed in self.seeds.split(",")]


class Stopped(Exception):
    """A part was stopped by Ctrl-C before its end."""


def task_of(c: DemoConfig, seed: int) -> TaskFlags:
    options = f"n_numbers={c.numbers}", f"high={c.high}", f"ops={c.ops}", f"seed={seed}"
    return TaskFlags(name="countdown", options=options)


def part_done(folder: Path, steps: int) -> bool:
    """Whether a part's run has reached and saved its last step."""
    saved = checkpoint_steps(
        folder
    )  # not the log: it has a step's line a moment before its checkpoint
    return bool(saved) and saved[-1] >= steps


def grpo_config(c: DemoConfig, folder: Path, seed: int, control: bool) -> GRPOConfig:
    name, steps = ("control", c.control_steps) if control else ("rl", c.rl_steps)
    return GRPOConfig(
        run=str(folder / name),
        resume=True,
        base=str(folder / "base"),
        task=task_of(c, seed),
        seed=seed,
        steps=steps,
        save_every=20,
        max_new_tokens=c.max_new_tokens,
        micro_tokens=8192,
        rewards=c.rewards,
        control=control,
        optim=rl_optim(c.rl_lr),
        device=c.device,
    )


def base_config(c: DemoConfig, folder: Path, seed: int) -> PretrainConfig:
    return PretrainConfig(
        run=str(folder),
        resume=True,
        data=("countdown",),
        model=c.model,
        seed=seed,
        steps=c.pretrain_steps,
        save_every=200,
        corpus=c.corpus,
        documents=c.documents,
        optim=OptimConfig(lr=4e-3),
        device=c.device,
        task=Countdown(n_numbers=c.numbers, high=c.high, ops=c.ops, seed=seed),
    )


def run_part(folder: Path, steps: int, loop, config) -> float:
    """Run a part to its end, whether it was begun or not; returns the seconds that it took in this
    process."""
    started = time.perf_counter()
    if not part_done(folder, steps):
        loop(config)
        if not part_done(folder, steps):
            raise Stopped
    return time.perf_counter() - started


def measure_model(c: DemoConfig, folder: Path, name: str, seed: int) -> dict:
    """Held-out accuracy and behaviour of a part's last checkpoint; responses go to eval_<name>.jsonl."""
    model, tokenizer, _ = load_model(str(folder / name), pick_device(c.device))
    task = task_of(c, seed).make()
    size = task.size("test")
    problems = task.problems(
        "test", c.eval_problems if size is None else min(size, c.eval_problems)
    )
    sampler = ModelSampler(model, tokenizer, c.max_new_tokens, temperature=1.0, seed=seed)
    out = folder / f"eval_{name}.jsonl"
    result = evaluate(
        sampler, task, problems, c.eval_samples, ks=(1, c.eval_samples), out=out, batch=128
    )
    responses = [
        json.loads(line)["response"] for line in out.read_text(encoding="utf-8").splitlines()
    ]
    repeated = [p for p in problems for _ in range(c.eval_samples)]
    return {"eval": result.to_dict(), "behaviour": measure(repeated, responses).to_dict()}


def keep_group(c: DemoConfig, folder: Path, seed: int) -> None:
    """Sample one group from the base, as a step of GRPO does, and keep it token by token for the report."""
    model, tokenizer, _ = load_model(str(folder / "base"), pick_device(c.device))
    task, g = task_of(c, seed).make(), grpo_config(c, folder, seed, control=False)
    engine, grader = Engine(model, tokenizer), Grader(g)
    for index, problem in enumerate(task.problems("train", 50)):
        rollouts = sample_groups(
            engine,
            [task.prompt(problem)],
            g.group_size,
            g.max_new_tokens,
            g.temperature,
            sample_seeds(g.group_size, seed, index),
            [problem],
        )
        rewards = grader(task, rollouts)
        if 0.2 <= rewards.accuracy.mean() <= 0.6:  # one that has something to show
            break
    advantages = group_advantages(
        rewards.total, rollouts.group_offsets, g.advantage.scale == "std"
    )
    samples = []
    for n, sequence in enumerate(rollouts.sequences):
        tokens = [tokenizer.token_text(int(t)) for t in sequence[rollouts.prompt_lengths[n] :]]
        samples.append(
            {
                "tokens": tokens,
                "accuracy": rewards.accuracy[n],
                "format": rewards.format[n],
                "reward": rewards.total[n],
                "advantage": advantages[n],
                "why": rewards.why[n],
                "finish_reason": rollouts.finish_reasons[n],
            }
        )
    atomic_write_json(
        folder / "group.json", {"step": 0, "problem": task.prompt(problem), "samples": samples}
    )


def one_seed(c: DemoConfig, folder: Path, seed: int) -> dict:
    """The whole demo for one seed; what was done before a stop is not done again."""
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"seconds": {}, "tokens": {}}

    def timed(name: str, seconds: float) -> None:
        results["seconds"][name] = results["seconds"].get(name, 0.0) + seconds
        atomic_write_json(path, results)

    def evaluate_part(name: str, steps: int) -> None:
        if results.get(name, {}).get("steps") != steps:
            started = time.perf_counter()
            results[name] = {"steps": steps, **measure_model(c, folder, name, seed)}
            timed(f"eval_{name}", time.perf_counter() - started)
            share, (low, high) = (results[name]["eval"][key] for key in ("accuracy", "accuracy_95"))
            print(
                f"{name}: {share:.1%} of held-out answers are right (95 % interval {low:.1%} to "
                f"{high:.1%}), {results[name]['eval']['mean_tokens']:.1f} tokens long"
            )

    timed(
        "pretrain",
        run_part(
            folder / "base", c.pretrain_steps, pretrain, base_config(c, folder / "base", seed)
        ),
    )
    evaluate_part("base", c.pretrain_steps)
    if not (folder / "group.json").exists():
        keep_group(c, folder, seed)
    timed(
        "rl", run_part(folder / "rl", c.rl_steps, grpo, grpo_config(c, folder, seed, control=False))
    )
    evaluate_part("rl", c.rl_steps)
    if c.control_steps:
        control = grpo_config(c, folder, seed, control=True)
        timed("control", run_part(folder / "control", c.control_steps, grpo, control))
        evaluate_part("control", c.control_steps)
    for name, part in (("pretrain", "base"), ("rl", "rl"), ("control", "control")):
        if (folder / part / "metrics.jsonl").exists():
            results["tokens"][name] = sum(row["tokens"] for row in read_metrics(folder / part))
    model, _, _ = load_model(str(folder / "base"), torch.device("cpu"))
    results["parameters"] = count_parameters(model.config)
    atomic_write_json(path, results)
    return results


def demo(c: DemoConfig) -> Path | None:
    """Run everything that is not done yet; returns the report's path, or None if Ctrl-C stopped it."""
    reuse_memory()
    folder = Path(c.run)
    if (folder / "demo.json").exists() and not c.resume:
        raise ValueError(
            f"{folder} holds a demo already; add --resume to go on with it, or give another --run"
        )
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    record = {
        "config": asdict(c),
        "machine": machine(),
        "seeds": c.seed_list,
        "seconds": {},
        "finished": None,
    }
    atomic_write_json(folder / "demo.json", record)
    try:
        for seed in c.seed_list:
            one_seed(c, folder / f"seed{seed}", seed)
    except Stopped:
        print(f"the demo was stopped; go on with: r1zero demo --run {folder} --resume")
        return None
    record["seconds"]["all"] = time.perf_counter() - started
    record["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")
    atomic_write_json(folder / "demo.json", record)
    report = write_report(folder)
    print(seeds_table(folder))
    print(f"report: {report}   ({record['seconds']['all'] / 60:.1f} minutes)")
    return report
