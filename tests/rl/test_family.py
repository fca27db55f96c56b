"""GRPO's family in the trainer: presets and dials, and that no gradient depends on how the work is cut."""
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from r1zero.model.optimizer import OptimConfig
from r1zero.rl.advantages import AdvantageConfig, Advantages, advantages
from r1zero.rl.family import PARTS, PRESETS, Algorithm, in_words, resolve
from r1zero.rl.heads import CriticLearner, ValueHead
from r1zero.rl.losses import LossConfig, importance_weights, loss_weights, value_loss
from r1zero.rl.rollouts import merge, micro_batches
from r1zero.rl.shaping import overlong_penalty
from r1zero.rl.update import update_policy
from r1zero.train.grpo import grpo
from r1zero.train.log import read_metrics

from ..train.loop_cases import grpo_config, save_base
from .cases import (
    Capture,
    algorithm,
    assert_same_gradient,
    make_learner,
    per_token,
    rollouts_by_hand,
    tiny,
)
from .family_cases import REWARDS, SHARED, rank_gradients, whole_update

# ---- presets ----

def test_a_preset_is_complete_and_what_is_given_wins():
    defaults = dataclasses.asdict(Algorithm())
    for algo, preset in PRESETS.items():
        config = dataclasses.asdict(resolve(algo, {"loss": {"clip_high": 0.3}, "temperature": 0.9}))
        assert None not in config.values() and None not in {**config["loss"], **config["advantage"]}.values()
        expected = defaults | {"algo": algo, "temperature": 0.9}
        expected |= preset
        for part in PARTS:
            expected[part] = defaults[part] | preset.get(part, {})
        expected["loss"] = defaults["loss"] | preset.get("loss", {}) | {"clip_high": 0.3}
        assert config == expected, algo
    whole = LossConfig(objective="cispo")
    assert resolve("dapo", {"loss": whole}).loss is whole  # a part that is given whole replaces the preset's
    assert resolve("dapo", {"optim": {"lr": 0.5}}).optim == dataclasses.replace(Algorithm().optim, lr=0.5)


@pytest.mark.parametrize("overrides, message", [
    ({"loss": {"clip_hihg": 0.3}}, "loss has no option 'clip_hihg'; expected .*clip_high"),
    ({"optim": {"lrr": 0.3}}, "optim has no option 'lrr'; expected lr"),
    ({"lr": 0.3}, "Algorithm has no option 'lr'; expected "),
    ({"algo": "ppo"}, "the overrides of dapo have algo 'ppo'; resolve that preset"),
])
def test_an_option_that_is_none_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        resolve("dapo", overrides)


def test_what_was_used_is_what_is_recorded_and_said(tmp_path, capsys):
    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), algo="dapo", steps=1)
    grpo(c)
    recorded = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert recorded["algo"] == "dapo" and recorded["loss"]["clip_high"] == 0.28
    said = capsys.readouterr().err
    assert "dapo: baseline group, scale std, objective clip, clip_low 0.2, clip_high 0.28, mean token, " \
        "dynamic_sampling 3, overlong_buffer 0.2, max_logp_gap 0.001\n" in said
    assert in_words(grpo_config("none", "", algo="reinforce_pp")) == \
        "reinforce_pp: baseline none, scale batch, gamma 1.0, lam 1.0, objective clip, clip_low 0.2, " \
        "clip_high 0.2, mean token, kl_coef 0.001, kl_in reward, kl_estimator k1"
    assert in_words(grpo_config("none", "", algo="maxrl", loss=dict(max_importance=2.0))) == \
        "maxrl: baseline group, scale mean, objective clip, clip_low 0.2, clip_high 0.2, mean constant, " \
        "max_importance 2.0, importance token, format_weight 0.0"
    assert recorded["dynamic_sampling"] == 3 and recorded["overlong_buffer"] == 0.2
    assert not [name for part in (recorded["loss"], recorded["advantage"]) for name, v in part.items()
                if v is None]


@pytest.mark.parametrize("changes, message", [
    (dict(algo="grop"), "--algo is 'grop', expected one of r1_zero, grpo"),
    (dict(algo="ppo", advantage=dict(scale="std")), "scale std with baseline critic"),
    (dict(advantage=dict(baseline="critic")), "scale std with baseline critic"),
    (dict(algo="ppo", loss=dict(objective="gspo")), "gspo with --advantage.baseline critic"),
    (dict(algo="reinforce_pp", loss=dict(objective="gspo")), "gspo with --advantage.baseline none"),
    (dict(loss=dict(kl_in="reward", kl_coef=0.1)), "--loss.kl-in reward with --advantage.scale std"),
    (dict(algo="maxrl", loss=dict(kl_in="reward", kl_coef=0.1)), "--advantage.scale mean: the KL can"),
    (dict(algo="gdpo", loss=dict(kl_in="reward", kl_coef=0.1)), "--advantage.scale parts: the KL is not one"),
    (dict(algo="maxrl", overlong_buffer=0.2), "--overlong-buffer 0.2 with --advantage.scale mean"),
    (dict(algo="maxrl", rewards=dict(efficiency_weight=0.1)), "--rewards.efficiency-weight 0.1 with"),
    (dict(algo="rloo", advantage=dict(scale="mean")), "scale mean with baseline leave_one_out; .* group"),
    (dict(algo="gdpo", advantage=dict(baseline="batch")), "scale parts with baseline batch; .* group"),
    (dict(algo="dppo", loss=dict(clip_high=1.5)), "clip_high is 1.5; expected above 0, and at most 1"),
    (dict(loss=dict(importance="answer")), "importance is 'answer', expected one of"),
    (dict(loss=dict(importance_mask=True)), r"importance_mask keeps .* 0 .* to 0 .* either side of 1"),
    (dict(loss=dict(importance_mask=True, max_importance=0.9)), "either side of 1"),
    (dict(loss=dict(importance_mask=True, max_importance=3.0, min_importance=1.1)), "either side of 1"),
    (dict(loss=dict(min_importance=0.5, max_importance=3.0)), "min_importance is 0.5 without"),
    (dict(dynamic_sampling=0), "--dynamic-sampling is 0"),
    (dict(overlong_buffer=1.5), "--overlong-buffer 1.5"),
    (dict(mistake="typo"), "--break is 'typo', expected one of k1_loss"),
])
def test_dials_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        grpo_config("none", "", **changes)
    grpo_config("none", "", algo="reinforce_pp", loss=dict(objective="gspo", kl_coef=0.0))  # no KL: one a
    # sequence, so this goes


@pytest.mark.parametrize("algo", [algo for algo in PRESETS if algo != "distill"])  # no reward teaches it
def test_every_preset_learns_the_bandit(algo, tmp_path):
    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), algo=algo, steps=25, prompts_per_step=8,
                    group_size=8, seed=1, save_every=1000, max_new_tokens=2, micro_tokens=2048,
                    overlong_buffer=0.0, updates_per_step=2)
    grpo(c)
    accuracy = [row["accuracy"] for row in read_metrics(c.run)]
    assert np.mean(accuracy[:3]) < 0.65 and np.mean(accuracy[-5:]) > 0.75, accuracy


# ---- the cut ----

CUTS = [  # (preset, changes): every kind of advantage, ratio, mean and KL
    ("plain", {}), ("r1_zero", {}), ("grpo", {}), ("gspo", {}), ("cispo", {}), ("dr_grpo", {}),
    ("reinforce", {}), ("rloo", {}), ("reinforce_pp", {}), ("ppo", {}), ("gdpo", {}), ("maxrl", {}),
    ("dppo", {}),
    ("dapo", dict(loss=dict(entropy_coef=0.1, max_importance=1.05, overlong_filter=True))),
    ("gspo", dict(loss=dict(max_importance=1.05))),
    ("grpo", dict(loss=dict(max_importance=1.15, importance="sequence", importance_mask=True,
                            min_importance=0.5))),
]


@pytest.mark.parametrize("algo, changes", CUTS)
def test_gradient_does_not_depend_on_micro_batches_or_their_order(algo, changes):
    expected = whole_update(algo, 10**6, **changes)
    assert all(float(g.abs().max()) > 0 for name, g in expected.items() if name.endswith("norm"))
    for micro_tokens, seed in ((1, 0), (1, 7), (25, 0), (25, 7)):  # a sample at a time, or some; two orders
        found = whole_update(algo, micro_tokens, seed=seed, **changes)
        assert_same_gradient(found, expected, 1e-6)


@pytest.mark.parametrize("algo", ["r1_zero", "grpo", "dr_grpo", "rloo", "ppo", "gdpo", "maxrl"])
def test_gradient_does_not_depend_on_the_order_of_groups(algo):
    assert_same_gradient(whole_update(algo, 25, order=[2, 0, 1]), whole_update(algo, 25), 1e-6)


def test_two_processes_with_one_denominator_have_the_gradient_of_one():
    """Over gloo: each process has some of the groups, and one of them none that teaches anything.

    With adapters, these alone have a gradient, which `Capture` checks."""
    done = subprocess.run([sys.executable, "-m", "tests.rl.family_cases"], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    found = rank_gradients(done.stdout)
    first, second = found.pop("gap")  # one that would leave alone would leave the other waiting
    assert first.endswith("more than --max-logp-gap 0.1") and second.endswith("0.1 on another process")
    assert found.keys() == {*SHARED}
    for algo, gradients in found.items():
        for rank in gradients:
            assert rank == pytest.approx(gradients[0], abs=0), algo  # both have the same, to the bit
        assert max(abs(x) for x in gradients[0]) > 0
        [expected] = rank_gradients(json.dumps({algo: [whole_update(algo, 25, sums=True)]}))[algo]
        assert gradients[0] == pytest.approx(expected, rel=1e-6, abs=1e-9), algo


# ---- pieces of the update ----

def test_answers_that_were_cut_off_are_left_out_of_loss_and_mean():
    model = tiny(dtype=torch.float64)
    rollouts = rollouts_by_hand(model)
    cut = dataclasses.replace(rollouts, finish_reasons=["stop", "length", "stop", "length", "stop", "stop"])
    weights = loss_weights(np.array([5, 0, 9, 0, 4, 6]), "token", 12)
    assert weights.tolist() == pytest.approx([1 / 24, 0, 1 / 24, 0, 1 / 24, 1 / 24])
    assert loss_weights(np.array([5, 0]), "sequence", 12).tolist() == [1 / 5, 0]
    assert loss_weights(np.array([5, 0]), "constant", 12).tolist() == [1 / 12, 0]
    advantages = np.array([1.5, -0.5, 1.0, -1.0, 0.5, 2.0])
    found = whole_update("plain", 25, rollouts=cut, advantages=advantages,
                         loss=dict(overlong_filter=True))
    # by hand: those two have advantage 0, and the mean is over 24 tokens and not over 28
    expected = whole_update("plain", 25, rollouts=rollouts, advantages=advantages * [1, 0, 1, 0, 1, 1])
    assert_same_gradient(found, {name: g * 28 / 24 for name, g in expected.items()}, 1e-6)


def test_soft_overlong_penalty_by_hand():
    found = overlong_penalty(np.array([1, 80, 81, 90, 100, 120]), 100, 0.2)
    np.testing.assert_allclose(found, [0, 0, -0.05, -0.5, -1, -1])
    assert not overlong_penalty(np.array([1, 100]), 100, 0.0).any()


def test_truncated_importance_weights_by_hand_and_in_the_gradient():
    old, sampler = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0])

    def weights(**options):
        found = importance_weights(old, sampler, torch.tensor([0, 2, 3]), LossConfig(**options))
        return found.tolist()

    assert weights(max_importance=1.2) == pytest.approx([1.2, np.exp(-1), 1.0])
    assert weights(max_importance=9.0, importance="sequence") == pytest.approx([np.exp(-0.5)] * 2 + [1.0])
    assert weights(max_importance=9.0, importance="geometric") == pytest.approx([np.exp(-0.25)] * 2 + [1.0])
    icepop = dict(max_importance=5.0, min_importance=0.5, importance_mask=True)
    assert weights(**icepop) == pytest.approx([np.exp(0.5), 0.0, 1.0])
    assert weights(**icepop | dict(max_importance=1.2)) == [0.0, 0.0, 1.0]
    old[0] = float("nan")  # it is not hidden by any bound
    assert np.isnan(weights(**icepop)[0]) and np.isnan(weights(max_importance=1.2)[0])
    model = tiny(dtype=torch.float64)
    rollouts = rollouts_by_hand(model)
    for logp in rollouts.sampler_logp:
        logp -= 0.5  # the sampler thought all of it e^0.5 times less likely
    plain = whole_update("plain", 25, rollouts=rollouts)
    for bound, factor in ((5.0, np.exp(0.5)), (1.25, 1.25), (0.0, 1.0)):
        found = whole_update("plain", 25, rollouts=rollouts, loss=dict(max_importance=bound))
        assert_same_gradient(found, {name: g * factor for name, g in plain.items()}, 1e-6)


def test_the_log_has_the_share_of_importance_weights_that_were_cut():
    model = tiny()
    rollouts = rollouts_by_hand(model)  # answers of 5, 3, 9, 1, 4 and 6 tokens
    rollouts.sampler_logp[0][:] -= 0.5
    rollouts.sampler_logp[4][:] += 0.5
    found = {}
    for name, options in {"none": {}, "cap": dict(max_importance=1.2),
                          "mask": dict(max_importance=1.2, min_importance=0.8, importance_mask=True)}.items():
        config = algorithm(loss=options, micro_tokens=25, max_logp_gap=1.0)
        learner = make_learner(config, model, Capture(model))
        found[name] = update_policy(learner, rollouts, per_token([1.0, -1] * 3, rollouts), config, 0)
    assert "importance_cut" not in found["none"]
    assert found["cap"]["importance_cut"] == pytest.approx(5 / 28)
    assert found["mask"]["importance_cut"] == pytest.approx(9 / 28)


def test_the_critics_loss_by_hand():
    values = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    old, returns = torch.tensor([0.0, 0.2, 0.5]), torch.tensor([1.0, 1.0, 1.0])
    loss = value_loss(values, old, returns, torch.full((3,), 1 / 3), clip=0.5)
    loss.backward()
    # errors 1, 0 and 1; kept within 0.5 of the old: 0, 0.7, 1.0, with errors 1, 0.09, 0
    assert float(loss.detach()) == pytest.approx((1 + 0.09 + 1) / 6)
    assert values.grad.tolist() == pytest.approx([-1 / 3, 0.0, 1 / 3])
    plain = value_loss(values.detach(), old, returns, torch.full((3,), 1 / 3), clip=0.0)
    assert float(plain) == pytest.approx(2 / 6)


def test_the_critic_sees_what_stands_before_each_token_and_learns_returns():
    rollouts = rollouts_by_hand(tiny())
    critic = ValueHead(tiny(seed=2))
    with torch.no_grad():
        critic.value.normal_(generator=torch.Generator().manual_seed(0))
    [batch] = micro_batches(rollouts, np.arange(6), 10**6, "cpu")
    values = critic(batch)
    for i, n in enumerate(batch.samples):  # the oracle: the answer cut off behind each token
        first = int(batch.response_offsets[i])
        for t in range(rollouts.response_lengths[n]):
            before = rollouts.sequences[n][: rollouts.prompt_lengths[n] + t + 1]
            short = dataclasses.replace(rollouts, sequences=[before],
                                        prompt_lengths=np.array([rollouts.prompt_lengths[n] + t]),
                                        sampler_logp=[np.zeros(1, np.float32)])
            [alone] = micro_batches(short, np.arange(1), 10**6, "cpu")
            assert float((values[first + t] - critic(alone)[0]).detach()) == pytest.approx(0, abs=1e-4)
    optim = OptimConfig(lr=1e-2, warmup=0, schedule="constant", weight_decay=0.0, clip_grad=1e9)
    config = algorithm("ppo", steps=100, value_clip=0.0, critic_optim=optim)
    learner = CriticLearner(critic, torch.optim.AdamW(critic.parameters(), lr=1e-2), config)
    returns = np.random.default_rng(0).normal(size=int(rollouts.response_offsets[-1]))
    for step in range(60):
        found = Advantages(returns, learner.values(rollouts), returns)
        metrics = learner.update(rollouts, found, step)
    assert metrics["value_explained"] > 0.8


def test_an_answer_of_no_token_takes_no_reward_and_gives_none():
    c = AdvantageConfig("critic", "none", 1.0, 1.0)
    found, returns = advantages(np.array([5.0, 1.0, 7.0]), np.array([0, 3]), np.array([0, 0, 2, 2]), c)
    assert found.tolist() == returns.tolist() == [1.0, 1.0]


def test_the_logged_loss_has_the_entropy_bonus():
    model, metrics = tiny(), {}
    rollouts = rollouts_by_hand(model)
    for coef in (0.0, 0.5):
        config = algorithm(loss=dict(entropy_coef=coef), micro_tokens=25, max_logp_gap=1.0)
        found = per_token([1.0, -1, 0, 1, -1, 0], rollouts)
        learner = make_learner(config, model, Capture(model))
        metrics[coef] = update_policy(learner, rollouts, found, config, 0)
    expected = metrics[0.0]["loss"] - 0.5 * metrics[0.5]["entropy"]
    assert metrics[0.5]["loss"] == pytest.approx(expected, rel=1e-5)


def test_merge_keeps_groups_whole():
    rollouts = rollouts_by_hand(tiny())
    found = merge([rollouts, rollouts], [np.array([0, 2]), np.array([1])])
    assert found.group_offsets.tolist() == [0, 2, 3, 6] and REWARDS.shape == (6,)
    expected = [0, 1, 5, 2, 3, 4]
    assert [s.tolist() for s in found.sequences] == [rollouts.sequences[n].tolist() for n in expected]
    assert found.prompt_lengths.tolist() == rollouts.prompt_lengths[expected].tolist()
    assert found.texts == [rollouts.texts[n] for n in expected]
