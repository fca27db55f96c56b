"""What do the metrics of this GRPO run mean? Prints the advice of train/lab/diagnosis.py.

    r1zero diagnose --run runs/rl        a run that is over, or still going

Reads run.json and metrics.jsonl and nothing else, so it needs no checkpoint and no GPU. A run of an
older version, whose run.json lacks an option that a rule reads, is taken to have had r1_zero's
default.

Left out: runs of other loops. The rules are about groups, rewards and ratios.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..lab.diagnosis import WINDOW, Look, advice, number
from ..run import read_metrics

# The options that the rules read, each with the value that is assumed where run.json lacks it.
ASSUMED = {
    "steps": 100,
    "prompts_per_step": 16,
    "group_size": 16,
    "max_new_tokens": 128,
    "updates_per_step": 1,
    "dynamic_sampling": 1,
    "overlong_buffer": 0.0,
    "control": False,
    "advantage": {"baseline": "group", "lam": 1.0},
    "loss": {"objective": "clip", "kl_coef": 0.0, "max_importance": 0.0},
    "optim": {"clip_grad": 1.0},
}


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Say in plain words what the metrics of a GRPO run mean."""

    run: str
    """Folder of the run."""


def as_config(logged: Any, assumed: dict[str, Any]) -> SimpleNamespace:
    """The options of `assumed`, by attribute, with the values in `logged`, an object of run.json.

    An option that `logged` lacks, or has another kind of value for, keeps the assumed value.
    """
    logged = logged if isinstance(logged, dict) else {}
    options = {name: _option(logged.get(name), value) for name, value in assumed.items()}
    return SimpleNamespace(**options)


def _option(logged: Any, assumed: Any) -> Any:
    """The logged value if it is of the assumed value's kind, else the assumed value."""
    if isinstance(assumed, dict):
        return as_config(logged, assumed)
    if isinstance(assumed, str):
        return logged if isinstance(logged, str) else assumed
    return assumed if math.isnan(number(logged)) else logged


def read_run(folder: Path) -> tuple[SimpleNamespace, list[dict]]:
    """(config, metrics, one row per step) of a GRPO run. Raises ValueError for any other folder."""
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
    try:
        logged = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
        rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} has no readable run.json and metrics.jsonl ({error!r})"
        ) from error
    if not isinstance(logged, dict) or "group_size" not in logged:
        raise ValueError(
            f"{folder} is no run of GRPO, which the rules are about; give a folder that r1zero "
            "grpo wrote"
        )
    if not rows:
        raise ValueError(f"{folder} has no steps yet; ask again when the first is done")
    return as_config(logged, ASSUMED), rows


def diagnose(config: DiagnoseConfig) -> None:
    """Print the advice of each rule that holds. Raises ValueError for a folder of no GRPO run."""
    options, rows = read_run(Path(config.run))
    look = Look(rows, options)
    wait = "" if look.enough else f"; most rules wait for {WINDOW} steps"
    print(
        f"{len(rows)} of {options.steps} steps: accuracy {look.then('accuracy'):.1%} at first, "
        f"{look.mean('accuracy'):.1%} of late{wait}"
    )
    found = advice(rows, options)
    for name, text in found.items():
        print(f"[{name}] {text}")
    if not found:
        print("nothing to complain about")
