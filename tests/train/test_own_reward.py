"""Runs with a reward of the user's own or more parts: logged, resumed, and ended by a bad one in one line."""
import json
import math
import sys

import pytest

from r1zero.model.checkpoint import CheckpointError, checkpoint_steps
from r1zero.rl.plugin import PluginError
from r1zero.train.grpo import GRPOConfig, grpo
from r1zero.train.log import read_metrics
from r1zero.train.settings import check_settings, settings_of
from r1zero.train.task_flags import TaskFlags

from .loop_cases import grpo_config, save_base
from .run_cases import assert_same, broken_at, fails, outcome

MODULE = "own_reward_of_the_tests"
SOURCE = """
import json

calls = []

def brevity(samples):
    calls.append(len(samples))
    return [1.0 / (1 + len(sample.tokens)) for sample in samples]

def keeps_lists(samples):
    assert all(type(sample.tokens) is list and sample.tokens for sample in samples)
    json.dumps([sample.tokens for sample in samples])
    return [1.0] * len(samples)

def fails_at_once(samples):
    return [sample.length for sample in samples]

def fails_later(samples):
    calls.append(len(samples))
    return [float("nan") if len(calls) > 4 else 1.0 for sample in samples]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with the user's module in it, and a base; the module is forgotten afterwards."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop(MODULE, None)


def config(folder, run="run", plugin="brevity", **changes) -> GRPOConfig:
    rewards = dict(plugin=f"{MODULE}:{plugin}", plugin_weight=0.5)
    return grpo_config(folder / run, folder / "base", **{"rewards": rewards, "steps": 4, **changes})


def test_every_part_is_logged_under_its_name(folder):
    parts = dict(plugin=f"{MODULE}:brevity", efficiency_weight=0.5, coherence_weight=0.25)
    task = TaskFlags("countdown", ("n_numbers=2", "high=9"))
    grpo(config(folder, task=task, rewards=parts, steps=2))
    for row in read_metrics(folder / "run"):
        assert 1 / 4 <= row["reward_brevity"] <= 1 / 2 and row["reward_coherence"] == 0
        assert -0.5 <= row["reward_efficiency"] <= 0.5
        expected = row["accuracy"] + 0.2 * row["format"] + row["reward_brevity"]
        expected += 0.5 * row["reward_efficiency"]
        assert row["reward"] == pytest.approx(expected) and row["penalty"] == 0
    saved = json.loads((folder / "run/run.json").read_text())["config"]["rewards"]
    assert saved["plugin"] == f"{MODULE}:brevity" and saved["efficiency_weight"] == 0.5


def test_a_run_with_a_plug_in_resumes_to_the_same_bits(folder, monkeypatch):
    grpo(config(folder, "whole"))
    broken_at(monkeypatch, 3, grpo, config(folder))
    grpo(config(folder, resume=True))
    assert_same(folder / "run", outcome(folder / "whole"))


def test_a_plug_in_belongs_to_the_settings_and_its_source_to_the_inputs(folder):
    grpo(config(folder, steps=2))
    with fails(CheckpointError, f"--rewards.plugin is {MODULE}:brevity there and {MODULE}:fails_later here"):
        grpo(config(folder, plugin="fails_later", resume=True))
    (folder / f"{MODULE}.py").write_text(SOURCE + "# another version")
    with fails(CheckpointError, f"have changed: plugin .*{MODULE}.py"):
        grpo(config(folder, resume=True))
    grpo(config(folder, resume=True, accept_changes=True, steps=3))
    assert checkpoint_steps(folder / "run")[-1] == 3


def test_tokens_are_lists_so_they_can_be_asked_for_and_written(folder):
    grpo(config(folder, plugin="keeps_lists", steps=1))
    assert read_metrics(folder / "run")[0]["reward_keeps_lists"] == 1


def test_a_plug_in_that_fails_ends_the_run_with_one_line_after_its_last_whole_step(folder):
    with fails(PluginError, "returned nan, expected a finite number, on the problem 12 and the response .*, "
                            "at step 4; the checkpoint of step 2 is kept in"):
        grpo(config(folder, plugin="fails_later", steps=8))
    rows = read_metrics(folder / "run")
    assert [row["step"] for row in rows] == [1, 2, 3] == [*range(1, checkpoint_steps(folder / "run")[-1] + 1)]
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("rewards, fragment", [
    (dict(coherence_weight=0.5), "coherence does not apply to the task bandit"),
    (dict(plugin=f"{MODULE}:brevety"), "has no 'brevety'"),
    (dict(plugin=f"{MODULE}:fails_at_once"), "'Sample' object has no attribute 'length'")])
def test_a_part_that_does_not_fit_is_refused_before_there_is_a_folder(folder, rewards, fragment):
    with fails(ValueError, fragment):
        grpo(config(folder, rewards=rewards))
    assert not (folder / "run").exists()


def test_a_run_from_when_the_control_was_a_switch_is_resumed_as_what_it_was(tmp_path):
    for switch, word, other in ((False, "none", "permute"), (True, "permute", "random")):
        older = settings_of(grpo_config("run", "base"), free=set()) | {"control": switch}
        older.pop("dead_groups")
        for part in ("efficiency_weight", "coherence_weight", "plugin", "plugin_weight"):
            older["rewards"].pop(part)
        same, another = (grpo_config("run", "base", control=control) for control in (word, other))
        check_settings(older, settings_of(same, free=set()), same, tmp_path)
        with fails(CheckpointError, f"--control is {word} there and {other} here"):
            check_settings(older, settings_of(another, free=set()), another, tmp_path)
