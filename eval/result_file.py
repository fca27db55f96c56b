"""A file of results, written aside and put in its place when it is whole.

    with ResultFile(out) as file:
        file.write(rows)                # to <out>.partial, flushed
    # here <out> is replaced

At any moment `<out>` is the earlier result or the new one. A call that is broken off leaves the
earlier one as it was, and what it has written so far in `<out>.partial`, and says so.

A device or a pipe (/dev/stdout, a shell's `>(...)`) is written to directly. A link stays a link:
the file that it leads to is replaced.

Left out: two writers of one result at the same time.
"""

import json
import os
import stat
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..model.files import flush, flush_to_disk
from .console import say

# What a run has in its folder, besides results.
RUN_FILES = ("run.json", "metrics.jsonl", "held_out.json", "wandb_id", ".lock")


def sibling(path: str | Path, suffix: str) -> Path:
    """The file beside `path` with `suffix` behind its whole name: a.v1 and a.v2 never share one."""
    path = Path(path)
    return path.with_name(path.name + suffix)


def summary_path(out: str | Path) -> Path:
    """Where the summary of the results in `out` is."""
    return sibling(out, ".summary.json")


def target_of(out: str | Path) -> Path:
    """The file that is replaced: `out`, or what it leads to if it is a link."""
    return Path(os.path.realpath(out) if os.path.islink(out) else out)


def partial_path(out: str | Path) -> Path:
    """Where results are written until they are whole."""
    return sibling(target_of(out), ".partial")


def check_result_path(out: str, inputs: Sequence[str] = (), flag: str = "--out") -> None:
    """Raise ValueError, in one line, for a path that results cannot be written to. Touches nothing.

    inputs: files that the results, or what is written beside them, must not replace under any
    spelling; the files of a run or a checkpoint are never replaced. Missing folders are no fault:
    they will be made. flag: what gave the path, for the error.
    """
    if not out or "\0" in out:
        raise ValueError(f"{flag} is {out!r}, expected the path of a file")
    inputs = [*inputs, *map(str, files_of_a_run(Path(out).parent))]
    _refuse_folder(Path(out))
    for path in (Path(out), partial_path(out), summary_path(out)):
        _refuse_folder(path)
        for given in inputs:
            if _same_file(path, given):
                raise ValueError(
                    f"{flag} {out} would replace the file {given}, which would be lost; give "
                    "another one"
                )
    if not is_stream(out):
        _check_folder(Path(os.path.realpath(out)).parent, out)


def files_of_a_run(folder: Path) -> list[Path]:
    """The files of the run, or of the checkpoint, whose folder this is; none if it is neither."""
    if folder.name == "checkpoints":
        return [folder / "best.json"]
    if os.path.exists(folder / "state.json"):
        return [folder / "state.json", *folder.glob("*.safetensors")]
    is_run = os.path.exists(folder / "run.json") or os.path.exists(folder / "checkpoints")
    if not is_run:
        return []
    return [*(folder / name for name in RUN_FILES), *folder.glob("rollouts*.jsonl.gz")]


def _refuse_folder(path: Path) -> None:
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return  # what is missing is no folder; its parents are looked at elsewhere
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise ValueError(f"cannot write results to {path}: {error.strerror}") from None
    if is_folder:
        raise ValueError(f"cannot write results to {path}: it is a folder; give a file in it")


def _check_folder(folder: Path, out: str) -> None:
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"cannot write results to {out}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write results to {out}: {existing} is not writable")


def _same_file(path: Path, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):  # one of them does not exist: then compare what they would be
        return os.path.realpath(path) == os.path.realpath(other.replace("\0", ""))


def is_stream(path: str | Path) -> bool:
    """Whether a path leads to something that cannot be replaced: a device, a pipe, a socket."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


class ResultFile:
    """JSON lines that replace `out` when the `with` block ends without an error.

    Raises ValueError, when entered, if the file cannot be opened.
    """

    def __init__(self, out: str | Path):
        self.out = Path(out)
        self.target = target_of(out)
        self.writes_aside = not is_stream(out)
        self.partial = partial_path(out)
        self.n_written = 0

    def __enter__(self) -> "ResultFile":
        try:
            if self.writes_aside:
                self.target.parent.mkdir(parents=True, exist_ok=True)
                _refuse_folder(self.target)
            path = self.partial if self.writes_aside else self.out
            self._file = open(path, "w", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write results to {self.out}: {error.strerror}") from None
        return self

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add a line for each row; they are in the file when this returns."""
        lines = [json.dumps(row) + "\n" for row in rows]
        self._file.write("".join(lines))
        self._file.flush()
        self.n_written += len(lines)

    def __exit__(self, kind, error, trace) -> None:
        if not self.writes_aside:
            self._file.close()
        elif kind is None:
            self._finish()
        else:
            self._break_off()

    def _finish(self) -> None:
        try:
            self._file.flush()
            flush_to_disk(self._file.fileno())
            self._file.close()
            os.replace(self.partial, self.target)
        except OSError as error:
            self._break_off()
            raise OSError(error.errno, error.strerror, str(self.out)) from error
        flush(self.target.parent)

    def _break_off(self) -> None:
        try:
            self._file.close()
        except OSError:  # what could not be written to a full disk
            pass
        if self.n_written == 0:
            self.partial.unlink(missing_ok=True)
            return
        earlier = f"; {self.out} is as it was" if self.target.exists() else ""
        say(f"broken off: {self.n_written:,} results are in {self.partial}{earlier}")


def fingerprint(out: str | Path) -> dict[str, int]:
    """What tells whether a summary is of these results: the number of lines, and a checksum."""
    crc, n_lines = 0, 0
    with open(out, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
            n_lines += block.count(b"\n")
    return {"lines": n_lines, "crc32": crc}
