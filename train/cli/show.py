"""What did the model write? Prints the groups of one step of a GRPO run, best answers first.

    r1zero show --run runs/rl                            the last step
    r1zero show --run runs/rl --step 40 --group 3        all answers of one group
    r1zero show --run runs/rl --step 40 --html page.html every answer, token by token

It reads rollouts.jsonl.gz, which r1zero grpo writes (rollout_log.py); a run that is still going may
be looked at, too. In a terminal, answers that become more likely are green, and those that become
less likely red; NO_COLOR in the environment turns that off.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ...eval.console import say
from ...eval.result_file import check_result_path, is_stream, target_of
from ...model.files import atomic_write_text
from ..report.step_page import (
    advantage_of,
    best_and_worst,
    by_group,
    group_in_words,
    head_of,
    note_of,
    step_in_words,
    step_page,
)
from ..rollout_files import kept_steps, read_step
from .diagnose import check_run_folder
from .main import one_line, printable

LIMIT = 4  # answers per group, where no number is given
MOST_CHARACTERS = 600  # of a text, unless one group is shown whole
GREEN, RED = "32", "31"  # of ANSI


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Print the groups of one step of a GRPO run: answers, rewards, advantages."""

    run: str
    """Folder of the run."""
    step: int | None = None
    """Step to show. Without it, the last that was kept."""
    group: int | None = None
    """Number of the one group to show, with all of its answers."""
    limit: int | None = None
    """Maximum number of answers per group, the best and the worst of it. Without it: 4, and all
    with --group or --html."""
    html: str | None = None
    """File to write a page to, with every token, instead of printing."""

    def __post_init__(self):
        for name in ("step", "group", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}, expected 1 or more")
        if self.html is not None:
            if self.html == "-":
                raise ValueError("--html - would write a file of that name; give another one")
            check_result_path(self.html, flag="--html")
            if is_stream(self.html):
                raise ValueError(f"--html {self.html} is no file that can be replaced; give one")


# ---- what to show ----


def ranges(numbers: list[int]) -> str:
    """1-40, 50"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)


def read_samples(config: ShowConfig) -> list[dict]:
    """All samples of the step.

    Raises ValueError, in plain words, for a run, a step or a group that is not there.
    """
    folder = Path(config.run)
    check_run_folder(folder)
    steps = kept_steps(folder)
    if not steps:
        raise ValueError(
            f"{folder} has kept no completions yet; r1zero grpo keeps those of each step from "
            "its start or --resume on, unless --keep-rollouts is 0"
        )
    step = max(steps) if config.step is None else config.step
    if step not in steps:
        raise ValueError(
            f"--step is {step}, but {folder} has kept steps {ranges(sorted(steps))}; give one of "
            "them"
        )
    samples = read_step(steps[step])
    groups = by_group(samples)
    if config.group is not None and config.group not in groups:
        raise ValueError(
            f"--group is {config.group}, but step {step} has kept groups {ranges(list(groups))}; "
            "give one of them"
        )
    return samples


# ---- in the terminal ----


class Printer:
    """Lines for a terminal: what is coloured, and how much of a text is shown."""

    def __init__(self, stream, whole: bool):
        """whole: show texts in full."""
        self.in_colour = stream.isatty() and not os.environ.get("NO_COLOR")
        self.whole = whole

    def paint(self, text: str, strength: float) -> str:
        """Green above 0, red below."""
        if not self.in_colour or not strength:
            return text
        return f"\x1b[{GREEN if strength > 0 else RED}m{text}\x1b[0m"

    def shorten(self, text: str) -> str:
        """A text that the terminal shows and does not obey, cut if it is long."""
        n_more = len(text) - MOST_CHARACTERS
        if self.whole or n_more <= 0:
            return printable(text)
        return f"{printable(text[:MOST_CHARACTERS])} ... {n_more:,} characters more"

    def answer(self, sample: dict) -> str:
        text = self.shorten(sample["response"]).replace("\n", "\n    ")
        strength = advantage_of(sample)
        head = self.paint(head_of(sample), strength)
        return f"  {head} {one_line(note_of(sample))}\n    {self.paint(text, strength)}"

    def group(self, number: int, group: list[dict], limit: int) -> str:
        prompt = " ".join(self.shorten(group[0]["prompt"]).split())
        best, worst = best_and_worst(group, limit)
        lines = [f"\ngroup {number}: {prompt}   {group_in_words(group)}"]
        lines += [self.answer(sample) for sample in best]
        n_between = len(group) - len(best) - len(worst)
        if n_between:
            lines.append(f"  ... {n_between} more")
        lines += [self.answer(sample) for sample in worst]
        return "\n".join(lines)


def show(config: ShowConfig) -> None:
    """Print the step, or write its page. Raises ValueError as `read_samples` does."""
    samples = read_samples(config)
    if config.html is not None:
        write_page(samples, config)
        return
    printer = Printer(sys.stdout, whole=config.group is not None)
    limit = config.limit or (LIMIT if config.group is None else len(samples))
    print(step_in_words(samples))
    for number, group in by_group(samples).items():
        if config.group in (None, number):
            print(printer.group(number, group, limit))


def write_page(samples: list[dict], config: ShowConfig) -> None:
    """Write the page of --html."""
    tokenizer = tokenizer_of(Path(config.run))
    target = target_of(config.html)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = step_page(samples, tokenizer.token_text, only=config.group, limit=config.limit)
    atomic_write_text(target, text)
    say(f"written: {config.html}")


def tokenizer_of(folder: Path):
    """The tokenizer of a run, from what it began with or, in older ones, from its last checkpoint.

    Raises CheckpointError if there is neither.
    """
    # These import torch, which printing does without.
    from ...model.checkpoint import load_checkpoint
    from ...model.tokenizer import Tokenizer
    from ..run import START

    start = folder / START
    source = start if start.exists() else folder
    return Tokenizer.from_dict(load_checkpoint(source, groups=()).state["tokenizer"])
