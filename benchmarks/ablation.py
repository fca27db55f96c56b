"""All presets of `--algo` on the demo's task: same base, same budget of sampled tokens, several seeds.

    python -m benchmarks.ablation --base runs/demo/seed0/base       hours; call it again after a stop
    python -m benchmarks.ablation --presets r1_zero dapo --seeds 3 --budget 100000
    python -m benchmarks.ablation --table-of benchmarks/results/ablation.json     table and picture again

Each step samples 16 answers to each of 16 problems, and takes 4 optimizer steps on them. So ratios leave 1,
and the clips have something to do. "@1" takes one optimizer step, on-policy, as the papers without a ratio
do.

All presets have the same optimizer at the same learning rate: AdamW with a small eps. Then the overall scale
of a loss does not matter (except where the gradient's norm is cut to 1), and what is compared is the
direction. Nothing was tuned but the learning rate, which all presets share. Tokens that dynamic sampling
throws away count.

Afterwards, on held-out problems: pass@k for k = 1 to 16, from 16 answers to each at temperature 1, and greedy
accuracy. The base is measured too, and the control, whose rewards are shuffled within each group. Intervals
are Student's t over seeds: what another seed would give on the same base and the same problems. One base is
one sample of a base; differences smaller than the intervals are noise.
"""
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from tqdm import tqdm

from r1zero.eval.harness import evaluate
from r1zero.eval.sampler import ModelSampler
from r1zero.model.checkpoint import load_model
from r1zero.model.files import atomic_write_json
from r1zero.model.optimizer import OptimConfig
from r1zero.rl.family import PRESETS
from r1zero.train.grpo import GRPOConfig, grpo_config, make_learner, timed_step
from r1zero.train.machine import pick_device, reuse_memory
from r1zero.train.pretrain import pretrain
from r1zero.train.recipes.demo import DemoConfig, base_config, task_of
from r1zero.train.report.plots import BASE, CONTROL, save, smooth

from .common import finish, table

# The 97.5 % quantile of Student's t, by the number of runs.
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
KS = (1, 2, 4, 8, 16)
KEPT = ("accuracy", "length", "truncated", "dead_groups", "entropy", "gradient_norm", "ratio_max",
        "clipped_low", "clipped_high", "kl_to_reference", "tokens", "replaced_tokens", "rollout_s",
        "update_s", "value_explained")  # metrics of each step that stay in the results


REWARDED = [algo for algo in PRESETS if algo != "distill"]  # which has a teacher instead


@dataclass(frozen=True)
class Flags:
    """Train all presets on the same budget of tokens, and compare them."""

    base: str = "runs/ablation/base"
    """Folder of the base model's run. If it is missing, a base is pretrained there, as the demo does it."""
    work: str = "runs/ablation/runs"
    """Folder for one JSON file per run. Runs whose file is there are not done again."""
    presets: tuple[str, ...] = (*REWARDED, "r1_zero@1", "rloo@1", "reinforce@1", "control")
    """Presets to run. "control" is r1_zero with the rewards shuffled within each group. "@1" takes one
    optimizer step per batch of samples."""
    seeds: int = 3
    """Number of runs of each preset, with the seeds 0, 1, ..."""
    budget: int = 400_000
    """Number of sampled tokens per run. The step that passes it is the last one."""
    lr: float = 2e-4
    """Learning rate of the policy, after 5 steps of warm-up. The critic's is three times that."""
    updates_per_step: int = 4
    """Number of optimizer steps on each batch of samples."""
    problems: int = 256
    """Number of held-out problems."""
    table_of: str | None = None
    """Print and plot the results in this file, instead of measuring."""
    out: str | None = None
    """File for the line of JSON. The picture goes beside it."""


# ---- one run ----

def fingerprint(model) -> str:
    """A hash of all weights: runs from another base are another experiment."""
    whole = hashlib.sha256()
    for name, p in model.named_parameters():
        whole.update(name.encode() + p.detach().numpy().tobytes())
    return whole.hexdigest()[:16]


def config_of(preset: str, seed: int, flags: Flags) -> GRPOConfig:
    """The configuration of a run; `preset` may end with "@" and its own number of optimizer steps."""
    algo, _, updates = preset.partition("@")
    optim = OptimConfig(lr=flags.lr, warmup=5, schedule="constant", weight_decay=0.0, eps=1e-8)
    demo = DemoConfig()
    return grpo_config("r1_zero" if algo == "control" else algo, run="none", base=flags.base, seed=seed,
                       task=task_of(demo, 0), max_new_tokens=demo.max_new_tokens,
                       micro_tokens=2048, updates_per_step=int(updates or flags.updates_per_step),
                       control="permute" if algo == "control" else "none", optim=optim,
                       critic_optim=replace(optim, lr=3 * flags.lr))


def measure(model, tokenizer, task, config: GRPOConfig, flags: Flags) -> dict:
    """Held-out metrics, with the same problems and random numbers for every model of a seed."""
    problems = task.problems("test", flags.problems)
    found = {}
    for name, temperature, samples, ks in (("sampled", 1.0, max(KS), KS), ("greedy", 0.0, 1, (1,))):
        sampler = ModelSampler(model, tokenizer, config.max_new_tokens, temperature, config.seed)
        found[name] = evaluate(sampler, task, problems, samples, ks, batch=64, progress=False).to_dict()
    sampled, greedy = found["sampled"], found["greedy"]
    return {"pass_at": sampled["pass_at"], "greedy": greedy["accuracy"], "length": sampled["mean_tokens"],
            "format": sampled["format_rate"], "truncated": sampled["truncated"]}


def one_run(preset: str, seed: int, flags: Flags) -> dict:
    """Train until the budget is spent, then measure. The preset "base" is measured as it is."""
    config = config_of("r1_zero" if preset == "base" else preset, seed, flags)
    task = config.task.make()
    learner = make_learner(config, task, load_model(config.base, pick_device("auto")))
    rows, started = [], time.perf_counter()
    with tqdm(total=flags.budget, desc=f"{preset} {seed}", unit="token", leave=False) as bar:
        while preset != "base" and sum(row["tokens"] for row in rows) < flags.budget:
            metrics = timed_step(learner, task, config, len(rows))
            assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]), metrics
            rows.append({name: float(f"{metrics[name]:.4g}") if name != "tokens" else metrics[name]
                         for name in KEPT if name in metrics})
            bar.update(metrics["tokens"])
            bar.set_postfix(accuracy=f"{metrics['accuracy']:.2f}", length=f"{metrics['length']:.0f}")
    seconds = time.perf_counter() - started
    return {"preset": preset, "seed": seed, "seconds": seconds, "rows": rows,
            **measure(learner.policy, learner.sampler.engine.tokenizer, task, config, flags)}


# ---- all runs together ----

def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of the 95 % interval of Student's t); the width of one value is NaN."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan
    std = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
    return mean, T95.get(n, 2.31) * std / math.sqrt(n)


def by_preset(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs of each preset, the best preset first."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["preset"], []).append(run)

    def score(name: str) -> float:
        return mean_and_interval([run["pass_at"]["1"] for run in groups[name]])[0]

    return {name: groups[name] for name in sorted(groups, key=score, reverse=True)}


COLUMNS = {  # header: (what to take from a run, how to print it)
    "pass@1": (lambda run: run["pass_at"]["1"], ".1%"), "greedy": (lambda run: run["greedy"], ".1%"),
    "pass@16": (lambda run: run["pass_at"]["16"], ".1%"), "length": (lambda run: run["length"], ".0f"),
    "steps": (lambda run: len(run["rows"]), ".0f"), "seconds": (lambda run: run["seconds"], ".0f")}


def print_table(runs: list[dict]) -> None:
    def column(some: list[dict], metric, form: str) -> str:
        mean, half = mean_and_interval([metric(run) for run in some])
        return f"{format(mean, form)} ± {format(half, form).strip('%')}"

    rows = []
    for name, some in by_preset(runs).items():
        tokens = [sum(row["tokens"] for row in run["rows"]) for run in some]
        columns = [column(some, metric, form) for metric, form in COLUMNS.values()]
        rows.append([name, len(some), *columns, f"{sum(tokens) / len(tokens) / 1000:,.0f}k"])
    table(["preset", "seeds", *COLUMNS, "tokens"], rows)


def plot(runs: list[dict], path: Path) -> Path:
    """Plot held-out pass@1 of each preset, accuracy over tokens, and pass@k before and after."""
    groups = by_preset(runs)
    names = [*groups]
    colours = dict(zip(names, colormaps["tab20"].colors, strict=False))
    colours |= {"base": BASE, "control": CONTROL}
    figure = Figure(figsize=(15, 6), dpi=120, layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)

    # Left: pass@1 with its interval, and one dot per seed.
    for y, name in enumerate(names[::-1]):
        values = [100 * run["pass_at"]["1"] for run in groups[name]]
        mean, half = mean_and_interval(values)
        left.errorbar([mean], [y], xerr=None if math.isnan(half) else [half], fmt="D", color=colours[name],
                      capsize=4)
        left.plot(values, [y] * len(values), "o", color=colours[name], alpha=0.5, markersize=5)
    left.set(yticks=range(len(names)), yticklabels=names[::-1], xlim=(0, 100), xlabel="held-out pass@1, %")
    left.set_title("After the same number of tokens", loc="left", fontweight="bold")

    # Middle: the accuracy of the samples during training. Right: pass@k afterwards.
    for name in names:
        thick = 2.5 if name in ("base", "control") else 1.3
        for run in groups[name]:
            spent = [total / 1000 for total in accumulate(row["tokens"] for row in run["rows"])]
            middle.plot(spent, smooth(spent, [100 * row["accuracy"] for row in run["rows"]], 2),
                        color=colours[name], linewidth=thick)
        means = [100 * mean_and_interval([run["pass_at"][str(k)] for run in groups[name]])[0] for k in KS]
        right.plot(KS, means, "o-", color=colours[name], label=name, linewidth=thick, markersize=4)
    middle.set(ylim=(0, 100), xlabel="sampled tokens, thousands", ylabel="accuracy of the samples, %")
    middle.set_title("On the way, each seed", loc="left", fontweight="bold")
    right.set_xscale("log", base=2)
    right.set(xticks=KS, xticklabels=KS, ylim=(0, 100), xlabel="k", ylabel="held-out pass@k, %")
    right.set_title("Sharper, or abler?", loc="left", fontweight="bold")

    figure.legend(loc="outside lower center", ncols=8, frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E3E3E3")
        axes.set_axisbelow(True)
    return save(figure, path)


def run_or_read(preset: str, seed: int, flags: Flags, settings: dict) -> dict:
    """The results of a run, from its file if it is there. Raises ValueError for other settings."""
    path = Path(flags.work) / f"{preset}_{seed}.json"
    if not path.exists():
        atomic_write_json(path, {**one_run(preset, seed, flags), "settings": settings})
    run = json.loads(path.read_text(encoding="utf-8"))
    if run.pop("settings") != settings:
        raise ValueError(f"{path} was made with other settings; give another --work, or remove it")
    return run


def main(flags: Flags) -> None:
    if flags.table_of:
        runs = json.loads(Path(flags.table_of).read_text(encoding="utf-8"))["runs"]
        print_table(runs)
        print(plot(runs, Path(flags.table_of).with_suffix(".png")))
        return
    reuse_memory()
    if not (Path(flags.base) / "checkpoints").exists():
        pretrain(base_config(DemoConfig(), Path(flags.base), seed=0))
    model, _, _ = load_model(flags.base, torch.device("cpu"))  # a base that cannot be loaded is told now
    settings = {name: value for name, value in asdict(flags).items()
                if name in ("budget", "lr", "updates_per_step", "problems")}
    settings["base"] = fingerprint(model)
    Path(flags.work).mkdir(parents=True, exist_ok=True)

    # All presets of a seed come before the next seed, so that a stop leaves a fair comparison.
    runs = []
    for seed in range(flags.seeds):
        for preset in ("base", *flags.presets):
            run = run_or_read(preset, seed, flags, settings)
            runs.append(run)
            tqdm.write(f"{preset} {seed}: pass@1 {run['pass_at']['1']:.1%}, {run['length']:.0f} tokens, "
                       f"{run['seconds']:.0f} s")
    print_table(runs)
    if flags.out:
        plot(runs, Path(flags.out).with_suffix(".png"))
    finish("ablation", {"flags": asdict(flags), "runs": runs}, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
