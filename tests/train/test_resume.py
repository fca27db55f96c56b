"""Killed and interrupted runs go on to the same bits as unbroken ones; kill_runs.py does the killing."""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from r1zero.model.checkpoint import checkpoint_steps, load_checkpoint
from r1zero.train.grpo import grpo
from r1zero.train.interrupt import Stopped
from r1zero.train.log import read_metrics
from r1zero.train.pretrain import pretrain
from r1zero.train.run import Run
from r1zero.train.sft import SFTConfig, sft

from .loop_cases import grpo_config, pretrain_config, save_base, text_file
from .run_cases import assert_same, broken_at, outcome, pretrain_on_text

FINISHING = "finishing this step, then saving; press Ctrl-C again to stop at once"


def run_kills(folder, *words: str) -> dict:
    command = [sys.executable, "-m", "tests.train.kill_runs", str(folder), *words]
    one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | one_thread, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_and_interrupted_runs_go_on_to_the_same_bits(tmp_path):
    done = run_kills(tmp_path)
    assert done["killed"] == {"pretrain": 15, "grpo": 12}
    once, twice = done["messages"]["once"], done["messages"]["twice"]
    assert once.count(FINISHING) == 1
    assert f"stopped and saved in {tmp_path}/pretrain/once; go on with --resume" in once
    assert twice.count(FINISHING) == 1 and "stopped and saved" not in twice
    assert twice.endswith("r1zero pretrain: broken off\n") and "Traceback" not in once + twice


@pytest.mark.slow
def test_kills_at_every_call_that_touches_the_disk(tmp_path):
    killed = run_kills(tmp_path, "every")["killed"]
    assert killed["pretrain"] > 60 and killed["grpo"] > 60


def interrupted(step: int, method: str) -> type:
    """A Run where Ctrl-C is pressed as soon as the given method is through with `step`."""
    class Interrupted(Run):
        pass

    def pressed(run, at, *rest, **options):
        result = getattr(Run, method)(run, at, *rest, **options)
        if at + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    setattr(Interrupted, method, pressed)
    return Interrupted


@pytest.mark.parametrize("method", ["log", "due", "save"])
def test_ctrl_c_never_leaves_without_saving(tmp_path, method):
    """Whether it comes before the step's checkpoint, between the question and the saving, or after it."""
    expected = pretrain_config(tmp_path / "whole", text_file(tmp_path))
    pretrain(expected)
    c = pretrain_config(tmp_path / "run", text_file(tmp_path))
    with pytest.raises(Stopped, match="stopped and saved in .*run; go on with --resume") as end:
        pretrain_on_text(c, interrupted(6 if method == "save" else 4, method))
    assert end.value.exit_code == 128 + signal.SIGINT
    last = checkpoint_steps(c.run)[-1]
    assert last == {"log": 4, "due": 5, "save": 6}[method]
    assert [row["step"] for row in read_metrics(c.run)] == list(range(1, last + 1))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # given back
    pretrain(pretrain_config(c.run, text_file(tmp_path), resume=True))
    found, whole = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert found["rows"] == whole["rows"]
    assert {k: v for k, v in found["files"].items() if "00000008" in k} == \
        {k: v for k, v in whole["files"].items() if "00000008" in k}


def test_sft_resumes_to_the_same_bits(tmp_path, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}+1=", "response": str(i + 1) * (1 + i % 3)} for i in range(9)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(name, **more):
        return SFTConfig(run=str(tmp_path / name), base=str(tmp_path / "base"), data=str(pairs), steps=7,
                         save_every=3, batch_tokens=16, micro_tokens=8, device="cpu", **more)

    save_base(tmp_path / "base")
    sft(config("whole"))
    broken_at(monkeypatch, 5, sft, config("run"))
    assert checkpoint_steps(tmp_path / "run") == [3] and len(read_metrics(tmp_path / "run")) == 5
    sft(config("run", resume=True))
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))


def test_grpo_as_the_control_resumes_to_the_same_bits(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base")
    grpo(grpo_config(tmp_path / "whole", base, control="permute"))
    broken_at(monkeypatch, 3, grpo, grpo_config(tmp_path / "run", base, control="permute"))
    grpo(grpo_config(tmp_path / "run", base, control="permute", resume=True))
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))


def test_more_steps_go_on_where_a_finished_run_ended(tmp_path):
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "whole", data))
    pretrain(pretrain_config(tmp_path / "run", data, steps=5, save_every=2))
    for steps in [8, 8, 3]:  # the rest; once more, with nothing left to do; and fewer than it has
        pretrain(pretrain_config(tmp_path / "run", data, steps=steps, resume=True))
        assert read_metrics(tmp_path / "run")[-1]["step"] == 8
    found, whole = load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "whole")
    assert found.step == 8 and found.state.pop("schedule_steps") == 5
    assert found.state == {name: v for name, v in whole.state.items() if name != "schedule_steps"}
    for group in ("model", "optimizer"):
        assert all(torch.equal(found.tensors[group][name], t) for name, t in whole.tensors[group].items())


def test_a_torn_checkpoint_and_half_a_line_cost_steps_but_no_bits(tmp_path, monkeypatch):
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "whole", data))
    broken_at(monkeypatch, 7, pretrain, pretrain_config(tmp_path / "run", data))
    weights = tmp_path / "run/checkpoints/step_00000006/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with open(tmp_path / "run/metrics.jsonl", "a") as log:
        log.write('{"step": 8, "lo')
    with pytest.warns(UserWarning, match="step_00000006"):
        pretrain(pretrain_config(tmp_path / "run", data, resume=True))
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))


def test_a_killed_run_before_its_first_checkpoint_starts_afresh(tmp_path, monkeypatch):
    data = text_file(tmp_path)
    broken_at(monkeypatch, 2, pretrain, pretrain_config(tmp_path / "run", data))
    assert checkpoint_steps(tmp_path / "run") == [] and len(read_metrics(tmp_path / "run")) == 2
    pretrain(pretrain_config(tmp_path / "run", data, resume=True))
    (tmp_path / "empty").mkdir()
    for name in ["empty", "not/there/yet"]:  # to resume what has nothing is to begin
        pretrain(pretrain_config(tmp_path / name, data, resume=True))
        assert_same(tmp_path / "run", outcome(tmp_path / name))
