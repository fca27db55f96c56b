"""The loop of GRPO beyond its plain step: dynamic sampling, the reference, the best checkpoint, what is
logged."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from r1zero.model import checkpoint as checkpoint_module
from r1zero.model.checkpoint import checkpoint_steps, load_checkpoint, load_model
from r1zero.model.optimizer import OptimConfig, make_optimizer, optimizer_step
from r1zero.rl.step import grpo_step
from r1zero.train.grpo import grpo, held_out_accuracy, make_learner, timed_step
from r1zero.train.log import read_metrics

from ..rl.cases import Bandit, tiny
from .loop_cases import grpo_config, save_base
from .run_cases import Broken, assert_same, broken_at, fails, finite, outcome


@dataclasses.dataclass(frozen=True)
class Patchy(Bandit):
    """Only every third problem can be solved at all; of the others half are always right."""

    def grade(self, problem, response):
        grade = super().grade(problem, response)
        return dataclasses.replace(grade, accuracy=(grade.accuracy, 0.0, 1.0)[problem % 3])


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


def learner(c):
    return make_learner(c, c.task.make(), load_model(c.base, torch.device("cpu")))


def sampled_by(s, c, step: int = 0):
    """(the rollouts that are trained on, their rewards)"""
    rollouts = s.sampler.sample(c.task, c, step)
    return rollouts, s.grader(c.task, rollouts)


# ---- dynamic sampling ----

def test_groups_without_signal_are_replaced_by_new_ones(base):
    c = grpo_config("none", base, task=Patchy(), dynamic_sampling=6, group_size=8)
    s, requests = learner(c), []
    generate = s.sampler.engine.generate
    s.sampler.engine.generate = lambda new: requests.extend(new) or generate(new)
    rollouts, rewards = sampled_by(s, c)
    assert len(rollouts.group_offsets) == 5 and len(rewards.training) == 32
    groups = rewards.training.reshape(4, 8)
    assert ((groups.min(1) == 0) & (groups.max(1) == 1)).all()  # every group has a signal
    replaced = rollouts.replaced
    assert len(replaced.problems) > 0  # and those that were replaced have none
    assert s.grader(c.task, replaced).dead(replaced).all()
    everyone = sorted(rollouts.problems + replaced.problems)
    assert everyone == list(range(s.sampler.position))  # no problem is sampled twice, none is lost
    assert len({request.seed for request in requests}) == len(requests) == 8 * len(everyone) > 32
    for part in (rollouts, replaced):  # each answer stays with its own problem
        prompts = [chr(token) for sequence in part.sequences for token in sequence[:1]]
        assert prompts == [str(problem % 10) for problem in part.problems for _ in range(8)]


def test_metrics_are_of_all_that_was_sampled_and_not_of_the_kept(base):
    c = grpo_config("none", base, task=Patchy(), dynamic_sampling=6, group_size=8)
    s = learner(c)
    metrics = timed_step(s, c.task, c, 0)
    other = learner(c)
    rollouts, rewards = sampled_by(other, c)
    replaced = other.grader(c.task, rollouts.replaced)
    accuracy = np.concatenate([rewards.accuracy, replaced.accuracy])
    assert metrics["accuracy"] == pytest.approx(accuracy.mean()) != pytest.approx(rewards.accuracy.mean())
    sampled = metrics["groups_sampled"]
    assert sampled == metrics["position"] > 8 and metrics["trained_samples"] == 32
    assert metrics["dead_groups"] == pytest.approx(1 - 4 / sampled)
    assert metrics["all_right"] + metrics["all_wrong"] == pytest.approx(metrics["dead_groups"])
    assert metrics["all_right"] > 0 and metrics["all_wrong"] > 0
    assert 0 < metrics["replaced_tokens"] < metrics["tokens"]
    assert 0 < metrics["replaced_s"] < metrics["rollout_s"]


@pytest.mark.parametrize("limit", [1, 2])
def test_rounds_are_limited_and_a_step_without_any_signal_changes_nothing(base, limit):
    class Hopeless(Bandit):
        def grade(self, problem, response):
            return super().grade(problem, "é")

    c = grpo_config("none", base, task=Hopeless(), dynamic_sampling=limit)
    s = learner(c)
    before = {name: p.clone() for name, p in s.policy.named_parameters()}
    metrics = grpo_step(s, c.task, c, 0)
    assert s.sampler.position == 4 * limit and metrics["dead_groups"] == metrics["all_wrong"] == 1
    assert metrics["gradient_norm"] == metrics["loss"] == metrics["trained_samples"] == 0
    assert all(torch.equal(p, before[name]) for name, p in s.policy.named_parameters())


def test_without_it_the_problems_are_those_of_the_step(base):
    c = grpo_config("none", base)
    s = learner(c)
    for step in range(3):
        assert s.sampler.position == 4 * step
        metrics = grpo_step(s, c.task, c, step)
        assert metrics["groups_sampled"] == 4 and metrics["replaced_tokens"] == 0


# ---- the reference ----

def test_the_reference_becomes_the_policy_every_n_steps(base, tmp_path):
    c = grpo_config(tmp_path / "run", base, steps=5, ref_refresh=2, save_every=1, keep_last=9,
                    kl_samples=99)
    grpo(c)
    saved = {step: load_checkpoint(c.run, step).tensors for step in checkpoint_steps(c.run)}
    start = load_checkpoint(base).tensors["model"]
    sources = {1: start, 2: saved[2]["model"], 3: saved[2]["model"], 5: saved[4]["model"]}
    for step, expected in sources.items():
        assert all(torch.equal(saved[step]["reference"][name], t) for name, t in expected.items()), step
    kl = [row["kl_to_reference"] for row in read_metrics(c.run)]
    assert max(abs(kl[0]), abs(kl[2]), abs(kl[4])) < 1e-5 < min(kl[1], kl[3])  # before the step's own update


def test_a_reference_kept_elsewhere_between_uses_is_the_same(base):
    metrics = {}
    for offload in (False, True):
        c = grpo_config("none", base, loss=dict(kl_coef=0.1), ref_offload=offload)
        s = learner(c)
        for step in range(2):
            metrics[offload] = {name: value for name, value in grpo_step(s, c.task, c, step).items()
                                if name in ("loss", "kl_loss", "kl_to_reference", "gradient_norm")}
    assert metrics[False] == metrics[True] and metrics[True]["kl_loss"] > 0


@pytest.mark.parametrize("algo", ["grpo", "rloo", "reinforce_pp", "ppo"])
def test_a_large_kl_coef_keeps_the_policy_at_its_reference(base, tmp_path, algo):
    """In the loss and in the reward alike."""
    kl = {}
    for coef in (0.0, 2.0):
        c = grpo_config(tmp_path / f"run{coef}", base, algo=algo, loss=dict(kl_coef=coef), steps=12,
                        prompts_per_step=8, group_size=8, kl_samples=64, save_every=100)
        grpo(c)
        kl[coef] = np.mean([row["kl_to_reference"] for row in read_metrics(c.run)[-3:]])
    assert kl[2.0] < 0.5 * kl[0.0]


# ---- sampler and trainer ----

@pytest.mark.parametrize("algo", ["r1_zero", "ppo"])
@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_all_log_probs_are_at_the_temperature_of_sampling(base, algo, temperature):
    c = grpo_config("none", base, algo=algo, temperature=temperature, updates_per_step=2, kl_samples=99,
                    loss=dict(kl_coef=1.0))
    s = learner(c)
    compare, seen = s.credit.advantages, []
    s.credit.advantages = lambda *rest: seen.append(rest) or compare(*rest)
    metrics = grpo_step(s, c.task, c, 0)
    assert metrics["logp_gap"] < 1e-4 and abs(metrics["kl_to_reference"]) < 1e-5  # it is the policy still
    if algo == "ppo":
        assert np.abs(seen[0][4]).max() < 1e-4  # and the KL in the reward is 0


def test_rollouts_never_lag_behind_the_trainer(base):
    c = grpo_config("none", base, optim=OptimConfig(lr=0.05, warmup=0, schedule="constant"), max_new_tokens=8)
    s, task = learner(c), c.task.make()
    before = {name: p.clone() for name, p in s.policy.named_parameters()}
    for step in range(4):
        assert s.sampler.sample(task, c, step).weights_version == step
        metrics = grpo_step(s, task, c, step)
        assert metrics["logp_gap"] < 1e-3
    assert max(float((p.data - before[name]).abs().max()) for name, p in s.policy.named_parameters()) > 0.1


def test_small_steps_are_not_lost_in_16_bit(base):
    """Stepping bf16 weights directly would leave a weight of 1 where it is for any step under 0.004."""
    model = tiny()
    model.compute_dtype = torch.bfloat16
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.0))
    before = model.norm.detach().clone()
    for _ in range(100):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer_step(model, optimizer, 1e-5, OptimConfig(weight_decay=0.0))
    np.testing.assert_allclose((before - model.norm.detach()).numpy(), 1e-3, rtol=0.02)
    assert model.norm.to(torch.bfloat16)[0] == 1.0  # which shows in 16 bit later, when it has added up


# ---- the best checkpoint, and what is logged ----

def test_held_out_accuracy_marks_the_best_checkpoint(base, tmp_path):
    found = iter([0.3, 0.9, 0.5])
    c = grpo_config(tmp_path / "run", base, steps=5, eval_every=2, save_every=100, keep_last=1)
    grpo(c, score_of=lambda *rest: next(found))
    assert load_checkpoint(c.run, "best").step == 4 and checkpoint_steps(c.run) == [4, 5]
    assert [row.get("eval_accuracy") for row in read_metrics(c.run)] == [None, 0.3, None, 0.9, 0.5]


@pytest.mark.parametrize("end", [Broken, KeyError])
def test_a_run_that_ended_between_its_best_checkpoint_and_the_mark_marks_it_on_resume(base, tmp_path,
                                                                                      monkeypatch, end):
    found, mark = iter([0.3, 0.9, 0.5]), checkpoint_module._mark_best

    def dying(root, step, score):
        if step == 4:
            raise end
        mark(root, step, score)

    common = dict(steps=5, eval_every=2, save_every=100, keep_last=1)
    with monkeypatch.context() as patch, pytest.raises(end):
        patch.setattr(checkpoint_module, "_mark_best", dying)
        grpo(grpo_config(tmp_path / "run", base, **common), score_of=lambda *rest: next(found))
    assert load_checkpoint(tmp_path / "run", "best").step == 2
    grpo(grpo_config(tmp_path / "run", base, resume=True, **common), score_of=lambda *rest: next(found))
    assert load_checkpoint(tmp_path / "run", "best").step == 4


def test_held_out_accuracy_is_measured_on_problems_of_the_test_split(base):
    asked = []

    class Watching(Bandit):
        def problems(self, split, n, start=0):
            asked.append((split, n))
            return super().problems(split, n, start)

    c = grpo_config("none", base, task=Watching(), eval_problems=40)
    s = learner(c)
    accuracy = held_out_accuracy(s, c.task, c)
    assert asked[-1] == ("test", 40) and 0.2 < accuracy < 0.8
    assert accuracy == held_out_accuracy(s, c.task, c)


NAMES = """
    reward accuracy format penalty length length_max truncated dead_groups all_right all_wrong groups_sampled
    lr replaced_tokens replaced_s tokens rollout_s rollout_tokens_per_s loss clipped_low clipped_high k1 k3
    ratio ratio_max cut_off kl_loss entropy gradient_norm logp_gap logp_gap_mean trained_samples
    kl_to_reference position step_s update_s update_tokens_per_s keep_s memory_gb step""".split()


def test_every_step_logs_every_metric(base, tmp_path):
    c = grpo_config(tmp_path / "run", base, algo="ppo", steps=2)
    grpo(c)
    for row in read_metrics(c.run):
        assert set(row) == {*NAMES, "value_loss", "value_explained", "critic_gradient_norm",
                            "kl_in_reward"}
        assert all(math.isfinite(value) for value in row.values())
        assert 0.1 < row["memory_gb"] < 24 and row["length_max"] == 3 >= row["length"]
        assert row["step_s"] == pytest.approx(row["rollout_s"] + row["update_s"], rel=0.05)


def test_the_control_and_the_penalty_change_what_is_trained_on_and_not_what_is_logged(base):
    found = {}
    for name, changes in (("plain", {}), ("control", dict(control="permute")),
                          ("penalty", dict(overlong_buffer=1.0))):
        c = grpo_config("none", base, **changes)
        rollouts, rewards = sampled_by(learner(c), c)
        found[name] = rewards
        lengths = rollouts.response_lengths
    assert all(np.array_equal(rewards.total, found["plain"].total) for rewards in found.values())
    assert not np.array_equal(found["control"].training, found["plain"].training)
    np.testing.assert_allclose(found["penalty"].training, found["plain"].training - lengths / 3)
    c = grpo_config("none", base, overlong_buffer=1.0)
    logged = grpo_step(learner(c), c.task.make(), c, 0)
    assert logged["reward"] == pytest.approx(found["plain"].total.mean())
    assert logged["penalty"] == pytest.approx(lengths.mean() / 3)


# ---- resume ----

EVERYTHING = dict(algo="ppo", ref_refresh=2, dynamic_sampling=3, eval_every=2, eval_problems=8,
                  updates_per_step=2)


def test_everything_at_once_resumes_to_the_same_bits(base, tmp_path, monkeypatch):
    grpo(grpo_config(tmp_path / "whole", base, task=Patchy(), **EVERYTHING))
    broken_at(monkeypatch, 4, grpo, grpo_config(tmp_path / "run", base, task=Patchy(), **EVERYTHING))
    grpo(grpo_config(tmp_path / "run", base, task=Patchy(), resume=True, **EVERYTHING))
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))
    files = outcome(tmp_path / "run")["files"]
    assert {name.rpartition("/")[2] for name in files} >= {
        "model.safetensors", "optimizer.safetensors", "reference.safetensors", "critic.safetensors",
        "critic_optimizer.safetensors", "best.json"}
    assert load_checkpoint(tmp_path / "run").state["counters"]["position"] > 20  # more than 5 steps of 4


@pytest.mark.parametrize("spoil, match", [
    (lambda critic: critic.value.data.fill_(math.nan), "loss is nan at step 2 .*weight critic.value"),
    (lambda critic: critic.trunk.norm.register_hook(lambda grad: grad * math.nan),
     "critic_gradient_norm is nan at step 2 .*gradient of critic.trunk.norm")])
def test_a_critic_that_is_not_finite_stops_ppo_and_is_named(spoil, match, tmp_path):
    def spoiled(s, task, c, step):
        if step == 1:
            spoil(s.credit.critic.critic)
        return timed_step(s, task, c, step)

    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), algo="ppo", save_every=1)
    with fails(FloatingPointError, f"{match}.*checkpoint of step 1"):
        grpo(c, step_of=spoiled)
    assert checkpoint_steps(c.run) == [1] and finite(c.run) and len(read_metrics(c.run)) == 1
