"""What the benchmarks share: medians and quantiles, a table for people, one line of JSON with everything."""
import json
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from r1zero.model.files import atomic_write_json
from r1zero.train.machine import describe_machine


def time_of(function) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def spread(values) -> dict[str, float]:
    """The median, and the 20 % and 80 % quantiles."""
    p20, median, p80 = np.quantile(np.asarray(values, np.float64), [0.2, 0.5, 0.8])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def show(spread_of: dict[str, float], unit: str = "", scale: float = 1.0, digits: int = 2) -> str:
    """"median (p20 to p80) unit", for a table."""
    median, p20, p80 = (f"{spread_of[name] * scale:.{digits}f}" for name in ("median", "p20", "p80"))
    return f"{median} ({p20} to {p80}){unit}"


def table(header: list[str], rows: list[list]) -> None:
    """Print columns, the first one left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    print()


def cpu_name() -> str:
    """Number and name of the processors where Linux says it, else their kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def check_settings(work: str, settings: dict) -> None:
    """Note what the results in a folder are made with. Raises ValueError if that was something else."""
    path = Path(work) / "settings.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, settings)
    made_with, given = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    for name in sorted(made_with.keys() | given.keys()):
        if made_with.get(name) != given.get(name):
            raise ValueError(f"the results in {work} were made with {name} {made_with.get(name)!r}, not "
                             f"{given.get(name)!r}; set it back, or give another --work")


def finish(name: str, results: dict, out: str | None, peers: tuple[str, ...] = ()) -> dict:
    """Print the results as one line of JSON, with date, hardware and versions; write it to `out` if given.

    peers: packages whose versions belong to the results. One that is not installed is named as missing.
    Returns what the line holds.
    """
    record = {"benchmark": name, "date": datetime.now(UTC).isoformat(timespec="seconds"),
              "machine": {**describe_machine(), "cpu": cpu_name()}, **results}
    for package in peers:
        try:
            record["machine"]["versions"][package] = version(package)
        except PackageNotFoundError:
            record["machine"]["versions"][package] = "missing"
    line = json.dumps(record)
    if out:
        Path(out).write_text(line + "\n", encoding="utf-8")
    print(line)
    return json.loads(line)
