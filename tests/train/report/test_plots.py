"""Plots: gaps and missing values are plotted as such, and smoothing bends no straight line."""
import math

import pytest
from matplotlib.image import imread

from r1zero.train.report import plots


def test_gaps_can_be_plotted(tmp_path):
    gaps = plots.Line("a", plots.RL, [1, 2, 3], [math.nan, 1.0, math.inf])
    mark = plots.Mark("b", plots.BASE, 0, 0.5, (0.6, 0.4))  # an interval that does not hold its value
    panels = [plots.Panel("t", "y", [gaps], [mark], percent=True), plots.Panel("t", "y", [])]
    assert plots.plot(panels, tmp_path / "a.png", 4, 2).exists()
    assert plots.plot_bars("t", ["x"], [plots.Bars("a", plots.RL, [None])], tmp_path / "b.png", 4, 2).exists()


def test_values_that_are_no_numbers_are_gaps_on_any_scale(tmp_path):
    values = [1.0, None, "x", math.nan, 10**400, 2.0]
    line = plots.Line("a", plots.RL, range(6), values)
    panels = [plots.Panel("t", "y", [line], log_scale=is_log) for is_log in (True, False)]
    assert plots.plot(panels, tmp_path / "a.png", 4, 2, dpi=25).exists()


def test_smoothing_keeps_straight_lines_and_skips_gaps():
    steps = list(range(20))
    assert plots.smooth(steps, [2.0 * step + 1 for step in steps], 3) == pytest.approx(
        [2.0 * step + 1 for step in steps])
    assert plots.smooth([1, 2, 3], [1.0, math.nan, 3.0], 1) == pytest.approx([1, 2, 3])
    assert plots.smooth([], [], 1) == [] and plots.smooth([1], [5.0], 2) == [5.0]
    assert all(map(math.isnan, plots.smooth([1, 2], [math.nan] * 2, 1)))
    jitter = [(-1.0) ** step for step in steps]
    assert max(map(abs, plots.smooth(steps, jitter, 3)[3:-3])) < 0.2


def test_a_heat_map_is_white_at_1_blue_below_and_orange_above_and_rows_may_be_short(tmp_path):
    """One step is enough, and a place without a map stays empty."""
    def map_of(value: float) -> plots.HeatMap:
        return plots.HeatMap("t", "y", [[value]], [5])

    grid = [[map_of(0.0), map_of(1.0)], [map_of(3.0)]]
    path = plots.plot_heat_maps(grid, "c", tmp_path / "a.png", 6, 4, dpi=50)
    pixels = imread(path)[..., :3]
    height, width, _ = pixels.shape

    def at(row: float, column: float) -> list[int]:
        return [round(255 * value) for value in pixels[int(row * height), int(column * width)]]

    assert at(0.25, 0.25) == [0, 114, 178] and at(0.75, 0.25) == [213, 94, 0]
    assert min(at(0.25, 0.65)) >= 254
    empty = pixels[int(0.52 * height) :, int(0.45 * width) : int(0.75 * width)]
    assert empty.min() > 0.99


def test_a_line_may_be_thick_as_it_is_and_an_axis_may_go_below_0():
    from matplotlib.figure import Figure
    axes = Figure().subplots()
    zigzag = [0.0, -3.0, 4.0, -5.0, 6.0, -7.0]
    line = plots.Line("a", plots.RL, range(6), zigzag, is_smoothed=False)
    plots.plot_panel(axes, plots.Panel("t", "y", [line], from_zero=False))
    thin, thick = (drawn.get_ydata() for drawn in axes.get_lines())
    assert list(thick) == list(thin) == zigzag and axes.get_ylim()[0] < -6
    axes = Figure().subplots()
    plots.plot_panel(axes, plots.Panel("t", "y", [plots.Line("a", plots.RL, range(6), zigzag)]))
    thin, thick = (drawn.get_ydata() for drawn in axes.get_lines())
    assert list(thick) != zigzag and axes.get_ylim()[0] == 0
