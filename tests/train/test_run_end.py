"""How a run ends: by signals, by errors after and within a step, before dead streams; and what it keeps."""
import errno
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from r1zero.model.checkpoint import CheckpointError, checkpoint_steps
from r1zero.train.grpo import grpo, timed_step
from r1zero.train.interrupt import Stopped
from r1zero.train.log import MetricsLog, read_metrics
from r1zero.train.pretrain import pretrain
from r1zero.train.run import Run

from ..eval.console_cases import DEAD_STREAMS
from .loop_cases import grpo_config, pretrain_config, save_base, text_file
from .run_cases import fails, outcome, pretrain_on_text


def pretrain_whole(tmp_path) -> dict:
    pretrain(pretrain_config(tmp_path / "whole", text_file(tmp_path)))
    return outcome(tmp_path / "whole")


def same_end(run, whole: dict) -> None:
    """The log and the last checkpoint are those of the unbroken run."""
    found = outcome(run)
    assert found["rows"] == whole["rows"]
    last = {name: data for name, data in whole["files"].items() if "00000008" in name}
    assert {name: found["files"][name] for name in last} == last


# ---- signals ----

@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_scheduler_or_a_terminal_ends_a_run_like_ctrl_c(tmp_path, name):
    whole = pretrain_whole(tmp_path)
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)

    class Ended(Run):
        def log(self, step, *rest, **options):
            super().log(step, *rest, **options)
            if step + 1 == 4:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # schedulers repeat themselves

    try:
        c = pretrain_config(tmp_path / "run", text_file(tmp_path))
        with pytest.raises(Stopped, match="stopped and saved") as end:
            pretrain_on_text(c, Ended)
        assert end.value.exit_code == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert checkpoint_steps(c.run)[-1] == 4
    pretrain(pretrain_config(c.run, text_file(tmp_path), resume=True))
    same_end(tmp_path / "run", whole)


# ---- errors ----

class DiskFull(MetricsLog):
    """A log that cannot be written from step 5 on."""

    def write(self, row):
        if row["step"] >= 5:
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
        super().write(row)


class OnDiskFull(Run):
    def __enter__(self):
        run = super().__enter__()
        self._log.close()
        self._log = DiskFull(self.folder, self.first_step)
        return run


def out_of_memory_at(step: int):
    def spoil(now, model):
        if now == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return spoil


@pytest.mark.parametrize("kind, error, saved", [
    ("the log is full", OSError, 5),
    ("out of memory in step 6", RuntimeError, 5),
])
def test_an_error_saves_the_last_whole_step_first(tmp_path, capsys, kind, error, saved):
    whole = pretrain_whole(tmp_path)
    c = pretrain_config(tmp_path / "run", text_file(tmp_path))
    options = {"run_class": OnDiskFull} if "log" in kind else {"spoil": out_of_memory_at(5)}
    with pytest.raises(error):
        pretrain_on_text(c, **options)
    assert checkpoint_steps(c.run) == [3, saved]
    assert f"saved step {saved} in {c.run} before leaving; --resume goes on" in capsys.readouterr().err
    pretrain(pretrain_config(c.run, text_file(tmp_path), resume=True))
    found = outcome(tmp_path / "run")["files"]  # the row of step 5 went with the full disk
    assert {name: found[name] for name in whole["files"] if "00000008" in name} == \
        {name: data for name, data in whole["files"].items() if "00000008" in name}


def test_an_error_while_measuring_on_held_out_problems_saves_the_step(tmp_path):
    base = save_base(tmp_path / "base")
    options = dict(steps=5, save_every=100, eval_every=3)

    def failing(learner, task, config):
        raise KeyError("no such problem")

    grpo(grpo_config(tmp_path / "whole", base, **options), score_of=lambda *rest: 0.5)
    with pytest.raises(KeyError):
        grpo(grpo_config(tmp_path / "run", base, **options), score_of=failing)
    assert checkpoint_steps(tmp_path / "run") == [3]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]
    grpo(grpo_config(tmp_path / "run", base, resume=True, **options), score_of=lambda *rest: 0.5)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    weights = "checkpoints/step_00000005/model.safetensors"
    assert outcome(tmp_path / "run")["files"][weights] == outcome(tmp_path / "whole")["files"][weights]


def test_half_a_step_is_not_saved_as_a_whole_one(tmp_path):
    """An error between the updates of a step: the weights are those of no step."""
    base = save_base(tmp_path / "base")

    def half(learner, task, config, step):
        metrics = timed_step(learner, task, config, step)
        if step == 3:
            raise MemoryError
        return metrics

    with pytest.raises(MemoryError):
        grpo(grpo_config(tmp_path / "run", base, save_every=2), step_of=half)
    assert checkpoint_steps(tmp_path / "run") == [2]


def test_weights_that_are_nan_are_not_saved_on_the_way_out(tmp_path):
    def poison(step, model):
        if step == 4:
            model.norm.data[0] = float("nan")
            raise MemoryError

    with pytest.raises(MemoryError):
        pretrain_on_text(pretrain_config(tmp_path / "run", text_file(tmp_path)), spoil=poison)
    assert checkpoint_steps(tmp_path / "run") == [3]


def test_where_saving_fails_too_the_first_error_is_the_one_that_is_told(tmp_path, capsys):
    class Failing(Run):
        def save(self, step, *rest):
            if step == 3:
                raise CheckpointError("cannot save: disk full")
            super().save(step, *rest)

    with pytest.raises(torch.OutOfMemoryError):
        pretrain_on_text(pretrain_config(tmp_path / "run", text_file(tmp_path)), Failing, out_of_memory_at(4))
    assert "step 4 could not be saved before leaving: cannot save" in capsys.readouterr().err
    assert checkpoint_steps(tmp_path / "run") == [3]


# ---- dead streams ----

@pytest.mark.parametrize("stream", DEAD_STREAMS)
def test_no_dead_stream_ends_or_changes_a_run(tmp_path, monkeypatch, stream):
    data, base = text_file(tmp_path), save_base(tmp_path / "base")
    loops = {"pretrain": lambda run: pretrain(pretrain_config(run, data, steps=3)),
             "grpo": lambda run: grpo(grpo_config(run, base, steps=2, eval_every=1, eval_problems=4))}
    for name, loop in loops.items():
        loop(tmp_path / f"whole_{name}")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", DEAD_STREAMS[stream]())
            patch.setattr(sys, "stderr", DEAD_STREAMS[stream]())
            loop(tmp_path / f"run_{name}")
        assert outcome(tmp_path / f"run_{name}") == outcome(tmp_path / f"whole_{name}")


def test_the_held_out_score_is_in_a_file_before_it_is_shown(tmp_path, monkeypatch):
    c = pretrain_config(tmp_path / "run", text_file(tmp_path), steps=1)
    monkeypatch.setattr(sys, "stdout", DEAD_STREAMS["reader gone"]())
    pretrain(c)
    assert '"bits_per_byte"' in (tmp_path / "run/held_out.json").read_text()


# ---- one process at a time ----

def test_a_second_process_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path):
    whole = pretrain_whole(tmp_path)
    data = text_file(tmp_path)
    said = []

    class Watched(Run):
        def save(self, step, *rest):
            super().save(step, *rest)
            if step + 1 == 3:
                with fails(ValueError, f"another process \\({os.getpid()}\\) is training in .*run"):
                    pretrain(pretrain_config(tmp_path / "run", data, resume=True))
                said.append(step)

    pretrain_on_text(pretrain_config(tmp_path / "run", data), Watched)
    assert said == [2] and outcome(tmp_path / "run") == whole


def test_the_lock_goes_with_the_run(tmp_path):
    c = pretrain_config(tmp_path / "run", text_file(tmp_path))
    with pytest.raises(torch.OutOfMemoryError):
        pretrain_on_text(c, spoil=out_of_memory_at(1))
    pretrain(pretrain_config(c.run, c.data[0], resume=True))
    assert checkpoint_steps(tmp_path / "run")[-1] == 8


def test_a_run_that_another_process_overtook_while_loading_touches_nothing(tmp_path):
    """As after a scheduler's requeue: the new process reads the folder while the old one still saves."""
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "run", data, steps=2, save_every=2))
    for resume in (True, False):
        folder = tmp_path / ("run" if resume else "new")
        slow = Run(pretrain_config(folder, data, resume=resume), "pretrain")
        pretrain(pretrain_config(folder, data, steps=5, resume=resume))
        before = outcome(folder)
        with fails(ValueError, "another process has trained in .* while this one was loading"), slow:
            raise AssertionError("it has begun")
        assert outcome(folder) == before


def pressed_at(monkeypatch, step: int) -> None:
    """From now on, Ctrl-C is pressed when the line of `step` is in the log."""
    log = Run.log

    def pressed(run, at, *rest, **options):
        log(run, at, *rest, **options)
        if at + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "log", pressed)


def test_a_stopped_run_does_not_spend_its_last_seconds_on_a_score(tmp_path, monkeypatch):
    c = pretrain_config(tmp_path / "run", text_file(tmp_path))
    pressed_at(monkeypatch, 1)
    with pytest.raises(Stopped):
        pretrain(c)
    assert checkpoint_steps(c.run) == [1] and not (tmp_path / "run/held_out.json").exists()


def test_ctrl_c_in_the_last_step_is_no_less_a_wish_to_stop(tmp_path, monkeypatch):
    """What comes behind the run, such as the next part of a demo, must not begin."""
    c = pretrain_config(tmp_path / "run", text_file(tmp_path), steps=3)
    with monkeypatch.context() as patch:
        pressed_at(patch, 3)
        with pytest.raises(Stopped, match="done and saved in"):
            pretrain(c)
    assert checkpoint_steps(c.run) == [3] and not (tmp_path / "run/held_out.json").exists()
    pretrain(pretrain_config(c.run, c.data[0], steps=3, resume=True))
    assert (tmp_path / "run/held_out.json").exists()


def test_no_checkpoint_is_on_the_disk_before_its_line_of_the_log(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    log = tmp_path / "run/metrics.jsonl"

    def noted(descriptor):
        if log.exists() and os.fstat(descriptor).st_ino == log.stat().st_ino:
            events.append(len(read_metrics(tmp_path / "run")))
        fsync(descriptor)

    def renamed(old, new):
        if Path(new).name.startswith("step_"):
            events.append(Path(new).name)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    pretrain(pretrain_config(tmp_path / "run", text_file(tmp_path), steps=2, save_every=1))
    assert events == [1, "step_00000001", 2, "step_00000002"]
