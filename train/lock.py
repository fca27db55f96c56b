"""One process at a time in a run's folder.

Two processes that train there would each cut back the other's log and remove its unfinished
checkpoints. The system lets go of the lock when a process ends, however it ends.

Left out: Windows, and file systems without locks. There nothing is checked.
"""

import os
from pathlib import Path


class FolderLock:
    """Held from `acquire` to `release`, in the file .lock of a folder."""

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._file = None

    def acquire(self) -> None:
        """Raises ValueError, with its number, if another process holds it; OSError as open does."""
        try:
            import fcntl  # not on Windows
        except ImportError:
            return
        self._file = open(self.path, "a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            process = self._file.read().strip()
            self.release()
            raise ValueError(
                f"another process ({process}) is training in {self.path.parent}; wait until it "
                "ends, stop it with Ctrl-C, or give another folder"
            ) from None
        except OSError:  # this file system has no locks
            return
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
