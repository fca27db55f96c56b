"""Which of a model's samples to fine-tune the base on: all, the right ones, one per problem, the shortest.

    python -m benchmarks.rejection --base runs/demo/seed0/base --teacher runs/demo/seed0/rl

Both models answer the same training problems. Each arm is a choice among those answers by `r1zero collect`,
cut to the same number of pairs, and `r1zero sft` trains the base on them for the same number of tokens. Then
held-out problems are measured. Intervals are Student's t over seeds, of sampling and of training; there is
one base and one teacher.

The samples of an arm are made once per model and seed: the .partial file of one call serves the others.
"""
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from r1zero.eval.tasks.countdown import Countdown
from r1zero.model.files import atomic_write_json
from r1zero.model.optimizer import OptimConfig
from r1zero.train.cli.eval import EvalConfig, run_eval
from r1zero.train.collect import CollectConfig, collect
from r1zero.train.report.behaviour import measure
from r1zero.train.sft import SFTConfig, sft

from .ablation import mean_and_interval
from .common import check_settings, finish, table

ARMS = {
    "unfiltered": dict(keep=("finished",)),
    "right": {},
    "right, 1 per problem": dict(per_problem=1),
    "right, the shortest": dict(per_problem=1, prefer="shortest"),
}

# Column of the table: the figure in a result, its factor and its digits.
COLUMNS = {"pairs": ("pairs", 1, 0), "problems": ("problems", 1, 0), "right %": ("pairs_right", 100, 1),
           "tokens/pair": ("pair_tokens", 1, 1), "pass@1 %": ("accuracy", 100, 1),
           "pass@4 %": ("pass_at_4", 100, 1), "length": ("mean_tokens", 1, 1)}


@dataclass(frozen=True)
class Flags:
    """Compare choices of data for fine-tuning."""

    base: str
    """Folder of the base model, which is trained."""
    teacher: str
    """Folder of the model after RL, which also answers the problems."""
    work: str = "runs/rejection"
    """Folder for data and runs. Runs whose result is there are not done again."""
    seeds: int = 3
    """Number of runs of each arm."""
    problems: int = 1024
    """Number of training problems."""
    samples: int = 8
    """Number of answers per problem and model."""
    sample_tokens: int = 160
    """Maximum number of tokens of each of them."""
    pairs: int = 768
    """Number of pairs that an arm is trained on."""
    steps: int = 25
    """Number of optimizer steps of up to 4,096 tokens."""
    lr: float = 1e-3
    """Learning rate."""
    eval_problems: int = 512
    """Number of held-out problems, with 4 answers each."""
    max_new_tokens: int = 192
    """Maximum number of new tokens per answer to a held-out problem."""
    out: str | None = None
    """File for the results."""


def sampled(flags: Flags, model: str, folder: Path, seed: int) -> CollectConfig:
    """Sample once; returns the call whose samples are all there, to be resumed with other filters."""
    # No answer earns so much: nothing is kept, and the samples stay.
    config = CollectConfig(run=model, out=str(folder / "samples.jsonl"), problems=flags.problems,
                           samples=flags.samples, max_new_tokens=flags.sample_tokens, seed=seed, resume=True,
                           min_reward=99.0)
    try:
        collect(config)
    except ValueError as error:
        if "nothing is kept" not in str(error):
            raise
    return config


def measured(flags: Flags, model: str, out: Path, seed: int) -> dict:
    """What a model does on held-out problems, as JSON types."""
    config = EvalConfig(run=model, n=flags.eval_problems, max_new_tokens=flags.max_new_tokens, seed=seed,
                        out=str(out))
    return run_eval(config).to_dict()


def behaviour_in(path: Path) -> dict:
    """What the thoughts do in a file of responses: r1zero.train.report.behaviour."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    problems = [Countdown.problem_from_record(row["problem"]) for row in rows]
    return measure(problems, [row["response"] for row in rows]).to_dict()


def run_arm(flags: Flags, samples: CollectConfig, name: str, folder: Path, seed: int) -> dict:
    """Choose, train, measure."""
    data = folder / "data.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(f"{samples.out}.partial", f"{data}.partial")
    chosen = collect(replace(samples, out=str(data), min_reward=None, **ARMS[name]))
    lines = data.read_text().splitlines(keepends=True)[: flags.pairs]
    data.write_text("".join(lines))
    rows = [json.loads(line) for line in lines]
    sft(SFTConfig(run=str(folder / "run"), base=flags.base, data=(str(data),), steps=flags.steps,
                  batch_tokens=4096, micro_tokens=4096, save_every=flags.steps, seed=seed,
                  optim=OptimConfig(lr=flags.lr, warmup=5, weight_decay=0.0)))
    found = measured(flags, str(folder / "run"), folder / "eval.jsonl", seed)
    return {
        "pairs": len(rows),
        "problems": len({row["index"] for row in rows}),
        "pair_tokens": float(np.mean([row["n_tokens"] for row in rows])),
        "pairs_right": float(np.mean([row["parts"]["accuracy"] for row in rows])),
        "kept": chosen["kept"] / chosen["sampled"],
        "sampled_tokens": chosen["tokens"],
        **{name: found[name] for name in ("accuracy", "format_rate", "mean_tokens", "truncated")},
        "pass_at_4": found["pass_at"]["4"],
        "behaviour_of_data": behaviour_in(data),
        "behaviour_of_model": behaviour_in(folder / "eval.jsonl"),
    }


def interval(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """mean ± half a 95 % interval."""
    mean, half = mean_and_interval([value * scale for value in values])
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def main(flags: Flags) -> dict:
    work = Path(flags.work)
    check_settings(flags.work, {name: value for name, value in vars(flags).items()
                                if name not in ("work", "seeds", "out")})
    results = {}
    for seed in range(flags.seeds):
        for source, model in (("base", flags.base), ("teacher", flags.teacher)):
            samples = None
            for name in ARMS:
                folder = work / f"{source}-{seed}-{name.replace(', ', '-').replace(' ', '_')}"
                path = folder / "result.json"
                if not path.exists():
                    shutil.rmtree(folder, ignore_errors=True)
                    samples = samples or sampled(flags, model, work / f"{source}-{seed}", seed)
                    atomic_write_json(path, run_arm(flags, samples, name, folder, seed))
                results.setdefault(f"{source}: {name}", []).append(json.loads(path.read_text()))
    before, teacher = (measured(flags, model, work / f"{name}_eval.jsonl", 0)
                       for name, model in (("base", flags.base), ("teacher", flags.teacher)))
    rows = []
    for name, runs in results.items():
        cells = [interval([run[key] for run in runs], *how) for key, *how in COLUMNS.values()]
        rows.append([name, *cells])
    table(["data", *COLUMNS], rows)
    found = {"flags": vars(flags), "runs": results, "base": before, "teacher": teacher}
    return finish("rejection", found, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags))
