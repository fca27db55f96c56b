"""A run's folder: what it leaves there, and the folders, settings and checkpoints that it refuses."""
import json
import shutil

import pytest
import torch

from r1zero.model.checkpoint import CheckpointError, checkpoint_steps, load_checkpoint
from r1zero.model.huggingface import write_model
from r1zero.model.optimizer import OptimConfig
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.grpo import grpo
from r1zero.train.log import read_metrics
from r1zero.train.pretrain import pretrain
from r1zero.train.run import Run, RunConfig, at_least

from ..rl.cases import Bandit, tiny
from .loop_cases import grpo_config, pretrain_config, save_base, text_file
from .run_cases import fails, forget, outcome, pretrain_on_text


def test_a_run_folder_that_cannot_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in [file, file / "below"]:
        with fails(ValueError, "cannot use the run folder .*give another one"):
            Run(RunConfig(run=str(folder)), "test")
    assert file.read_text() == "mine"


def test_the_folder_of_an_open_model_is_no_run_folder(tmp_path):
    # Its checkpoints would make it a run: nobody could load the open model from it any more.
    write_model(tmp_path / "open", tiny(), Tokenizer.bytes())
    before = sorted(path.name for path in (tmp_path / "open").iterdir())
    for resume in (False, True):
        with fails(ValueError, "open holds a Hugging Face model.*a folder of its own"):
            Run(RunConfig(run=str(tmp_path / "open"), resume=resume), "test")
    assert sorted(path.name for path in (tmp_path / "open").iterdir()) == before


def test_a_foreign_checkpoint_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "checkpoints/step_00000005"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"format": "other"}')
    with fails(CheckpointError, "state.json was not written by r1zero.*another folder"):
        Run(RunConfig(run=str(tmp_path), resume=True), "test")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"] and (folder / "state.json").exists()


def test_a_checkpoint_of_another_model_is_not_loaded_into_this_one(tmp_path):
    c = pretrain_config(tmp_path / "run", text_file(tmp_path), steps=2)
    model = pretrain(c)
    run = Run(pretrain_config(c.run, c.data[0], steps=2, resume=True), "pretrain")
    model.config = type(model.config)(**{**model.config.to_dict(), "rope_theta": 500.0})
    with fails(CheckpointError, "rope_theta is 10000.0 there and 500.0 here"):
        run.restore(model, Tokenizer.bytes(), None)


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
    (dict(optim=OptimConfig(lr=5e-3)), "--optim.lr is 0.01 there and 0.005 here"),
    (dict(batch_tokens=32, seq_len=8), "--batch-tokens is 64 there and 32 here; --seq-len is 16 there and 8"),
])
def test_to_resume_with_other_settings_is_refused_by_their_names(finished, changes, named):
    before = outcome(finished / "pretrain")
    with pytest.raises(CheckpointError, match=named) as error:
        c = pretrain_config(finished / "pretrain", str(finished / "text.txt"), resume=True, steps=2)
        Run(type(c)(**{**vars(c), **changes}), "pretrain")
    assert "\n" not in str(error.value) and "or another run folder" in str(error.value)
    assert outcome(finished / "pretrain") == before


@pytest.mark.parametrize("changes, named", [
    (dict(control="permute"), "control is none there and permute here"),
    (dict(loss=dict(kl_coef=0.1)), "--loss.kl-coef is 0.0 there and 0.1 here"),
    (dict(task=Bandit("other")), "--task is bandit there and other here"),
])
def test_to_resume_grpo_with_other_settings_is_refused(finished, changes, named):
    with pytest.raises(CheckpointError, match=named):
        grpo(grpo_config(finished / "grpo", finished / "base", resume=True, **changes))


def test_to_resume_the_run_of_another_loop_is_refused(finished):
    with pytest.raises(CheckpointError, match="is a run of pretrain, not of grpo; .* with r1zero pretrain"):
        grpo(grpo_config(finished / "pretrain", finished / "base", resume=True))


def test_a_checkpoint_that_holds_weights_alone_is_no_run_to_resume(finished):
    """Such as the model that a run of GRPO began with."""
    start = finished / "grpo/start"
    with pytest.raises(CheckpointError, match="has no optimizer to go on with; it is a model to begin from"):
        grpo(grpo_config(start, finished / "base", resume=True))
    assert not (start / "run.json").exists()


def test_to_resume_on_changed_data_with_another_tokenizer_is_refused(tmp_path):
    def config(text, **more):
        return pretrain_config(tmp_path / "run", text_file(tmp_path, text), tokenizer="bpe", vocab_size=270,
                               steps=2, **more)

    pytest.importorskip("tokenizers")
    pretrain(config("the cat and the dog " * 60))
    pretrain(config("the cat and the dog " * 60, resume=True))
    with pytest.raises(CheckpointError, match="another tokenizer: the data, the base or --tokenizer has"):
        pretrain(config("some other words then " * 60, resume=True, accept_changes=True))


def test_what_is_free_to_change_may_change(finished):
    c = pretrain_config(finished / "pretrain", str(finished / "text.txt"), resume=True, steps=3, save_every=1,
                        keep_last=1)
    pretrain(c)
    assert checkpoint_steps(finished / "pretrain") == [3]


@pytest.mark.parametrize("left", ["all of it", "checkpoints"])
def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path, left):
    c = pretrain_config(tmp_path / "run", text_file(tmp_path), steps=2)
    pretrain(c)
    if left == "checkpoints":
        (tmp_path / "run/run.json").unlink()
    before = outcome(tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
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


@pytest.mark.parametrize("value, is_fine", [(1, True), (1.5, True), (0, False), (-3, False),
                                            (float("nan"), False)])
def test_a_flag_below_its_minimum_is_refused_by_name(value, is_fine):
    config = RunConfig(run="r")
    object.__setattr__(config, "save_every", value)
    if is_fine:
        at_least(config, 1, "steps", "save_every")
    else:
        with fails(ValueError, f"--save-every is {value}, expected 1 or more"):
            at_least(config, 1, "steps", "save_every")


# ---- a folder is a run from its first checkpoint on ----

def test_a_corrected_command_works_after_one_that_failed_before_its_first_checkpoint(tmp_path):
    data = text_file(tmp_path)
    with pytest.raises(MemoryError):
        pretrain_on_text(pretrain_config(tmp_path / "run", data, seed=1), spoil=fail_at_once)
    assert (tmp_path / "run/run.json").exists() and checkpoint_steps(tmp_path / "run") == []
    pretrain(pretrain_config(tmp_path / "run", data))
    pretrain(pretrain_config(tmp_path / "other", data))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "other")


def fail_at_once(step, model):
    raise MemoryError


def test_a_refused_command_leaves_no_folder(tmp_path):
    base = save_base(tmp_path / "base")
    for changes in [dict(base="none"), dict(max_new_tokens=300), dict(device="tpu")]:
        with pytest.raises(ValueError):
            grpo(grpo_config(tmp_path / "run", **{"base": base, **changes}))
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="the text has 3 tokens"):
        pretrain(pretrain_config(tmp_path / "run", text_file(tmp_path, "ab")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["", " "])
def test_a_run_without_a_name_is_refused(name):
    with fails(ValueError, "--run is empty, expected the name of a folder"):
        RunConfig(run=name)


def test_to_resume_what_holds_nothing_says_so(tmp_path, capsys):
    pretrain(pretrain_config(tmp_path / "typo", text_file(tmp_path), steps=1, resume=True))
    assert "typo holds no checkpoint to resume yet: starting at step 1" in capsys.readouterr().err


# ---- flags that are newer than a checkpoint ----

def test_a_flag_that_is_newer_than_the_checkpoint_counts_as_its_default(tmp_path):
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "run", data, steps=2))
    forget(tmp_path / "run", "seed", "optim.eps", "inputs", "schedule_steps", "loop")
    with pytest.raises(CheckpointError, match="seed is 0 there and 5 here"):
        pretrain(pretrain_config(tmp_path / "run", data, steps=3, seed=5, resume=True))
    pretrain(pretrain_config(tmp_path / "run", data, steps=3, resume=True))
    assert checkpoint_steps(tmp_path / "run")[-1] == 3


# ---- more and fewer steps ----

COSINE = OptimConfig(lr=1e-2, warmup=1, schedule="cosine", final_lr=0.1)


def rates(run) -> list[float]:
    return [row["lr"] for row in read_metrics(run)]


@pytest.mark.parametrize("stopped_at", [4, 2])
def test_more_steps_keep_the_final_rate_and_say_so(tmp_path, capsys, stopped_at):
    """Whether the run had ended, or was stopped on its way."""
    base = save_base(tmp_path / "base")
    loops = {"pretrain": lambda run, **more: pretrain(
                 pretrain_config(run, text_file(tmp_path), optim=COSINE, save_every=stopped_at, **more)),
             "grpo": lambda run, **more: grpo(
                 grpo_config(run, base, optim=COSINE, save_every=stopped_at, **more))}
    for name, loop in loops.items():
        whole, run = tmp_path / f"whole_{name}", tmp_path / name
        loop(whole, steps=4)
        loop(run, steps=4)
        for path in (run / "checkpoints").iterdir():
            if path.name > f"step_{stopped_at:08d}":
                shutil.rmtree(path)
        capsys.readouterr()
        loop(run, steps=7, resume=True)
        assert "schedule ends with step 4, as the run began; later steps keep its final rate" in \
            capsys.readouterr().err
        assert rates(run)[:4] == rates(whole) and rates(run)[4:] == [pytest.approx(1e-3)] * 3


def test_the_critics_rate_follows_the_same_schedule(tmp_path):
    base = save_base(tmp_path / "base")
    options = dict(algo="ppo", optim=COSINE, critic_optim=COSINE, save_every=1, keep_last=9)
    grpo(grpo_config(tmp_path / "run", base, steps=3, **options))
    grpo(grpo_config(tmp_path / "run", base, steps=5, resume=True, **options))
    rate_of = {step: load_checkpoint(tmp_path / "run", step).state["critic_optimizer"]["groups"][0]["lr"]
               for step in (2, 3, 4, 5)}
    assert rate_of[3] == rate_of[4] == rate_of[5] == pytest.approx(1e-3) != rate_of[2]


def test_fewer_steps_say_so_and_keep_the_schedule(tmp_path, capsys):
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "run", data, optim=COSINE, keep_last=9))
    expected = rates(tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:08d}")
    pretrain(pretrain_config(tmp_path / "run", data, optim=COSINE, steps=5, resume=True))
    said = capsys.readouterr().err
    assert "ends at step 5, before the learning rate's schedule, which ends with step 8" in said
    assert rates(tmp_path / "run") == expected[:5]


def test_a_run_that_has_its_steps_says_that_nothing_is_left(tmp_path, capsys):
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "run", data, steps=3))
    pretrain(pretrain_config(tmp_path / "run", data, steps=2, resume=True))
    assert "nothing to do: --steps is 2, and 3 are done" in capsys.readouterr().err
