"""metrics.jsonl, the log of a run: one JSON object per step, read around what is broken."""

import json
import warnings
from pathlib import Path

from ..model.files import atomic_write_text, flush_to_disk

MOST_NAMED = 5  # broken lines that a warning names


def read_metrics(folder: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl.

    A line that is no row is left out, and a warning names it. The last line may be half written,
    where a run was killed or is still going; that is no reason to warn.
    """
    path = Path(folder) / "metrics.jsonl"
    # Not splitlines(), which would also cut at the bytes of other line breaks.
    lines = path.read_bytes().split(b"\n")
    rows, broken = [], []
    for number, line in enumerate(lines, start=1):
        row = parse_row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            broken.append(number)
    if broken:
        named = ", ".join(map(str, broken[:MOST_NAMED]))
        more = f" and {len(broken) - MOST_NAMED} more" if len(broken) > MOST_NAMED else ""
        warnings.warn(
            f"{path}: lines that cannot be read are left out: {named}{more}; the others are used",
            stacklevel=2,
        )
    return rows


def parse_row(line: bytes) -> dict | None:
    """The row in a line; None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: no JSON, or no UTF-8
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if is_row else None


class MetricsLog:
    """metrics.jsonl, open for appending. Each row is flushed as soon as it is written."""

    def __init__(self, folder: Path, last_step: int):
        """last_step: rows after it are dropped, because those steps are done again."""
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [row for row in read_metrics(folder) if row["step"] <= last_step]
            atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, row: dict) -> None:
        """Append a row. Raises OSError if it cannot be written."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Return when every row is on the disk."""
        flush_to_disk(self._file.fileno())

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:  # the rest of a row that `write` has raised for already
            pass
