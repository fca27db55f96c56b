"""Rollouts into groups and micro-batches, and the gradient of a whole update."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from r1zero.model.engine.engine import Engine
from r1zero.model.engine.sampling import sample_seeds
from r1zero.model.optimizer import OptimConfig, make_optimizer
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.rl.advantages import group_advantages
from r1zero.rl.losses import loss_weights, policy_loss
from r1zero.rl.rollouts import micro_batch, micro_batches, response_logprobs, sample_groups
from r1zero.rl.update import Reference, kl_to_reference, update_policy

from .cases import (
    Capture,
    algorithm,
    assert_same_gradient,
    make_learner,
    naive_logp,
    per_token,
    rollouts_by_hand,
    tiny,
)

STILL = OptimConfig(lr=1.0, warmup=0, schedule="constant", clip_grad=1e9)  # nothing is clipped
ADVANTAGES = np.array([1.5, -0.5, 0.0, 0.0, 0.0, 2.0])  # of the six samples of rollouts_by_hand


# ---- rollouts ----

def test_equal_prompts_stay_two_groups():
    tokenizer = Tokenizer.bytes()
    rollouts = sample_groups(Engine(tiny(), tokenizer), ["abc", "d", "abc"], 3, 4, 1.0, sample_seeds(9, 0))
    assert rollouts.group_offsets.tolist() == [0, 3, 6, 9]
    assert rollouts.prompt_lengths.tolist() == [3] * 3 + [1] * 3 + [3] * 3
    assert [s[:p].tolist() for s, p in zip(rollouts.sequences, rollouts.prompt_lengths, strict=True)] == \
        [[97, 98, 99]] * 3 + [[100]] * 3 + [[97, 98, 99]] * 3
    assert len(set(rollouts.texts)) > 3  # samples of equal prompts differ
    rewards = np.array([0, 0, 1, 0, 0, 0, 1, 1, 0.0])
    found = group_advantages(rewards, rollouts.group_offsets)
    np.testing.assert_allclose(found[:3], (rewards[:3] - 1 / 3) / np.sqrt(2 / 9))  # not the mean of all six


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_trainer_and_sampler_agree_on_every_log_prob_at_the_sampling_temperature(temperature):
    model, tokenizer = tiny(seed=3), Tokenizer.bytes()
    prompts = ["7", "what is it?", "ab"]
    rollouts = sample_groups(Engine(model, tokenizer), prompts, 8, 40, temperature, sample_seeds(24, 5))
    assert {"stop", "length"} == set(rollouts.finish_reasons)
    worst, wrong_temperature = 0.0, 0.0
    for batch in micro_batches(rollouts, np.arange(24), 200, "cpu"):
        with torch.no_grad():
            logp, _ = response_logprobs(model, batch, rollouts.temperature)
            other, _ = response_logprobs(model, batch, temperature + 0.3)
        worst = max(worst, float((logp - batch.sampler_logp).abs().max()))
        wrong_temperature = max(wrong_temperature, float((other - batch.sampler_logp).abs().max()))
    assert worst < 1e-4 < 0.1 < wrong_temperature


def test_micro_batches_hold_each_response_token_once_the_end_token_too():
    rollouts, eos = rollouts_by_hand(tiny()), Tokenizer.bytes().eos_id
    seen = []
    for batch in micro_batches(rollouts, np.array([5, 2, 0, 1, 4]), 12, "cpu"):
        assert len(batch.packed.tokens) <= 12 or len(batch.samples) == 1
        for i, n in enumerate(batch.samples):
            mine = slice(*batch.response_offsets[i : i + 2].tolist())
            response = rollouts.sequences[n][rollouts.prompt_lengths[n]:]
            assert batch.targets[mine].tolist() == response.tolist() and response[-1] == eos
            start = int(batch.packed.cu_seqlens[i]) + int(rollouts.prompt_lengths[n])
            assert batch.predictors[mine].tolist() == list(range(start - 1, start - 1 + len(response)))
            assert batch.sampler_logp[mine].tolist() == rollouts.sampler_logp[n].tolist()
            seen.append(int(n))
    assert sorted(seen) == [0, 1, 2, 4, 5]


def test_a_micro_batch_is_laid_out_on_the_host_and_nothing_is_read_back():
    """A device that holds no numbers has none to give."""
    rollouts = rollouts_by_hand(tiny(), (5, 3, 9, 1), (0, 2, 4))
    for samples in (np.array([0, 2]), np.array([3, 1, 0, 2])):  # with prompts to share, and without
        there, here = (vars(micro_batch(rollouts, samples, device)) for device in ("meta", "cpu"))
        for found, expected in ((there, here), (vars(there.pop("packed")), vars(here.pop("packed")))):
            for name, x in found.items():
                if isinstance(x, torch.Tensor):
                    assert x.is_meta and (x.shape, x.dtype) == (expected[name].shape, expected[name].dtype)
                else:
                    assert x == expected[name]


def test_a_prompt_of_several_samples_is_computed_once():
    model = tiny(seed=3, dtype=torch.float64)
    lengths, group_offsets = (5, 3, 9, 1, 4, 6, 2, 2), (0, 3, 5, 8)
    rollouts = rollouts_by_hand(model, lengths, group_offsets, seed=18)
    assert sorted(set(rollouts.prompt_lengths.tolist())) == [1, 3, 4]
    for samples in [[6, 0, 3, 2, 4, 7], [4, 3], [0, 5, 7]]:
        batch = micro_batch(rollouts, np.array(samples), "cpu")
        prompts = {rollouts.sequences[n][: rollouts.prompt_lengths[n]].tobytes() for n in samples}
        n_prompt_tokens = sum(len(p) // 8 - 1 for p in prompts)
        assert len(batch.packed.tokens) == n_prompt_tokens + rollouts.response_lengths[samples].sum()
        found = response_logprobs(model, batch, 0.7)
        oracle = [naive_logp(model, rollouts.sequences[n], rollouts.prompt_lengths[n], 0.7) for n in samples]
        for mine, naive in zip(found, zip(*oracle, strict=True), strict=True):
            torch.testing.assert_close(mine, torch.cat(naive), rtol=1e-9, atol=1e-9)
    assert micro_batch(rollouts, np.array([0, 3, 6]), "cpu").packed.keys is None  # nothing to share


# ---- the whole update ----

def update(learner, rollouts, advantages_N, config, step: int = 0) -> dict:
    return update_policy(learner, rollouts, per_token(advantages_N, rollouts), config, step)


def test_an_answer_with_a_token_that_is_padding_of_the_head_is_refused():
    rollouts = rollouts_by_hand(tiny())  # their last token is the highest id
    padded = Transformer(dataclasses.replace(tiny().config, vocab_in_use=257)).init_weights(0)
    config = algorithm(optim=STILL)
    learner = make_learner(config, padded, Capture(padded))
    with pytest.raises(ValueError, match="token id 257 .*from 0 to 256"):
        update(learner, rollouts, ADVANTAGES, config)


def update_once(model, rollouts, advantages, reference=None, **changes):
    """(the gradient of each optimizer step, what is logged) of update_policy."""
    optimizer = Capture(model)
    config = algorithm(**{"optim": STILL, "micro_tokens": 10**6, "max_new_tokens": 12, **changes})
    metrics = update(make_learner(config, model, optimizer, reference), rollouts, advantages, config)
    return optimizer.grads, metrics


def plain_gradient(model, rollouts, advantages, mean="token", kl_coef=0.0, reference=None) -> dict:
    """The oracle: every sample by itself through all logits, none left out; on-policy, so the ratio is 1."""
    weights, total = loss_weights(rollouts.response_lengths, mean, 12), 0.0
    for n, sequence in enumerate(rollouts.sequences):
        logp, _ = naive_logp(model, sequence, int(rollouts.prompt_lengths[n]), rollouts.temperature)
        total = total - weights[n] * advantages[n] * (logp - logp.detach()).exp().sum()
        if kl_coef:
            with torch.no_grad():
                prompt = int(rollouts.prompt_lengths[n])
                ref, _ = naive_logp(reference, sequence, prompt, rollouts.temperature)
            total = total + kl_coef * weights[n] * ((ref - logp).exp() - (ref - logp) - 1).sum()
    grads = torch.autograd.grad(total, list(model.parameters()))
    return dict(zip([name for name, _ in model.named_parameters()], grads, strict=True))


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_gradient_does_not_depend_on_the_cut_and_equals_the_oracle(mean, kl_coef):
    model, reference = tiny(dtype=torch.float64), tiny(seed=9, dtype=torch.float64)
    rollouts = rollouts_by_hand(model, temperature=0.8)
    expected = plain_gradient(model, rollouts, ADVANTAGES, mean, kl_coef, reference)
    for micro_tokens in [1, 15, 10**6]:  # a sample at a time, several, all
        [found], metrics = update_once(model, rollouts, ADVANTAGES, reference, micro_tokens=micro_tokens,
                                  loss=dict(mean=mean, kl_coef=kl_coef))
        assert_same_gradient(found, expected, 1e-6)
        assert metrics["trained_samples"] == (6 if kl_coef else 3)  # those with advantage 0 are left out


def test_gradient_does_not_depend_on_the_order_of_samples_or_groups():
    model = tiny(dtype=torch.float64)
    rollouts = rollouts_by_hand(model)
    [expected], _ = update_once(model, rollouts, ADVANTAGES)
    order = [5, 4, 2, 3, 1, 0]  # groups the other way round, and samples within them
    turned = dataclasses.replace(rollouts)
    for name in ("sequences", "sampler_logp", "texts"):
        object.__setattr__(turned, name, [getattr(rollouts, name)[n] for n in order])
    object.__setattr__(turned, "prompt_lengths", rollouts.prompt_lengths[order])
    object.__setattr__(turned, "group_offsets", np.array([0, 1, 4, 6]))
    for seed in [0, 1]:
        [found], _ = update_once(model, turned, ADVANTAGES[order], micro_tokens=20, seed=seed)
        assert_same_gradient(found, expected, 1e-6)


def test_training_on_a_stopped_answer_makes_the_end_token_likelier():
    model, eos = tiny(), Tokenizer.bytes().eos_id
    rollouts = rollouts_by_hand(model, lengths=(4, 4), group_offsets=(0, 2))
    config = algorithm(optim=STILL)
    prompt = int(rollouts.prompt_lengths[0])
    before = naive_logp(model, rollouts.sequences[0], prompt, 1.0)[0][-1].item()
    assert rollouts.sequences[0][-1] == eos
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update(make_learner(config, model, optimizer), rollouts, np.array([1.0, 0.0]), config)
    after = naive_logp(model, rollouts.sequences[0], prompt, 1.0)[0][-1].item()
    assert after > before + 0.05


def test_with_two_updates_the_old_policy_is_the_one_before_the_first():
    model = tiny()
    rollouts = rollouts_by_hand(model)
    advantages = np.array([1.5, -0.5, 1.0, -1.0, 0.5, 2.0])
    expected = {n: naive_logp(model, s, int(rollouts.prompt_lengths[n]), 1.0)[0].detach()
                for n, s in enumerate(rollouts.sequences)}
    calls = []

    def spy(logp, old_logp, ref_logp, advantages, *rest):
        calls.append((logp.detach().clone(), old_logp.clone(), float(advantages[0])))
        return policy_loss(logp, old_logp, ref_logp, advantages, *rest)

    config = algorithm(optim=STILL, updates_per_step=2, micro_tokens=1, max_logp_gap=100.0)
    learner = make_learner(config, model, torch.optim.SGD(model.parameters(), lr=1.0))
    learner.policy_loss = spy
    update(learner, rollouts, advantages, config)
    seen = [advantages.tolist().index(a) for _, _, a in calls]  # each sample has its own advantage
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]
    for n, (_, old, _) in zip(seen, calls, strict=True):
        assert torch.allclose(old, expected[n], atol=1e-5)
    first, second = ([call[:2] for call in part] for part in (calls[:3], calls[3:]))
    assert all(torch.allclose(logp, old, atol=1e-6) for logp, old in first)
    assert max(float((logp - old).abs().max()) for logp, old in second) > 0.01  # the policy has moved on


def test_two_updates_share_the_samples_out_with_the_weight_of_a_whole_batch():
    model = tiny(dtype=torch.float64)
    rollouts = rollouts_by_hand(model)
    advantages = np.array([1.5, -0.5, 1.0, -1.0, 0.5, 2.0])
    [whole], one = update_once(model, rollouts, advantages)
    halves, two = update_once(model, rollouts, advantages, updates_per_step=2)
    assert len(halves) == 2
    assert_same_gradient({name: (halves[0][name] + halves[1][name]) / 2 for name in whole}, whole, 1e-6)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)  # logged on the same scale
    updates, _ = update_once(model, rollouts, ADVANTAGES, updates_per_step=5)
    assert len(updates) == 3  # three samples have something to teach, so two shares are empty


def test_logged_entropy_is_the_distributions_and_loss_and_gap_are_true():
    model = tiny()
    rollouts = rollouts_by_hand(model, temperature=0.7)
    _, metrics = update_once(model, rollouts, ADVANTAGES, micro_tokens=12)
    live = [naive_logp(model, rollouts.sequences[n], int(rollouts.prompt_lengths[n]), 0.7) for n in (0, 1, 5)]
    entropy = torch.cat([e for _, e in live]).mean().item()
    minus_logp = -torch.cat([logp for logp, _ in live]).mean().item()
    assert metrics["entropy"] == pytest.approx(entropy, abs=1e-4) and abs(entropy - minus_logp) > 0.1
    weights = loss_weights(rollouts.response_lengths, "token", 12)
    loss = -(weights * ADVANTAGES * rollouts.response_lengths).sum()
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert 0 <= metrics["logp_gap"] < 1e-4 and metrics["gradient_norm"] > 0
    rollouts.sampler_logp[1][0] -= 0.5  # a sampler that disagrees with the trainer in one token
    metrics = update_once(model, rollouts, ADVANTAGES, max_logp_gap=0.6)[1]
    assert metrics["logp_gap"] == pytest.approx(0.5, abs=1e-4)
    live_tokens = rollouts.response_lengths[[0, 1, 5]].sum()
    assert metrics["logp_gap_mean"] == pytest.approx(0.5 / live_tokens, abs=1e-4)
    for limit in ({}, {"max_logp_gap": 0.4}):  # before anything is updated
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(FloatingPointError, match="0.5 from the trainer's own, more than --max-logp-gap"):
            update_once(model, rollouts, ADVANTAGES, **limit)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    rollouts.sampler_logp[1][0] = float("nan")
    with pytest.raises(FloatingPointError, match="nan from the trainer's own"):
        update_once(model, rollouts, ADVANTAGES, max_logp_gap=100.0)


def test_kl_in_the_loss_pulls_towards_the_reference_and_without_it_nothing_moves():
    rollouts = rollouts_by_hand(tiny())
    distance = {}
    for kl_coef in [0.0, 0.1]:
        model, reference = tiny(), tiny(seed=1)
        optim = OptimConfig(lr=3e-3, warmup=0, schedule="constant", weight_decay=0.0)
        config = algorithm(loss=dict(kl_coef=kl_coef), kl_samples=6, max_logp_gap=100.0, optim=optim)
        learner = make_learner(config, model, make_optimizer(model, config.optim), reference)
        for step in range(10):
            update(learner, rollouts, np.zeros(6), config, step)
        with torch.no_grad():
            gaps = [naive_logp(model, s, int(p), 1.0)[0] - naive_logp(reference, s, int(p), 1.0)[0]
                    for s, p in zip(rollouts.sequences, rollouts.prompt_lengths, strict=True)]
        distance[kl_coef] = float(torch.cat(gaps).square().mean())
    assert distance[0.1] < 0.5 * distance[0.0]


def test_kl_to_the_base_is_logged_over_the_asked_samples():
    model, other = tiny(), tiny(seed=1)
    rollouts = rollouts_by_hand(model)
    c = SimpleNamespace(kl_samples=100, micro_tokens=20, seed=0)
    same, another = (Reference(reference, "cpu") for reference in (tiny(), other))
    assert kl_to_reference(same, rollouts, c, 0)["kl_to_reference"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        d = torch.cat([naive_logp(other, s, int(p), 1.0)[0] - torch.from_numpy(mine) for s, p, mine in
                       zip(rollouts.sequences, rollouts.prompt_lengths, rollouts.sampler_logp, strict=True)])
    expected = float((d.exp() - d - 1).mean())
    assert kl_to_reference(another, rollouts, c, 0)["kl_to_reference"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1
    c.kl_samples = 0
    another.in_use = None  # it is not even brought to the device
    assert kl_to_reference(another, rollouts, c, 0) == {}
