"""Dense against a mixture of experts with as many active parameters: what each learns, and what it costs.

    python -m benchmarks.dense_vs_moe --work runs/dense_vs_moe      about an hour and a half of one core for
                                                                    three seeds; called again, it goes on
    python -m benchmarks.dense_vs_moe --table-of benchmarks/results/dense_vs_moe.json      the table again

Three arms, each the whole demo (pretraining, R1-Zero, control) for each seed:

    dense            the dense model, with the demo's numbers of steps
    moe              the mixture, with the same numbers of steps: equal active parameters, equal tokens
    moe, equal time  the mixture, with as many steps as take it the dense model's time

The ratio of their times comes from the first two bases of the first seed, measured in turns: steps of
pretraining, steps of GRPO, and decoding, where the dense model is also measured on the cache that the mixture
decodes from. A CPU's compiled loops serve dense layers alone, so the mixture takes pages.

The held-out text is of problems that neither the pretraining nor R1-Zero has seen. Nothing is tuned on it,
nor on the held-out answers: all arms have the dense demo's settings.

A mixture reads and writes memory for all its experts, whatever is active. "Bytes per step" counts what a step
must move of weights, gradients and moments at the least; activations are the same for both.

Left out: GPUs, where neither the kernels nor the costs are these.
"""
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from r1zero.eval.tasks.countdown import Countdown
from r1zero.model.checkpoint import load_model
from r1zero.model.config import ModelConfig, preset
from r1zero.model.engine.engine import Engine
from r1zero.model.files import atomic_write_json
from r1zero.model.transformer import count_active_parameters, count_parameters, flops_per_token
from r1zero.train.batches import DocumentBatches
from r1zero.train.data import encode_documents
from r1zero.train.grpo import make_learner, timed_step
from r1zero.train.log import read_metrics
from r1zero.train.machine import reuse_memory
from r1zero.train.pretrain import corpus_batches
from r1zero.train.recipes.demo import DemoConfig, base_config, demo, grpo_config, task_of
from r1zero.train.recipes.demo_corpus import document

from .common import check_settings, finish, show, spread, table
from .generation import requests_of, take_turns
from .training import Flags as StepFlags
from .training import Steps

CPU = torch.device("cpu")
EQUAL_TIME = "moe, equal time"
NAMES = {"dense": "dense", "moe": "mixture, equal steps", EQUAL_TIME: "mixture, equal time"}
FOLDERS = {"dense": "dense", "moe": "moe", EQUAL_TIME: "moe_equal_time"}
# Bytes per fp32 parameter and step of training: forward and backward read the weight (8), the gradient is
# written (4), read for its norm (4) and by AdamW (4), which reads and writes the weight and two moments (24).
BYTES_PER_STEP = 44
OF_A_RUN = ("run", "resume", "seeds", "model")  # settings of a demo that each run has its own of
PART_STEPS = {"base": "pretrain_steps", "rl": "rl_steps", "control": "control_steps"}


@dataclass(frozen=True)
class Flags:
    """Compare a dense model and a mixture of experts."""

    work: str = "runs/dense_vs_moe"
    """Folder for the demos; what is done there is not done again."""
    dense: str = "demo"
    """Preset of the dense model."""
    moe: str = "demo-moe"
    """Preset of the mixture of experts."""
    seeds: int = 3
    """Number of demos of the first two arms, with the seeds 0, 1, ..."""
    equal_time_seeds: int = 3
    """Number of demos of the arm of equal time."""
    rounds: int = 30
    """Number of timed steps of pretraining; a third as many of GRPO and of decoding."""
    documents: int = 2000
    """Number of held-out documents whose loss is measured."""
    demo: DemoConfig = field(default_factory=DemoConfig)
    """The demo that each arm is."""
    table_of: str | None = None
    """Print the table of the results in this file, instead of measuring."""
    out: str | None = None
    """File for the line of JSON."""


# ---- the arms ----

def demo_of(flags: Flags, arm: str, seed: int, ratios: dict[str, float] | None = None) -> DemoConfig:
    """The demo of an arm and seed. ratios: how much longer the mixture's steps take, for equal time."""
    folder = Path(flags.work) / f"{FOLDERS[arm]}-{seed}"
    model = flags.dense if arm == "dense" else flags.moe
    config = replace(flags.demo, run=str(folder), seeds=str(seed), resume=True, model=model)
    if arm != EQUAL_TIME:
        return config
    steps = {name: getattr(config, name) for name in PART_STEPS.values()}
    for name, dense_steps in steps.items():
        ratio = ratios["pretrain" if name == "pretrain_steps" else "grpo"]
        steps[name] = max(1, round(dense_steps / ratio)) if dense_steps else 0
    return replace(config, **steps)


def run_of(config: DemoConfig) -> Path:
    """Folder of the demo's one seed."""
    return Path(config.run) / f"seed{config.seeds}"


class HeldOut(Countdown):
    """The corpus writes about problems to train on; here it gets the others, over and over."""

    def problem(self, split: str, index: int):
        size = self.size("test")  # None: as many as are asked for
        return super().problem("test", index if size is None else index % size)


@torch.inference_mode()
def held_out_loss(config: DemoConfig, n: int) -> float:
    """Mean loss in nats per token of the base on `n` documents about held-out problems."""
    model, tokenizer, _ = load_model(str(run_of(config) / "base"), CPU)
    task = HeldOut(n_numbers=config.numbers, high=config.high, ops=config.ops)
    texts = ["".join(document(task, index, config.corpus, seed=0)) for index in range(n)]
    batches = DocumentBatches(encode_documents(tokenizer, texts), 2048, model.config.max_seq_len, 0)
    nats, n_tokens = 0.0, 0
    for step in range(len(batches.plan_of(0))):
        batch = batches.batch(step)
        logp, _ = model.logprobs(model.hidden_states(batch.inputs), batch.targets)
        nats -= float((logp * batch.weight).double().sum())
        n_tokens += float(batch.weight.sum())
    return nats / n_tokens


def one_run(config: DemoConfig, flags: Flags) -> dict:
    """Run an arm's demo to its end, whether it was begun or not; what was measured of it."""
    if not any(run_of(config).glob("*/checkpoints/step_*")):
        config = replace(config, resume=False)
    demo(config)
    results = json.loads((run_of(config) / "results.json").read_text(encoding="utf-8"))
    rows = [row for part in ("rl", "control") if (run_of(config) / part).exists()
            for row in read_metrics(run_of(config) / part)]
    steps = {part: getattr(config, name) for part, name in PART_STEPS.items()}
    return {"seed": int(config.seeds), "steps": steps, "seconds": results["seconds"],
            "tokens": results["tokens"], "largest_logp_gap": max(row["logp_gap"] for row in rows),
            "replays": all("flipped_routers" in row for row in rows),
            "held_out_loss": held_out_loss(config, flags.documents),
            **{part: results[part] for part in PART_STEPS if part in results}}


# ---- times, in turns ----

def step_times(flags: Flags) -> dict[str, np.ndarray]:
    """Seconds of steps of pretraining, on the demo's corpus."""
    pretraining = replace(base_config(flags.demo, Path("none"), 0), documents=2000)
    tokenizer, batches = corpus_batches(pretraining)
    sides = {name: Steps(batches, tokenizer.vocab_size, StepFlags(model=name))
             for name in (flags.dense, flags.moe)}
    return take_turns(sides, flags.rounds, warmup=3)


def grpo_times(flags: Flags) -> dict[str, dict[str, list[float]]]:
    """Per model, seconds per sampled token of GRPO's steps: in all, of the rollouts, of the update."""
    learners, found = {}, {}
    for arm in ("dense", "moe"):
        config = demo_of(flags, arm, 0)
        rl = grpo_config(config, run_of(config), 0, control=False)
        task = task_of(config, 0).make()
        learners[arm] = make_learner(rl, task, load_model(rl.base, CPU)), task, rl
        found[arm] = {"step": [], "rollout": [], "update": []}
    for step in range(1 + max(2, flags.rounds // 3)):
        for arm in [*learners][:: 1 if step % 2 else -1]:
            metrics = timed_step(*learners[arm], step)
            if step > 0:  # the first one warms up
                for name, seconds in found[arm].items():
                    seconds.append(metrics[f"{name}_s"] / metrics["tokens"])
    return found


def decode_times(flags: Flags) -> dict[str, np.ndarray]:
    """Seconds for 256 answers of 64 tokens each, by model and cache."""
    sides = {}
    for arm, paged in (("dense", False), ("dense", True), ("moe", True)):
        model, _, _ = load_model(str(run_of(demo_of(flags, arm, 0)) / "base"), CPU)
        engine = Engine(model, max_rows=256, paged=paged)
        prompts = np.random.default_rng(0).integers(model.config.vocab_size, size=(16, 8)).tolist()
        requests = requests_of(prompts, 16, 64)
        sides[f"{arm}, {'pages' if paged else 'slots'}"] = lambda e=engine, r=requests: e.generate(r)
    return take_turns(sides, max(2, flags.rounds // 3), warmup=1)


def times_of(flags: Flags) -> dict[str, dict]:
    """How much longer the mixture takes than the dense model, as spreads over the rounds."""
    steps, grpo, decoding = step_times(flags), grpo_times(flags), decode_times(flags)
    ratios = {"pretrain": spread(steps[flags.moe] / steps[flags.dense])}
    for name, label in (("step", "grpo"), ("rollout", "grpo_rollout"), ("update", "grpo_update")):
        ratios[label] = spread(np.array(grpo["moe"][name]) / np.array(grpo["dense"][name]))
    for cache in ("slots", "pages"):
        ratios[f"decoding_over_{cache}"] = spread(decoding["moe, pages"] / decoding[f"dense, {cache}"])
    return {"ratios": ratios, "threads": torch.get_num_threads(),
            "seconds": {"pretraining_step": {name: spread(s) for name, s in steps.items()},
                        "decoding_256x64": {name: spread(s) for name, s in decoding.items()}}}


# ---- what a model is ----

def bytes_of_decoding(config: ModelConfig, rows: int) -> float:
    """Bytes of weights that a decode step of `rows` rows reads, if the routers choose evenly, row by row."""
    if config.moe is None:
        return 4.0 * count_parameters(config)
    idle = count_parameters(config) - count_active_parameters(config)
    share = config.moe.experts_per_token / config.moe.n_experts
    untouched = (1 - share) ** rows  # of an expert: no row has chosen it
    return 4.0 * (count_parameters(config) - idle / (1 - share) * untouched)


def size_of(config: ModelConfig) -> dict:
    """Parameters, FLOPs and bytes of a model."""
    total = count_parameters(config)
    return {"parameters": total, "active": count_active_parameters(config),
            "flops_per_token": flops_per_token(config, 40, training=True),
            "bytes_per_training_step": BYTES_PER_STEP * total,
            "bytes_per_decode_step": {str(rows): bytes_of_decoding(config, rows) for rows in (1, 16, 256)}}


# ---- the table ----

def print_tables(found: dict) -> None:
    """What the models are, how long they take, and what each arm learned."""
    sizes, ratios = found["sizes"], found["times"]["ratios"]
    columns = list(sizes.values())
    rows = [["parameters", *(f"{size['parameters']:,}" for size in columns)],
            ["active per token", *(f"{size['active']:,}" for size in columns)],
            ["MFLOPs per token of training", *(f"{size['flops_per_token'] / 1e6:.2f}" for size in columns)],
            ["MB per training step", *(f"{size['bytes_per_training_step'] / 1e6:.0f}" for size in columns)]]
    for n in columns[0]["bytes_per_decode_step"]:
        megabytes = [size["bytes_per_decode_step"][n] / 1e6 for size in columns]
        rows.append([f"MB per decode step, {n} rows", *(f"{value:.1f}" for value in megabytes)])
    table(["", *sizes], rows)
    table(["time of the mixture / dense", "median (20 % to 80 %)"],
          [[name.replace("_", " "), show(ratio)] for name, ratio in ratios.items()])

    def accuracy(run: dict, part: str) -> str:
        if part not in run:  # a demo without its control
            return "-"
        low, high = run[part]["eval"]["accuracy_95"]
        return f"{100 * run[part]['eval']['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    def cells(run: dict) -> list[str]:
        tokens = ", ".join(f"{run[part]['eval']['mean_tokens']:.1f}" for part in ("base", "rl"))
        return [", ".join(f"{n:,}" for n in run["steps"].values()), f"{run['held_out_loss']:.3f}",
                *(accuracy(run, part) for part in PART_STEPS), tokens, f"{run['largest_logp_gap']:.1e}",
                "yes" if run["replays"] else "no"]

    header = ["seed", "steps of pretraining, R1-Zero, control", "loss on held-out text", "base pass@1 [95 %]",
              "after R1-Zero", "control", "tokens in an answer, base and after", "largest log-prob gap",
              "replay of routes"]
    table(header, [[f"{NAMES[arm]}, {run['seed']}", *cells(run)]
                   for arm, runs in found["arms"].items() for run in runs])


def main(flags: Flags) -> dict:
    if flags.table_of:
        found = json.loads(Path(flags.table_of).read_text(encoding="utf-8"))
        print_tables(found)
        return found
    reuse_memory()
    settings = {name: getattr(flags, name) for name in ("dense", "moe", "rounds")}
    settings |= {f"demo.{name}": value for name, value in asdict(flags.demo).items() if name not in OF_A_RUN}
    check_settings(flags.work, settings)

    # 1. Equal steps.
    arms = {arm: [one_run(demo_of(flags, arm, seed), flags) for seed in range(flags.seeds)]
            for arm in ("dense", "moe")}

    # 2. The times, once: the numbers of steps of the third arm follow from them.
    path = Path(flags.work) / "times.json"
    if not path.exists():
        atomic_write_json(path, times_of(flags))
    times = json.loads(path.read_text(encoding="utf-8"))

    # 3. Equal time.
    ratios = {name: ratio["median"] for name, ratio in times["ratios"].items()}
    arms[EQUAL_TIME] = [one_run(demo_of(flags, EQUAL_TIME, seed, ratios), flags)
                        for seed in range(flags.equal_time_seeds)]

    model, _, _ = load_model(str(run_of(demo_of(flags, "dense", 0)) / "base"), CPU)
    sizes = {name: size_of(preset(name, model.config.vocab_size)) for name in (flags.dense, flags.moe)}
    found = {"flags": asdict(flags), "sizes": sizes, "times": times, "arms": arms}
    print_tables(found)
    return finish("dense_vs_moe", found, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
