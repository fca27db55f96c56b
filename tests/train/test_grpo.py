"""GRPO raises a reward and its control does not; what it leaves can be trained on."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from r1zero.eval.tasks.gsm8k import GSM8K
from r1zero.eval.tasks.math import Math
from r1zero.model.checkpoint import load_checkpoint
from r1zero.model.config import preset
from r1zero.model.engine.engine import Engine
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.train import grpo as grpo_module
from r1zero.train.grpo import form_notice, grpo, rate_notice, timed_step
from r1zero.train.log import read_metrics
from r1zero.train.task_flags import TaskFlags

from ..rl.cases import Bandit
from .loop_cases import grpo_config, save_base


def test_grpo_raises_the_reward_and_its_control_does_not(tmp_path):
    base, accuracy = save_base(tmp_path / "base"), {}
    for control in ("none", "permute", "random"):
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
    assert len({values[0] for values in accuracy.values()}) == 1 and 0.3 < accuracy["none"][0] < 0.7
    assert np.mean(accuracy["none"][-5:]) > 0.85
    for control in ("permute", "random"):
        assert np.mean(accuracy[control][-5:]) < 0.7


def test_a_grpo_run_leaves_a_model_that_can_be_trained_on(tmp_path):
    base = save_base(tmp_path / "base")
    first = grpo_config(tmp_path / "first", base, steps=2)
    grpo(first)
    grpo(grpo_config(tmp_path / "second", first.run, steps=1))
    found = load_checkpoint(tmp_path / "second")
    assert found.step == 1 and found.state["tokenizer"] == Tokenizer.bytes().to_dict()


def test_mathematics_can_be_trained_on_and_a_file_that_holds_it_out_too_cannot(tmp_path):
    base, path, test = save_base(tmp_path / "base"), tmp_path / "m.jsonl", tmp_path / "test.jsonl"
    path.write_text('{"problem": "Root of 2?", "answer": "\\\\sqrt{2}"}\n' * 3)
    test.write_text('{"problem": "root  of 2?", "answer": 2}\n')
    flags = TaskFlags("math", ("template=plain",), str(path))
    rewards = {"accuracy_weight": 1.0, "format_weight": 0.5, "efficiency_weight": 0.5}
    grpo(grpo_config(tmp_path / "run", base, task=flags, steps=1, rewards=rewards))
    [row] = read_metrics(tmp_path / "run")
    assert row["accuracy"] == row["format"] == 0
    leaky = replace(flags, options=("template=plain", f"test={test}"))
    with pytest.raises(ValueError, match="every problem .* nothing is left to train on"):
        grpo(grpo_config(tmp_path / "leaky", base, task=leaky, steps=1))
    path.write_text(path.read_text() + '{"problem": "?", "answer": 1}\n')
    with pytest.raises(ValueError, match="3 of 4 problems .*line 1 .held out in line 1.*skip_held_out=true"):
        grpo(grpo_config(tmp_path / "leaky", base, task=leaky, steps=1))
    assert not (tmp_path / "leaky").exists()


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


# ---- what the loop asks of the engine, and does about log-probs that are not the trainer's ----

def test_grpo_says_what_a_step_needs(tmp_path, monkeypatch):
    asked = {}

    class Asked(Engine):
        def __init__(self, *args, **options):
            asked.update(options)
            super().__init__(*args, **options)

    monkeypatch.setattr(grpo_module, "Engine", Asked)
    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), steps=1, save_every=1)
    policy = grpo_module.grpo(c)
    weights = sum(p.numel() for p in policy.parameters())
    activations = policy.saved_bytes(max(c.micro_tokens, asked["longest"]))
    least = 12 * weights + activations
    head = 4 * policy.embed.numel() + 4096 * 4 * c.micro_tokens  # its gradient, and a CPU's slice of logits
    assert 13 * weights < least < asked["reserve"] <= least + head
    assert c.max_new_tokens < asked["longest"] and asked["max_rows"] == c.prompts_per_step * c.group_size


def test_grpo_logs_the_gap_and_stops_when_it_is_too_large(tmp_path):
    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), steps=4, save_every=1)

    def disagreeing(learner, task, config, step):
        sample = learner.sampler.sample

        def sample_and_spoil(*args):
            rollouts = sample(*args)
            if step == 2:
                for logp in rollouts.sampler_logp:
                    logp[0] -= 0.01
            return rollouts

        learner.sampler.sample = sample_and_spoil
        return timed_step(learner, task, config, step)

    with pytest.raises(FloatingPointError, match="is 0.01 from the trainer's own, more than --max-logp-gap "
                                                 "0.001, at step 3; the checkpoint of step 2 is kept"):
        grpo(c, step_of=disagreeing)
    rows = read_metrics(c.run)
    assert len(rows) == 2 and all(0 <= row["logp_gap_mean"] <= row["logp_gap"] < 1e-4 for row in rows)
    assert rows[0]["logp_gap"] > 0
    with pytest.raises(ValueError, match="--max-logp-gap is -1"):
        grpo_config("none", "", max_logp_gap=-1.0)
    grpo(grpo_config(c.run, c.base, steps=4, save_every=1, resume=True, max_logp_gap=0.1))
    assert len(json.dumps(read_metrics(c.run))) and len(read_metrics(c.run)) == 4


# ---- answers that the model has no room for ----

class Growing(Bandit):
    """Its prompts grow from the eighth on; the held-out ones are longer still."""

    def prompt(self, problem):
        return ":" * (2 if problem < 8 else 6 if problem < 1000 else 9)

    def problems(self, split, n, start=0):
        first = start + (1000 if split == "test" else 0)
        return list(range(first, first + n))

    def size(self, split):
        return 12


@pytest.mark.parametrize("eval_every, longest", [(0, 6), (1, 9)])
def test_the_longest_prompt_of_the_task_decides_about_the_room(tmp_path, eval_every, longest):
    base = save_base(tmp_path / "base")
    options = dict(task=Growing(), eval_every=eval_every, eval_problems=4, steps=3, save_every=9)
    with pytest.raises(ValueError, match=f"a prompt has up to {longest} tokens; .* at most {256 - longest}"):
        grpo(grpo_config(tmp_path / "run", base, max_new_tokens=257 - longest, **options))
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_asks_for_no_tags_is_told_of_where_tags_are_rewarded(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "One hen lays 3 eggs. How many?", "answer": "#### 3"}\n')
    asks_mark, asks_tags = GSM8K(path=str(path)), GSM8K(path=str(path), template="r1_zero")
    config = grpo_config("r", "b")
    no_form = replace(config, rewards=replace(config.rewards, format_weight=0.0))
    told = form_notice(asks_mark, config)
    assert "template zero_shot does not ask for <think>" in told and "template=r1_zero" in told
    assert "\n" not in told and form_notice(replace(asks_mark, template="chat"), config)
    path.write_text('{"problem": "One hen lays 3 eggs. How many?", "answer": 3}\n')
    boxed = Math(path=str(path))
    assert "template boxed does not ask" in form_notice(boxed, config)
    for task, flags in ((asks_mark, no_form), (asks_tags, config), (Bandit(), config)):
        assert form_notice(task, flags) is None


def test_a_learning_rate_for_toys_is_told_to_be_one_on_an_open_model():
    with torch.device("meta"):
        large = Transformer(preset("smollm2-135m", 49_152))
        small = Transformer(preset("demo", 800))
    config = grpo_config("r", "b")
    told = rate_notice(config, large)
    assert f"--optim.lr is {config.optim.lr:g}" in told and "135 million" in told and "\n" not in told
    assert rate_notice(config, small) is None
    assert rate_notice(replace(config, optim=replace(config.optim, lr=1e-5)), large) is None
