"""The mistakes that can be made on purpose: each does what it says, no more, and stays out of the core."""
import ast
import copy
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from r1zero.eval.tasks.base import Grade
from r1zero.rl.advantages import advantages
from r1zero.rl.family import PRESETS, Algorithm
from r1zero.rl.losses import loss_weights, policy_loss
from r1zero.rl.update import update_policy
from r1zero.train.grpo import grpo
from r1zero.train.lab import compare as compare_module
from r1zero.train.lab.mistakes import MISTAKES
from r1zero.train.log import read_metrics

from ...rl.cases import (
    Bandit,
    Capture,
    algorithm,
    assert_same_gradient,
    loss_config,
    make_learner,
    rollouts_by_hand,
    tiny,
)
from ...rl.family_cases import STILL
from ..loop_cases import grpo_config, save_base

ROOT = Path(__file__).parents[3]
OFFSETS = torch.tensor([0, 3, 3, 8], dtype=torch.int32)  # answers of 3, 0 and 5 tokens
GROUPS = np.array([0, 2, 5, 6])  # of 2, 3 and 1
REWARDS = np.array([1.2, 0.2, 0.0, 1.0, 1.0, 0.7])


def tokens(n: int = 8, seed: int = 0) -> torch.Tensor:
    return -torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.1


def gradient(piece, logp, old_logp, ref_logp, a, c, weights=(0.1, 0.2, 0.3), offsets=OFFSETS):
    """(d loss / d logp, loss, metrics) of a loss; a and weights: per answer, or per token."""
    logp = logp.detach().clone().requires_grad_()
    a, weights = (torch.as_tensor(x, dtype=torch.float64) for x in (a, weights))
    a, weights = (x if len(x) == len(logp) else x.repeat_interleave(offsets.diff()) for x in (a, weights))
    loss, metrics = piece(logp, old_logp, ref_logp, a, weights, offsets, c)
    loss.backward()
    return logp.grad, float(loss.detach()), metrics


def broken(name: str):
    """The wrong function."""
    return MISTAKES[name].wrong


# ---- the loss ----

@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_flipped_clip_keeps_the_gradient_beyond_the_bound_and_drops_it_on_the_way_back(kl_coef):
    """With A > 0: at ratio 1.5 the right one is done, and the broken one pulls on; at 0.5 the reverse."""
    ratios, c = torch.tensor([0.5, 1.5, 1.0, 0.5, 1.5, 0.9, 1.1, 1.0]).double(), loss_config(kl_coef=kl_coef)
    old, ref, w, a = tokens(), tokens(seed=1), np.repeat([0.1, 0.3], [3, 5]), np.repeat([1.0, -2.0], [3, 5])
    logp = old + ratios.log()
    right, right_loss, _ = gradient(policy_loss, logp, old, ref, [1.0, 9.0, -2.0], c)
    wrong, wrong_loss, metrics = gradient(broken("flipped_clip"), logp, old, ref, [1.0, 9.0, -2.0], c)
    price = torch.from_numpy(w) * kl_coef * (1 - (ref - logp).exp())  # the KL's part, the same in both
    whole = torch.from_numpy(-w * a) * ratios
    torch.testing.assert_close(right - price, whole * torch.tensor([1, 0, 1, 0, 1, 1, 1, 1]))
    torch.testing.assert_close(wrong - price, whole * torch.tensor([0, 1, 1, 1, 0, 1, 1, 1]))
    chosen = torch.maximum(ratios * torch.from_numpy(a), ratios.clamp(0.8, 1.2) * torch.from_numpy(a))
    d = ref - logp
    kl = float((torch.from_numpy(w) * (d.exp() - d - 1)).sum())
    assert wrong_loss == pytest.approx(kl_coef * kl - float((torch.from_numpy(w) * chosen).sum()))
    assert float(metrics[0]) == pytest.approx(wrong_loss) and wrong_loss < right_loss
    assert float(metrics[-1]) == pytest.approx(kl if kl_coef else 0.0)


@pytest.mark.parametrize("a", [[1.0, 9.0, -2.0], np.linspace(-1, 1, 8)])
@pytest.mark.parametrize("algo", ["r1_zero", "grpo", "cispo", "reinforce"])
def test_no_end_token_gives_exactly_nothing_to_the_last_token_and_the_same_to_the_others(a, algo):
    logp, old, ref, c = tokens(), tokens() + 0.05, tokens(seed=1), loss_config(algo)
    right, right_loss, _ = gradient(policy_loss, logp, old, ref, a, c)
    wrong, wrong_loss, _ = gradient(broken("no_end_token"), logp, old, ref, a, c)
    last = [2, 7]  # the empty answer between them has none
    assert (wrong[last] == 0).all() and (right[last] != 0).all() and wrong_loss == right_loss
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(wrong[others], right[others])


def mean_gradient(piece, logits, ref_logits, c):
    """The loss piece's mean gradient to the logits of one token's distribution, over all that could be drawn
    on-policy: each token an answer of its own, its weight its probability."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(0)
    n = len(logits)
    loss, _ = piece(logp, logp.detach(), ref_logits.log_softmax(0), torch.zeros(n).double(),
                    logp.detach().exp(), torch.arange(n + 1, dtype=torch.int32), c)
    return torch.autograd.grad(loss, logits)[0]


def test_k1_teaches_nothing_on_average_and_a_flipped_k3_prices_another_distance():
    logits, ref_logits = (torch.randn(5, generator=torch.Generator().manual_seed(n)).double() for n in (0, 1))
    c, x = loss_config(kl_coef=0.5), logits.clone().requires_grad_()
    p, r = x.softmax(0), ref_logits.softmax(0)
    forward_kl = torch.autograd.grad(0.5 * (r * (r / p).log()).sum(), x, retain_graph=True)[0]
    chi_square = torch.autograd.grad(0.5 * (p * p / r).sum() / 2, x)[0]
    torch.testing.assert_close(mean_gradient(policy_loss, logits, ref_logits, c), forward_kl)
    k1 = mean_gradient(broken("k1_loss"), logits, ref_logits, c)
    assert float(k1.abs().max()) < 1e-15 < 1e-2 < float(forward_kl.abs().max())
    flipped = mean_gradient(broken("flipped_k3"), logits, ref_logits, c)
    torch.testing.assert_close(flipped, chi_square)
    near = logits + 1e-4 * ref_logits  # to first order it is the same
    torch.testing.assert_close(mean_gradient(broken("flipped_k3"), logits, near, c),
                               mean_gradient(policy_loss, logits, near, c), rtol=1e-2, atol=1e-9)


def test_flipped_k3_logs_its_own_loss_and_is_right_without_a_reference():
    logp, ref, a, c = tokens(), tokens(seed=1), [1.0, 9.0, -2.0], loss_config(kl_coef=0.5)
    wrong = broken("flipped_k3")
    found, loss, metrics = gradient(wrong, logp, logp, ref, a, c)
    d, w = logp - ref, torch.tensor([0.1] * 3 + [0.3] * 5).double()
    kl = float((w * (d.exp() - d - 1)).sum())
    alone = gradient(policy_loss, logp, logp, None, a, c)
    assert loss == pytest.approx(alone[1] + 0.5 * kl) == float(metrics[0]) and float(metrics[-1]) == \
        pytest.approx(kl)
    torch.testing.assert_close(found - alone[0], 0.5 * w * (d.exp() - 1))
    assert torch.equal(gradient(wrong, logp, logp, None, a, c)[0], alone[0])


def update(micro_tokens: int, mistake: str | None = None, **changes) -> dict:
    """The gradient of a whole update on rollouts by hand."""
    model = tiny(dtype=torch.float64)
    optimizer, rollouts = Capture(model), rollouts_by_hand(model)
    config = algorithm(optim=STILL, micro_tokens=micro_tokens, max_new_tokens=12, **changes)
    learner = make_learner(config, model, optimizer, copy.deepcopy(model))
    if mistake:
        MISTAKES[mistake].make(learner)
    found = learner.credit(SimpleNamespace(training=REWARDS), rollouts)
    update_policy(learner, rollouts, found, config, 0)
    return optimizer.grads[0]


def differ(found: dict, expected: dict) -> bool:
    try:
        assert_same_gradient(found, expected, 1e-3)
    except AssertionError:
        return True
    return False


def test_the_mean_of_a_micro_batch_depends_on_the_cut_and_the_right_one_does_not():
    assert not differ(update(15), update(10**6))
    assert differ(update(15, "micro_batch_mean"), update(10**6, "micro_batch_mean"))
    logp, c = tokens(5), loss_config()
    found, _, _ = gradient(broken("micro_batch_mean"), logp, logp, None, [1.0, 1.0], c, (1 / 28, 0.0),
                           torch.tensor([0, 3, 5], dtype=torch.int32))
    assert found.tolist() == pytest.approx([-0.2] * 3 + [0.0] * 2)  # of five tokens, those with a weight


# ---- the weights ----

def test_length_bias_lets_a_long_answer_weigh_as_much_as_a_short_one():
    lengths = np.array([2, 0, 8])
    right, wrong = (piece(lengths, "token", 12) for piece in (loss_weights, broken("length_bias")))
    assert right.tolist() == pytest.approx([0.1, 0, 0.1])
    assert wrong.tolist() == pytest.approx([1 / 4, 0, 1 / 16])
    assert (wrong * lengths).tolist() == pytest.approx([0.5, 0, 0.5])


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_a_sum_grows_with_the_batch_and_a_mean_does_not(mean):
    lengths, piece = np.array([2, 0, 8, 5]), broken("sum_of_groups")
    for weights, growth in ((loss_weights, 1), (piece, 3)):
        once, thrice = (weights(np.tile(lengths, n), mean, 12).sum() for n in (1, 3))
        total = [(weights(np.tile(lengths, n), mean, 12) * np.tile(lengths, n)).sum() for n in (1, 3)]
        assert total[1] == pytest.approx(growth * total[0]) and thrice == pytest.approx(growth * once)
    assert piece(lengths, mean, 12) == pytest.approx(4 * loss_weights(lengths, mean, 12))


# ---- the advantages ----

def advantages_of(name: str | None, rewards, groups=GROUPS, algo: str = "r1_zero"):
    """Answers of one token each, so that per answer and per token are the same."""
    c, n = algorithm(algo), len(rewards)
    compare = broken(name) if name else advantages
    per_token = np.linspace(-0.1, 0.1, n)
    return compare(rewards, groups, np.arange(n + 1), c.advantage, per_token if c.kl_in_reward else None,
                   per_token if algo == "ppo" else None)


def test_rewards_that_differ_by_rounding_become_advantages_of_one():
    rewards = np.array([1.0, 1, 1, 1, 0, 1, 0, 0])
    rewards[:4] = [0.1 * 3, 0.3, 0.3, 0.1 * 3]
    groups = np.array([0, 4, 8])
    right, wrong = (advantages_of(name, rewards, groups)[0] for name in (None, "unguarded_std"))
    assert (right[:4] == 0).all() and wrong[:4].std() == pytest.approx(1) and abs(wrong[:4]).min() > 0.05
    assert wrong[4:] == pytest.approx(right[4:], abs=1e-6)
    assert np.isfinite(advantages_of("unguarded_std", REWARDS)[0]).all()  # a group of one


def test_without_a_baseline_what_earns_anything_is_made_likelier():
    assert advantages_of("no_baseline", REWARDS)[0].tolist() == REWARDS.tolist()
    assert advantages_of(None, REWARDS)[0].tolist()[:2] == pytest.approx([1, -1])


@pytest.mark.parametrize("algo, std", [("r1_zero", 0.4), ("dr_grpo", 1.0)])
def test_an_easy_problem_is_praised_and_a_hard_one_punished(algo, std):
    easy_hard = np.array([1.0, 1, 0, 0, 0, 0.8, 0])  # groups of 2, 3 and 2; the last has a spread of 0.4
    found = advantages_of("wrong_group", easy_hard, np.array([0, 2, 5, 7]), algo)[0]
    assert found == pytest.approx([0.6 / std, 0.6 / std, -1, -1, -1, 0.8, 0.0])
    assert (advantages_of(None, easy_hard, np.array([0, 2, 5, 7]), algo)[0][:5] == 0).all()


# ---- all of them ----

@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_wrong_piece_and_its_flags_exist(name):
    learner = make_learner(algorithm(), tiny(), None)
    right = {"advantages": advantages, "loss_weights": loss_weights, "policy_loss": policy_loss}
    MISTAKES[name].make(learner)
    now = {"advantages": learner.credit.advantages, "loss_weights": learner.loss_weights,
           "policy_loss": learner.policy_loss}
    assert [part for part in right if now[part] is not right[part]] == [MISTAKES[name].replaces]
    c = Algorithm()
    for option, value in MISTAKES[name].shows_with.items():
        assert compare_module.with_option(c, option, value) != c


@pytest.mark.parametrize("algo", PRESETS)
@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("lengths, groups", [
    ((3, 0, 5, 1, 2, 4), (0, 2, 5, 6)), ((4,), (0, 1)), ((1,), (0, 1)), ((0, 0), (0, 2)),
    ((1, 1), (0, 1, 2))])
def test_no_shape_crashes_a_mistake(name, algo, lengths, groups):
    """Groups of different sizes, empty answers, a single one; with an advantage a token too."""
    c, n, size = algorithm(algo), len(lengths), sum(lengths)
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    learner, logp = make_learner(algorithm(), tiny(), None), tokens(size).requires_grad_()
    MISTAKES[name].make(learner)
    if c.per_token and 0 in lengths:
        return  # a reward at the last token needs one
    a, returns = learner.credit.advantages(REWARDS[:n], np.array(groups), offsets.numpy(), c.advantage,
                                           np.zeros(size) if c.kl_in_reward else None,
                                           np.zeros(size) if algo == "ppo" else None)
    assert (returns is not None) == (algo == "ppo")
    weights = learner.loss_weights(np.array(lengths), c.loss.mean, 12)
    assert len(a) == size and len(weights) == n
    loss, metrics = learner.policy_loss(logp, logp.detach() + 0.1, logp.detach() - 0.2, torch.from_numpy(a),
                                        torch.from_numpy(np.repeat(weights, lengths)), offsets, c.loss)
    loss.backward()
    assert torch.isfinite(logp.grad).all() and torch.isfinite(metrics).all() and torch.isfinite(loss)


def test_the_help_of_compare_names_every_mistake():
    [config] = [node for node in ast.parse(inspect.getsource(compare_module)).body
                if isinstance(node, ast.ClassDef) and node.name == "CompareConfig"]
    names = [ast.unparse(getattr(node, "target", ast.Constant(""))) for node in config.body]
    text = config.body[names.index("mistake") + 1].value.value
    _, _, listed = text.partition(":")
    assert set(re.findall(r"\w+", listed)) - {"or"} == set(MISTAKES)


def test_the_core_knows_no_mistake():
    for path in [*ROOT.glob("rl/*.py"), ROOT / "train/grpo.py"]:
        tree = ast.parse(path.read_text())
        words = {getattr(node, "value", None) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        words |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not words & set(MISTAKES), path


class Short(Bandit):
    """Nothing is right, so that only length counts."""

    def grade(self, problem, response):
        return Grade(0.0, response, "")


@pytest.mark.parametrize("mistake", [None, "no_end_token"])
def test_who_masks_the_end_token_learns_late_to_stop(mistake, tmp_path):
    """From random weights, which stop once in 258 tokens; each token costs a little reward. The broken run
    learns it only by what is taken from all other tokens."""
    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), task=Short(), mistake=mistake, steps=16,
                    prompts_per_step=8, group_size=16, max_new_tokens=16, overlong_buffer=1.0, save_every=99,
                    micro_tokens=4096)
    grpo(c)
    lengths = [row["length"] for row in read_metrics(c.run)]
    assert lengths[0] > 15 and (lengths[-1] > 12 if mistake else lengths[-1] < 4)


def test_grpo_prints_a_banner_that_says_what_is_broken_and_what_it_takes_to_see_it(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    grpo(grpo_config(tmp_path / "run", base, steps=1, mistake="flipped_clip"))
    banner = capsys.readouterr().err
    for words in ("--break flipped_clip", MISTAKES["flipped_clip"].what, "shows with --updates-per-step 8"):
        assert banner.count(words) == 1
    grpo(grpo_config(tmp_path / "fine", base, steps=1))
    assert "BROKEN" not in capsys.readouterr().err
    grpo(grpo_config(tmp_path / "k1", base, steps=1, mistake="k1_loss"))
    assert "shows with --loss.kl-coef 1" in capsys.readouterr().err
