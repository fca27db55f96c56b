"""A run's folder: what it leaves there, and the folders, settings and checkpoints that it refuses."""
import json

import pytest
import torch

from r1zero.model.checkpoint import CheckpointError, checkpoint_steps
from r1zero.model.optimizer import OptimConfig
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.grpo import grpo
from r1zero.train.log import read_metrics
from r1zero.train.pretrain import pretrain
from r1zero.train.run import Run, RunConfig, at_least

from ..rl.cases import Bandit
from .loop_cases import grpo_config, pretrain_config, save_base, text_file
from .run_cases import fails, outcome


def test_a_run_folder_that_cannot_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in [file, file / "below"]:
        with fails(ValueError, "cannot use the run folder .*give another one"):
            Run(RunConfig(run=str(folder)), "test")
    assert file.read_text() == "mine"


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
    (dict(optim=OptimConfig(lr=5e-3)), "optim is .*0.01.* there and .*0.005"),
    (dict(batch_tokens=32, seq_len=8), "batch_tokens is 64 there and 32 here; seq_len is 16 there and 8"),
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
    with pytest.raises(CheckpointError, match="is a run of pretrain, not of grpo; .* with r1zero pretrain"):
        grpo(grpo_config(finished / "pretrain", finished / "base", resume=True))


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
