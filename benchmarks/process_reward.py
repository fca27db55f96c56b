"""Process rewards on the demo's task: how good are they by labels, and what does RL learn from them?

    python -m benchmarks.process_reward --base runs/demo/seed0/base     half an hour of one core

1. Answers of the base, each step labelled: many by the task's exact check, fewer by eight completions too.
2. A process reward of each kind of label, measured on the answers to held-out prompts. The four of the
   small set are compared with each other; the two of the large set are used in RL.
3. RL from the same base, to the same number of sampled tokens: accuracy by the rule, or the scores of steps
   instead, or both; the form is paid for in all. In the control the scores are shuffled within each group.

Afterwards pass@1 on held-out problems, with 95 % intervals over problems. What exists in --work is not made
again, so a call that was stopped goes on. One seed, one base: an interval knows nothing of another base.
"""
import json
import time
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import tyro

from r1zero.eval.harness import evaluate
from r1zero.eval.sampler import ModelSampler
from r1zero.model.checkpoint import load_model
from r1zero.model.files import atomic_write_json
from r1zero.model.optimizer import OptimConfig
from r1zero.train.collect import CollectConfig, collect
from r1zero.train.grpo import grpo_config, make_learner, timed_step
from r1zero.train.machine import pick_device, reuse_memory
from r1zero.train.other_models import open_judges
from r1zero.train.process_reward import ProcessRewardConfig, process_reward
from r1zero.train.run import read_record
from r1zero.train.task_flags import TaskFlags

from .common import finish, table

KEPT = ("accuracy", "format", "length", "tokens", "reward_process", "steps_per_answer", "kl_to_reference")
MEASURED = ("accuracy", "accuracy_95", "format_rate", "mean_tokens", "truncated")
SHOWN = ("AUC, its labels", "AUC, true", "AUC, reaches", "AUC, step 1", "AUC, step 2", "AUC, step 3",
         "AUC, last step", "AUC, before it", "first error, f1", "first error before it, f1")
# An arm of RL: (labels of the process reward or None, weight of accuracy, control).
ARMS = {
    "outcome": (None, 1.0, "none"),
    "process true": ("true", 0.0, "none"),
    "process reaches": ("reaches", 0.0, "none"),
    "both, true": ("true", 1.0, "none"),
    "both, reaches": ("reaches", 1.0, "none"),
    "control": ("reaches", 0.0, "permute"),
}


@dataclass(frozen=True)
class Flags:
    """Train process rewards on labelled steps, and policies on process rewards."""

    base: str = "runs/demo/seed0/base"
    """Folder of the base model's run."""
    work: str = "runs/process_reward"
    """Folder for data, runs and results."""
    exact_problems: int = 1024
    """Number of problems whose answers are labelled by the exact check alone."""
    completed_problems: int = 192
    """Number of problems whose answers are labelled by completions too."""
    completions: int = 8
    """Number of completions from the end of each step."""
    head_steps: int = 120
    """Number of optimizer steps of a process reward on the large set; a third less on the small one."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which arms of RL to run, after the base."""
    seed: int = 0
    """Seed of RL."""
    budget: int = 250_000
    """Number of sampled tokens per arm. The step that passes it is the last one."""
    problems: int = 256
    """Number of held-out problems, with four answers each."""
    out: str | None = None
    """File for the line of JSON."""


# ---- 1 and 2: labels and process rewards ----

def labelled(flags: Flags, name: str, problems: int, start: int, completions: int) -> str:
    """A file of answers with labelled steps."""
    out = Path(flags.work) / f"{name}.jsonl"
    if not out.exists():
        collect(CollectConfig(run=flags.base, out=str(out), problems=problems, start=start, batch=128,
                              keep=("all",), label_steps=completions, resume=True))
    return str(out)


def head(flags: Flags, data: str, labels: str, steps: int, held_out: float) -> dict:
    """What was measured of a process reward of these labels."""
    run = Path(flags.work) / f"{Path(data).stem}_{labels}"
    if "process_reward" not in read_record(run / "run.json"):
        process_reward(ProcessRewardConfig(run=str(run), base=flags.base, data=data, labels=labels,
                                           steps=steps, held_out=held_out, resume=True))
    return {"data": Path(data).stem, **read_record(run / "run.json")["process_reward"]}


# ---- 3: reinforcement learning ----

def one_arm(flags: Flags, name: str) -> dict:
    """Train until the budget is spent, then measure; "base" is measured as it is."""
    labels, accuracy_weight, control = ARMS.get(name, (None, 1.0, "none"))
    rewards = {"accuracy_weight": accuracy_weight}
    if labels:
        rewards["process"] = str(Path(flags.work) / f"exact_{labels}")
    optim = OptimConfig(lr=3e-4, warmup=5, schedule="constant", weight_decay=0.0, eps=1e-8)
    config = grpo_config("demo", run="none", base=flags.base, seed=flags.seed, control=control,
                         task=TaskFlags(), rewards=rewards, optim=optim)
    task, base = config.task.make(), load_model(config.base, pick_device(config.device))
    judges = {flag: judge for flag, (judge, _) in open_judges(config, base).items()}
    learner = make_learner(config, task, base, judges=judges)
    rows, started = [], time.perf_counter()
    while name != "base" and sum(row["tokens"] for row in rows) < flags.budget:
        metrics = timed_step(learner, task, config, len(rows))
        rows.append({key: float(f"{metrics[key]:.4g}") for key in KEPT if key in metrics})
        words = ", ".join(f"{key} {value:g}" for key, value in rows[-1].items())
        print(f"{name}, step {len(rows)}: {words}")
    seconds = time.perf_counter() - started
    sampler = ModelSampler(learner.policy, base[1], config.max_new_tokens, 1.0, flags.seed)
    problems = task.problems("test", flags.problems)
    found = evaluate(sampler, task, problems, 4, batch=64, progress=False).to_dict()
    return {"arm": name, "seed": flags.seed, "rows": rows, "seconds": seconds,
            **{key: found[key] for key in MEASURED}}


def arms_of(flags: Flags) -> list[dict]:
    """The base and all arms; those that have a file are read."""
    results = []
    for name in ("base", *flags.arms):
        path = Path(flags.work) / f"{name.replace(', ', '_').replace(' ', '_')}_{flags.seed}.json"
        if not path.exists():
            atomic_write_json(path, one_arm(flags, name))
        results.append(json.loads(path.read_text()))
    return results


# ---- tables ----

def show_heads(heads: list[dict]) -> None:
    rows = []
    for one in heads:
        values = [one["measured"].get(key) for key in SHOWN]
        rows.append([one["labels"], one["data"], f"{one['steps']:,}",
                     *("" if v is None else f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]" for v in values)])
    table(["labels", "data", "steps", *SHOWN], rows)


def show_arms(arms: list[dict]) -> None:
    rows = []
    for one in arms:
        mean, (low, high) = one["accuracy"], one["accuracy_95"]
        tokens = [*accumulate(row["tokens"] for row in one["rows"])]
        n_steps = [row["steps_per_answer"] for row in one["rows"] if "steps_per_answer" in row]
        rows.append([one["arm"], f"{mean:.1%} [{low:.1%}, {high:.1%}]", f"{one['format_rate']:.1%}",
                     f"{one['mean_tokens']:.0f}", f"{one['truncated']:.1%}",
                     f"{n_steps[0]:.1f} -> {n_steps[-1]:.1f}" if n_steps else "",
                     len(tokens), f"{tokens[-1] / 1000:,.0f}k" if tokens else ""])
    table(["arm", "pass@1", "formed", "length", "cut off", "steps per answer", "updates", "tokens"], rows)


def main(flags: Flags) -> dict:
    reuse_memory()
    Path(flags.work).mkdir(parents=True, exist_ok=True)
    exact = labelled(flags, "exact", flags.exact_problems, 0, 0)
    start = flags.exact_problems
    completed = labelled(flags, "completed", flags.completed_problems, start, flags.completions)
    heads = [head(flags, exact, labels, flags.head_steps, 0.1) for labels in ("true", "reaches")]
    fewer = max(1, flags.head_steps * 2 // 3)
    heads += [head(flags, completed, labels, fewer, 0.25) for labels in ("true", "reaches", "hard", "soft")]
    show_heads(heads)
    arms = arms_of(flags)
    show_arms(arms)
    summary = json.loads(Path(f"{completed}.summary.json").read_text())
    found = {"flags": asdict(flags), "labels": summary["labels"], "heads": heads, "arms": arms}
    return finish("process_reward", found, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
