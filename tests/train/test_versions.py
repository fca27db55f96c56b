"""What is recorded about the code: versions of packages, and the commit of its own checkout or none."""
import os
import subprocess
import time

import pytest

from r1zero.train.versions import ROOT, git_commit, package_version


def git(folder, *words) -> str:
    settings = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", "-C", str(folder), *settings, *words], capture_output=True, text=True,
                          check=True, env=environment)
    return done.stdout.strip()


@pytest.fixture
def theirs(tmp_path):
    """A repository with one commit."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "theirs")
    return tmp_path


def test_the_commit_of_a_checkout_is_its_head(theirs):
    assert git_commit(theirs) == git(theirs, "rev-parse", "HEAD")
    assert git_commit(ROOT) == (git(ROOT, "rev-parse", "HEAD") if (ROOT / ".git").exists() else None)


def test_a_worktree_has_a_commit_of_its_own(theirs):
    git(theirs, "worktree", "add", "-q", str(theirs / "tree"))
    git(theirs / "tree", "commit", "-q", "--allow-empty", "-m", "next")
    assert git_commit(theirs / "tree") == git(theirs / "tree", "rev-parse", "HEAD") != git_commit(theirs)


@pytest.mark.parametrize("where", [".venv/lib/python3/site-packages/r1zero", "vendor/r1zero", "r1zero"])
def test_a_repository_around_it_does_not_count(theirs, where):
    (theirs / where).mkdir(parents=True)
    assert git_commit(theirs / where) is None


def test_the_environment_does_not_lead_elsewhere(theirs, tmp_path, monkeypatch):
    (theirs / "own").mkdir()
    git(theirs / "own", "init", "-q")
    git(theirs / "own", "commit", "-q", "--allow-empty", "-m", "ours")
    ours = git(theirs / "own", "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(theirs / ".git"))
    folders = {"GIT_WORK_TREE": "", "GIT_COMMON_DIR": ".git", "GIT_OBJECT_DIRECTORY": ".git/objects"}
    for name, folder in folders.items():
        monkeypatch.setenv(name, str(theirs / folder))
    assert git_commit(theirs / "own") == ours
    assert git_commit(theirs / "nothing") is None


def test_a_repository_that_git_cannot_read_has_none(tmp_path):
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None  # no commit yet
    (tmp_path / ".git/HEAD").write_bytes(b"\xff\x00")
    assert git_commit(tmp_path) is None


def test_a_git_that_is_missing_slow_or_talkative_is_none(theirs):
    for name, script in (("slow", "sleep 60"), ("talk", "echo not a commit"),
                         ("fail", f"echo {'0' * 40}; exit 1")):
        tool = theirs / name
        tool.write_text(f"#!/bin/sh\nexec {script}\n" if name == "slow" else f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        started = time.perf_counter()
        assert git_commit(theirs, str(tool), seconds=0.2) is None
        assert time.perf_counter() - started < 10
    assert git_commit(theirs, str(theirs / "nothing")) is None


def test_a_package_that_is_not_there_is_missing():
    assert package_version("torch")[0].isdigit() and package_version("no-such-package-here") == "missing"
