"""Which code a run was made with: the versions of the packages, and the commit of r1zero."""

import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("r1zero", "torch", "triton", "numpy", "tiktoken")  # whose versions are recorded
ROOT = Path(__file__).resolve().parents[1]  # of the checkout; elsewhere the folder of the package


def package_version(name: str) -> str:
    """The version of an installed package, or "missing"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def git_commit(root: Path = ROOT, git: str = "git", seconds: float = 5.0) -> str | None:
    """The commit of the checkout whose root is `root`; None if it is none, or git cannot tell.

    A repository around it does not count: it is that of whoever installed r1zero there.
    """
    repository = root / ".git"  # a folder; in a worktree or submodule a file
    if not repository.exists():
        return None
    command = [git, f"--git-dir={repository}", "rev-parse", "--verify", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    commit = found.stdout.strip()
    is_commit = found.returncode == 0 and re.fullmatch(r"[0-9a-f]{40,64}", commit)
    return commit if is_commit else None
