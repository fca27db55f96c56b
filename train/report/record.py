"""What a demo left in its folder, read back with a forgiving eye, and its figures as text for people.

    <demo>/demo.json                       config, machine, seeds
    <demo>/seed<k>/results.json            what was measured, and the time and tokens it took
    <demo>/seed<k>/<part>/metrics.jsonl    the log of each part: base, rl, control
    <demo>/seed<k>/eval_<part>.jsonl       every held-out response
    <demo>/seed<k>/group.json              one group, token by token

A demo can be stopped at any moment, so all of it but demo.json may be missing or torn. What is not there is
empty or None, and is shown as a dash.
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
    """Rows of metrics.jsonl of each part."""
    answers: dict[str, list[dict]]
    """Rows of the held-out evaluation of each part."""
    group: dict

    def get(self, *path: str) -> Any:
        """A value inside results.json, None if it is not there."""
        return dig(self.results, *path)

    def figure(self, *path: str) -> float | None:
        """A finite number inside results.json, None if it is not there."""
        return finite(self.get(*path))

    def last_step(self, part: str) -> int:
        """The step that the log of a part ends with, 0 without a log."""
        return int(max((row["step"] for row in self.logs[part]), default=0))


def dig(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def read_dict(path: Path) -> dict:
    """A JSON object, empty if the file is missing or torn."""
    rows = read_lines(path, whole=True)
    return rows[0] if rows else {}


def read_lines(path: Path, whole: bool = False) -> list[dict]:
    """The JSON objects in a file, one a line (or the whole file is one); what is no object is passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    rows = []
    for line in [text] if whole else text.splitlines():
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict)]


def read_seed(folder: Path, number: int) -> Seed:
    logs = {part: read_lines(folder / part / "metrics.jsonl") for part in PARTS}
    logs = {
        part: [row for row in rows if finite(row.get("step")) is not None]
        for part, rows in logs.items()
    }
    answers = {part: read_lines(folder / f"eval_{part}.jsonl") for part in PARTS}
    results, group = (read_dict(folder / name) for name in ("results.json", "group.json"))
    return Seed(number, folder, results, logs, answers, group)


def read_demo(folder: str | Path) -> tuple[dict, list[Seed]]:
    """(demo.json, its seeds, at least one: an empty one if none was begun).

    Raises ValueError if `folder` is no demo's.
    """
    folder = Path(folder)
    record = read_dict(folder / "demo.json")
    if not record:
        raise ValueError(f"{folder} holds no demo.json that can be read; give the folder of a demo")
    numbers = record.get("seeds")
    numbers = [n for n in numbers if isinstance(n, int)] if isinstance(numbers, list) else []
    begun = [n for n in numbers if (folder / f"seed{n}").is_dir()]
    return record, [read_seed(folder / f"seed{n}", n) for n in begun or [0]]


# ---- figures as text ----


def percent(share: Any) -> str:
    share = finite(share)
    return "–" if share is None else f"{100 * share:.1f} %"


def number(value: Any, digits: int = 1) -> str:
    value = finite(value)
    return "–" if value is None else f"{value:,.{digits}f}"


def bounds(seed: Seed, part: str, name: str = "accuracy") -> tuple[float, float] | None:
    """The 95 % interval of a figure, None if it was not measured."""
    pair = seed.get(part, "eval", f"{name}_95")
    if not isinstance(pair, list) or len(pair) != 2 or None in map(finite, pair):
        return None
    return finite(pair[0]), finite(pair[1])


def brackets(pair: tuple[float, float] | None) -> str:
    """[27.1, 31.8], in percent"""
    return f"[{100 * pair[0]:.1f}, {100 * pair[1]:.1f}]" if pair else "–"


def with_interval(seed: Seed, part: str, name: str = "accuracy") -> str:
    """29.4 % [27.1, 31.8]"""
    share, pair = percent(seed.figure(part, "eval", name)), bounds(seed, part, name)
    return f"{share} {brackets(pair)}" if pair else share


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def change(seed: Seed, part: str) -> float | None:
    """How much pass@1 of a part differs from the base's."""
    after, before = seed.figure(part, "eval", "accuracy"), seed.figure("base", "eval", "accuracy")
    return None if after is None or before is None else after - before


def seconds(seed: Seed) -> float:
    """All that the seed took."""
    spent = seed.get("seconds")
    return sum(finite(value) or 0.0 for value in spent.values()) if isinstance(spent, dict) else 0.0


def seed_rows(seeds: list[Seed]) -> tuple[list[str], list[list[str]]]:
    """(head, a row a seed) of the table of all seeds."""
    head = [
        "seed",
        "base pass@1 [95 %]",
        "after R1-Zero",
        "control",
        "length",
        "stops after ok",
        "stops after no",
        "minutes",
    ]
    rows = []
    for seed in seeds:
        lengths = [seed.figure(part, "eval", "mean_tokens") for part in ("base", "rl")]
        grown = ratio(lengths[1], lengths[0])
        stops = [
            [
                percent(seed.figure(part, "behaviour", f"p_stop_after_{word}"))
                for part in ("base", "rl")
            ]
            for word in ("ok", "no")
        ]
        rows.append(
            [
                str(seed.number),
                *(with_interval(seed, part) for part in PARTS),
                "–" if grown is None else f"× {grown:.2f}",
                *(" → ".join(pair) for pair in stops),
                number(seconds(seed) / 60),
            ]
        )
    return head, rows
