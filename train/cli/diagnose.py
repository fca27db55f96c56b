"""Split off train/diagnose.py."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..lab.diagnosis import WINDOW, Look, advice, number
from ..run import read_metrics


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Say in plain words what a GRPO run's figures mean."""

    run: str
    """Folder of the run."""


def as_config(logged: Any, known: Any) -> Any:
    """What run.json has, to be read like a config; a dial that it lacks, or has another kind of
    value for, is as in `known`, today's default."""
    if isinstance(known, int | float):
        return known if math.isnan(number(logged)) else logged
    if not isinstance(known, dict):
        return logged if isinstance(logged, str) else known
    logged = logged if isinstance(logged, dict) else {}
    return SimpleNamespace(
        **{name: as_config(logged.get(name, value), value) for name, value in known.items()}
    )


def read_run(folder: Path):
    """(config, rows) of a GRPO run. Raises ValueError for a folder that is no such run's, in plain
    words."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} {'is a file' if folder.exists() else 'does not exist'}; give the folder "
            "of a run that r1zero grpo wrote"
        )
    if not (folder / "run.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/run.json"))
        raise ValueError(
            f"{folder} holds several runs; give one of them: {', '.join(inner)}"
            if inner
            else f"{folder} holds no run (no run.json); give a folder that r1zero grpo wrote"
        )
    from ..grpo import GRPOConfig  # imports this module

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
    return as_config(logged, asdict(GRPOConfig(run=".", base="."))), rows


def diagnose(c: DiagnoseConfig) -> None:
    """Print the advice of each rule that holds. Raises ValueError for a folder that is no GRPO
    run's."""
    config, rows = read_run(Path(c.run))
    look = Look(rows, config)
    wait = "" if look.enough else f"; most rules wait for {WINDOW} steps"
    print(
        f"{len(rows)} of {config.steps} steps: accuracy {look.then('accuracy'):.1%} at first, "
        f"{look.mean('accuracy'):.1%} of late{wait}"
    )
    found = advice(rows, config)
    print(
        "\n".join(f"[{name}] {text}" for name, text in found.items()) or "nothing to complain about"
    )
