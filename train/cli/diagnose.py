"""The command diagnose: what the log of a GRPO run means, by the rules of lab/diagnosis.py.

    r1zero diagnose --run runs/rl        for a run that is over, or still going

Its last line is that of the control: a run of the same base and task in a folder beside this one,
made with --control.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ...rl.control import CONTROLS
from ..lab.diagnosis import advice, is_real_run
from ..lab.history import WINDOW, History
from ..log import read_metrics
from ..report.record import dig, read_dict, read_lines


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Say in plain words what the metrics of a GRPO run mean."""

    run: str
    """Folder of the run."""


def check_run_folder(folder: Path) -> None:
    """Raise ValueError, in plain words, for a folder that is no run's."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} {'is a file' if folder.exists() else 'does not exist'}; give the folder "
            "of a run that r1zero grpo wrote"
        )
    if not (folder / "run.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/run.json"))
        if inner:
            raise ValueError(f"{folder} holds several runs; give one of them: {', '.join(inner)}")
        raise ValueError(
            f"{folder} holds no run (no run.json); give a folder that r1zero grpo wrote"
        )


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """(flags, rows of metrics.jsonl) of a GRPO run.

    Raises ValueError, in plain words, for a folder that is no such run's.
    """
    check_run_folder(folder)
    try:
        config = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
        rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{folder} has no readable run.json and metrics.jsonl ({error!r})"
        ) from error
    if not isinstance(config, dict) or "group_size" not in config:
        raise ValueError(
            f"{folder} is no run of GRPO, which the rules are about; give a folder that r1zero "
            "grpo wrote"
        )
    if not rows:
        raise ValueError(f"{folder} has no steps yet; ask again when the first is done")
    return config, rows


def accuracy_in_words(history: History) -> str:
    """How accuracy was at first and is now, as far as it was measured."""
    first, now = history.first_mean("accuracy"), history.mean("accuracy")
    if math.isnan(now):
        return "accuracy was not measured of late"
    at_first = "" if math.isnan(first) else f"{first:.1%} at first, "
    return f"accuracy {at_first}{now:.1%} of late"


def control_in_words(folder: Path, flags: dict) -> str:
    """What the control of a run did: the run beside it of the same base and task, with --control.
    Without one, how to make it; empty for a run that is a control itself."""
    if not is_real_run(History([{}], flags)):
        return ""
    found = []
    for path in sorted(folder.resolve().parent.glob("*/run.json")):
        other = read_dict(path).get("config")
        same = [dig(other, name) == flags.get(name) for name in ("base", "task")]
        kind = dig(other, "control")
        rows = read_lines(path.with_name("metrics.jsonl"))
        if all(same) and kind in (True, *CONTROLS) and rows:
            words = accuracy_in_words(History(rows, other))
            name = "permute" if kind is True else kind  # it was a switch once
            found.append(f"control ({path.parent.name}, {name}, {len(rows)} steps): {words}")
    return "\n".join(found) or (
        "control: none stands beside this run, so nothing tells what rewards without information "
        "would have done; the same command with another --run and --control permute makes one"
    )


def diagnose(config: DiagnoseConfig) -> None:
    """Print the advice of each rule that holds. Raises ValueError as `read_run` does."""
    flags, rows = read_run(Path(config.run))
    history = History(rows, flags)
    steps = history.option("steps")
    of_all = "" if math.isnan(steps) else f" of {steps:.0f}"
    wait = "" if history.is_long else f"; most rules wait for {WINDOW} steps"
    print(f"{len(rows)}{of_all} steps: {accuracy_in_words(history)}{wait}")
    found = [f"[{name}] {text}" for name, text in advice(rows, flags).items()]
    print("\n".join(found) or "nothing to complain about")
    if words := control_in_words(Path(config.run), flags):
        print(words)
