"""How evenly a mixture uses its experts: without any balance, with either means alone, and by default.

    python -m benchmarks.balance --out balance.json       ten minutes of one core; called again, it goes on
    python -m benchmarks.balance --table-of benchmarks/results/balance.json     table and picture again

Each run pretrains the preset on the demo's corpus for 200 steps, with `r1zero pretrain` and its --balance
flags. An expert's load is the number of its tokens in a step, as a multiple of the mean of its layer. The
picture shows the load of each expert of each layer over the steps, for the first seed.

Left out: other data, other rates of the means, what the balance does to longer runs, and reinforcement
learning, which does not balance.
"""
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from r1zero.model.balance import BalanceConfig
from r1zero.model.checkpoint import checkpoint_steps
from r1zero.train.log import read_metrics
from r1zero.train.machine import reuse_memory
from r1zero.train.pretrain import pretrain
from r1zero.train.recipes.demo import DemoConfig, base_config
from r1zero.train.recipes.parts import part_done
from r1zero.train.report.experts import LOAD, load_maps
from r1zero.train.report.plots import plot_heat_maps

from .common import check_settings, finish, table

MEANS = {
    "none": BalanceConfig(aux_coef=0, z_coef=0, bias_rate=0),
    "auxiliary loss": BalanceConfig(z_coef=0, bias_rate=0),
    "bias": BalanceConfig(aux_coef=0, z_coef=0),
    "default": BalanceConfig(),
}
N_LAST = 20  # steps at the end that the loads are of; the loss is of half as many
BIN = 4  # steps whose mean is one column of the picture


@dataclass(frozen=True)
class Flags:
    """Compare what balances the experts of a mixture."""

    work: str = "runs/balance"
    """Folder for the runs; what is done there is not done again."""
    model: str = "demo-moe"
    """Preset of a mixture of experts."""
    seeds: int = 3
    """Number of runs per kind of balance, with the seeds 0, 1, ..."""
    steps: int = 200
    """Number of steps per run."""
    documents: int = 4000
    """Number of documents in the corpus."""
    table_of: str | None = None
    """Print and plot the results in this file, instead of measuring."""
    out: str | None = None
    """File for the line of JSON. The picture goes beside it."""


def one_run(name: str, seed: int, flags: Flags) -> list[dict]:
    """The log of a run, which is done unless it has been."""
    folder = Path(flags.work) / f"{name.replace(' ', '_')}-{seed}"
    config = base_config(DemoConfig(model=flags.model), folder, seed)
    config = replace(config, steps=flags.steps, documents=flags.documents, balance=MEANS[name],
                     resume=bool(checkpoint_steps(folder)))
    if not part_done(folder, flags.steps):
        pretrain(config)
    return read_metrics(folder)


def results_of(rows: list[dict]) -> dict[str, float]:
    """The numbers at the end of a log."""
    def mean(name: str, n: int) -> float:
        return float(np.mean([row[name] for row in rows[-n:]]))

    return {"largest_load": mean("expert_load_max", N_LAST),
            "largest_load_after_10_steps": rows[:10][-1]["expert_load_max"],
            "dead": mean("experts_dead", N_LAST), "entropy": mean("router_entropy", N_LAST),
            "loss": mean("loss", N_LAST // 2)}


def binned(rows: list[dict]) -> list[dict]:
    """The loads of a log, each the mean of BIN steps."""
    found = []
    for start in range(0, len(rows) - BIN + 1, BIN):
        loads = np.mean([row["expert_load"] for row in rows[start : start + BIN]], axis=0)
        found.append({"step": rows[start]["step"] + BIN / 2, "expert_load": loads.round(2).tolist()})
    return found


def print_table(runs: dict[str, list[dict]]) -> None:
    """Each number's mean over the seeds, and the least and most of them."""
    def cell(some: list[dict], name: str) -> str:
        values, digits = [run[name] for run in some], 3 if name == "loss" else 2
        mean, least, most = (f"{value:.{digits}f}" for value in (np.mean(values), min(values), max(values)))
        return f"{mean} ({least} to {most})"

    names = [*next(iter(runs.values()))[0]]
    table(["mean (least to most)", *(name.replace("_", " ") for name in names)],
          [[kind, *(cell(some, name) for name in names)] for kind, some in runs.items()])


def plot(loads: dict[str, list[dict]], path: Path) -> Path:
    """A row of heat maps per kind of balance, one per mixture."""
    grid = [load_maps(rows, name + ", mixture {}") for name, rows in loads.items()]
    return plot_heat_maps(grid, LOAD, path, 13, 2.2 * len(grid), dpi=100)


def main(flags: Flags) -> dict:
    if flags.table_of:
        found = json.loads(Path(flags.table_of).read_text(encoding="utf-8"))
        print_table(found["runs"])
        print(plot(found["loads"], Path(flags.table_of).with_suffix(".png")))
        return found
    reuse_memory()
    made_with = {"model": flags.model, "steps": flags.steps, "documents": flags.documents}
    check_settings(flags.work, made_with)
    logs = {name: [one_run(name, seed, flags) for seed in range(flags.seeds)] for name in MEANS}
    runs = {name: [results_of(rows) for rows in some] for name, some in logs.items()}
    loads = {name: binned(some[0]) for name, some in logs.items()}
    print_table(runs)
    if flags.out:
        plot(loads, Path(flags.out).with_suffix(".png"))
    return finish("balance", {"flags": asdict(flags), "runs": runs, "loads": loads}, flags.out)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
