"""What a demo left in its folder, read back.

    <demo>/demo.json                       config, machine, seeds
    <demo>/seed<k>/results.json            what was measured, and the time and tokens it took
    <demo>/seed<k>/<part>/metrics.jsonl    the log of each part: base, rl, control
    <demo>/seed<k>/eval_<part>.jsonl       every held-out response
    <demo>/seed<k>/group.json              one group, token by token

A demo can be stopped at any moment, so all of it but demo.json may be missing or torn. What is not
there is empty or None here; metrics.py shows it as a dash.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("base", "rl", "control")


@dataclass(frozen=True)
class Seed:
    """All of one seed; what is missing is empty."""

    number: int
    folder: Path
    results: dict
    logs: dict[str, list[dict]]
    """Rows of metrics.jsonl, for each part."""
    answers: dict[str, list[dict]]
    """Rows of the held-out evaluation, for each part."""
    group: dict

    def get(self, *path: str) -> Any:
        """A value inside results.json, None if it is not there."""
        return dig(self.results, *path)

    def metric(self, *path: str) -> float | None:
        """A finite number inside results.json, None if it is not there."""
        return finite(self.get(*path))

    def last_step(self, part: str) -> int:
        """The step that the log of a part ends with, 0 without a log."""
        return int(max((row["step"] for row in self.logs[part]), default=0))


def dig(value: Any, *path: str) -> Any:
    """value[path[0]][path[1]]..., None if one of them is not there."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def finite(value: Any) -> float | None:
    """A finite number as a float, None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def read_dict(path: Path) -> dict:
    """The JSON object in a file, empty if the file is missing or torn."""
    rows = json_objects([read_or_empty(path)])
    return rows[0] if rows else {}


def read_lines(path: Path) -> list[dict]:
    """The JSON objects in a file, one per line; a line that is none is left out."""
    return json_objects(read_or_empty(path).splitlines())


def read_or_empty(path: Path) -> str:
    """The text of a file, empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def json_objects(texts: list[str]) -> list[dict]:
    """Each text that is a JSON object, as a dict."""
    found = []
    for text in texts:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # ValueError: an integer of thousands of digits too
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_seed(folder: Path, number: int) -> Seed:
    """What is in the folder of one seed."""
    logs, answers = {}, {}
    for part in PARTS:
        rows = read_lines(folder / part / "metrics.jsonl")
        logs[part] = [row for row in rows if finite(row.get("step")) is not None]
        answers[part] = read_lines(folder / f"eval_{part}.jsonl")
    results = read_dict(folder / "results.json")
    group = read_dict(folder / "group.json")
    return Seed(number, folder, results, logs, answers, group)


def read_demo(folder: str | Path) -> tuple[dict, list[Seed]]:
    """(demo.json, its seeds). There is at least one seed, an empty one if none was begun.

    Raises ValueError if `folder` is no demo's.
    """
    folder = Path(folder)
    record = read_dict(folder / "demo.json")
    if not record:
        raise ValueError(f"{folder} holds no demo.json that can be read; give the folder of a demo")
    listed = record.get("seeds")
    if not isinstance(listed, list):
        listed = []
    numbers = [n for n in listed if isinstance(n, int)]
    begun = [n for n in numbers if (folder / f"seed{n}").is_dir()]
    return record, [read_seed(folder / f"seed{n}", n) for n in begun or [0]]
