"""A classic mistake beside the right thing: two GRPO runs that differ in it alone, and a picture.

    r1zero compare --break flipped_clip --run runs/flipped --base runs/base --steps 20
    r1zero compare --control random --run runs/coin --base runs/base --steps 20

mistakes.py has the mistakes, and says of each what is done and where it shows. With --control the
second run has rewards that say nothing (rl/control.py), whatever the task is. Both runs have the
same base, problems, seeds and options. Some mistakes show only with options that both runs then get
(several updates per step for the clip, a KL for its estimators). A comparison that was stopped with
Ctrl-C goes on with --resume, like any run.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ...eval.console import show
from ...model.engine.sampling import NonFiniteError
from ...model.files import atomic_write_text
from ..grpo import GRPOConfig, grpo
from ..log import read_metrics
from ..report.demo_plots import CURVES
from ..report.metrics import column, mean, number
from ..report.plots import CONTROL, RL, Line, Panel, plot
from .mistakes import MISTAKES, Difference

SHOWN = ("accuracy", "length")  # beside the metric that the mistake shows in
CONTROL_RUN = Difference(
    what="the rewards say nothing of the answers, so whatever it gains is not learned from them",
    watch="kl_to_reference",
    seen="12 steps of --control permute left three seeds within 3 points of their bases; --control "
    "random was not measured.",
)
PANELS = {name: (title, unit, is_share) for name, _, title, unit, is_share, _ in CURVES} | {
    "gradient_norm": ("Size of the gradient", "norm before clipping, log scale", False),
    "trained_samples": ("Answers trained on", "answers per step", False),
    "truncated": ("Answers cut off", "share of answers", True),
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig(GRPOConfig):
    """Run a classic mistake, or the control, and the right thing, and plot both."""

    mistake: Annotated[str | None, tyro.conf.arg(name="break")] = None
    """The mistake, unless --control is given: k1_loss, flipped_k3, flipped_clip, length_bias,
    micro_batch_mean, sum_of_groups, no_end_token, no_baseline, unguarded_std or wrong_group."""
    run: str
    """Folder for both runs, right/ and broken/ (or control/), the picture compare.png and the text
    compare.txt."""
    resume: bool = False
    """Go on with a comparison that was stopped."""
    steps: int = 20
    """Number of steps of each run."""

    def __post_init__(self):
        super().__post_init__()
        # (There is no --run yet while the command line gathers its defaults.)
        is_one = (self.mistake is None) != (self.control == "none")
        if isinstance(self.run, str) and not is_one:
            raise ValueError(
                "expected either --break NAME or --control permute (or random): what the second "
                "run has and the first has not"
            )

    @property
    def difference(self) -> Difference:
        """What the second run does."""
        return CONTROL_RUN if self.mistake is None else MISTAKES[self.mistake]

    @property
    def second(self) -> str:
        """The kind of the second run, and its folder."""
        return "control" if self.mistake is None else "broken"

    @property
    def name(self) -> str:
        """What the second run is called."""
        return self.mistake or f"control {self.control}"


def config_of_run(config: CompareConfig, broken: bool) -> GRPOConfig:
    """One of the two runs; they differ in `mistake` or `control`, and the folder, alone."""
    options = {f.name: getattr(config, f.name) for f in fields(GRPOConfig)}
    if not broken:
        options |= {"mistake": None, "control": "none"}
    options["run"] = str(Path(config.run) / (config.second if broken else "right"))
    made = GRPOConfig(**options)
    for name, value in config.difference.shows_with.items():
        made = with_option(made, name, value)
    return made


def with_option(config: Any, name: str, value: Any) -> Any:
    """`config` with the option "loss.kl_coef" or "updates_per_step" set."""
    outer, _, inner = name.partition(".")
    if inner:
        value = with_option(getattr(config, outer), inner, value)
    return replace(config, **{outer: value})


def compare(config: CompareConfig) -> Path:
    """Do both runs and draw them; returns the picture's path. Raises Stopped after Ctrl-C."""
    rows, fell = {}, ""
    for broken in (False, True):
        run_config = config_of_run(config, broken)
        try:
            grpo(run_config)
        except (FloatingPointError, NonFiniteError) as error:
            rows[broken] = read_metrics(run_config.run)
            if not broken or not rows[broken]:
                raise
            last = rows[broken][-1]["step"]
            fell = f"the {config.second} run ended after {last} of {config.steps} steps: {error}"
            continue
        rows[broken] = read_metrics(run_config.run)
        if not rows[broken]:
            raise ValueError(
                f"the log of {run_config.run} is gone; remove that folder to have the run again"
            )
    path = picture(config, rows)
    result = "\n".join(filter(None, [summary(config, rows), fell, str(path)]))
    atomic_write_text(path.with_name("compare.txt"), f"{result}\n")
    show(result)
    return path


def shown(config: CompareConfig) -> list[str]:
    """The metrics that both runs are compared by."""
    return [*dict.fromkeys((*SHOWN, config.difference.watch))]


def picture(config: CompareConfig, rows: dict[bool, list[dict]]) -> Path:
    """rows: of the run that is broken (True) and of the right one."""
    panels = []
    for name in shown(config):
        title, unit, is_share = PANELS[name]
        lines = [
            Line(
                label,
                colour,
                [row["step"] for row in rows[broken]],
                [row.get(name) for row in rows[broken]],
            )
            for broken, label, colour in (
                (False, "right", RL),
                (True, label_of_second(config), CONTROL),
            )
        ]
        panels.append(
            Panel(title, unit, lines, percent=is_share, log_scale=name == "gradient_norm")
        )
    return plot(panels, Path(config.run) / "compare.png", 5 * len(panels), 4.4, one_line(config))


def label_of_second(config: CompareConfig) -> str:
    """broken: no_end_token, or control random"""
    return config.name if config.mistake is None else f"broken: {config.name}"


def one_line(config: CompareConfig) -> str:
    return f"{config.name}: {config.difference.what}"


def summary(config: CompareConfig, rows: dict[bool, list[dict]]) -> str:
    """Both runs' metrics over their last quarter, and what is to be expected of the second."""
    last = max(1, config.steps // 4)
    lines = [
        f"{one_line(config)}.",
        f"  {f'mean of the last {last} steps':<26} {'right':>9} {config.second:>9}",
    ]
    for name in shown(config):
        means = (mean(column(rows[broken][-last:], name)) for broken in (False, True))
        right, wrong = (number(value, 3) for value in means)  # a dash where it was not measured
        lines.append(f"  {name:<26} {right:>9} {wrong:>9}")
    difference = config.difference
    if difference.flags:
        lines.append(f"Both runs had {difference.flags}, with which it shows.")
    lines.append(f"What was seen of it, from the demo's base: {difference.seen}")
    return "\n".join(lines)
