"""What came out of `r1zero distill`: the cost of each arm, which is better, a table, a picture.

    sampled     tokens that teacher and student have written for an arm, useless ones included
    trained     tokens of its optimizer steps
    seconds     of both, on this machine

Which of two arms is better is the mean difference over the same held-out problems, with its 95 %
interval: problems differ more than models do, and that cancels. What the student has cost, which
all arms begin with, and the teacher, is not counted.
"""

import json
import math
from pathlib import Path

import numpy as np

from ...eval.harness import Z95
from ..cost import StageCost, cost_of
from ..machine import describe_machine
from ..report.metrics import share_with_interval
from ..report.plots import AXIS, BASE, CONTROL, GRID, INK, RL, new_figure, save
from .parts import PartResults

# What an arm is, and the stages that it takes beside the student.
ARMS = {
    "student": ("the small base", ()),
    "rl": ("RL alone", ("rl",)),
    "sft": ("SFT on the teacher's answers", ("traces", "sft")),
    "sft_rl": ("the same, then RL", ("traces", "sft", "sft_rl")),
    "own": ("SFT on its own right answers", ("own_traces", "own")),
    "on_policy": ("on-policy distillation", ("on_policy",)),
    "large": ("the teacher's base by SFT", ("traces", "large")),
    "teacher": ("the teacher", ()),
}
# (an arm, another, what each has that the other has not)
QUESTIONS = (
    ("sft", "rl", "distillation", "RL"),
    ("sft_rl", "sft", "RL behind SFT", "SFT alone"),
    ("sft", "own", "SFT on the teacher's answers", "SFT on its own"),
    ("on_policy", "sft", "on-policy distillation", "SFT"),
    ("on_policy", "rl", "on-policy distillation", "RL"),
    ("large", "sft", "the teacher's base", "the small one"),
    ("large", "teacher", "SFT of the teacher's base", "the teacher's RL"),
)


class Results(PartResults):
    """results.json: what was measured of each model, with the configuration and the machine."""

    def __init__(self, folder: Path, flags: dict):
        """flags: those of the recipe, as JSON types."""
        super().__init__(folder, {"stages": {}})
        self.values |= {"config": flags, "machine": describe_machine()}

    @property
    def stages(self) -> dict[str, dict]:
        return self.values["stages"]

    def keep(self, name: str, found: dict) -> None:
        """Note what was measured of a model."""
        self.stages[name] = found
        self.write()

    def sum_up(self, folder: Path) -> None:
        """Note what each arm has cost, and the differences between arms."""
        stages = {stage.name: stage for stage in cost_of(folder).stages}
        most = max(self.values["config"]["traces"])
        self.values["arms"] = {
            name: cost_of_arm(stages, path)
            for name, (_, path) in ARMS.items()
            if name in self.stages
        }
        questions = (
            *QUESTIONS,
            ("sft", f"any_{most}", "SFT on right answers", "SFT on unfiltered ones"),
        )
        self.values["differences"] = [
            {"better": words, "than": others, "points": difference(folder, one, other)}
            for one, other, words, others in questions
            if one in self.stages and other in self.stages
        ]
        self.write()

    def table(self) -> str:
        """A row per arm, for people."""
        heads = ("right", "sampled", "trained", "seconds")
        lines = [f"{'':<32}" + "".join(f"{head:>20}" for head in heads)]
        for name, cost in self.values["arms"].items():
            cells = [share_with_interval(self.stages[name]["accuracy"])]
            cells += [f"{cost[head]:,.0f}" if ARMS[name][1] else "-" for head in heads[1:]]
            lines.append(f"{ARMS[name][0]:<32}" + "".join(f"{cell:>20}" for cell in cells))
        lines.append("")
        lines.append(f"{'SFT on n answers':<32}{'right ones':>28}{'unfiltered':>28}")
        for n, *points in curve(self.values):
            cells = [share_of_traces(n, *point) for point in points]
            lines.append(f"{n:<32,}" + "".join(f"{cell:>28}" for cell in cells))
        return "\n".join(lines)


def share_of_traces(n: int, n_traces: int, accuracy: list[float]) -> str:
    """A cell of the curve's table; where there were fewer than n answers, with their number."""
    share = share_with_interval(accuracy)
    return share if n_traces == n else f"{share} of {n_traces:,}"


# ---- cost ----


def cost_of_arm(stages: dict[str, StageCost], path: tuple[str, ...]) -> dict[str, float]:
    """What the stages of an arm have cost together."""
    taken = [stages[name] for name in path]
    return {
        "sampled": sum(stage.sampled_tokens for stage in taken),
        "trained": sum(stage.trained_tokens for stage in taken),
        "seconds": sum(stage.seconds or 0.0 for stage in taken),
    }


# ---- which is better ----


def shares_right(path: Path) -> list[float]:
    """The share of right answers to each problem of an evaluation, in order."""
    answers: dict[int, list[float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers.setdefault(row["index"], []).append(row["accuracy"])
    return [float(np.mean(answers[index])) for index in sorted(answers)]


def difference(folder: Path, one: str, other: str) -> list[float]:
    """[mean, low, high]: how much more often one model is right than another on the same problems,
    from -1 to 1, with the normal approximation's 95 % interval over problems."""
    pair = [shares_right(folder / f"eval_{name}.jsonl") for name in (one, other)]
    apart = np.subtract(*pair)
    half = Z95 * float(apart.std()) / math.sqrt(len(apart))
    return [float(apart.mean()), float(apart.mean()) - half, float(apart.mean()) + half]


def verdict(found: dict) -> str:
    """Which of two is better, in a sentence, whichever it is."""
    mean, low, high = (100 * value for value in found["points"])
    one, other = found["better"], found["than"]
    points = f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
    if low > 0:
        return f"{one} beats {other}: {points}"
    if high < 0:
        return f"{other} beats {one}: {-mean:+.1f} points [{-high:+.1f}, {-low:+.1f}]"
    return f"{one} and {other} do not differ beyond the interval: {points}"


def verdicts(values: dict) -> str:
    """A sentence per question."""
    return "\n".join(verdict(found) for found in values["differences"])


# ---- the picture ----


Point = tuple[int, list[float]]
"""How many traces there were, and the accuracy of SFT on them."""


def curve(values: dict) -> list[tuple[int, Point, Point]]:
    """(number of traces that was asked for, SFT on right ones, SFT on unfiltered ones), rising."""
    numbers, stages = sorted(values["config"]["traces"]), values["stages"]
    points = []
    for n in numbers:
        right, unfiltered = f"right_{n}", f"any_{n}"
        trained = "sft" if n == numbers[-1] else right
        pair = ((right, trained), (unfiltered, unfiltered))
        # There may have been fewer answers than were asked for.
        found = [(values["traces"].get(file, n), stages[name]["accuracy"]) for file, name in pair]
        points.append((n, *found))
    return points


def plot_curve(axes, values: dict) -> None:
    """Accuracy over the number of traces, between that of the student and that of the teacher."""
    points = curve(values)
    for which, label, colour in ((1, "right ones alone", RL), (2, "unfiltered", CONTROL)):
        numbers = [point[which][0] for point in points]
        shares = np.array([point[which][1] for point in points])
        bars = np.abs(shares[:, 1:] - shares[:, :1]).T
        axes.errorbar(numbers, shares[:, 0], bars, label=label, color=colour, marker="o", capsize=3)
    numbers = sorted({n for _, *both in points for n, _ in both})
    for name in ("student", "teacher"):
        level = values["stages"][name]["accuracy"][0]
        axes.axhline(level, color=BASE, linestyle="--", linewidth=1)
        axes.text(numbers[0], level, f"{name} ", va="bottom", fontsize=9, color=INK)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [f"{n:,}" for n in numbers])
    axes.set_xlabel("answers of the teacher")
    axes.set_title("SFT of the student", loc="left", fontsize=10)
    axes.legend(loc="center right", frameon=False, fontsize=9)


def plot_costs(axes, values: dict) -> None:
    """Accuracy of each arm over the tokens that it took."""
    for name, cost in values["arms"].items():
        if not ARMS[name][1]:
            continue
        mean, low, high = values["stages"][name]["accuracy"]
        tokens = (cost["sampled"] + cost["trained"]) / 1e6
        colour = BASE if name == "large" else CONTROL if name == "rl" else RL
        bar = [[mean - low], [high - mean]]
        axes.errorbar([tokens], [mean], bar, color=colour, marker="o", capsize=3)
        above = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
        axes.annotate(name, (tokens, high), (0, 4), **above)
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens sampled and trained on, millions")
    axes.set_title("The arms", loc="left", fontsize=10)
    axes.margins(x=0.15)


def plot_results(values: dict, path: Path) -> Path:
    """Both panels, as a PNG file."""
    from matplotlib import style
    from matplotlib.ticker import NullLocator, PercentFormatter

    with style.context("default"):
        figure = new_figure(10, 4.2, 150)
        both = figure.subplots(1, 2, sharey=True)
        for axes, draw in zip(both, (plot_curve, plot_costs), strict=True):
            draw(axes, values)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(color=AXIS, labelsize=9)
        both[0].set_ylabel("held-out answers that are right")
        return save(figure, path)
