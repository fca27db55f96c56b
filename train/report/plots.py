"""Plots as PNG files: curves in panels side by side, bars, and heat maps. demo_plots.py and
experts.py say which ones a demo has.

matplotlib's Figure is used directly, without pyplot: no window, no global list of figures, and a
style that the user has set at home changes nothing. The colours are Okabe and Ito's, which
colour-blind readers can tell apart.

matplotlib takes a second to import, so it is imported where something is plotted.

Left out: interactive plots; they need scripts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .record import finite

RL, CONTROL, BASE = "#0072B2", "#D55E00", "#6A6A6A"
GRID, INK, AXIS = "#E3E3E3", "#333333", "#999999"
DPI = 150


@dataclass(frozen=True)
class Line:
    """A metric of each step, plotted thin as it is and thick when smoothed."""

    label: str
    colour: str
    steps: Sequence[float]
    values: Sequence[float]
    is_smoothed: bool = True
    """False: plotted thick as it is."""


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
    """One pair of axes."""

    title: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    percent: bool = False
    """Values are shares from 0 to 1."""
    x_label: str = "GRPO step"
    log_scale: bool = False
    """For metrics that differ by orders of magnitude; zeros are left out."""
    from_zero: bool = True
    """Whether the vertical axis begins at 0; not for values that may be negative."""


@dataclass(frozen=True)
class Bars:
    """One value per group, in one colour; None where there is none."""

    label: str
    colour: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class HeatMap:
    """How a value of each row differs from 1 over the steps: 1 is white, 0 blue, 2 orange."""

    title: str
    y_label: str
    rows: Sequence[Sequence[float]]
    """One value per step, in each row."""
    steps: Sequence[float]
    """The step of each value."""


# ---- smoothing ----


def smooth(steps: Sequence[float], values: Sequence[float], half: int) -> list[float]:
    """Fit a straight line through each value and `half` neighbours on either side; read it at its
    step.

    At the ends the line of the nearest whole window goes on. A running mean would bend a slope
    there. Values that are not finite are left out.
    """
    width = 2 * half + 1
    result = []
    for i, step in enumerate(steps):
        start = max(0, min(i - half, len(values) - width))
        window = zip(steps[start : start + width], values[start : start + width], strict=True)
        near = [(x, y) for x, y in window if math.isfinite(y)]
        result.append(fitted_line(near, step))
    return result


def fitted_line(points: list[tuple[float, float]], x: float) -> float:
    """The value at `x` of the least-squares line through the points; NaN if there are none."""
    if not points:
        return math.nan
    x_mean = sum(px for px, _ in points) / len(points)
    y_mean = sum(py for _, py in points) / len(points)
    spread = sum((px - x_mean) ** 2 for px, _ in points)
    slope = 0.0
    if spread:
        slope = sum((px - x_mean) * (py - y_mean) for px, py in points) / spread
    return y_mean + slope * (x - x_mean)


# ---- one panel ----


def plot_panel(axes, panel: Panel) -> None:
    """Lines, marks and axes."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    for line in panel.lines:
        plot_line(axes, line, panel.log_scale)
    for mark in panel.marks:
        plot_mark(axes, mark)

    axes.set_title(panel.title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(panel.x_label, fontsize=10.5, color=INK)
    axes.set_ylabel(panel.y_label, fontsize=10.5, color=INK)
    axes.tick_params(which="both", colors=INK, labelsize=10, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=[1, 2, 5, 10]))
    if panel.percent:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    elif panel.log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif panel.from_zero:
        axes.set_ylim(bottom=0)


def plot_line(axes, line: Line, log_scale: bool) -> None:
    """The values thin, and smoothed over about a fifth of them thick; a gap where there is none."""
    numbers = [finite(value) for value in line.values]
    values = [math.nan if value is None else value for value in numbers]
    axes.plot(line.steps, values, color=line.colour, alpha=0.28, linewidth=0.8)
    half = min(8, max(2, len(values) // 10))
    if not line.is_smoothed:
        smoothed = values
    elif log_scale:
        logs = [math.log(value) if value > 0 else math.nan for value in values]
        smoothed = [math.exp(y) for y in smooth(line.steps, logs, half)]
    else:
        smoothed = smooth(line.steps, values, half)
    axes.plot(
        line.steps,
        smoothed,
        color=line.colour,
        linewidth=2.2,
        label=line.label,
        solid_capstyle="round",
    )


def plot_mark(axes, mark: Mark) -> None:
    """A diamond, with its interval as an error bar."""
    errors = None
    if mark.interval:
        low, high = mark.interval
        errors = [[max(0.0, mark.value - low)], [max(0.0, high - mark.value)]]
    axes.errorbar(
        [mark.step],
        [mark.value],
        yerr=errors,
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


# ---- whole plots ----


def new_figure(width: float, height: float, dpi: int):
    """An empty white figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")


def save(figure, path: Path) -> Path:
    """Write a PNG file; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(str(path))
    return path


def plot(
    panels: Sequence[Panel],
    path: Path,
    width: float,
    height: float,
    title: str = "",
    dpi: int = DPI,
) -> Path:
    """The panels side by side, with one legend for all. Sizes are in inches, of `dpi` dots each."""
    from matplotlib import style

    with style.context("default"):
        figure = new_figure(width, height, dpi)
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        legend: dict = {}
        for axes, panel in zip(all_axes, panels, strict=True):
            plot_panel(axes, panel)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                legend.setdefault(label, handle)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06, wspace=0.04)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
        if len(legend) > 1:
            add_legend(figure, len(legend), legend.values(), legend.keys())
        return save(figure, path)


def plot_bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[Bars],
    path: Path,
    width: float,
    height: float,
    dpi: int = DPI,
    y_label: str = "share of verdicts",
) -> Path:
    """Shares as bars in groups, with the values on top."""
    from matplotlib import style

    with style.context("default"):
        figure = new_figure(width, height, dpi)
        axes = figure.subplots()
        thick = 0.8 / len(series)
        for n, bars in enumerate(series):
            offset = (n - (len(series) - 1) / 2) * thick
            centres = [group + offset for group in range(len(groups))]
            heights = [value or 0.0 for value in bars.values]
            axes.bar(centres, heights, 0.9 * thick, color=bars.colour, label=bars.label)
            for centre, value in zip(centres, bars.values, strict=True):
                shown = "–" if value is None else f"{100 * value:.0f} %"
                top = (value or 0.0) + 0.015
                axes.text(centre, top, shown, ha="center", fontsize=11, color=INK)
        plot_panel(axes, Panel(title, y_label, [], percent=True, x_label=""))
        axes.set_ylim(0, 1.08)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.set_xticks(range(len(groups)), groups, fontsize=11)
        add_legend(figure, len(series))
        return save(figure, path)


def plot_heat_maps(
    grid: Sequence[Sequence[HeatMap]],
    colours: str,
    path: Path,
    width: float,
    height: float,
    dpi: int = DPI,
) -> Path:
    """Rows of heat maps, with one scale of colours for all. colours: what they show, in words."""
    from matplotlib import style
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("around 1", [RL, "#FFFFFF", CONTROL])
    with style.context("default"):
        figure = new_figure(width, height, dpi)
        n_columns = max(map(len, grid))
        all_axes = figure.subplots(len(grid), n_columns, squeeze=False)
        image = None
        for row, row_axes in zip(grid, all_axes, strict=True):
            for axes in row_axes[len(row) :]:
                axes.set_axis_off()
            for heat_map, axes in zip(row, row_axes, strict=False):
                image = plot_heat_map(axes, heat_map, shades)
        bar = figure.colorbar(image, ax=all_axes, extend="max", ticks=[0, 0.5, 1, 1.5, 2])
        bar.set_label(colours, fontsize=10.5, color=INK)
        bar.ax.tick_params(colors=INK, labelsize=10)
        return save(figure, path)


def plot_heat_map(axes, heat_map: HeatMap, shades):
    """One row per number from 0 on, steps to the right; returns the image."""
    from matplotlib.ticker import MaxNLocator

    # All columns are equally wide, as wide as the steps are apart on average; with the same
    # distance everywhere, each has its own step in the middle.
    first, last = heat_map.steps[0], heat_map.steps[-1]
    half = (last - first) / max(1, len(heat_map.steps) - 1) / 2 or 0.5
    bottom = len(heat_map.rows) - 0.5
    image = axes.imshow(
        heat_map.rows,
        cmap=shades,
        vmin=0,
        vmax=2,
        aspect="auto",
        interpolation_stage="data",  # steps that share a dot: their mean, not a mix of colours
        extent=(first - half, last + half, bottom, -0.5),
    )
    axes.set_title(heat_map.title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel("step", fontsize=10.5, color=INK)
    axes.set_ylabel(heat_map.y_label, fontsize=10.5, color=INK)
    axes.tick_params(colors=INK, labelsize=10, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for side in axes.spines.values():
        side.set_color(GRID)
    return image


def add_legend(figure, n_columns: int, *handles_and_labels) -> None:
    """One legend below the whole figure."""
    figure.legend(
        *handles_and_labels,
        loc="outside lower center",
        ncols=n_columns,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
    )
