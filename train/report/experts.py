"""The section of the report on a mixture of experts: how busy each one was in pretraining.

The page of a dense model has nothing of it. The log says it step by step (model/balance.py), and
plots.py does the plotting. The log counts the layers with experts alone, the mixtures, from 0.

Left out: the loads in RL, which does not balance the experts.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .demo_plots import line_of
from .metrics import column, mean, number, percent
from .page import limit, paragraph, picture, section
from .plots import HeatMap, Panel, plot, plot_heat_maps
from .record import Seed, finite

N_LAST = 20  # steps at the end that the numbers are of
N_COLUMNS = 4  # heat maps side by side
LOAD = "load / mean load of the layer"


# ---- the log ----


def loads_in(row: dict) -> list[list[float]] | None:
    """The load of each expert of each layer in a row of the log; None if it has no such table."""
    table = row.get("expert_load")
    if not isinstance(table, list) or not table:
        return None
    for loads in table:
        if not isinstance(loads, list) or not loads or None in map(finite, loads):
            return None
    widths = {len(loads) for loads in table}
    return table if len(widths) == 1 else None


def read_loads(rows: Sequence[dict]) -> tuple[list[float], list[list[list[float]]]]:
    """(steps, the loads [L][E] of each of them), of the steps with as many mixtures and experts as
    the first has; a row without its step is left out."""
    steps, tables = [], []
    for row in rows:
        table = None if finite(row.get("step")) is None else loads_in(row)
        if table and (not tables or shape_of(table) == shape_of(tables[0])):
            steps.append(row["step"])
            tables.append(table)
    return steps, tables


def shape_of(table: list[list[float]]) -> tuple[int, int]:
    """(mixtures, experts of each)"""
    return len(table), len(table[0])


# ---- the pictures ----


def load_maps(rows: Sequence[dict], title: str = "mixture {}") -> list[HeatMap]:
    """One heat map per mixture of a log, experts downwards. title: with a place for its number."""
    steps, tables = read_loads(rows)
    maps = []
    for layer in range(len(tables[0]) if tables else 0):
        # From one table per step to one row per expert.
        by_expert = list(zip(*(table[layer] for table in tables), strict=True))
        maps.append(HeatMap(title.format(layer), "expert", by_expert, steps))
    return maps


def plot_experts(
    folder: Path,
    seed: Seed,
    plot: Callable[..., Path] = plot,
    plot_heat_maps: Callable[..., Path] = plot_heat_maps,
) -> dict[str, Path]:
    """Write the PNG files of a mixture's pretraining; returns the path of each by its name."""
    maps = load_maps(seed.logs["base"])
    if not maps:
        return {}
    grid = [maps[n : n + N_COLUMNS] for n in range(0, len(maps), N_COLUMNS)]
    height = 1 + 2 * len(grid)
    plots = {
        "expert_load": plot_heat_maps(grid, LOAD, folder / "expert_load.png", 12, height),
        "experts": plot(panels_of(seed), folder / "experts.png", 12, 3.6),
    }
    return plots


def panels_of(seed: Seed) -> list[Panel]:
    """The busiest expert, the experts without any token, and how undecided the routers are."""

    def panel(name: str, title: str, unit: str, **options: Any) -> Panel:
        line = line_of(seed, "base", name, "base model")
        return Panel(title, unit, [line], x_label="pretraining step", **options)

    return [
        panel("expert_load_max", "The busiest expert", LOAD),
        panel("experts_dead", "Experts without a token", "share of experts", percent=True),
        panel("router_entropy", "Entropy of the routers", "nats per token"),
    ]


# ---- the section ----


def experts(seed: Seed, plots: dict[str, Path]) -> str:
    """How evenly the tokens of pretraining were spread over the experts; empty if there are
    none."""
    if "expert_load" not in plots:
        return ""
    rows = seed.logs["base"]
    last = rows[-N_LAST:]
    _, tables = read_loads(rows)
    n_layers, n_experts = shape_of(tables[0])
    busiest, dead, nats = (
        mean(column(last, name)) for name in ("expert_load_max", "experts_dead", "router_entropy")
    )
    return section(
        "How busy the experts were",
        paragraph(
            f"The model has {n_layers} mixtures, layers of {n_experts} experts each: small MLPs of "
            "which a router chooses a few for each token. Left to itself a router may learn to "
            "send everything to the same few. An expert’s load is the number of its tokens in a "
            "step, as a multiple of the mean of its layer: 1 if all are equally busy."
        ),
        picture(
            plots["expert_load"],
            "the load of each expert over the steps of pretraining, layer by layer",
            "Mixtures are counted from 0, without the layers that have no experts. One row per "
            "expert. White: as busy as the mean of its layer. Blue: less. Orange: "
            "more; the strongest is twice the mean, or above.",
            full=True,
        ),
        paragraph(
            f"Over the last {len(last)} steps of pretraining the busiest expert of all layers had "
            f"{number(busiest, 2)} times the mean, and {percent(dead)} of the experts had no token "
            f"in a step. The routers’ entropy was {number(nats, 2)} nats, of at most "
            f"{number(math.log(n_experts), 2)} if they chose blindly."
        ),
        picture(
            plots.get("experts"),
            "the largest load, the share of experts without a token, and the routers’ entropy",
            full=True,
        ),
        limit(
            "Equal loads do not say that the experts are good at different things. "
            "Reinforcement learning leaves the balance as it is, so later loads may differ more."
        ),
    )
