"""The pictures of the demo's report: curves with the control beside, and bars, each a PNG file.

matplotlib's Figure is used directly, without pyplot: no window, no global list of figures, and a style that
the user has set at home changes nothing. Colours are Okabe and Ito's, which colour-blind readers tell apart.

Left out: interactive plots; they need scripts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from .record import PARTS, Seed, bounds, finite

RL, CONTROL, BASE = "#0072B2", "#D55E00", "#6A6A6A"
GRID, INK = "#E3E3E3", "#333333"
DPI = 150


@dataclass(frozen=True)
class Line:
    """A figure of each step, drawn thin as it is and thick when smoothed."""

    label: str
    colour: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Mark:
    """One measured point, with its interval if it has one."""

    label: str
    colour: str
    step: float
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    title: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    percent: bool = False
    """Values are shares from 0 to 1."""
    x_label: str = "GRPO step"
    log_scale: bool = False
    """For figures that differ by orders of magnitude; zeros are left out."""


def smooth(steps: Sequence[float], values: Sequence[float], half: int) -> list[float]:
    """A straight line fitted through each value and `half` neighbours on either side, read off at its step.

    At the ends the line of the nearest whole window goes on, so that a slope there is not bent as by a mean.
    Values that are not finite are left out.
    """
    result = []
    for i, step in enumerate(steps):
        start = max(0, min(i - half, len(values) - 2 * half - 1))
        window = zip(
            steps[start : start + 2 * half + 1], values[start : start + 2 * half + 1], strict=True
        )
        near = [(x, y) for x, y in window if math.isfinite(y)]
        x_mean, y_mean = (
            sum(pair[k] for pair in near) / len(near) if near else math.nan for k in (0, 1)
        )
        spread = sum((x - x_mean) ** 2 for x, _ in near)
        slope = sum((x - x_mean) * (y - y_mean) for x, y in near) / spread if spread else 0.0
        result.append(y_mean + slope * (step - x_mean))
    return result


def draw_panel(axes, panel: Panel) -> None:
    """Lines, marks, and axes that begin at 0."""
    for line in panel.lines:
        axes.plot(line.steps, line.values, color=line.colour, alpha=0.28, linewidth=0.8)
        half, values = min(8, max(2, len(line.values) // 10)), line.values
        if panel.log_scale:
            values = [math.log(value) if value > 0 else math.nan for value in values]
        thick = smooth(line.steps, values, half)
        axes.plot(
            line.steps,
            [math.exp(y) for y in thick] if panel.log_scale else thick,
            color=line.colour,
            linewidth=2.2,
            label=line.label,
            solid_capstyle="round",
        )
    for mark in panel.marks:
        low, high = mark.interval or (mark.value, mark.value)
        errors = [[max(0.0, mark.value - low)], [max(0.0, high - mark.value)]]
        axes.errorbar(
            [mark.step],
            [mark.value],
            yerr=errors if mark.interval else None,
            fmt="D",
            markersize=7,
            color=mark.colour,
            markeredgecolor="white",
            ecolor=mark.colour,
            elinewidth=1.8,
            capsize=4,
            label=mark.label,
            zorder=5,
            clip_on=False,
        )
    axes.set_title(panel.title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(panel.x_label, fontsize=10.5, color=INK)
    axes.set_ylabel(panel.y_label, fontsize=10.5, color=INK)
    axes.tick_params(which="both", colors=INK, labelsize=10, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=[1, 2, 5, 10]))
    if panel.percent:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    elif panel.log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)


def save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def draw(panels: Sequence[Panel], path: Path, width: float, height: float, title: str = "") -> Path:
    """The panels side by side, with one legend for all; sizes in inches at 150 dots each."""
    with style.context("default"):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
        legend = {}
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            draw_panel(axes, panel)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                legend.setdefault(label, handle)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06, wspace=0.04)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
        if len(legend) > 1:
            figure.legend(
                legend.values(),
                legend.keys(),
                loc="outside lower center",
                fontsize=10,
                ncols=len(legend),
                frameon=False,
                labelcolor=INK,
            )
        return save(figure, path)


def draw_bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    path: Path,
    width: float,
    height: float,
) -> Path:
    """Shares as bars in groups, values on top; series: (label, colour, one value or None for each group)."""
    with style.context("default"):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
        axes = figure.subplots()
        thick = 0.8 / len(series)
        for n, (label, colour, values) in enumerate(series):
            places = [group + (n - (len(series) - 1) / 2) * thick for group in range(len(groups))]
            axes.bar(
                places, [value or 0.0 for value in values], 0.9 * thick, color=colour, label=label
            )
            for place, value in zip(places, values, strict=True):
                shown = "–" if value is None else f"{100 * value:.0f} %"
                axes.text(place, (value or 0.0) + 0.015, shown, ha="center", fontsize=11, color=INK)
        draw_panel(axes, Panel(title, "share of verdicts", [], percent=True, x_label=""))
        axes.set_ylim(0, 1.08)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.set_xticks(range(len(groups)), groups, fontsize=11)
        figure.legend(
            loc="outside lower center",
            ncols=len(series),
            frameon=False,
            fontsize=10,
            labelcolor=INK,
        )
        return save(figure, path)


# ---- what is drawn ----

COLOURS = {"base": BASE, "rl": RL, "control": CONTROL}
SHORT = {"rl": "R1-Zero", "control": "control"}
LONG = {
    "rl": "R1-Zero: rewards by rule",
    "control": "control: the same rewards, dealt out at random",
}
COLUMNS = {"base": "base model", "rl": "after R1-Zero", "control": "after the control"}
HELD_OUT = "held-out problems"
CURVES = [  # (name in metrics.jsonl, name in the evaluation, title, unit, is it a share, how to read it)
    (
        "accuracy",
        "accuracy",
        "Right answers",
        "share of answers",
        True,
        "Every number used once and the target met: worth the large reward.",
    ),
    (
        "length",
        "mean_tokens",
        "Response length",
        "tokens",
        False,
        "Nobody asks for long answers; checking takes room.",
    ),
    (
        "format",
        "format_rate",
        "Well-formed answers",
        "share of answers",
        True,
        "One think block, one answer block, nothing else: worth a small reward.",
    ),
    (
        "dead_groups",
        None,
        "Dead groups",
        "share of groups",
        True,
        "Groups whose answers all got the same reward; they teach nothing.",
    ),
    (
        "entropy",
        None,
        "Entropy",
        "nats a token",
        False,
        "How undecided the model is about its next token; near 0 it would have stopped exploring.",
    ),
    (
        "kl_to_reference",
        None,
        "Distance to the base model",
        "KL, nats a token",
        False,
        "How far the model has moved from where it began.",
    ),
]


def line(seed: Seed, part: str, name: str, label: str) -> Line:
    """A column of a part's log; a figure that is missing or not finite leaves a gap."""
    values = [finite(row.get(name)) for row in seed.logs[part]]
    return Line(
        label,
        COLOURS[part],
        [row["step"] for row in seed.logs[part]],
        [float("nan") if value is None else value for value in values],
    )


def marks(seed: Seed, name: str) -> list[Mark]:
    """Held-out figures: of the base at step 0, of the others at the end of their logs."""
    found = []
    for part in PARTS:
        value = seed.figure(part, "eval", name)
        step = 0 if part == "base" else seed.last_step(part)
        if value is not None and (step or part == "base"):
            found.append(Mark(HELD_OUT, COLOURS[part], step, value, bounds(seed, part, name)))
    return found


def panel(seeds: list[Seed], curve: tuple, labels: dict[str, str]) -> Panel:
    """One of CURVES, of the parts that `labels` names."""
    name, measured, title, unit, is_share, _ = curve
    lines = [
        line(seed, part, name, label)
        for part, label in labels.items()
        for seed in seeds
        if seed.logs[part]
    ]
    points = [mark for seed in seeds for mark in marks(seed, measured)] if measured else []
    return Panel(title, unit, lines, points, is_share)


def draw_pictures(folder: Path, seeds: list[Seed]) -> dict[str, Path]:
    """Writes the PNG files that there is something for; the first seed's, and curves.png of all seeds."""
    drawn = {}
    if any(seed.logs["rl"] for seed in seeds):
        curves = [panel(seeds, curve, LONG) for curve in CURVES[:2]]
        drawn["curves"] = draw(curves, folder / "curves.png", 12, 4.8)
    first = seeds[0]
    if first.logs["rl"]:
        for curve in CURVES:
            drawn[curve[0]] = draw(
                [panel([first], curve, SHORT)], folder / f"{curve[0]}.png", 5, 3.6
            )
    if first.logs["base"]:
        loss = Panel(
            "Pretraining",
            "loss, nats a token",
            [line(first, "base", "loss", "base model")],
            x_label="pretraining step",
        )
        drawn["pretraining"] = draw([loss], folder / "pretraining.png", 8, 3.6)
    stops = [
        (
            COLUMNS[part],
            COLOURS[part],
            [first.figure(part, "behaviour", f"p_stop_after_{word}") for word in ("ok", "no")],
        )
        for part in PARTS
        if first.get(part, "behaviour")
    ]
    if stops:
        groups = ["after a verdict “ok”", "after a verdict “no”"]
        drawn["behaviour"] = draw_bars(
            "Does the thinking stop here?", groups, stops, folder / "behaviour.png", 8, 4.2
        )
    return drawn
