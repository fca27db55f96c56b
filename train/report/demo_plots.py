"""Which plots a demo's report has: curves with the control beside, and how often the thinking
stops.

plots.py does the plotting.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .metrics import bounds
from .plots import BASE, CONTROL, RL, Bars, Line, Mark, Panel, plot, plot_bars
from .record import PARTS, Seed, finite

COLOURS = {"base": BASE, "rl": RL, "control": CONTROL}
SHORT = {"rl": "R1-Zero", "control": "control"}
LONG = {
    "rl": "R1-Zero: rewards by rule",
    "control": "control: the same rewards, dealt out at random",
}
COLUMNS = {"base": "base model", "rl": "after R1-Zero", "control": "after the control"}
HELD_OUT = "held-out problems"


class Curve(NamedTuple):
    """One metric over the steps of GRPO."""

    name: str
    """Its name in metrics.jsonl."""
    measured: str | None
    """Its name in the evaluation, if it is measured on held-out problems too."""
    title: str
    unit: str
    is_share: bool
    note: str
    """How to read it."""


CURVES = [
    Curve(
        "accuracy",
        "accuracy",
        "Right answers",
        "share of answers",
        True,
        "Every number used once and the target met: worth the large reward.",
    ),
    Curve(
        "length",
        "mean_tokens",
        "Response length",
        "tokens",
        False,
        "Nobody asks for long answers; checking takes room.",
    ),
    Curve(
        "format",
        "format_rate",
        "Well-formed answers",
        "share of answers",
        True,
        "One think block, one answer block, nothing else: worth a small reward.",
    ),
    Curve(
        "dead_groups",
        None,
        "Dead groups",
        "share of groups",
        True,
        "Groups whose answers all got the same reward; they teach nothing.",
    ),
    Curve(
        "entropy",
        None,
        "Entropy",
        "nats per token",
        False,
        "How undecided the model is about its next token; near 0 it would have stopped exploring.",
    ),
    Curve(
        "kl_to_reference",
        None,
        "Distance to the base model",
        "KL, nats per token",
        False,
        "How far the model has moved from where it began.",
    ),
]


def line_of(seed: Seed, part: str, name: str, label: str) -> Line:
    """A column of a part's log; a value that is missing or not finite leaves a gap."""
    steps = [row["step"] for row in seed.logs[part]]
    values = [finite(row.get(name)) for row in seed.logs[part]]
    with_gaps = [float("nan") if value is None else value for value in values]
    return Line(label, COLOURS[part], steps, with_gaps)


def is_measured(line: Line) -> bool:
    """Whether any step of a line has a value."""
    return any(math.isfinite(value) for value in line.values)


def marks_of(seed: Seed, name: str) -> list[Mark]:
    """Held-out measurements: of the base at step 0, of the others at the end of their logs."""
    found = []
    for part in PARTS:
        value = seed.metric(part, "eval", name)
        step = 0 if part == "base" else seed.last_step(part)
        has_run = part == "base" or step > 0
        if value is not None and has_run:
            mark = Mark(HELD_OUT, COLOURS[part], step, value, bounds(seed, part, name))
            found.append(mark)
    return found


def panel_of(seeds: Sequence[Seed], curve: Curve, labels: dict[str, str]) -> Panel:
    """One curve of all seeds, for the parts that `labels` names."""
    lines = []
    for part, label in labels.items():
        lines += [line_of(seed, part, curve.name, label) for seed in seeds]
    lines = [line for line in lines if is_measured(line)]
    marks = []
    if curve.measured:
        for seed in seeds:
            marks += marks_of(seed, curve.measured)
    return Panel(curve.title, curve.unit, lines, marks, curve.is_share)


def stops_of(seed: Seed) -> list[Bars]:
    """For each part, the shares of verdicts "ok" and "no" after which the thinking stops."""
    found = []
    for part in PARTS:
        if seed.get(part, "behaviour"):
            names = [f"p_stop_after_{word}" for word in ("ok", "no")]
            values = [seed.metric(part, "behaviour", name) for name in names]
            found.append(Bars(COLUMNS[part], COLOURS[part], values))
    return found


def plot_demo(
    folder: Path,
    seeds: list[Seed],
    plot: Callable[..., Path] = plot,
    plot_bars: Callable[..., Path] = plot_bars,
) -> dict[str, Path]:
    """Write the PNG files that there is data for; returns the path of each by its name.

    curves.png is of all seeds, the others are of the first.
    """
    plots = {}
    if any(seed.logs["rl"] for seed in seeds):
        panels = [panel_of(seeds, curve, LONG) for curve in CURVES[:2]]
        plots["curves"] = plot(panels, folder / "curves.png", 12, 4.8)

    first = seeds[0]
    if first.logs["rl"]:
        for curve in CURVES:
            panel = panel_of([first], curve, SHORT)
            if panel.lines:  # a metric that was not measured has no picture
                plots[curve.name] = plot([panel], folder / f"{curve.name}.png", 5, 3.6)
    if first.logs["base"]:
        loss = Panel(
            "Pretraining",
            "loss, nats per token",
            [line_of(first, "base", "loss", "base model")],
            x_label="pretraining step",
        )
        plots["pretraining"] = plot([loss], folder / "pretraining.png", 8, 3.6)

    stops = stops_of(first)
    if stops:
        title = "Does the thinking stop here?"
        groups = ["after a verdict “ok”", "after a verdict “no”"]
        path = folder / "behaviour.png"
        plots["behaviour"] = plot_bars(title, groups, stops, path, 8, 4.2)
    return plots
