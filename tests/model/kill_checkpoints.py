"""Saves checkpoints in child processes that are killed with signal 9 at every step of the way, and reads what
they leave. A process of its own for test_checkpoint_faults.py, because one with threads cannot safely fork:

    python -m tests.model.kill_checkpoints EMPTY_FOLDER
"""
import itertools
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from r1zero.model.checkpoint import load_checkpoint, save_checkpoint

CALLS = ["open", "fsync", "chmod", "mkdir", "rename", "replace", "unlink", "rmdir"]  # what changes a disk


def save(run: Path, step: int, value: float) -> None:
    weight, moment = torch.full((100,), value), torch.full((100,), -value)
    tensors = {"model": {"w": weight}, "optimizer": {"w/exp_avg": moment}}
    save_checkpoint(run, step, tensors, {"value": value}, keep_last=2, score=value)


def load(run: Path) -> tuple[int, float]:
    """(step, value) of the last checkpoint, which must be whole, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_checkpoint(run)
    value = found.state["value"]
    assert torch.equal(found.tensors["model"]["w"], torch.full((100,), value))
    assert torch.equal(found.tensors["optimizer"]["w/exp_avg"], torch.full((100,), -value))
    return found.step, value


def die_at_call(number: int) -> None:
    """From now on, the `number`-th call that touches the disk is the end of this process."""
    calls = itertools.count(1)

    def deadly(call):
        def wrapped(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapped

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def killed_at_every_call(folder: Path, step: int, value: float, possible: set[tuple[int, float]]) -> int:
    """Save (step, value) over steps 1 and 2, killed at each call in turn; returns how often it was killed."""
    save(folder / "before", 1, 1.0)
    save(folder / "before", 2, 2.0)
    for number in itertools.count(1):
        run = folder / f"{step}-{number}"
        shutil.copytree(folder / "before", run)
        child = os.fork()
        if child == 0:
            die_at_call(number)
            save(run, step, value)
            os._exit(0)
        died = os.waitpid(child, 0)[1] == signal.SIGKILL
        found = load(run)
        assert found in possible if died else found == (step, value), (number, found)
        save(run, 4, 4.0)
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        former = f"step_{max(found[0], 2):08d}"
        assert left == ["best.json", former, "step_00000004"], (number, left)
        shutil.rmtree(run)
        if not died:
            return number - 1


def killed_by_the_clock(run: Path) -> None:
    """One process after another goes on from the last checkpoint and is killed at some moment."""
    last = 0
    for milliseconds in [3, 17, 5, 29, 11, 2, 41, 7, 13, 23]:
        child = os.fork()
        if child == 0:
            for step in range(last + 1, last + 1001):  # an end, should nobody be left to kill it
                save(run, step, float(step))
            os._exit(0)
        deadline = time.monotonic() + 60
        while not (run / "checkpoints" / f"step_{last + 1:08d}").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step, value = load(run)
        assert step > last and value == step, (last, step, value)
        last = step


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # slow, and of no effect on what survives a killed process
    root = Path(sys.argv[1])
    new = killed_at_every_call(root, 3, 3.0, {(2, 2.0), (3, 3.0)})
    again = killed_at_every_call(root, 2, 2.5, {(2, 2.0), (2, 2.5)})
    killed_by_the_clock(root / "clock")
    print(f"killed {new} + {again} + 10 times")
