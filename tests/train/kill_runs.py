"""Runs of pretrain and grpo in child processes that are killed or interrupted at many moments, then resumed,
and compared with an unbroken run. A process of its own for test_resume.py, because one with threads cannot
safely fork. Its environment needs NUMBA_THREADING_LAYER=workqueue, the layer that can.

    python -m tests.train.kill_runs EMPTY_FOLDER         at some moments
    python -m tests.train.kill_runs EMPTY_FOLDER every   at every call that touches the disk, after every step

The last line is a JSON object that says what was done.
"""
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import tyro  # noqa: F401  (the command line imports it late; the children then have it)
from tqdm import tqdm

from r1zero.train.cli.main import main
from r1zero.train.grpo import grpo
from r1zero.train.pretrain import pretrain
from r1zero.train.run import Run

from ..model.kill_checkpoints import CALLS, die_at_call
from .loop_cases import grpo_config, pretrain_config, save_base, text_file
from .run_cases import assert_same, outcome


def in_child(action, messages: Path | None = None) -> int:
    """Run `action` in a fork; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
        log = os.open(messages or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 99
        try:
            code = action() or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish(loop, config) -> int:
    """Run a loop to its end; an exit code."""
    loop(config)
    return 0


def signal_at_log(step: int, signals: list[int]) -> None:
    """From now on, this process sends itself the signals as soon as the line of `step` is in the log."""
    log = Run.log

    def wrapped(run, at, *rest, **options):
        log(run, at, *rest, **options)
        if at + 1 == step:
            for number in signals:
                os.kill(os.getpid(), number)

    Run.log = wrapped


def count_calls(action) -> int:
    """How many calls that touch the disk an unbroken run makes."""
    reading, writing = os.pipe()

    def counted():
        numbers = itertools.count()

        def counting(call):
            def wrapped(*args, **kwargs):
                next(numbers)
                return call(*args, **kwargs)
            return wrapped

        for name in CALLS:
            setattr(os, name, counting(getattr(os, name)))
        action()
        os.write(writing, str(next(numbers)).encode())

    assert in_child(counted) == 0
    return int(os.read(reading, 20))


def killed_and_resumed(root: Path, loop, config, expected: dict, n_moments: int | None, steps: list) -> int:
    """Kill at disk calls spread over the run (None: at all) and when a step is logged; returns how often."""
    calls = count_calls(lambda: loop(config(root / "counted")))
    n_moments = n_moments or calls
    moments = [("call", round(1 + i * (calls - 1) / (n_moments - 1))) for i in range(n_moments)]
    moments += [("log", step) for step in steps]
    for kind, number in moments:
        run = root / f"{kind}-{number}"

        def broken(kind=kind, number=number, run=run):
            if kind == "call":
                die_at_call(number)
            else:
                signal_at_log(number, [signal.SIGKILL])
            loop(config(run))

        assert in_child(broken) == -signal.SIGKILL, (kind, number)
        assert in_child(lambda run=run: finish(loop, config(run, resume=True))) == 0, (kind, number)
        assert_same(run, expected)
    return len(moments)


def killed_by_the_clock(run: Path, loop, config, expected: dict) -> int:
    """One process after another goes on from the last checkpoint until a signal from outside ends it."""
    for attempt, milliseconds in enumerate([60, 25, 110]):
        child = os.fork()
        if child == 0:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            loop(config(run, resume=attempt > 0))
            os._exit(0)
        deadline = time.monotonic() + 60
        while not (run / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(milliseconds / 1000)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert in_child(lambda: finish(loop, config(run, resume=True))) == 0
    assert_same(run, expected)
    return 3


def interrupted_by_hand(root: Path, data: str, expected: dict) -> dict[str, str]:
    """Ctrl-C once and twice, through the command line; returns what it wrote."""
    flags = ["--data", data, "--tokenizer", "bytes", "--model", "tiny", "--seq-len", "16",
             "--batch-tokens", "64", "--micro-tokens", "32", "--steps", "8", "--save-every", "3",
             "--optim.lr", "1e-2", "--optim.warmup", "2", "--optim.schedule", "constant", "--device", "cpu",
             "--task.n-numbers", "2", "--task.high", "9"]
    texts = {}
    for name, step, signals, code in [("once", 4, 1, 130), ("twice", 5, 2, 130), ("last", 8, 1, 130)]:
        run, messages = root / name, root / f"{name}.txt"

        def broken(run=run, step=step, signals=signals):
            signal_at_log(step, [signal.SIGINT] * signals)
            return main(["pretrain", "--run", str(run), *flags])

        found = in_child(broken, messages)
        texts[name] = messages.read_text()
        assert found == code, (name, found, texts[name])
        steps = [int(path.name[5:]) for path in (run / "checkpoints").iterdir()]
        assert max(steps) == {"once": 4, "twice": 3, "last": 8}[name], (name, steps)
        assert in_child(lambda run=run: main(["pretrain", "--run", str(run), "--resume", *flags])) == 0
        found = outcome(run)  # where it stopped there is a checkpoint more, or another is the last but one
        newest = {name: data for name, data in expected["files"].items() if "step_00000008" in name}
        assert found["rows"] == expected["rows"]
        assert {name: found["files"][name] for name in newest} == newest
    return texts


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # slow, and of no effect on what survives a killed process
    torch.set_num_threads(1)  # no threads in the parent: it forks (Numba's workqueue may be forked)
    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # imports much of torch; the children then have it
    root = Path(sys.argv[1])
    data, base = text_file(root), save_base(root / "base")
    every = sys.argv[2:] == ["every"]
    tqdm.monitor_interval = 0  # its thread
    loops = {  # the loop, its config, how many disk calls to die at, how many steps it has
        "pretrain": (pretrain, lambda run, **more: pretrain_config(run, data, **more), 9, 8),
        "grpo": (grpo, lambda run, **more: grpo_config(
            run, base, algo="ppo", updates_per_step=2, ref_refresh=2, dynamic_sampling=2, eval_every=2,
            eval_problems=4, **more), 6, 5),
    }
    for name, (loop, config, _, _) in loops.items():  # loads the compiled loops once, for all children
        loop(config(root / f"warm_{name}", steps=1))
    done: dict = {"killed": {}}
    for name, (loop, config, n_moments, n_steps) in loops.items():
        folder = root / name
        folder.mkdir()
        whole = config(folder / "whole")
        assert in_child(lambda loop=loop, whole=whole: finish(loop, whole)) == 0
        expected = outcome(folder / "whole")
        assert [row["step"] for row in expected["rows"]] == list(range(1, n_steps + 1))
        steps = list(range(1, n_steps + 1)) if every else [1, 4, n_steps]
        done["killed"][name] = killed_and_resumed(folder, loop, config, expected,
                                                  None if every else n_moments, steps)
        done["killed"][name] += killed_by_the_clock(folder / "clock", loop, config, expected)
        if name == "pretrain":
            done["messages"] = interrupted_by_hand(folder, data, expected)
    print(json.dumps(done))
