"""The tests of the GPU, each result written as soon as there is one.

    python -m benchmarks.correct --out results_gpu     correct.csv row by row, and correct.xml at the end

The order is that of tests/conftest.py: bf16 first, fp32 last. So a run that is cut short has tested what
matters most, and correct.csv says what. Interrupted (SIGINT), pytest still writes correct.xml.
"""
import argparse
import csv
import sys
from collections import Counter
from pathlib import Path

import pytest

from .rehearse import ROOT, TESTS

COLUMNS = ("test", "result", "seconds", "why")


class Rows:
    """A plugin of pytest that writes a row per test, at once."""

    def __init__(self, path: Path):
        self.results: Counter[str] = Counter()
        self.file = open(path, "w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        self.write(COLUMNS)

    def write(self, row: tuple) -> None:
        self.writer.writerow(row)
        self.file.flush()

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when != "call":  # set up and torn down: nothing to tell
            return
        why = ""
        if report.skipped:
            why = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = (crash.message if crash else str(report.longrepr)).splitlines()
            why = (lines or [""])[0][:300]
        self.results[report.outcome] += 1
        self.write((report.nodeid, report.outcome, f"{report.duration:.3f}", why))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.correct", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results_gpu", help="folder of correct.csv and correct.xml")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, default=["-m", "gpu", TESTS],
                        help="flags of pytest, last; by default the tests of the GPU")
    flags = parser.parse_args(argv)
    folder = Path(flags.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(folder / "correct.csv")
    options = ["-v", "--durations=5", "--tb=short", "--rootdir", str(ROOT)]
    code = pytest.main([*options, f"--junitxml={folder / 'correct.xml'}", *flags.tests], plugins=[rows])
    print(", ".join(f"{n} {result}" for result, n in rows.results.items()) or "no test ran")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
