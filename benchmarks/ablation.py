"""All presets of `--algo` on the demo's task, with the same base, the same budget of sampled tokens, several
seeds.

    python -m benchmarks.ablation --base runs/demo/seed0/base       hours; called again, goes on after a stop
    python -m benchmarks.ablation --presets r1_zero dapo --seeds 3 --budget 100000
    python -m benchmarks.ablation --table-of benchmarks/results/ablation.json     table and picture again

Each run samples 16 answers to each of 16 problems a step and takes 4 optimizer steps on them, so that ratios
leave 1 and the clips have something to do; "@1" takes one, on-policy, as the papers without a ratio do. All
have the same optimizer at the same learning rate: AdamW with a small eps, which a loss's overall scale does
not matter to (but where the gradient's norm is cut to 1), so what is compared is the direction. No preset was
tuned but by the learning rate that all share. Tokens that dynamic sampling throws away count.

Then, on held-out problems: pass@k for k = 1 to 16 from 16 answers each at temperature 1, and greedy accuracy;
of the base, of every run, and of the control, whose rewards are dealt out at random within each group.
Intervals are Student's t over seeds: what another seed would give on the same base and the same problems. One
base is one throw; differences smaller than the intervals are noise.
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
from r1zero.model.checkpoint import atomic_write_json, load_model
from r1zero.model.optimizer import OptimConfig
from r1zero.rl.family import PRESETS
from r1zero.train.grpo import GRPOConfig, grpo_config, make_learner, timed_step
from r1zero.train.machine import pick_device, reuse_memory
from r1zero.train.pretrain import pretrain
from r1zero.train.recipes.demo import DemoConfig, base_config, task_of
from r1zero.train.report.plots import BASE, CONTROL, save, smooth

from .common import finish, table

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, by runs
KS = (1, 2, 4, 8, 16)
KEPT = ("accuracy", "length", "truncated", "dead_groups", "entropy", "gradient_norm", "ratio_max",
        "clipped_low", "clipped_high", "kl_to_reference", "tokens", "replaced_tokens", "rollout_s",
        "update_s", "value_explained")


@dataclass(frozen=True)
class Flags:
    """The presets against each other."""

    base: str = "runs/ablation/base"
    """Folder of the base model's run; pretrained there as the demo does it if it is missing."""
    work: str = "runs/ablation/runs"
    """Folder for a JSON file of each run; those that are there are not done again."""
    presets: tuple[str, ...] = (*PRESETS, "r1_zero@1", "rloo@1", "reinforce@1", "control")
    """Which; "control" is r1_zero with the rewards dealt out at random; @1 takes 1 optimizer step a batch."""
    seeds: int = 3
    """Runs of each preset, with the seeds 0, 1, ..."""
    budget: int = 400_000
    """Sampled tokens of a run; the step that passes it is its last."""
    lr: float = 2e-4
    """Of the policy, after 5 steps of warm-up; the critic's is three times that."""
    updates_per_step: int = 4
    """Optimizer steps on each batch of rollouts."""
    problems: int = 256
    """Held-out problems."""
    table_of: str | None = None
    """Print and draw what is in this file instead of measuring."""
    out: str | None = None
    """File for the line of JSON; the picture goes beside it."""


def fingerprint(model) -> str:
    """Of all weights: runs from another base are another experiment."""
    whole = hashlib.sha256()
    for name, p in model.named_parameters():
        whole.update(name.encode() + p.detach().numpy().tobytes())
    return whole.hexdigest()[:16]


def config_of(preset: str, seed: int, f: Flags) -> GRPOConfig:
    algo, _, updates = preset.partition("@")
    optim = OptimConfig(lr=f.lr, warmup=5, schedule="constant", weight_decay=0.0, eps=1e-8)
    demo = DemoConfig()
    return grpo_config("r1_zero" if algo == "control" else algo, run="", base=f.base, seed=seed,
                       task=task_of(demo, 0), max_new_tokens=demo.max_new_tokens,
                       micro_tokens=2048, updates_per_step=int(updates or f.updates_per_step),
                       control=algo == "control", optim=optim, critic_optim=replace(optim, lr=3 * f.lr))


def measure(model, tokenizer, task, c: GRPOConfig, f: Flags) -> dict:
    """Held-out figures, the same problems and random numbers for every model of a seed."""
    problems, figures = task.problems("test", f.problems), {}
    for name, temperature, samples, ks in (("sampled", 1.0, max(KS), KS), ("greedy", 0.0, 1, (1,))):
        sampler = ModelSampler(model, tokenizer, c.max_new_tokens, temperature, c.seed)
        figures[name] = evaluate(sampler, task, problems, samples, ks, batch=64, progress=False).to_dict()
    sampled, greedy = figures["sampled"], figures["greedy"]
    return {"pass_at": sampled["pass_at"], "greedy": greedy["accuracy"], "length": sampled["mean_tokens"],
            "format": sampled["format_rate"], "truncated": sampled["truncated"]}


def one_run(preset: str, seed: int, f: Flags) -> dict:
    """Train until the budget is spent, then measure; preset "base" is measured as it is."""
    c = config_of("r1_zero" if preset == "base" else preset, seed, f)
    task, device = c.task.make(), pick_device("auto")
    s = make_learner(c, task, device)
    rows, started = [], time.perf_counter()
    with tqdm(total=f.budget, desc=f"{preset} {seed}", unit="token", leave=False) as bar:
        while preset != "base" and sum(row["tokens"] for row in rows) < f.budget:
            row = timed_step(s, task, c, len(rows))
            assert math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"]), row
            rows.append({name: float(f"{row[name]:.4g}") if name != "tokens" else row[name]
                         for name in KEPT if name in row})
            bar.update(row["tokens"])
            bar.set_postfix(accuracy=f"{row['accuracy']:.2f}", length=f"{row['length']:.0f}")
    seconds = time.perf_counter() - started
    return {"preset": preset, "seed": seed, "seconds": seconds, "rows": rows,
            **measure(s.policy, s.sampler.engine.tokenizer, task, c, f)}


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of the 95 % interval of Student's t; NaN for a single value)."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan
    std = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
    return mean, T95.get(n, 2.31) * std / math.sqrt(n)


def by_preset(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs of each preset, the best first."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["preset"], []).append(run)

    def score(name: str) -> float:
        return mean_and_interval([run["pass_at"]["1"] for run in groups[name]])[0]

    return {name: groups[name] for name in sorted(groups, key=score, reverse=True)}


COLUMNS = {
    "pass@1": (lambda run: run["pass_at"]["1"], ".1%"), "greedy": (lambda run: run["greedy"], ".1%"),
    "pass@16": (lambda run: run["pass_at"]["16"], ".1%"), "length": (lambda run: run["length"], ".0f"),
    "steps": (lambda run: len(run["rows"]), ".0f"), "seconds": (lambda run: run["seconds"], ".0f")}


def print_table(runs: list[dict]) -> None:
    def column(some: list[dict], figure, form: str) -> str:
        mean, half = mean_and_interval([figure(run) for run in some])
        return f"{format(mean, form)} ± {format(half, form).strip('%')}"

    rows = []
    for name, some in by_preset(runs).items():
        tokens = [sum(row["tokens"] for row in run["rows"]) for run in some]
        rows.append([name, len(some),
                     *(column(some, figure, form) for figure, form in COLUMNS.values()),
                     f"{sum(tokens) / len(tokens) / 1000:,.0f}k"])
    table(["preset", "seeds", *COLUMNS, "tokens"], rows)


def draw(runs: list[dict], path: Path) -> Path:
    """Held-out pass@1 of each preset; accuracy over tokens; pass@k before and after."""
    groups = by_preset(runs)
    figure = Figure(figsize=(15, 6), dpi=120, layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    names, colours = [*groups], dict(zip(groups, colormaps["tab20"].colors, strict=False))
    colours |= {"base": BASE, "control": CONTROL}
    for y, name in enumerate(names[::-1]):
        values = [100 * run["pass_at"]["1"] for run in groups[name]]
        mean, half = mean_and_interval(values)
        left.errorbar([mean], [y], xerr=None if math.isnan(half) else [half], fmt="D", color=colours[name],
                      capsize=4)
        left.plot(values, [y] * len(values), "o", color=colours[name], alpha=0.5, markersize=5)
    left.set(yticks=range(len(names)), yticklabels=names[::-1], xlim=(0, 100), xlabel="held-out pass@1, %")
    left.set_title("After the same number of tokens", loc="left", fontweight="bold")
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


def main(f: Flags) -> None:
    if f.table_of:
        runs = json.loads(Path(f.table_of).read_text(encoding="utf-8"))["runs"]
        print_table(runs)
        print(draw(runs, Path(f.table_of).with_suffix(".png")))
        return
    reuse_memory()
    if not (Path(f.base) / "checkpoints").exists():
        pretrain(base_config(DemoConfig(), Path(f.base), seed=0))
    model, _, _ = load_model(f.base, torch.device("cpu"))  # whatever is wrong with it is told now
    settings = {name: value for name, value in asdict(f).items()
                if name in ("budget", "lr", "updates_per_step", "problems")}
    settings["base"] = fingerprint(model)
    runs, work = [], Path(f.work)
    work.mkdir(parents=True, exist_ok=True)
    for seed in range(f.seeds):  # all presets of a seed before the next: what is there after a stop is fair
        for preset in ("base", *f.presets):
            path = work / f"{preset}_{seed}.json"
            if not path.exists():
                atomic_write_json(path, {**one_run(preset, seed, f), "settings": settings})
            run = json.loads(path.read_text(encoding="utf-8"))
            if run.pop("settings") != settings:
                raise ValueError(f"{path} was made with other settings; give another --work, or remove it")
            runs.append(run)
            tqdm.write(f"{preset} {seed}: pass@1 {run['pass_at']['1']:.1%}, {run['length']:.0f} tokens, "
                       f"{run['seconds']:.0f} s")
    print_table(runs)
    if f.out:
        draw(runs, Path(f.out).with_suffix(".png"))
    finish("ablation", {"flags": asdict(f), "runs": runs}, f.out)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
