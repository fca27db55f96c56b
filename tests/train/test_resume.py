"""Killed and interrupted runs go on to the same bits as unbroken ones; kill_runs.py does the killing."""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from r1zero.model.checkpoint import CheckpointError, checkpoint_steps, load_checkpoint
from r1zero.model.optimizer import OptimConfig
from r1zero.train.grpo import grpo
from r1zero.train.pretrain import pretrain
from r1zero.train.run import Run, RunConfig, read_metrics
from r1zero.train.sft import SFTConfig, sft

from ..rl.cases import Bandit
from .kill_runs import assert_same, outcome
from .loop_cases import grpo_config, pretrain_config, save_base, text_file

FINISHING = "finishing this step, then saving; Ctrl-C again breaks off at once"


def run_kills(folder, *words: str) -> dict:
    done = subprocess.run([sys.executable, "-m", "tests.kill_runs", str(folder), *words], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1800)
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


def interrupt_at(monkeypatch, step: int, method: str = "log"):
    """Press Ctrl-C as soon as the given method of Run is through with `step`."""
    former = getattr(Run, method)

    def pressed(run, at, *rest, **options):
        result = former(run, at, *rest, **options)
        if at + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(Run, method, pressed)


@pytest.mark.parametrize("method", ["log", "due", "save"])
def test_ctrl_c_never_leaves_without_saving(tmp_path, monkeypatch, capfd, method):
    """Whether it comes before the step's checkpoint, between the question and the saving, or after it."""
    expected = pretrain_config(tmp_path / "whole", text_file(tmp_path))
    pretrain(expected)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6 if method == "save" else 4, method)
        c = pretrain_config(tmp_path / "run", text_file(tmp_path))
        pretrain(c)
    last = checkpoint_steps(c.run)[-1]
    assert last == {"log": 4, "due": 5, "save": 6}[method]
    assert [row["step"] for row in read_metrics(c.run)] == list(range(1, last + 1))
    assert "stopped and saved" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # given back
    pretrain(pretrain_config(c.run, text_file(tmp_path), resume=True))
    found, whole = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert found["rows"] == whole["rows"]
    assert {k: v for k, v in found["files"].items() if "00000008" in k} == \
        {k: v for k, v in whole["files"].items() if "00000008" in k}


class Broken(Exception):
    pass


def break_at(monkeypatch, step: int):
    """The loop ends without warning as soon as `step` is logged."""
    log = Run.log

    def breaking(run, at, *rest, **options):
        log(run, at, *rest, **options)
        if at + 1 == step:
            raise Broken

    monkeypatch.setattr(Run, "log", breaking)


def broken_at(monkeypatch, step: int, loop, config):
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_at(patch, step)
        loop(config)


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
    grpo(grpo_config(tmp_path / "whole", base, control=True))
    broken_at(monkeypatch, 3, grpo, grpo_config(tmp_path / "run", base, control=True))
    grpo(grpo_config(tmp_path / "run", base, control=True, resume=True))
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))


def test_more_steps_go_on_where_a_finished_run_ended(tmp_path):
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "whole", data))
    pretrain(pretrain_config(tmp_path / "run", data, steps=5, save_every=2))
    for steps in [8, 8, 3]:  # the rest; once more, with nothing left to do; and fewer than it has
        pretrain(pretrain_config(tmp_path / "run", data, steps=steps, resume=True))
        assert read_metrics(tmp_path / "run")[-1]["step"] == 8
    found, whole = load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "whole")
    assert found.step == 8 and found.state == whole.state
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders of a short pretraining and a short GRPO run, with what they began from."""
    root = tmp_path_factory.mktemp("finished")
    pretrain(pretrain_config(root / "pretrain", text_file(root), steps=2))
    grpo(grpo_config(root / "grpo", save_base(root / "base"), steps=1))
    return root


@pytest.mark.parametrize("changes, named", [
    (dict(seed=1), "seed is 0 there and 1 here"),
    (dict(model="depth=1"), "model is tiny there and depth=1 here"),
    (dict(optim=OptimConfig(lr=5e-3)), "optim is .*0.01.* there and .*0.005"),
    (dict(batch_tokens=32, seq_len=8), "batch_tokens is 64 there and 32 here; seq_len is 16 there and 8"),
    (dict(data=("other.txt",)), "data is .*text.txt.* there and .*other.txt.* here"),
])
def test_to_resume_with_other_settings_is_refused_by_their_names(finished, changes, named):
    before = outcome(finished / "pretrain")
    with pytest.raises(CheckpointError, match=named) as error:
        c = pretrain_config(finished / "pretrain", str(finished / "text.txt"), resume=True, steps=2)
        Run(type(c)(**{**vars(c), **changes}), "pretrain")
    assert "\n" not in str(error.value) and "or another run folder" in str(error.value)
    assert outcome(finished / "pretrain") == before


@pytest.mark.parametrize("changes, named", [
    (dict(control=True), "control is False there and True here"),
    (dict(loss=dict(kl_coef=0.1)), "loss is .* there and"),
    (dict(task=Bandit("other")), "task is .* there and"),
])
def test_to_resume_grpo_with_other_settings_is_refused(finished, changes, named):
    with pytest.raises(CheckpointError, match=named):
        grpo(grpo_config(finished / "grpo", finished / "base", resume=True, **changes))


def test_to_resume_the_run_of_another_loop_is_refused(finished):
    with pytest.raises(CheckpointError, match="group_size is missing there and 4 here"):
        grpo(grpo_config(finished / "pretrain", finished / "base", resume=True))


def test_to_resume_on_changed_data_with_another_tokenizer_is_refused(tmp_path):
    def config(text, **more):
        return pretrain_config(tmp_path / "run", text_file(tmp_path, text), tokenizer="bpe", vocab_size=270,
                               steps=2, **more)

    pytest.importorskip("tokenizers")
    pretrain(config("the cat and the dog " * 60))
    pretrain(config("the cat and the dog " * 60, resume=True))
    with pytest.raises(CheckpointError, match="another tokenizer: the data or the base has changed"):
        pretrain(config("some other words then " * 60, resume=True))


def test_what_is_free_to_change_may_change(finished):
    c = pretrain_config(finished / "pretrain", str(finished / "text.txt"), resume=True, steps=3, save_every=1,
                        keep_last=1)
    pretrain(c)
    assert checkpoint_steps(finished / "pretrain") == [3]


@pytest.mark.parametrize("left", ["all of it", "checkpoints", "run.json"])
def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path, left):
    c = pretrain_config(tmp_path / "run", text_file(tmp_path), steps=2)
    pretrain(c)
    if left == "checkpoints":
        (tmp_path / "run/run.json").unlink()
    elif left == "run.json":
        for path in sorted((tmp_path / "run/checkpoints").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    before = outcome(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already; add --resume"):
        pretrain(c)
    assert outcome(tmp_path / "run") == before


def test_a_run_without_interruption_leaves_the_log_and_the_record(tmp_path):
    with Run(RunConfig(run=str(tmp_path), steps=3), "short") as run:
        for step in run.steps():
            run.log(step, {"loss": 1.0}, show=("loss",))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["title"] == "short" and record["config"]["steps"] == 3
    assert record["machine"]["versions"]["torch"] == torch.__version__
    assert read_metrics(tmp_path) == [{"step": n, "loss": 1.0} for n in (1, 2, 3)]
