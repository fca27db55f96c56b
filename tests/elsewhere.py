"""A process in which what only Linux has is missing: it imports every module, trains, samples and grades.

    python -m tests.elsewhere PLATFORM FOLDER

PLATFORM is what sys.platform then says. Its paths stay those of here, which cannot be had otherwise."""
import fcntl
import importlib
import os
import signal
import sys
from pathlib import Path

# Other people's packages know their systems, so they are imported before.
import safetensors.torch  # noqa: F401
import tqdm  # noqa: F401
import tyro  # noqa: F401
from matplotlib import figure  # noqa: F401

ROOT = Path(__file__).parents[1]
MISSING = ("resource", "fcntl", "termios", "pwd", "grp", "posix", "syslog", "triton", "numba", "wandb",
           "tokenizers")
LOST = {os: ("O_DIRECTORY", "O_NOFOLLOW", "fork", "uname", "getuid", "geteuid", "getpgid", "killpg", "setsid",
             "sched_getaffinity", "sched_setaffinity", "posix_fallocate", "posix_fadvise", "sync", "statvfs"),
        signal: ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGALRM", "SIGKILL", "SIGPIPE", "SIGTSTP",
                 "alarm", "setitimer", "pthread_sigmask", "sigwait")}


class Refuse:
    """A finder that knows only which modules are not there."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def leave_linux(platform: str) -> None:
    """Take away what only Linux has."""
    for name in list(sys.modules):
        if name.partition(".")[0] in MISSING and name != "posix":
            del sys.modules[name]
    sys.meta_path.insert(0, Refuse)
    for module, names in LOST.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    sys.platform = platform

    opened, synced = os.open, os.fsync

    def open_files_only(path, flags, *rest, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, flags, *rest, **options)

    def sync_written_only(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        synced(descriptor)

    if platform == "win32":
        os.open, os.fsync = open_files_only, sync_written_only


def library_modules() -> list[str]:
    """The names of all modules that need neither Numba nor Triton."""
    folders = [ROOT / name for name in ("kernels", "model", "eval", "rl", "train")]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    names = ["r1zero." + ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return sorted(name for name in names if not name.startswith("r1zero.kernels.cpu."))


def main(platform: str, folder: str) -> None:
    leave_linux(platform)
    for name in library_modules():
        importlib.import_module(name)

    import torch

    from r1zero.train.cli.main import main as r1zero
    from r1zero.train.machine import describe_machine, peak_memory

    peak = peak_memory(torch.device("cpu"))
    assert peak is None, f"no module tells the memory, so it is not known; got {peak}"
    assert describe_machine()["cpu"] is not None
    text, run = Path(folder) / "text.txt", str(Path(folder) / "run")
    text.write_text("the cat sat on the mat. " * 40)
    commands = (["pretrain", "--run", run, "--data", str(text), "--tokenizer", "bytes", "--model", "tiny",
                 "--seq-len", "16", "--batch-tokens", "64", "--device", "cpu", "--steps", "1"],
                ["chat", "--run", run, "--problem", "3 7 -> 10", "--max-new-tokens", "3"],
                ["grade", "--problem", "3 7 -> 10", "--response", "<answer>3+7</answer>"])
    for words in commands:
        assert r1zero(words) == 0, words
    print(f"everything works on {platform}")


if __name__ == "__main__":
    main(*sys.argv[1:])
