"""How far a mixture's sampler is from its trainer in log-probs, and what the replay of routes mends.

    python -m benchmarks.routing                              random mixtures: minutes of one core
    python -m benchmarks.routing --base DIR                   and a run folder of one that knows Countdown
    python -m benchmarks.routing --base DIR --curve-steps 16 --seeds 0 1 2 --out routing.json      and GRPO

The engine samples, and keeps the routes of its tokens. The trainer scores the same tokens twice: its routers
choose, or they replay. Both have the same weights; they differ in dtype, in batching, and in order of sums. A
router "flips" if its K experts are not those of the engine, and a token if a router of it does. Peers: the
pairs of dtypes, in the same run. fp32 with fp32 is one program's rounding, bf16 with fp32 that of an engine
in 16 bit beside fp32 masters. A dense model of the same shape says what rounding alone does.

The curve trains a mixture by GRPO from samples of a bf16 engine in an fp32 trainer, with the replay and
without. The engine's weights are the trainer's own, read in bf16. Runs whose file is in --work are not done
again.

Source: routing replay, arXiv 2510.11370.
"""
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from r1zero.eval.harness import evaluate
from r1zero.eval.sampler import ModelSampler
from r1zero.model.checkpoint import load_model
from r1zero.model.config import ModelConfig
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.sampling import sample_seeds
from r1zero.model.files import atomic_write_json
from r1zero.model.moe_config import ROUTING, MoEConfig
from r1zero.model.optimizer import OptimConfig
from r1zero.model.routes import RecordedRouting, differ
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.rl.rollouts import micro_batches, response_logprobs, sample_groups
from r1zero.rl.step import grpo_step
from r1zero.train.grpo import grpo_config, make_learner
from r1zero.train.machine import reuse_memory
from r1zero.train.recipes.demo import DemoConfig, task_of
from r1zero.train.report.plots import BASE, save

from .ablation import mean_and_interval
from .common import finish, table

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
PAIRS = {"fp32, fp32": (FP32, FP32), "bf16, bf16": (BF16, BF16), "bf16, fp32": (BF16, FP32)}
# Models with random weights: experts, and experts per token.
SIZES = {"dense": None, "E=32 K=4": (32, 4), "E=128 K=8": (128, 8)}
MICRO_TOKENS = 4096
SHARPER = 2.0  # the head of random weights: entropies as of a trained model, not those of a die
KEPT = ("accuracy", "length", "logp_gap", "logp_gap_mean", "flipped_routers", "flipped_tokens",
        "gradient_norm", "entropy", "ratio_max", "clipped_low", "clipped_high", "tokens", "expert_load_max")
NEW_TOKENS = 96  # at most, per answer of a curve
HELD_OUT = 256  # problems, with as many answers each:
ANSWERS = 2


@dataclass(frozen=True)
class Flags:
    """Routing replay: gaps and curves."""

    base: str | None = None
    """Run folder of a mixture of experts that knows Countdown."""
    sequences: int = 32
    tokens: int = 64
    """Sampled tokens per sequence."""
    seed: int = 0
    """Seed of random weights and of the samples that gaps are measured on."""
    curve_steps: int = 0
    """Number of GRPO steps of each curve; 0 makes none."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the curves."""
    problems: int = 8
    """Number of problems per GRPO step, with 16 answers each."""
    lr: float = 4e-4
    work: str = "runs/routing"
    """Folder for one JSON file per curve."""
    out: str | None = None
    """File for the line of JSON. The picture of the curves goes beside it."""


# ---- gaps ----

def random_model(size: tuple[int, int] | None, seed: int) -> Transformer:
    """A small Qwen3-MoE with random weights, or one without experts."""
    moe = MoEConfig(*size, 32, **ROUTING["qwen3-moe"]) if size else None
    config = ModelConfig(vocab_size=Tokenizer.bytes().vocab_size, n_layers=8, d_model=128, n_heads=4,
                         n_kv_heads=2, head_dim=32, d_ff=384, max_seq_len=512, qk_norm=True,
                         tie_embeddings=False, moe=moe)
    model = Transformer(config).init_weights(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARPER)
    return model


def twin(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The same weights, in the same memory, computed with in another dtype."""
    other = Transformer(model.config, dtype)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def gaps_of(model: Transformer, rollouts, replays: bool) -> dict:
    """How far the trainer's log-probs are from the sampler's; k3 is Schulman's estimate of the KL."""
    gaps, flips = [], []
    for batch in micro_batches(rollouts, np.arange(len(rollouts.texts)), MICRO_TOKENS, CPU):
        routing = batch.replay() if replays else RecordedRouting()
        logp, _ = response_logprobs(model, batch, rollouts.temperature, routing)
        gaps.append(logp.double() - batch.sampler_logp.double())
        # A router that replays may still want other experts; without the replay it takes them, and the
        # layers above read what those have made.
        if replays:
            flips.append(routing.flipped())
        elif model.config.moe is not None:
            flips.append(differ(batch.routes, torch.from_numpy(routing.routes(model.config))))
    d = torch.cat(gaps)
    found = {"tokens": len(d), "mean": float(d.abs().mean()), "max": float(d.abs().max()),
             "k3": float((torch.expm1(d) - d).mean())}
    if flips:
        flipped_TL = torch.cat(flips).double()
        found |= {"routers": float(flipped_TL.mean()), "flipped_tokens": float(flipped_TL.amax(1).mean())}
    return found


def mixture_in(base: str) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a run folder. Raises ValueError for a dense model."""
    model, tokenizer, _ = load_model(base, CPU)
    if model.config.moe is None:
        raise ValueError(f"--base {base} is a dense model; expected a mixture of experts")
    return model, tokenizer


def measure_gaps(model: Transformer, tokenizer, prompts: list[str], f: Flags) -> dict:
    """pair of dtypes -> {"free": gaps, "replayed": gaps}; a dense model has nothing to replay."""
    found, ways = {}, ("free",) if model.config.moe is None else ("free", "replayed")
    for name, (sampler, trainer) in PAIRS.items():
        engine = Engine(twin(model, sampler), tokenizer, max_rows=f.sequences, keep_routes=True)
        size = f.sequences // len(prompts)
        seeds = sample_seeds(len(prompts) * size, f.seed)
        rollouts = sample_groups(engine, prompts, size, f.tokens, 1.0, seeds)
        scorer = twin(model, trainer)
        found[name] = {way: gaps_of(scorer, rollouts, way == "replayed") for way in ways}
    return found


# ---- curves ----

def curve_config(f: Flags, seed: int, replays: bool):
    optim = OptimConfig(lr=f.lr, warmup=5, schedule="constant", weight_decay=0.0, eps=1e-8)
    # The gap is measured here, so no gap stops a run.
    return grpo_config("demo", run="none", base=f.base, seed=seed, task=task_of(DemoConfig(), seed),
                       prompts_per_step=f.problems, max_new_tokens=NEW_TOKENS, optim=optim, kl_samples=0,
                       max_logp_gap=1e9, routing_replay=replays)


def one_curve(f: Flags, seed: int, replays: bool) -> dict:
    """GRPO from samples of a bf16 engine: the metrics of each step, and held-out accuracy at the end."""
    config = curve_config(f, seed, replays)
    task, base = config.task.make(), load_model(f.base, CPU)
    learner = make_learner(config, task, base)
    learner.sampler.engine = Engine(twin(learner.policy, BF16), base[1], keep_routes=replays)
    rows, started = [], time.perf_counter()
    for step in range(f.curve_steps):
        metrics = grpo_step(learner, task, config, step)
        rows.append({name: float(f"{metrics[name]:.4g}") for name in KEPT if name in metrics})
        print(f"seed {seed}, replay {replays}, step {step + 1}: {rows[-1]}", flush=True)
    return {"seed": seed, "replays": replays, "rows": rows, "seconds": time.perf_counter() - started,
            **held_out(learner.sampler.engine, config, task, seed)}


def held_out(engine: Engine, config, task, seed: int) -> dict:
    """Accuracy on held-out problems at temperature 1, and its 95 % interval, of the bf16 engine."""
    engine.refresh()
    sampler = ModelSampler(engine.model, engine.tokenizer, config.max_new_tokens, 1.0, seed, engine=engine)
    problems = task.problems("test", HELD_OUT)
    found = evaluate(sampler, task, problems, ANSWERS, batch=64, progress=False).to_dict()
    return {"held_out": found["accuracy"], "held_out_95": found["accuracy_95"]}


def run_or_read(f: Flags, seed: int, replays: bool) -> dict:
    """A curve, from its file if it is there. Raises ValueError for other settings."""
    settings = {"base": f.base, "steps": f.curve_steps, "problems": f.problems, "lr": f.lr}
    path = Path(f.work) / f"{'replay' if replays else 'free'}_{seed}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, {**one_curve(f, seed, replays), "settings": settings})
    run = json.loads(path.read_text(encoding="utf-8"))
    if run.pop("settings") != settings:
        raise ValueError(f"{path} was made with other settings; give another --work, or remove it")
    return run


def plot(curves: list[dict], base: dict, path: Path) -> Path:
    """Accuracy, mean gap and largest gap over the steps, with the replay and without."""
    figure = Figure(figsize=(12, 4), dpi=110, layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3)
    names = {"accuracy": "accuracy of the samples, %", "logp_gap_mean": "mean gap per step, nats",
             "logp_gap": "largest gap per step, nats"}
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        for replays, colour in ((False, "tab:red"), (True, "tab:blue")):
            runs = [curve for curve in curves if curve["replays"] == replays]
            scale = 100 if name == "accuracy" else 1
            values = scale * np.array([[row[name] for row in run["rows"]] for run in runs])
            steps = np.arange(1, values.shape[1] + 1)
            for line in values:
                axes.plot(steps, line, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, values.mean(0), color=colour, linewidth=2,
                      label="routes replayed" if replays else "routers choose again")
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if name != "accuracy":
            axes.set_yscale("log")
    panels[0].axhline(100 * base["held_out"], color=BASE, linestyle="--", label="base, held-out")
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle("GRPO of a mixture of experts: bf16 engine, fp32 trainer", fontsize=11)
    return save(figure, path)


def measure_curves(f: Flags) -> dict:
    """All curves, and the base."""
    # A seed's two runs come before the next seed, so that a stop leaves a fair comparison.
    curves = [run_or_read(f, seed, replays) for seed in f.seeds for replays in (True, False)]
    config = curve_config(f, 0, True)
    model, tokenizer = mixture_in(f.base)
    base = held_out(Engine(twin(model, BF16), tokenizer), config, config.task.make(), 0)
    rows = []
    for name, replays in (("replayed", True), ("free", False)):
        some = [curve for curve in curves if curve["replays"] == replays]
        mean, half = mean_and_interval([100 * curve["held_out"] for curve in some])
        steps = [row for curve in some for row in curve["rows"]]
        rows.append([name, len(some), f"{mean:.1f} ± {half:.1f} %", *(
            f"{np.mean([row[key] for row in steps]):.2g}" for key in ("logp_gap_mean", "logp_gap")),
            f"{max(row['logp_gap'] for row in steps):.2g}"])
    low, high = base["held_out_95"]
    print(f"base, held-out: {base['held_out']:.1%} ({low:.1%} to {high:.1%})")
    table(["routes", "seeds", "held-out", "mean gap", "a step's largest", "largest of all"], rows)
    if f.out:
        plot(curves, base, Path(f.out).with_suffix(".png"))
    return {"base": base, "curves": curves}


def main(f: Flags) -> dict:
    if f.curve_steps and f.base is None:
        raise ValueError(f"--curve-steps is {f.curve_steps}, but there is no --base to train")
    reuse_memory()
    gaps = {}
    with torch.no_grad():
        for name, size in SIZES.items():
            prompts = [f"{number}:" for number in range(8)]
            gaps[name] = measure_gaps(random_model(size, f.seed), Tokenizer.bytes(), prompts, f)
        if f.base is not None:
            model, tokenizer = mixture_in(f.base)
            task = task_of(DemoConfig(), 0).make()
            prompts = [task.prompt(problem) for problem in task.problems("train", 8)]
            gaps["trained"] = measure_gaps(model, tokenizer, prompts, f)
    rows = []
    for model_name, pairs in gaps.items():
        for pair, found in pairs.items():
            for way, n in found.items():
                shares = [f"{n[key]:.1%}" if key in n else "-" for key in ("routers", "flipped_tokens")]
                numbers = [f"{n[key]:.2g}" for key in ("mean", "max", "k3")]
                rows.append([f"{model_name}, {pair}, {way}", f"{n['tokens']:,}", *shares, *numbers])
    header = ["model, sampler and trainer, routes", "tokens", "flipped routers", "flipped tokens", "mean gap",
              "largest", "k3"]
    table(header, rows)
    curves = measure_curves(f) if f.curve_steps else None
    return finish("routing", {"flags": asdict(f), "gaps": gaps, "curves": curves}, f.out)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
