"""Plots: gaps and missing values are plotted as such, and smoothing bends no straight line."""
import math

import pytest

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
