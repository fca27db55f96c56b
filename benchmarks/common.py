"""What the benchmarks share: taking turns, quantiles, a table for people, and one line of JSON that holds everything."""
import json
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from r1zero.train.run import machine


def time_of(function) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def take_turns(peers: dict, rounds: int, warmup: int) -> dict[str, np.ndarray]:
    """Time each peer once a round, in turn, so that a busy moment of the machine meets all of them.

    peers: name -> function without arguments. Returns name -> [rounds] seconds; the first `warmup` rounds are dropped.
    """
    seconds = {name: [] for name in peers}
    for _ in range(warmup + rounds):
        for name, function in peers.items():
            seconds[name].append(time_of(function))
    return {name: np.array(times[warmup:]) for name, times in seconds.items()}


def spread(values) -> dict[str, float]:
    """Median, and the quantiles that leave a fifth on either side."""
    p20, median, p80 = np.quantile(np.asarray(values, np.float64), [0.2, 0.5, 0.8])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def show(s: dict[str, float], unit: str = "", scale: float = 1.0, digits: int = 2) -> str:
    """"median (p20 to p80) unit", for a table."""
    return f"{s['median'] * scale:.{digits}f} ({s['p20'] * scale:.{digits}f} to {s['p80'] * scale:.{digits}f}){unit}"


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print columns, the first to the left, the others to the right."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(str(cell).rjust(w) if i else str(cell).ljust(w)
                        for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip())
    print()


def cpu_name() -> str:
    """The processor's name where Linux tells it, or its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def finish(name: str, figures: dict, out: str | None, peers: tuple[str, ...] = ()) -> dict:
    """Print the figures as one line of JSON with date, hardware and versions, and write it to `out` if given.

    peers: packages whose versions belong to the result too; one that is not installed is named as missing.
    """
    record = {"benchmark": name, "date": datetime.now(UTC).isoformat(timespec="seconds"),
              "machine": {**machine(), "cpu": cpu_name()}, **figures}
    for package in peers:
        try:
            record["machine"]["versions"][package] = version(package)
        except PackageNotFoundError:
            record["machine"]["versions"][package] = "missing"
    line = json.dumps(record)
    if out:
        Path(out).write_text(line + "\n", encoding="utf-8")
    print(line)
    return record
