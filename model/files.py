"""Files that appear whole or not at all, and are on the disk when a call returns.

Left out: locks (train/lock.py), and results that come bit by bit (eval/result_file.py).
"""

import errno
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

# A name that starts with this is unfinished.
UNFINISHED = ".tmp-"
# How a file system says that it knows no flush, unlike a full or broken disk.
CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def flush(path: Path) -> None:
    """`flush_to_disk` of a file, or of the list of names in a folder, which Windows cannot do."""
    try:
        # Windows flushes only what is open for writing.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


def flush_to_disk(descriptor: int) -> None:
    """Wait until what was written to an open file is on the disk, where the file system can tell.

    Raises OSError if it cannot be written.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace the file at `path`: at any moment a reader sees the old text or the new one.

    Raises OSError with the file's name (no space, no permission); the old text is then still there.
    """
    path = Path(path)
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        flush(unfinished)
        os.replace(unfinished, path)
        flush(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def atomic_write_json(path: str | Path, value: object) -> None:
    """`atomic_write_text` of a JSON value, indented for people."""
    atomic_write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def new_folder(folder: Path):
    """Yield an empty folder beside `folder`, which gets its name when the block ends: it appears
    whole or not at all. An empty folder of that name is replaced.

    Raises ValueError if it cannot be written.
    """
    from safetensors import SafetensorError  # here, since not all who use this file write weights

    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        make_readable(unfinished)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{folder} cannot be written: {reason}; make room, or give another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def make_readable(folder: Path) -> None:
    """Give all files the mode that the umask says (save_file lets only the owner read), and flush
    them."""
    probe = folder / f"{UNFINISHED}mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.iterdir():
        with suppress(OSError):  # some mounts know no modes: then all files have the same
            path.chmod(mode)
        flush(path)
    flush(folder)
