"""What a run has logged, as the rules of diagnosis.py see it: windows of steps, and its flags.

The log of a run may be torn, and its flags may be those of an older version. So nothing here
raises: what is missing or is not a number is NaN, and no threshold is crossed by NaN.
"""

import math
from typing import Any

WINDOW = 10  # steps that a rule looks at
N_WINDOWS = 20  # windows among which the best is looked for, spread over the run


def number(value: Any) -> float:
    """A logged value as a float; NaN if it is missing, not a number, or too large to be one."""
    if not isinstance(value, int | float):
        return math.nan
    try:
        found = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
    if abs(found) < 1e30:  # so that sums and squares stay finite
        return found
    return math.nan


class History:
    """The steps of a run so far, and its flags.

    rows: metrics.jsonl, one row per step; config: the flags, as in run.json.
    """

    def __init__(self, rows: list[dict], config: dict):
        self.rows = rows
        self.config = config
        self.first, self.last = rows[:WINDOW], rows[-WINDOW:]
        self.is_long = len(rows) >= WINDOW  # most rules wait for a whole window

    # ---- metrics ----

    def values(self, name: str, rows: list[dict] | None = None) -> list[float]:
        """A metric in each of the last steps (or of `rows`), where it is a number."""
        if rows is None:
            rows = self.last
        found = [number(row.get(name)) for row in rows]
        return [value for value in found if math.isfinite(value)]

    def mean(self, name: str, rows: list[dict] | None = None) -> float:
        """Mean over the last steps (or over `rows`); NaN where no step has the metric."""
        found = self.values(name, rows)
        if not found:
            return math.nan
        return sum(found) / len(found)

    def first_mean(self, name: str) -> float:
        """Mean over the first steps."""
        return self.mean(name, self.first)

    def best_mean(self, name: str) -> float:
        """Mean of the best window."""
        stride = max(WINDOW, len(self.rows) // N_WINDOWS)
        n_starts = max(1, len(self.rows) - WINDOW + 1)
        best = math.nan
        for start in range(0, n_starts, stride):
            mean = self.mean(name, self.rows[start : start + WINDOW])
            if math.isnan(best) or mean > best:
                best = mean
        return best

    def falls_below(self, name: str, level: float) -> dict:
        """The first row from which on a metric stays below a level; empty if it does not."""
        found: dict = {}
        for row in reversed(self.rows):
            if number(row.get(name)) >= level:
                break
            found = row
        return found

    def noise(self, name: str) -> float:
        """Two standard errors of the difference between the first and the last window's mean."""
        squared_errors = 0.0
        for rows in (self.first, self.last):
            found = self.values(name, rows)
            mean = self.mean(name, rows)
            squares = sum((value - mean) ** 2 for value in found)
            variance = squares / max(1, len(found) - 1)
            squared_errors += variance / max(1, len(found))
        return 2 * math.sqrt(squared_errors)

    # ---- flags ----

    def option(self, *path: str) -> float:
        """A flag that is a number (False is 0, True is 1); NaN if it was not logged as one."""
        return number(self._logged(*path))

    def choice(self, *path: str) -> str:
        """A flag that is a word, or a switch as "True" or "False"; empty if it was logged as
        neither."""
        value = self._logged(*path)
        return str(value) if isinstance(value, str | bool) else ""

    def _logged(self, *path: str) -> Any:
        value: Any = self.config
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value
