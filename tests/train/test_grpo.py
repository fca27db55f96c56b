"""GRPO raises a reward and its control does not; what it leaves can be trained on."""
import math

import numpy as np
import pytest
import torch

from r1zero.model.checkpoint import load_checkpoint
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.grpo import grpo
from r1zero.train.run import read_metrics

from ..rl.cases import Bandit
from .loop_cases import grpo_config, save_base


def test_grpo_raises_the_reward_and_its_control_does_not(tmp_path):
    base, accuracy = save_base(tmp_path / "base"), {}
    for control in [False, True]:
        c = grpo_config(tmp_path / f"run-{control}", base, control=control, steps=30, prompts_per_step=8,
                        group_size=8, seed=1, save_every=1000, max_new_tokens=2, micro_tokens=2048)
        grpo(c)
        rows = read_metrics(c.run)
        assert len(rows) == 30 and all(math.isfinite(v) for row in rows for v in row.values())
        accuracy[control] = [row["accuracy"] for row in rows]
        assert all(row["logp_gap"] < 1e-3 and row["format"] == 0 for row in rows)
        assert rows[0]["kl_to_reference"] == pytest.approx(0, abs=1e-5)
        assert rows[0]["reward"] == pytest.approx(rows[0]["accuracy"])  # the real ones, in the control too
        assert rows[-1]["kl_to_reference"] > 0.01
    assert accuracy[False][0] == accuracy[True][0] and 0.3 < accuracy[False][0] < 0.7
    assert np.mean(accuracy[False][-5:]) > 0.85 > 0.7 > np.mean(accuracy[True][-5:])


def test_a_grpo_run_leaves_a_model_that_can_be_trained_on(tmp_path):
    base = save_base(tmp_path / "base")
    first = grpo_config(tmp_path / "first", base, steps=2)
    grpo(first)
    grpo(grpo_config(tmp_path / "second", first.run, steps=1))
    found = load_checkpoint(tmp_path / "second")
    assert found.step == 1 and found.state["tokenizer"] == Tokenizer.bytes().to_dict()


class Hopeless(Bandit):
    def grade(self, problem, response):
        return super().grade(problem, "é")  # no answer is ever right


def test_all_groups_dead_changes_nothing_and_says_so(tmp_path):
    base = save_base(tmp_path / "base")
    c = grpo_config(tmp_path / "run", base, task=Hopeless(), steps=1)
    grpo(c)
    [row] = read_metrics(c.run)
    assert row["dead_groups"] == 1 and row["trained_samples"] == row["gradient_norm"] == row["loss"] == 0
    before, after = (load_checkpoint(folder).tensors["model"] for folder in (base, c.run))
    assert all(torch.equal(before[name], after[name]) for name in before)
