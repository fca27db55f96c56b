"""The demo's report: one HTML file that explains itself, its plots, and the table of all seeds.

    write_report(folder)    reads what demo.py left there; writes report.html and the PNG files
    seeds_table(folder)     the results of all seeds as Markdown

The page is written for somebody who has not seen the code: each section says what it shows, how to
read it, and what it does not show. Of a demo that was cut short it shows what is there, and says
what is not.

    record.py, metrics.py                     computed: the files read back, the numbers in them
    results.py, examples.py, background.py    written: the sections, as text
    experts.py                                the section that only a mixture of experts has
    page.py, plots.py, demo_plots.py          what it looks like: HTML, and which plots
"""

from collections.abc import Callable
from pathlib import Path

from ...model.files import atomic_write_text
from . import page, plots
from .background import how_to_go_on, memory, settings, spent, what_was_done
from .demo_plots import plot_demo
from .examples import one_group, pairs
from .experts import experts, plot_experts
from .metrics import seed_rows
from .record import read_demo
from .results import about_the_loss, all_seeds, behaviours, headline, main_curves, memorising


def write_report(
    folder: str | Path,
    plot: Callable[..., Path] = plots.plot,
    plot_bars: Callable[..., Path] = plots.plot_bars,
    plot_heat_maps: Callable[..., Path] = plots.plot_heat_maps,
) -> Path:
    """Write report.html and the PNG files into the demo's folder; returns the path of report.html.

    plot, plot_bars, plot_heat_maps: how a plot is made, as in plots.py.
    Raises ValueError if `folder` is no demo's, OSError if it cannot be written to.
    """
    folder = Path(folder)
    record, seeds = read_demo(folder)
    first = seeds[0]
    plotted = plot_demo(folder, seeds, plot, plot_bars)
    plotted |= plot_experts(folder, first, plot, plot_heat_maps)
    sections = [
        headline(record, seeds, plotted),
        what_was_done(record, first, plotted),
        main_curves(first, plotted),
        behaviours(first, plotted),
        experts(first, plotted),
        one_group(first),
        pairs(first),
        all_seeds(seeds),
        memorising(record, first),
        about_the_loss(first),
        settings(record),
        spent(record, seeds),
        memory(seeds),
        how_to_go_on(record, first),
    ]
    path = folder / "report.html"
    atomic_write_text(path, page.document("R1-Zero from nothing", sections))
    return path


def seeds_table(folder: str | Path) -> str:
    """All seeds as a Markdown table. Raises ValueError if `folder` is no demo's."""
    _, seeds = read_demo(folder)
    head, rows = seed_rows(seeds)
    lines = [head, ["---:"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
