"""A classic mistake beside the right thing: two GRPO runs that differ in it alone, and a picture.

    r1zero compare --break flipped_clip --run runs/flipped --base runs/base --steps 20

mistakes.py has the mistakes, and says of each what is done and where it shows. Both runs have the
same base, problems, seeds and options. Some mistakes show only with options that both runs then get
(several updates per step for the clip, a KL for its estimators). A comparison that was stopped with
Ctrl-C goes on with --resume, like any run.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ...model.engine.sampling import NonFiniteError
from ..grpo import GRPOConfig, grpo
from ..report.demo_plots import CURVES
from ..report.plots import CONTROL, RL, Line, Panel, plot
from ..run import read_metrics
from .mistakes import MISTAKES

SHOWN = ("accuracy", "length")  # beside the figure that the mistake shows in
PANELS = {name: (title, unit, is_share) for name, _, title, unit, is_share, _ in CURVES} | {
    "gradient_norm": ("Size of the gradient", "norm before clipping, log scale", False),
    "trained_samples": ("Answers trained on", "answers a step", False),
    "truncated": ("Answers cut off", "share of answers", True),
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig(GRPOConfig):
    """Run a classic mistake and the right thing, and plot both."""

    mistake: Annotated[str, tyro.conf.arg(name="break")]
    """The mistake: k1_loss, flipped_k3, flipped_clip, length_bias, micro_batch_mean, sum_of_groups,
    no_end_token, no_baseline, unguarded_std or wrong_group."""
    run: str
    """Folder for both runs, right/ and broken/, and the picture, compare.png."""
    resume: bool = False
    """Go on with a comparison that was stopped."""
    steps: int = 20
    """Number of steps of each run."""


def grpo_config(c: CompareConfig, broken: bool) -> GRPOConfig:
    """One of the two runs; they differ in `mistake` and the folder alone."""
    options = {f.name: getattr(c, f.name) for f in fields(GRPOConfig)}
    options["mistake"] = c.mistake if broken else None
    options["run"] = str(Path(c.run) / ("broken" if broken else "right"))
    config = GRPOConfig(**options)
    for name, value in MISTAKES[c.mistake].shows_with.items():
        config = with_option(config, name, value)
    return config


def with_option(config: Any, name: str, value: Any) -> Any:
    """`config` with the option "loss.kl_coef" or "updates_per_step" set."""
    outer, _, inner = name.partition(".")
    if inner:
        value = with_option(getattr(config, outer), inner, value)
    return replace(config, **{outer: value})


def compare(c: CompareConfig) -> Path | None:
    """Do both runs and draw them; returns the picture's path, or None if Ctrl-C stopped a run."""
    rows, fell = {}, ""
    for broken in (False, True):
        config = grpo_config(c, broken)
        try:
            grpo(config)
        except (FloatingPointError, NonFiniteError) as error:
            rows[broken] = read_metrics(config.run)
            if not broken or not rows[broken]:
                raise
            fell = (
                f"the broken run ended after {rows[broken][-1]['step']} of {c.steps} steps: {error}"
            )
            continue
        rows[broken] = read_metrics(config.run)
        if rows[broken][-1]["step"] < c.steps:
            print(f"stopped; go on with: r1zero compare --resume and the same flags ({c.run})")
            return None
    path = picture(c, rows)
    print(summary(c, rows))
    if fell:
        print(fell)
    print(path)
    return path


def shown(c: CompareConfig) -> list[str]:
    """The figures that both runs are compared by."""
    return [*dict.fromkeys((*SHOWN, MISTAKES[c.mistake].watch))]


def picture(c: CompareConfig, rows: dict[bool, list[dict]]) -> Path:
    """rows: of the run that is broken (True) and of the right one."""
    panels = []
    for name in shown(c):
        title, unit, is_share = PANELS[name]
        lines = [
            Line(
                label,
                colour,
                [row["step"] for row in rows[broken]],
                [row[name] for row in rows[broken]],
            )
            for broken, label, colour in (
                (False, "right", RL),
                (True, f"broken: {c.mistake}", CONTROL),
            )
        ]
        panels.append(
            Panel(title, unit, lines, percent=is_share, log_scale=name == "gradient_norm")
        )
    return plot(panels, Path(c.run) / "compare.png", 5 * len(panels), 4.4, one_line(c))


def one_line(c: CompareConfig) -> str:
    return f"{c.mistake}: {MISTAKES[c.mistake].what}"


def summary(c: CompareConfig, rows: dict[bool, list[dict]]) -> str:
    """Both runs' figures over their last quarter, and what is to be expected of the mistake."""
    last = max(1, c.steps // 4)
    lines = [
        f"{one_line(c)}.",
        f"  {f'mean of the last {last} steps':<26} {'right':>9} {'broken':>9}",
    ]
    for name in shown(c):
        right, wrong = (
            sum(row[name] for row in rows[broken][-last:]) / len(rows[broken][-last:])
            for broken in (False, True)
        )
        lines.append(f"  {name:<26} {right:9.3f} {wrong:9.3f}")
    dials = MISTAKES[c.mistake].shows_with
    flags = [f"--{name.replace('_', '-')} {value:g}" for name, value in dials.items()]
    lines += [f"Both runs had {' '.join(flags)}, with which it shows."] if flags else []
    return "\n".join(
        [*lines, f"What 16 steps from the demo's base showed: {MISTAKES[c.mistake].seen}"]
    )
